"""Any layout computes what one rank computes: losses, gradients, parameters, what is logged.

The runs themselves are in ``layouts.py``: one launch per number of ranks does all its cases.
"""

from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from layouts import BY_NAME, CASES, ROWS
from places import SUPPORT
from ranks import forked, output_of
from tiny_runs import SHAPE, moma, tiny_config, token_choice
from torch.torch_version import TorchVersion
from toy import make_data

from earlyfuse.configs import decoders, embedded
from earlyfuse.parallel.plan import check_parallelism

TOLERANCE = 1e-5
EQUAL = ("loss", "grad_norm", "z_loss", "output_norm", "unigram_entropy", "router", "task")
EQUAL += ("tokens", "flops", "lr", "skipped_steps", "causal", "causal_loss", "causal_task")
PROGRAM = SUPPORT / "layouts.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(ranks, case) → what ``layouts.py`` wrote; each number of ranks is launched once."""
    folder = tmp_path_factory.mktemp("layouts")
    data = make_data(folder / "data")
    make_seed(folder / "seed", data)
    launched: set[int] = set()

    def result(ranks: int, name: str) -> dict:
        out = folder / str(ranks)
        if ranks not in launched:
            launched.add(ranks)
            output_of(forked(ranks, PROGRAM, str(out), str(data)))
        return torch.load(out / f"{name}.pt")

    return result


def make_seed(folder: Path, data: Path) -> None:
    """A run of moe_1t1i, out of which others grow."""
    config = tiny_config(folder, data, decoders.moe_1t1i(SHAPE), steps=3)
    config.training.global_batch_size = config.validator.batch_rows = ROWS
    config.validator.enable = config.metrics.enable_tensorboard = False
    trainer = config.build()
    trainer.train()
    trainer.close()


def cases() -> list:
    no_pipeline = pytest.mark.skip("torchtitan 0.3's pipeline schedules need torch 2.14")
    slow = [pytest.mark.slow]
    return [
        pytest.param(ranks, name, marks=slow * (ranks > 2) + ([] if case.runs else [no_pipeline]))
        for ranks in (2, 4)
        for name, case in CASES[ranks].items()
    ]


@pytest.mark.parametrize(("ranks", "name"), cases())
def test_a_layout_computes_what_one_rank_computes(results, ranks, name):
    case = CASES[ranks][name]
    expected = results(1, case.model + "-apart" * case.apart + "-stage2" * case.stage2)
    found = results(ranks, name)
    # key biases have what cancellation leaves, which AdamW scales up: measured by a hundredth of
    # the whole norm, and their values by a thousandth
    assert relative_errors(found, expected, "gradients", 1e-2, above=TOLERANCE) == {}
    assert relative_errors(found, expected, "parameters", 1e-3, above=TOLERANCE) == {}
    for line, wanted in zip(found["metrics"], expected["metrics"], strict=True):
        for key in (key for key in wanted if key.split("/")[0] in EQUAL):
            assert line[key] == pytest.approx(wanted[key], rel=TOLERANCE, abs=1e-7), key


def relative_errors(
    found: dict, expected: dict, kind: str, floor: float, above: float
) -> dict[str, float]:
    """Names and errors that are too large, relative to a tensor's norm or ``floor`` of them all."""
    assert found[kind].keys() == expected[kind].keys()
    whole = sum(float(value.square().sum()) for value in expected[kind].values()) ** 0.5
    errors = {
        name: float((found[kind][name] - value).norm() / value.norm().clamp_min(floor * whole))
        for name, value in expected[kind].items()
    }
    return {name: error for name, error in errors.items() if not error <= above}


def test_ranks_without_a_modality_are_among_the_cases(results):
    """That the cases test what they claim: all rows are text or image, in equal parts."""
    for line in results(1, "moma-apart")["metrics"]:
        if line["kind"] == "train":
            assert line["tokens/text"] == line["tokens/image"]


def test_rows_of_one_modality_travel_while_the_other_computes(results):
    """Both pools' rows are on their way before the first is waited for, there and back."""
    events = results(2, "moma-ep")["events"]
    changes = [event for event, _ in groupby(events)]
    layer = ["send", *("compute", "wait", "send"), *("compute", "wait", "send"), "wait"]
    assert changes == layer * len(moma().layers)
    assert events[:2] == ["send", "send"]


