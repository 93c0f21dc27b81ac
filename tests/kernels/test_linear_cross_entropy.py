"""Head and loss without logits in memory: chunked = whole = shards of the vocabulary."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_equal, rms_ratio
from torch.utils.flop_counter import FlopCounterMode

from earlyfuse.kernels.linear_cross_entropy import (
    VocabularyShard,
    chunked,
    linear_cross_entropy,
    torch_impl,
)

pytest.importorskip("triton")
triton_impl = pytest.importorskip("earlyfuse.kernels.linear_cross_entropy.triton_impl")

MODALITIES = 3
Z_WEIGHT = 0.02


def problem(tokens, vocabulary, width, dtype=torch.float32, scale=1.0):
    """x, w, labels (some ignored) and their modalities (no token has the last one)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(DEVICE, dtype).requires_grad_()

    x, w = normal(tokens, width), normal(vocabulary, width)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    modality = torch.randint(MODALITIES - 1, (tokens,), generator=generator, dtype=torch.uint8)
    labels[1::4] = -100
    modality[1::4] = 77  # means nothing where nothing counts
    return x, w, labels.to(DEVICE), modality.to(DEVICE)


def sums_and_gradients(x, w, labels, modality, backend, z_weight=Z_WEIGHT, **options):
    """total, nll_M, z_M, and the gradients of total / 7."""
    sums = linear_cross_entropy(
        x,
        w,
        labels,
        modality,
        modalities=MODALITIES,
        z_weight=z_weight,
        backend=backend,
        **options,
    )
    return [*(s.detach() for s in sums), *torch.autograd.grad(sums.total / 7, [x, w])]


@torch.no_grad()
def sums_alone(x, w, labels, modality, backend, **options):
    """total, nll_M, z_M, as validation has them."""
    options |= {"modalities": MODALITIES, "z_weight": Z_WEIGHT, "backend": backend}
    return linear_cross_entropy(x, w, labels, modality, **options)


@pytest.fixture
def small_chunks(monkeypatch):
    """Three tokens of 1500 words, two of them together in cache; two blocks of a row."""
    monkeypatch.setattr(torch_impl, "PIECE", 2 * 1500)
    monkeypatch.setattr(triton_impl, "BLOCK", 1024)
    monkeypatch.setattr(chunked, "CPU_BYTES", 3 * 1500 * 4)
    monkeypatch.setattr(chunked, "GPU_BYTES", 3 * 1500 * 4)


