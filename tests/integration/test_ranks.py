"""Every layout equals one rank: losses, gradients, parameters and logged metrics.

The runs are in ``layouts.py``.
"""

import re
from dataclasses import replace
from functools import cache, partial
from itertools import groupby, product
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from layouts import BY_NAME, CASES, FAST, ROWS, Case
from places import SUPPORT
from ranks import forked, output_of
from tiny_runs import SHAPE, VECTORS, changed, moma, run, tiny_config, token_choice
from torch.torch_version import TorchVersion
from toy import VECTOR_VOCABULARY, make_data

from earlyfuse.configs import decoders, embedded
from earlyfuse.parallel.plan import check_parallelism

TOLERANCE = 1e-5
EQUAL = (
    "loss",
    "diffusion_loss",
    "causal_diffusion_loss",
    "grad_norm",
    "z_loss",
    "output_norm",
    "unigram_entropy",
    "router",
    "task",
)
EQUAL += ("depth", "tokens", "flops", "lr", "skipped_steps", "causal", "causal_loss", "causal_task")
EQUAL += ("tokens_by_source", "epochs_by_source", "threshold", "threshold_loss", "threshold_task")
# exact budgets pad all rows of a micro-batch to the longest
PADDED = re.compile(r"depth/.*/filled")
PROGRAM = SUPPORT / "layouts.py"
AT_ONCE = 10  # cases of one process: gloo's groups are only given back with it
NO_PIPELINE = pytest.mark.skip("torchtitan 0.3's pipeline schedules need torch 2.14")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(ranks, case) → what ``layouts.py`` wrote; each number of ranks is launched once for the fast
    cases, once for the slow ones.
    """
    folder = tmp_path_factory.mktemp("layouts")
    data = make_data(folder / "data")
    make_data(folder / "vectors", vocabulary=VECTOR_VOCABULARY)
    # a run of moe_1t1i, from which others are upcycled
    parent = tiny_config(folder / "seed", data, decoders.moe_1t1i(SHAPE), steps=3)
    parent.training.global_batch_size = parent.validator.batch_rows = ROWS
    parent.validator.enable = parent.metrics.enable_tensorboard = False
    run(parent)

    @cache
    def launch(ranks: int, fast: bool) -> Path:
        out = folder / str(ranks)
        cases = [case for case in CASES[ranks] if (case in FAST[ranks]) == fast]
        names = [case.name for case in cases if case.runs]
        parts = [names[first : first + AT_ONCE] for first in range(0, len(names), AT_ONCE)]
        arguments = [word for part in parts for word in (";", str(out), str(data), *part)]
        output_of(forked(ranks, PROGRAM, *arguments))
        return out

    def read(ranks: int, name: str) -> dict:
        return torch.load(launch(ranks, Case(name) in FAST[ranks]) / f"{name}.pt")

    return read


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(
            ranks,
            case,
            marks=[pytest.mark.slow] * (case not in FAST[ranks]) + [NO_PIPELINE] * (not case.runs),
            id=f"{ranks}-{case.name}",
        )
        for ranks in (2, 4)
        for case in CASES[ranks]
    ],
)
def test_a_layout_computes_what_one_rank_computes(results, ranks, case):
    expected, found = results(1, case.one_rank), results(ranks, case.name)
    # key biases have what cancellation leaves, which AdamW scales up: measured by a hundredth of
    # the whole norm, and their values by a thousandth
    for kind, floor in (("gradients", 1e-2), ("parameters", 1e-3)):
        assert found[kind].keys() == expected[kind].keys()
        whole = sum(float(value.square().sum()) for value in expected[kind].values()) ** 0.5
        errors = {
            name: float((found[kind][name] - value).norm() / value.norm().clamp_min(floor * whole))
            for name, value in expected[kind].items()
        }
        assert {n: error for n, error in errors.items() if not error <= TOLERANCE} == {}
    for line, wanted in zip(found["metrics"], expected["metrics"], strict=True):
        wanted = {key: value for key, value in wanted.items() if key.split("/")[0] in EQUAL}
        for key in (key for key in wanted if not PADDED.fullmatch(key)):
            assert line[key] == pytest.approx(wanted[key], rel=TOLERANCE, abs=1e-7), key


def test_each_layout_is_run_with_each_other_word():
    words = [case.words for case in CASES[2]]
    for layout, other in product(("tp", "ep", "cp"), ("apart", "accumulated", "full", "selective")):
        assert any({layout, other} <= case for case in words), (layout, other)
    parts = {"mamba", "tf_mixture_of_mamba"}  # of mixture_of_mamba and tf_hybrid
    covered = {case.model for ranks in (2, 4) for case in CASES[ranks]}
    assert covered >= BY_NAME.keys() - parts
    assert {case.model for case in FAST[2]} >= BY_NAME.keys() - parts - VECTORS.keys()


def test_ranks_without_a_modality_are_among_the_cases(results):
    """The "apart" cases are what they claim: half of the rows is text, half image."""
    for line in results(1, "moma-apart")["metrics"]:
        if line["kind"] == "train":
            assert line["tokens/text"] == line["tokens/image"]


def test_rows_of_one_modality_travel_while_the_other_computes(results):
    """Both pools' all-to-alls are issued before the first is waited for, both ways."""
    events = results(2, "moma-ep")["events"]
    layer = ["send", *("compute", "wait", "send"), *("compute", "wait", "send"), "wait"]
    assert [event for event, _ in groupby(events)] == layer * len(moma().layers)
    assert events[:2] == ["send", "send"]


