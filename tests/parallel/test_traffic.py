"""Closed-form estimates against counted values: bytes, collectives, memory, step time, dry run."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import traffic_ranks
from batches import batch_of, context_of
from ranks import forked, output_of
from tiny_runs import (
    MAMBAS,
    MODELS,
    SHAPE,
    THRESHOLDS,
    changed,
    moma,
    tiny_config,
    token_choice,
)
from torchtitan.distributed import ParallelDims
from toy import VECTOR_VOCABULARY, make_data
from traffic_ranks import LAYOUTS

from earlyfuse.configs import decoders
from earlyfuse.configs.registry import catalogue
from earlyfuse.models.blocks.branch import Microbatch
from earlyfuse.models.flops import count_parameters
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.precision import fp32_modules
from earlyfuse.models.routes import by_modality
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.expert_choice import expert_choice
from earlyfuse.parallel.estimates import dry_run
from earlyfuse.parallel.estimates.communication import Traffic, step_traffic, total
from earlyfuse.parallel.estimates.memory import kept_by_head, rank_memory
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.tools.doctor import Cluster, main, step_time

# counts of tokens and labels, loss sums, gradient norm: whatever the model
SCALAR_CALLS, SCALAR_BYTES = 4, 256


@pytest.fixture(scope="module")
def counted_on_ranks(tmp_path_factory):
    """(ranks, layout) → what each rank counted in one step; a number of ranks is launched once."""
    folder = tmp_path_factory.mktemp("traffic")
    make_data(folder / "data")
    make_data(folder / "vectors", vocabulary=VECTOR_VOCABULARY)

    @cache
    def launched(ranks):
        out = folder / str(ranks)
        out.mkdir()
        for name in ("data", "vectors"):
            (out / name).symlink_to(folder / name)
        output_of(forked(ranks, Path(traffic_ranks.__file__), str(out), *LAYOUTS[ranks]))
        return [json.loads((out / f"counted-{rank}.json").read_text()) for rank in range(ranks)]

    return lambda ranks, layout: [counted[layout] for counted in launched(ranks)]


@pytest.mark.parametrize(
    ("ranks", "layout"), [(ranks, name) for ranks, names in LAYOUTS.items() for name in names]
)
def test_collectives_shards_and_parts_in_flight_are_as_predicted(counted_on_ranks, ranks, layout):
    """With token choice, experts get and return as many rows as predicted on average over ranks."""
    uneven = layout.startswith("token choice, experts")
    rows = {"seen": Counter(), "expected": Counter()}  # (calls, bytes)
    for rank in counted_on_ranks(ranks, layout):
        calls = {key: Counter({tuple(c): n for c, n in rank[key]}) for key in rows}
        for key, counter in calls.items():
            for call in [c for c in counter if uneven and c[0] == "all_to_all"]:
                number = counter.pop(call)
                rows[key] += Counter(calls=number, bytes=number * call[2])
        expected, others = calls["expected"], calls["seen"] - calls["expected"]
        assert expected and expected - calls["seen"] == Counter()
        assert all(kind == "all_reduce" and size <= SCALAR_BYTES for kind, _, size in others)
        assert others.total() <= SCALAR_CALLS
        assert rank["held"] == rank["predicted"], "elements of shards"
        assert rank["in_flight"] == rank["in_flight_predicted"], "parts in a pipeline"
    assert rows["seen"] == rows["expected"] and bool(rows["seen"]) == uneven


def test_static_routing_reads_no_value_on_the_host():
    # tensors of the meta device have no values: whoever asks for one fails
    logits_TE = torch.randn(64, 4, device="meta", requires_grad=True)
    eligible_T = torch.zeros(64, dtype=torch.bool, device="meta")
    by_modality(eligible_T.long(), 2)
    routes = expert_choice(logits_TE, eligible_T, 2, budget=5, capacity_factor=1.0)
    routes.weight_R.sum().backward()
    with pytest.raises(NotImplementedError):  # as the exact rule does
        expert_choice(logits_TE, eligible_T, 2, budget=None, capacity_factor=1.0)


@pytest.fixture
def run(tmp_path):
    fields = {"mixed_precision_param": "bfloat16", "global_batch_size": -1, "seq_len": 4096}
    fields = {f"training.{name}": value for name, value in fields.items()}
    return changed(tiny_config(tmp_path, tmp_path), fields)


def step_of(config, model, ranks, **degrees):
    parallelism = replace(config.parallelism, **degrees)
    dims = ParallelDims.from_config(parallelism, ranks)
    return Step(model, dims, config.training, parallelism, None)


def preset(name="moma_1_4b_moe_4t4i"):
    return catalogue()[name]().model_spec.model


@pytest.mark.parametrize("name", ["moma_1_4b_moe_4t4i", "mot_7b_moe_4x"])
def test_fsdp_receives_eight_bytes_per_parameter(run, name):
    model = preset(name)
    head = model.vocab_size * model.dim  # stays gathered: no second gather
    for ranks in (8, 64, 1024):
        expected = (8 * count_parameters(model).total - 2 * head) * (ranks - 1) / ranks
        # padding is 0.2 % at most
        assert total(step_traffic(step_of(run, model, ranks))) == pytest.approx(expected, rel=3e-3)


def test_rows_of_experts_travel_four_times_whatever_the_number_of_experts(run):
    model = preset()
    sent = step_traffic(step_of(run, model, 64, expert_parallel_degree=4))
    tokens = run.training.local_batch_size * run.training.seq_len
    (rows,) = [one for one in sent if one.kind == "all_to_all"]
    assert rows.received == 4 * len(model.layers) * tokens * model.dim * 2 * 3 / 4


def test_what_scans_send_does_not_grow_with_rows_but_keys_and_values_do(run):
    run.training.local_batch_size = 8

    def sent(model, seq_len):
        run.training.seq_len = seq_len
        traffic = step_traffic(step_of(run, model, 8, context_parallel_degree=8))
        return sum(one.size for one in traffic if one.axis == "cp")

    mamba, dense = MAMBAS["mixture_of_mamba"](), decoders.dense(SHAPE)
    assert sent(mamba, 4096) == sent(mamba, 1 << 20) > 0
    assert sent(dense, 8192) == 2 * sent(dense, 4096) > 0


@pytest.mark.parametrize(("name", "most"), [("dense", 0.4), ("mamba", 0.26)])
def test_activations_are_divided_among_the_ranks_of_a_row(run, name, most):
    model = (MODELS | MAMBAS)[name]()
    alone, four = (
        rank_memory(step_of(run, model, degree, context_parallel_degree=degree)).activations
        for degree in (1, 4)
    )
    # keys and values of other ranks' positions, in two of about forty tensors, come on top
    assert 0.25 <= four / alone < most


def test_gloo_pays_twice_for_reduce_scatter_alone():
    sent = [Traffic("", kind, "fsdp", 4, 1, 100) for kind in ("reduce_scatter", "all_gather")]
    assert [one.received_on_gloo / one.received for one in sent] == [2, 1]


def test_traffic_hides_behind_compute_only_as_far_as_there_is_compute(run):
    step = step_of(run, preset(), 64)
    sent = step_traffic(step)
    cluster = Cluster(gpus_per_node=8, nvlink=1e11, network=1e10, flops=1e14, overlap=0.8)
    for flops in (1e10, 1e12, 1e14, 1e16):
        time = step_time(sent, step.dims, flops, cluster)
        assert time.step >= max(time.compute, time.fsdp)
        assert time.step >= (time.compute + 0.2 * time.fsdp) * (1 - 1e-9)
        assert time.step <= time.compute + time.fsdp
    alone = step_time(sent, step.dims, 1e14, replace(cluster, nvlink=1e30, network=1e30))
    assert alone.step == pytest.approx(alone.compute)
    slow = replace(cluster, network=1e9)
    inside = step_of(run, preset(), 8)  # a node more makes the network count
    inside = step_time(step_traffic(inside), inside.dims, 1e14, slow)
    assert step_time(sent, step.dims, 1e14, slow).fsdp > 2 * inside.fsdp


def test_the_doctor_prints_a_row_per_number_of_gpus_and_says_it_is_a_model(capsys):
    traffic = ["traffic", "moma_1_4b_moe_4t4i", "--gpus", "8"]
    assert main([*traffic, "64", "--local-batch-size", "8"]) == 0
    text = capsys.readouterr().out
    rows = [line.split()[1] for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["8", "64"] and "A model, not a measurement" in text
    assert main([*traffic, "--expert", "3"]) == 2
    assert "expert_parallel_degree (3)" in capsys.readouterr().err
    assert main(["traffic", "mot_7b_mot", "--gpus", "8", "--context", "4"]) == 0
    header = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| GPUs"))
    assert "keys and values" in header


# ---------------------------------------------------------------- memory


def kept_by_autograd(compute, *others) -> int:
    """Bytes of storages that autograd keeps of ``compute()``, without those of ``others``."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert compute().requires_grad
    for tensor in others:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def drawn(block):
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block


