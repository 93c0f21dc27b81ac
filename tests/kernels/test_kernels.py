"""Grouped ops: fast path = reference = masked dense, gradients included."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import outputs_and_gradients, rms_ratio

from earlyfuse.kernels.grouped_gemm import grouped_linear, grouped_swiglu, torch_impl

TOKENS, WIDTH, HIDDEN = 37, 10, 14

# name → the tokens of each group
ROUTES = {
    "modalities: every token once": [list(range(0, 37, 2)), list(range(1, 37, 2))],
    "experts: tokens in several groups": [[3, 5, 9], [5, 30, 3], [36, 0, 5]],
    "ragged, one group empty": [[1, 2, 3, 4, 5, 6, 7], [], [0]],
    "first and last group empty": [[], [4, 8], []],
    "runs: the tokens of a group together": [list(range(20)), list(range(20, 37))],
    "runs apart, out of order": [[30, 31, 32], list(range(2, 9)), [36]],
    "one group, as in Mixture-of-Depths": [[7, 1, 20]],
    "a token twice in one group": [[6, 6, 2], [6]],
    "all groups empty": [[], []],
}


def routes_of(groups):
    row_R = torch.tensor([token for group in groups for token in group], dtype=torch.int64)
    offset_G1 = torch.tensor([0, *[len(group) for group in groups]]).cumsum(0)
    return row_R, offset_G1


def swiglu_tensors(groups, dtype=torch.float32, width=WIDTH, hidden=HIDDEN, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    x, w1, w3 = leaf(TOKENS, width), leaf(groups, hidden, width), leaf(groups, hidden, width)
    return x, w1, w3, leaf(groups, width, hidden)


def weights_for(row_R, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(row_R.shape, generator=generator).to(dtype).requires_grad_()


def masked_dense_swiglu(x, w1, w3, w2, row_R, offset_G1, weight_R=None):
    """Every group computes every token; a (G, T) matrix of summed weights picks what counts."""
    weight_R = torch.ones(row_R.shape, dtype=x.dtype) if weight_R is None else weight_R
    share_GT = []
    for start, stop in pairwise(offset_G1.tolist()):
        share_T = torch.zeros(x.shape[0], dtype=x.dtype)
        share_GT.append(share_T.index_add(0, row_R[start:stop], weight_R[start:stop]))
    h_GTF = F.silu(torch.einsum("td,gfd->gtf", x, w1)) * torch.einsum("td,gfd->gtf", x, w3)
    return torch.einsum("gt,gtf,gdf->td", torch.stack(share_GT), h_GTF, w2)


def masked_dense_linear(x, w, row_R, offset_G1, weight_R=None):
    weight_R = torch.ones(row_R.shape, dtype=x.dtype) if weight_R is None else weight_R
    out = torch.zeros(x.shape[0], w.shape[1], dtype=x.dtype)
    for group, (start, stop) in enumerate(pairwise(offset_G1.tolist())):
        for place in range(start, stop):
            row = row_R[place]
            out = out.index_add(0, row[None], (weight_R[place] * (w[group] @ x[row]))[None])
    return out


@pytest.fixture(params=[1, 128], ids=["runs", "rows"])
def long_run(request, monkeypatch):
    """How long runs must be on average to be read in place: in the first case all are."""
    monkeypatch.setattr(torch_impl, "LONG_RUN", request.param)


@pytest.mark.usefixtures("nan_filled_memory", "long_run")
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("name", ROUTES)
def test_fast_path_equals_the_reference_in_output_and_every_gradient(name, weighted):
    row_R, offset_G1 = routes_of(ROUTES[name])
    weight_R = weights_for(row_R) if weighted else None
    x, w1, w3, w2 = swiglu_tensors(len(ROUTES[name]))
    for op, inputs in ((grouped_swiglu, (x, w1, w3, w2)), (grouped_linear, (x, w1))):
        rest = (row_R, offset_G1, weight_R)
        expected = outputs_and_gradients(op, inputs, *rest, backend="reference")
        tokens = [token for group in ROUTES[name] for token in group]
        once = len(set(tokens)) == len(tokens)
        actual = outputs_and_gradients(op, inputs, *rest, unique_tokens=once, backend="torch")
        assert len(actual) == len(inputs) + 1 + weighted
        for have, want in zip(actual, expected, strict=True):
            assert have.dtype == want.dtype and have.shape == want.shape
            assert rms_ratio(have, want) < 1e-6


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("name", ROUTES)
def test_reference_equals_masked_dense(name, weighted):
    row_R, offset_G1 = routes_of(ROUTES[name])
    weight_R = weights_for(row_R, torch.float64) if weighted else None
    x, w1, w3, w2 = swiglu_tensors(len(ROUTES[name]), torch.float64)
    for op, oracle, inputs in (
        (grouped_swiglu, masked_dense_swiglu, (x, w1, w3, w2)),
        (grouped_linear, masked_dense_linear, (x, w1)),
    ):
        actual = op(*inputs, row_R, offset_G1, weight_R, backend="reference")
        assert rms_ratio(actual, oracle(*inputs, row_R, offset_G1, weight_R)) < 1e-12


@pytest.mark.parametrize("op_name", ["linear", "swiglu"])
@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_gradients_are_those_of_the_function(op_name, backend_name):
    row_R, offset_G1 = routes_of(ROUTES["experts: tokens in several groups"])
    weight_R = weights_for(row_R, torch.float64)
    x, w1, w3, w2 = swiglu_tensors(3, torch.float64, width=3, hidden=4)

    def linear(x, w, weight):
        return grouped_linear(x, w, row_R, offset_G1, weight, backend=backend_name)

    def swiglu(x, w1, w3, w2, weight):
        return grouped_swiglu(x, w1, w3, w2, row_R, offset_G1, weight, backend=backend_name)

    if op_name == "linear":
        assert torch.autograd.gradcheck(linear, (x, w1, weight_R))
    else:
        assert torch.autograd.gradcheck(swiglu, (x, w1, w3, w2, weight_R))


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    row_R, offset_G1 = routes_of(ROUTES["ragged, one group empty"])
    inputs = swiglu_tensors(3)
    with_graph = grouped_swiglu(*inputs, row_R, offset_G1)
    with torch.no_grad():
        without = grouped_swiglu(*inputs, row_R, offset_G1)
    assert without.grad_fn is None
    assert torch.equal(with_graph, without)


def test_int32_routes_and_bf16_agree_with_fp32():
    row_R, offset_G1 = routes_of(ROUTES["experts: tokens in several groups"])
    weight_R = weights_for(row_R)
    inputs = swiglu_tensors(3, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    expected = outputs_and_gradients(grouped_swiglu, exact, row_R, offset_G1, weight_R)
    for name in ("torch", "reference"):
        rest = (row_R.int(), offset_G1.int(), weight_R)
        actual = outputs_and_gradients(grouped_swiglu, inputs, *rest, backend=name)
        assert actual[0].dtype == torch.bfloat16 and actual[-1].dtype == torch.float32
        for have, want in zip(actual, expected, strict=True):
            assert rms_ratio(have, want) < 1e-2


def test_padded_rows_of_weight_zero_change_nothing_but_their_own_weight_gradient():
    groups = ROUTES["ragged, one group empty"]
    padded = [[*group, *[0] * (8 - len(group))] for group in groups]
    kept_R = torch.tensor([i < len(group) for group in groups for i in range(8)])
    inputs = swiglu_tensors(3)
    row_R, offset_G1 = routes_of(groups)
    weight_R = weights_for(row_R)
    padded_weight_R = torch.zeros(24).masked_scatter(kept_R, weight_R.detach()).requires_grad_()
    expected = outputs_and_gradients(grouped_swiglu, inputs, row_R, offset_G1, weight_R)
    actual = outputs_and_gradients(grouped_swiglu, inputs, *routes_of(padded), padded_weight_R)
    for have, want in zip(actual[:-1], expected[:-1], strict=True):
        assert rms_ratio(have, want) < 1e-6
    assert rms_ratio(actual[-1][kept_R], expected[-1]) < 1e-6


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("op", [grouped_swiglu, grouped_linear])
def test_each_gradient_comes_right_when_no_other_is_asked_for(op):
    row_R, offset_G1 = routes_of(ROUTES["ragged, one group empty"])
    tensors = swiglu_tensors(3)[: 4 if op is grouped_swiglu else 2]
    full = (*tensors, weights_for(row_R))

    def gradient(needed, of):
        leaves = [t.detach().clone().requires_grad_(i in of) for i, t in enumerate(full)]
        y = op(*leaves[:-1], row_R, offset_G1, leaves[-1], backend="torch")
        return torch.autograd.grad(y.sin().sum(), leaves[needed])[0]

    everything = set(range(len(full)))
    for needed in everything:
        assert torch.equal(gradient(needed, {needed}), gradient(needed, everything))


def test_repeated_calls_and_repeated_backwards_are_bitwise_equal():
    row_R, offset_G1 = routes_of([[1, 2, 3, 30] * 20, [3, 2, 1] * 30])
    leaves = [*swiglu_tensors(2), weights_for(row_R)]
    found = []
    for _ in range(2):
        y = grouped_swiglu(*leaves[:4], row_R, offset_G1, leaves[4], backend="torch")
        dy = torch.ones_like(y)
        found += [[y, *torch.autograd.grad(y, leaves, dy, retain_graph=True)] for _ in range(2)]
    for once, *again in zip(*found, strict=True):
        assert all(torch.equal(once, other) for other in again)