# ---------------------------------------------------------------- refusals

DENSE, DEEP = decoders.dense(SHAPE), decoders.dense(replace(SHAPE, layers=6))


def refusal(ranks: int, model, rows: int = 4, **fields) -> str:
    """The error for ``rows`` per rank with these ``parallelism`` fields; tensor=2 is a degree."""
    config = embedded.dense()
    config.training.local_batch_size = rows
    config.parallelism.pipeline_parallel_microbatch_size = fields.pop("size", 2)
    for name, value in fields.items():
        short = name in ("tensor", "expert", "context", "pipeline")
        setattr(config.parallelism, f"{name}_parallel_degree" if short else name, value)
    with pytest.raises(ValueError, match=r"^(parallelism|training)\.") as error:
        check_parallelism(config.parallelism, config.training, model, ranks)
    return str(error.value)


def test_layouts_that_cannot_work_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.1"))
    assert "must make up the 1 ranks" in refusal(1, DENSE, tensor=2)
    assert "must make up the 6 ranks" in refusal(6, DENSE, data_parallel_replicate_degree=4)
    assert "no routed experts" in refusal(2, DENSE, expert=2)
    assert "must be 1 together with tensor" in refusal(4, moma(), tensor=2, expert=2)
    assert "must divide the 3 ranks" in refusal(3, moma(), expert=2)
    assert "layers[0].feed_forward.text.experts (2)" in refusal(4, moma(), expert=4)
    assert "must divide layers[0].attention.heads (2)" in refusal(4, DENSE, tensor=4)
    assert "must make up the 3 ranks" in refusal(3, DENSE, context=2)
    assert "experts that choose among all tokens" in refusal(2, moma(), context=2)
    message = refusal(2, BY_NAME["tf_dense"](), context=2)
    assert "context_parallel_degree (2) must be 1: vectors: an image may be on two" in message
    for other in ("tensor", "expert", "pipeline"):
        message = refusal(4, token_choice(), context=2, **{other: 2})
        assert f"{other}_parallel_degree (2)" in message
    message = refusal(3, DENSE, context=3)
    assert "context_parallel_degree (3) must split training.seq_len (" in message
    assert "multiple of 6" in message


def test_pipelines_that_cannot_work_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.1"))
    refused = partial(refusal, 2, pipeline=2)
    schedule, less = "pipeline_parallel_schedule", "pipeline_parallel_first_stage_less_layers"
    interleaved = {schedule: "Interleaved1F1B"}
    assert "(ZBVZeroBubble) must be one of 1F1B" in refused(DENSE, **{schedule: "ZBVZeroBubble"})
    assert "must have one of the 2 layers" in refused(DENSE, **interleaved)
    assert "they get [0, 2]" in refused(DENSE, **{less: 3})
    assert "(always) must be default" in refused(DENSE, fsdp_reshard_after_forward="always")
    assert "microbatch_size (3) must divide training.local_batch_size (4)" in refused(DENSE, size=3)
    assert "microbatch_size (0) must divide" in refused(DENSE, size=0)
    assert "multiple of routing_rows (2)" in refused(moma(), size=1)
    assert "must be 1 with a U-Net as vectors.adapter" in refused(BY_NAME["tf_unet"]())
    assert "makes 1 micro-batches" in refused(DENSE, rows=2)
    assert "equal rounds" in refused(DEEP, rows=10, **interleaved)
    message = refused(DENSE, data_parallel_shard_degree=2)
    assert "x pipeline_parallel_degree (2) x" in message and "make up the 2 ranks" in message


def test_what_this_machine_lacks_is_refused_and_what_works_is_not(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cpu"))
    for field, value, rule in (
        ("parallelism.pipeline_parallel_degree", 2, "need torch 2.14"),
        ("training.enable_cpu_offload", True, r"must be False without a GPU"),
    ):
        config = changed(embedded.dense(), {field: value})
        with pytest.raises(ValueError, match=rf"{field} .*{rule}"):
            check_parallelism(config.parallelism, config.training, DENSE, 2)
    for ranks, cases in CASES.items():
        for case in filter(attrgetter("runs"), cases):
            config = case.config(Path("run"), Path("data"), ranks)
            check_parallelism(config.parallelism, config.training, BY_NAME[case.model](), ranks)