@pytest.mark.parametrize("order", ["pre", "swin"])
@pytest.mark.parametrize("name", [*MODELS, "moma_threshold"])
def test_the_estimate_of_activations_is_what_autograd_keeps(name, order):
    config = (MODELS | THRESHOLDS)[name]().layers[0]
    config.norm_order = order
    block = drawn(config.build())
    modality_BS = torch.zeros(2, 64, dtype=torch.uint8)
    modality_BS[:, 16:48] = 1
    context = context_of(modality_BS, torch.arange(64).expand(2, -1), (0, 1), 16, 10_000.0)
    x_TD = torch.randn(128, SHAPE.dim, requires_grad=True)
    shared = (context.cos_BS1H, context.sin_BS1H, *block.parameters())
    kept = kept_by_autograd(lambda: block(x_TD, context), *shared)
    assert 4 * 128 * config.saved(Microbatch(2, 64)) == pytest.approx(kept, rel=0.1)


WIDE = replace(SHAPE, dim=128, hidden_dim=192)  # what a router keeps by the token is little then
MIXTURES = {
    "moma": lambda: moma(WIDE, shared=decoders.Shared(everyone=1, by_modality=1)),
    "token_choice": lambda: token_choice(WIDE),
    "causal": lambda: decoders.with_routers(moma(WIDE), causal=CausalRouter.Config()),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_what_a_mixture_keeps_in_bf16_is_predicted(name):
    config = MIXTURES[name]().layers[0]
    block = config.build().bfloat16()
    for module in fp32_modules(block):
        module.float()
    drawn(block)
    modality_BS = torch.arange(1024).view(2, 512).remainder(2).to(torch.uint8)
    context = context_of(modality_BS, torch.arange(512).expand(2, -1), (0, 1), 0, 10_000.0)
    x_TD = torch.randn(1024, WIDE.dim, dtype=torch.bfloat16, requires_grad=True)
    kept = kept_by_autograd(lambda: block.feed_forward(x_TD, context), x_TD, *block.parameters())
    predicted = config.feed_forward.saved(Microbatch(2, 512, itemsize=2))
    assert 2 * 1024 * predicted == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_head_keeps_is_predicted(dtype):
    tokens, words, dim = 24, 40, 6
    x, w = (torch.randn(n, dim, dtype=dtype, requires_grad=True) for n in (tokens, words))
    labels = torch.arange(tokens)
    batch = batch_of(labels[None], labels_BS=labels[None], label_modality_BS=labels[None] % 2)
    loss = ChameleonObjective.Config().build().loss_of(batch)
    assert kept_by_autograd(lambda: loss(x, w).total) == kept_by_head(tokens, words, dim, dtype)


@pytest.mark.parametrize("vocab_size", [1 << 16, 1 << 18])
def test_memory_of_the_head_does_not_grow_with_tokens_but_by_their_gradients(run, vocab_size):
    model = decoders.dense(replace(SHAPE, vocab_size=vocab_size))

    def head(rows):
        run.training.local_batch_size = rows
        return rank_memory(step_of(run, model, 1)).head

    gradients = 8 * run.training.seq_len * model.dim * 2
    assert head(16) - head(8) == pytest.approx(gradients, rel=0.01)


# ---------------------------------------------------------------- dry run


def test_a_dry_run_writes_nothing_and_needs_no_data(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path / "data")
    page = dry_run.describe("tiny", changed(config, {"training.global_batch_size": -1}), ranks=8)
    assert "data does not have text, pairs yet: prepare them first" in page
    assert f"{count_parameters(config.model_spec.model).total / 1e3:.4g} k parameters" in page
    assert list(tmp_path.iterdir()) == []
    assert not torch.distributed.is_initialized()


def test_a_dry_run_tells_how_often_data_are_read_and_refuses_what_a_start_would(tmp_path, data):
    fields = {"training.global_batch_size": -1, "training.steps": 1000, "validator.batch_rows": 16}
    page = dry_run.describe("tiny", changed(tiny_config(tmp_path, data), fields), ranks=8)
    assert f"takes {1000 * 8 * 2 * 32 / 1e3:.4g} k tokens in 16 lanes" in page
    assert "300 documents" in page and "epochs" in page
    config = changed(tiny_config(tmp_path, data), {"parallelism.tensor_parallel_degree": 3})
    with pytest.raises(ValueError, match="tensor_parallel_degree"):
        dry_run.describe("tiny", config, ranks=8)
    config = changed(tiny_config(tmp_path, data), {"data.shares": {"films": 1.0}})
    with pytest.raises(ValueError, match=r"data.shares names \['films'\]"):
        dry_run.describe("tiny", config, ranks=1)