CASES = {  # (tokens, vocabulary, width), dtype, bound
    "chunks of unequal size": ((7, 1500, 5), torch.float32, 1e-5),
    "bf16": ((7, 1500, 5), torch.bfloat16, 1e-2),
    "a vocabulary below one block": ((6, 17, 3), torch.float32, 1e-5),
    "one token": ((1, 5, 4), torch.float32, 1e-5),
    "no tokens": ((0, 5, 4), torch.float32, 1e-5),
    "sizes of models": ((5000, 65544, 64), torch.float32, 1e-5),
    "sizes of models in bf16": ((5000, 65544, 64), torch.bfloat16, 1e-2),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("nan_filled_memory", "small_chunks")
def test_chunks_equal_the_reference(backend, name):
    sizes, dtype, bound = CASES[name]
    if sizes[0] == 5000 and DEVICE == "cpu":
        pytest.skip("the interpreter would take minutes")
    inputs = problem(*sizes, dtype)
    expected = sums_and_gradients(*inputs, "reference")
    assert_equal(sums_and_gradients(*inputs, backend), expected, bound)
    assert_equal(sums_alone(*inputs, backend), expected[:3], bound)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_sums_are_those_of_torch_by_modality(backend):
    x, w, labels, modality = problem(12, 40, 6)
    sums = linear_cross_entropy(
        x, w, labels, modality, modalities=MODALITIES, z_weight=Z_WEIGHT, backend=backend
    )
    logits = F.linear(x, w)
    for m in range(MODALITIES):
        mine = (modality == m) & (labels != -100)
        nll = F.cross_entropy(logits[mine], labels[mine], reduction="sum")
        z = logits[mine].logsumexp(1).square().sum()
        assert rms_ratio(sums.nll_M[m].detach(), nll.detach()) <= 1e-6
        assert rms_ratio(sums.z_M[m].detach(), z.detach()) <= 1e-6
    whole = sums.nll_M.sum() + Z_WEIGHT * sums.z_M.sum()
    assert rms_ratio(sums.total.detach(), whole) <= 1e-6
    assert not sums.nll_M.requires_grad and not sums.z_M.requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_of_any_size_neither_overflow_nor_vanish(backend):
    x, w, labels, modality = problem(5, 30, 4, scale=40.0)  # logits beyond ±3000
    expected = sums_and_gradients(x, w, labels, modality, "reference")
    for have, want in zip(
        sums_and_gradients(x, w, labels, modality, backend), expected, strict=True
    ):
        assert have.isfinite().all() and rms_ratio(have, want) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_that_do_not_count_get_no_gradient_and_give_none(backend):
    x, w, labels, modality = problem(8, 20, 3)
    dx, dw = sums_and_gradients(x, w, labels, modality, backend)[3:]
    assert dx[1::4].count_nonzero() == 0
    counted = labels != -100
    kept = x[counted].detach().requires_grad_()
    alone = sums_and_gradients(kept, w, labels[counted], modality[counted], backend)
    assert rms_ratio(dx[counted], alone[3]) <= 1e-6
    assert rms_ratio(dw, alone[4]) <= 1e-6


@pytest.mark.parametrize("implementation", [torch_impl, triton_impl])
def test_beside_other_shards_too_large_logits_that_do_not_count_get_no_gradient(implementation):
    logits = torch.tensor([[200.0, -200.0, 150.0], [2.0, 1.0, 0.0]]).repeat(2, 1).to(DEVICE)
    expected = logits.log_softmax(1).exp()
    expected[[0, 3]] = 0
    expected[1, 2] -= 1  # row 2: its label is in another shard
    rows = torch.tensor([chunked.UNCOUNTED, 2, chunked.ELSEWHERE, chunked.UNCOUNTED]).to(DEVICE)
    _, log_z = implementation._turn(logits, rows, 0.0, lambda statistics: statistics, True)
    assert rms_ratio(logits, expected) <= 1e-6
    assert not log_z[[0, 3]].any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.usefixtures("small_chunks")
def test_gradients_are_the_slopes_of_the_total(backend):
    x, w, labels, modality = problem(5, 6, 3, torch.float64)

    def total(x, w):
        options = {"modalities": MODALITIES, "z_weight": Z_WEIGHT, "backend": backend}
        return linear_cross_entropy(x, w, labels, modality, **options).total * 1.5

    assert torch.autograd.gradcheck(total, (x, w))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.usefixtures("small_chunks")
def test_weights_of_tokens_scale_their_part_of_the_total_alone(backend):
    x, w, labels, modality = problem(7, 1500, 5)
    weight = torch.tensor([1.0, 5, 0, 2, 0.5, 3, 1], device=DEVICE)
    total, nll, z, dx, dw = sums_and_gradients(x, w, labels, modality, backend, weight_T=weight)
    logits = F.linear(x, w)
    of_token = F.cross_entropy(logits, labels, reduction="none")
    of_token = of_token + Z_WEIGHT * (labels != -100) * logits.logsumexp(1).square()
    expected = (of_token * weight).sum()
    assert rms_ratio(total, expected.detach()) <= 1e-6
    for found, wanted in zip((dx, dw), torch.autograd.grad(expected / 7, [x, w]), strict=True):
        assert rms_ratio(found, wanted) <= 1e-5
    plain = sums_and_gradients(x, w, labels, modality, backend)
    assert torch.equal(nll, plain[1]) and torch.equal(z, plain[2])
    ones = sums_and_gradients(x, w, labels, modality, backend, weight_T=torch.ones_like(weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, ones, strict=True))
    with pytest.raises(ValueError, match=r"weight_T \(6,\) must have the shape \(7\)"):
        sums_and_gradients(x, w, labels, modality, backend, weight_T=weight[:6])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.usefixtures("small_chunks")
def test_two_runs_give_the_same_bits(backend):
    inputs = problem(7, 1500, 5)
    first, second = (sums_and_gradients(*inputs, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone_is_what_it_is_among_both_and_costs_one_product_less(wanted):
    inputs = problem(6, 20, 4)
    expected = sums_and_gradients(*inputs, "torch")[3 + wanted]
    alone = [t if i == wanted else t.detach() for i, t in enumerate(inputs)]
    options = {"modalities": MODALITIES, "z_weight": Z_WEIGHT, "backend": "torch"}
    with FlopCounterMode(display=False) as counter:
        total = linear_cross_entropy(*alone, **options).total
    assert torch.equal(torch.autograd.grad(total / 7, alone[wanted])[0], expected)
    assert counter.get_total_flops() == 2 * (2 * 6 * 20 * 4)
    for run, products in ((sums_and_gradients, 3), (sums_alone, 1)):
        with FlopCounterMode(display=False) as counter:
            run(*inputs, "torch")
        assert counter.get_total_flops() == products * (2 * 6 * 20 * 4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_registered_op_keeps_the_rules_of_torch_library(backend):
    x, w, labels, _ = problem(4, 6, 3)
    op = torch.ops.earlyfuse.linear_cross_entropy
    for need in ([True, True], [True, False]):
        with torch.set_grad_enabled(all(need)):
            for weight in (None, torch.rand(4, device=DEVICE)):
                given = (x, w, labels, 0.1, need, 0, 6, "", 1, backend, weight)
                torch.library.opcheck(op, given)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_second_derivative_is_right_or_refused(backend):
    x, w, labels, modality = problem(5, 6, 3, torch.float64)

    def slope(x):
        options = {"modalities": MODALITIES, "z_weight": Z_WEIGHT, "backend": backend}
        total = linear_cross_entropy(x, w, labels, modality, **options).total
        return torch.autograd.grad(total, x, create_graph=True)

    if backend == "reference":
        assert torch.autograd.gradcheck(slope, (x,))
    else:
        with pytest.raises(RuntimeError, match=r"no second derivative.*'reference'"):
            slope(x)


def test_never_more_than_one_chunk_of_logits_is_held(monkeypatch):
    largest, mm = 0, torch.mm

    def watched(a, b, **options):
        nonlocal largest
        out = mm(a, b, **options)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(chunked, "CPU_BYTES", 1 << 14)
    monkeypatch.setattr(chunked, "GPU_BYTES", 1 << 14)
    monkeypatch.setattr(torch, "mm", watched)
    sums_and_gradients(*problem(64, 512, 4), "torch")
    assert largest * 4 <= 1 << 14


# ---------------------------------------------------------------- a vocabulary over two ranks


def check_shards(rank, meeting_place):
    """Uneven shards of the vocabulary against the whole of it; run in each of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=meeting_place,
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    before = chunked.CPU_BYTES
    chunked.CPU_BYTES = 60  # two tokens of six words, or three of five: all ranks must agree
    x, w, labels, modality = (t.detach() for t in problem(8, 11, 4))
    rows = (slice(0, 6), slice(6, 11))[rank]
    x.requires_grad_()
    whole_w, own_w = w.clone().requires_grad_(), w[rows].clone().requires_grad_()
    expected = sums_and_gradients(x, whole_w, labels, modality, "reference")
    expected[4] = expected[4][rows]
    shard = VocabularyShard(rows.start, 11, dist.group.WORLD)
    for backend in ("torch", "triton"):
        *sums, dx, dw = sums_and_gradients(x, own_w, labels, modality, backend, shard=shard)
        dist.all_reduce(dx)  # as the caller does
        for have, want in zip([*sums, dx, dw], expected, strict=True):
            assert rms_ratio(have, want) <= 1e-6
        own = torch.cat([s.reshape(-1) for s in sums])
        first = own.clone()
        dist.broadcast(first, 0)
        assert torch.equal(own, first)
        alone = sums_alone(x, own_w, labels, modality, backend, shard=shard)
        assert all(rms_ratio(a, b) <= 1e-6 for a, b in zip(alone, expected[:3], strict=True))
    with pytest.raises(ValueError, match=r"backend \('reference'\) .*shard"):
        sums_alone(x, own_w, labels, modality, "reference", shard=shard)
    with pytest.raises(ValueError, match=r"shard.first \(9\)"):
        sums_alone(x, own_w, labels, modality, "torch", shard=shard._replace(first=9))
    chunked.CPU_BYTES = before
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="the same on CPU says enough")
def test_two_shards_of_the_vocabulary_equal_the_whole(tmp_path):
    meeting_place = f"file://{tmp_path}/meeting"
    other = torch.multiprocessing.spawn(check_shards, (meeting_place,), nprocs=1, join=False)
    check_shards(1, meeting_place)
    assert other.join(60)