def refusal(ranks: int, model, **degrees: int) -> str:
    config = embedded.dense()
    for name, degree in degrees.items():
        setattr(config.parallelism, f"{name}_degree", degree)
    with pytest.raises(ValueError) as error:
        check_parallelism(config.parallelism, config.training, model, ranks)
    return str(error.value)


def test_layouts_that_cannot_work_are_refused_by_name():
    tensor, expert = {"tensor_parallel": 2}, {"expert_parallel": 2}
    dense = decoders.dense(SHAPE)
    assert "must make up the 1 ranks" in refusal(1, dense, **tensor)
    assert "must make up the 6 ranks" in refusal(6, dense, data_parallel_replicate=4)
    assert "no routed experts" in refusal(2, dense, **expert)
    assert "must be 1 together with tensor" in refusal(4, moma(), **tensor, **expert)
    assert "must divide the 3 ranks" in refusal(3, moma(), **expert)
    message = refusal(4, moma(), expert_parallel=4)
    assert "must divide the 2 text experts" in message
    message = refusal(4, dense, tensor_parallel=4)
    assert "must divide layers[0].attention.heads (2)" in message


def test_rows_that_cannot_be_cut_are_refused_by_name(monkeypatch):
    context = {"context_parallel": 2}
    dense = decoders.dense(SHAPE)
    assert "must make up the 3 ranks" in refusal(3, dense, **context)
    assert "experts that choose among all tokens" in refusal(2, moma(), **context)
    for other in ("tensor", "expert", "pipeline"):
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.1"))
        degrees = context | {f"{other}_parallel": 2}
        assert f"{other}_parallel_degree (2)" in refusal(4, token_choice(), **degrees)
    message = refusal(3, dense, context_parallel=3)
    assert "context_parallel_degree (3) must cut training.seq_len (" in message
    assert "multiple of 6" in message


def pipeline_refusal(monkeypatch, model, version="2.14.1", rows=4, size=2, **fields) -> str:
    """What is said of ``rows`` a rank in parts of ``size``, in a pipeline of two ranks."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    config = embedded.dense()
    config.training.local_batch_size = rows
    config.parallelism.pipeline_parallel_degree = 2
    config.parallelism.pipeline_parallel_microbatch_size = size
    for name, value in fields.items():
        setattr(config.parallelism, name, value)
    with pytest.raises(ValueError, match=r"^parallelism\.") as error:
        check_parallelism(config.parallelism, config.training, model, ranks=2)
    return str(error.value)


def test_pipelines_that_cannot_work_are_refused_by_name(monkeypatch):
    refused = partial(pipeline_refusal, monkeypatch)
    dense, interleaved = decoders.dense(SHAPE), {"pipeline_parallel_schedule": "Interleaved1F1B"}
    assert "need torch 2.14" in refused(dense, version="2.13.0+cpu")
    assert "(ZBVZeroBubble) must be one of 1F1B" in refused(
        dense, pipeline_parallel_schedule="ZBVZeroBubble"
    )
    assert "each must have one of the 2 layers" in refused(dense, **interleaved)
    assert "they get [0, 2]" in refused(dense, pipeline_parallel_first_stage_less_layers=3)
    assert "module_fqns_per_model_part" in refused(dense, module_fqns_per_model_part=[["norm"]])
    assert "(always) must be default" in refused(dense, fsdp_reshard_after_forward="always")
    assert "microbatch_size (3) must divide training.local_batch_size (4)" in refused(dense, size=3)
    assert "microbatch_size (0) must divide" in refused(dense, size=0)
    assert "multiple of routing_rows (2)" in refused(moma(), size=1)
    assert "makes 1 micro-batches" in refused(dense, rows=2)
    deep = decoders.dense(replace(SHAPE, layers=6))
    assert "equal rounds" in refused(deep, rows=10, **interleaved)
    message = refused(dense, data_parallel_shard_degree=2)
    assert "x pipeline_parallel_degree (2) x" in message and "make up the 2 ranks" in message


def test_what_works_is_not_refused():
    for ranks, cases in CASES.items():
        for case in filter(attrgetter("runs"), cases.values()):
            config = case.config(Path("run"), Path("data"), ranks)
            model = BY_NAME[case.model]()
            check_parallelism(config.parallelism, config.training, model, ranks)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_cpu_offload_without_a_gpu_is_refused():
    config = embedded.dense()
    config.training.enable_cpu_offload = True
    with pytest.raises(ValueError, match=r"enable_cpu_offload .* must be False without a GPU"):
        check_parallelism(config.parallelism, config.training, decoders.dense(SHAPE), ranks=1)
