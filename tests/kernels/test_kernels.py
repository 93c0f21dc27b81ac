"""Grouped ops and row movers: fast path = reference = masked dense, gradients included."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import outputs_and_gradients, rms_ratio

from earlyfuse.kernels import backend
from earlyfuse.kernels.grouped_gemm import grouped_linear, grouped_swiglu, torch_impl
from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k

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


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_comes_right_when_no_other_is_asked_for(needed):
    row_R, offset_G1 = routes_of(ROUTES["ragged, one group empty"])
    full = (*swiglu_tensors(3), weights_for(row_R))

    def gradient(of):
        leaves = [t.detach().clone().requires_grad_(i in of) for i, t in enumerate(full)]
        *inputs, weight_R = leaves
        y = grouped_swiglu(*inputs, row_R, offset_G1, weight_R, backend="torch")
        return torch.autograd.grad(y.sin().sum(), leaves[needed])[0]

    assert torch.equal(gradient({needed}), gradient(set(range(5))))


@pytest.mark.parametrize("needed", range(3))
def test_each_linear_gradient_comes_right_when_no_other_is_asked_for(needed):
    row_R, offset_G1 = routes_of(ROUTES["ragged, one group empty"])
    x, w1, _, _ = swiglu_tensors(3)
    full = (x, w1, weights_for(row_R))

    def gradient(of):
        leaves = [t.detach().clone().requires_grad_(i in of) for i, t in enumerate(full)]
        y = grouped_linear(leaves[0], leaves[1], row_R, offset_G1, leaves[2], backend="torch")
        return torch.autograd.grad(y.sin().sum(), leaves[needed])[0]

    assert torch.equal(gradient({needed}), gradient({0, 1, 2}))


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    row_R, offset_G1 = routes_of(ROUTES["ragged, one group empty"])
    inputs = swiglu_tensors(3)
    with_graph = grouped_swiglu(*inputs, row_R, offset_G1)
    with torch.no_grad():
        without = grouped_swiglu(*inputs, row_R, offset_G1)
    assert without.grad_fn is None
    assert torch.equal(with_graph, without)


def test_backward_twice_through_a_retained_graph_gives_the_same_gradients():
    row_R, offset_G1 = routes_of(ROUTES["experts: tokens in several groups"])
    leaves = [*swiglu_tensors(3), weights_for(row_R)]
    y = grouped_swiglu(*leaves[:4], row_R, offset_G1, leaves[4], backend="torch").sum()
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(y, leaves), strict=True):
        assert torch.equal(once, again)


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
def test_gather_and_scatter_equal_their_reference_with_repeated_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=generator).requires_grad_()
    y = torch.randn(7, 5, generator=generator).requires_grad_()
    row_R = torch.tensor([3, 3, 0, 8, 3, 1, 0])
    weight_R = weights_for(row_R)
    for name in ("torch", "reference"):
        gathered = outputs_and_gradients(gather_rows, (x,), row_R, backend=name)
        scattered = outputs_and_gradients(
            lambda y, w, name=name: scatter_add_rows(y, row_R, 9, w, backend=name), (y, weight_R)
        )
        plain = outputs_and_gradients(
            lambda y, name=name: scatter_add_rows(y, row_R, 9, backend=name), (y,)
        )
        if name == "torch":
            actual = [*gathered, *scattered, *plain]
    for have, want in zip(actual, [*gathered, *scattered, *plain], strict=True):
        assert rms_ratio(have, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [9, 70_000])
def test_sums_by_token_are_those_of_the_definition_in_the_order_of_the_route(tokens, dtype):
    """More tokens than 16 bits count, tokens without rows, and rows that only order keeps apart."""
    generator = torch.Generator().manual_seed(7)
    row_R = torch.randint(0, 3, (40,), generator=generator) * (tokens // 3)
    row_R[::7] = tokens - 1
    magnitude_R1 = 1e6 ** torch.rand(40, 1, generator=generator)
    y_RD = (torch.randn(40, 3, generator=generator) * magnitude_R1).to(dtype)
    y_RD[row_R == tokens // 3] = torch.inf  # stays with its token
    for rows in (row_R, row_R.int()):
        expected = scatter_add_rows(y_RD, rows, tokens, backend="reference")
        assert torch.equal(scatter_add_rows(y_RD, rows, tokens, backend="torch"), expected)


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("rows", [(0, 1, 4), (2, 3, 4), (-1, 0, 1), (-3, -2, -1)])
def test_rows_that_are_not_there_are_refused_by_name(rows, name):
    """Runs of them too, which a slice would cut short without a word."""
    row_R, w2_GDF = torch.tensor(rows), torch.zeros(2, 6, 5)
    for call in (
        lambda: grouped_linear(X, W, row_R, OFFSET, unique_tokens=True, backend=name),
        lambda: grouped_swiglu(X, W, W, w2_GDF, row_R.int(), OFFSET, backend=name),
        lambda: gather_rows(X, row_R, backend=name),
        lambda: scatter_add_rows(X[:3], row_R, 4, backend=name),
    ):
        with pytest.raises(ValueError, match=rf"row_R \({rows[0]} … {rows[2]}\).*0 … 3"):
            call()


def test_a_row_beyond_the_tokens_is_refused_by_a_scatter_that_was_compiled():
    for row_R in (torch.tensor([0, 9]), -torch.arange(2)):
        with pytest.raises(ValueError):
            torch.ops.earlyfuse.scatter_add_rows(torch.ones(2, 3), row_R, 9, None, "torch")


def test_no_rows_or_no_width_scatter_to_zeros():
    for rows, width, tokens in ((0, 3, 4), (2, 0, 4), (0, 3, 0)):
        y_RD, row_R = torch.ones(rows, width), torch.zeros(rows, dtype=torch.int64)
        out_TD = scatter_add_rows(y_RD, row_R, tokens, backend="torch")
        assert torch.equal(out_TD, torch.zeros(tokens, width))


def test_scatter_is_the_transpose_of_gather():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 5, generator=generator), torch.randn(7, 5, generator=generator)
    row_R = torch.tensor([3, 3, 0, 8, 3, 1, 0])
    left = (gather_rows(x, row_R) * y).sum()
    torch.testing.assert_close(left, (x * scatter_add_rows(y, row_R, 9)).sum())


@pytest.mark.parametrize("k", [0, 1, 17, 64])
def test_top_k_breaks_ties_by_the_lower_index(k):
    generator = torch.Generator().manual_seed(0)
    scores_GT = torch.randint(-2, 3, (5, 64), generator=generator).float()
    scores_GT[1] = 0.0
    scores_GT[2, ::3] = -0.0  # equal to 0.0
    scores_GT[3, :60] = -torch.inf  # fewer candidates than k
    scores_GT[4, 7] = torch.inf
    expected = [
        sorted(range(64), key=lambda t, group=group: (-group[t], t))[:k]
        for group in scores_GT.tolist()
    ]
    for name in ("torch", "reference"):
        chosen = select_top_k(scores_GT, k, backend=name)
        assert chosen.dtype == torch.int64 and chosen.shape == (5, k)
        assert chosen.tolist() == expected


def test_top_k_orders_tiny_and_huge_scores_of_both_signs():
    values = torch.tensor([1e-45, -1e-45, 3e38, -3e38, 1.0, 1.0 + 2**-23, -1.0, 0.0])
    order = select_top_k(values[None], 8, backend="torch")[0]
    assert values[order].tolist() == sorted(values.tolist(), reverse=True)


def test_repeated_calls_are_bitwise_equal():
    row_R, offset_G1 = routes_of([[1, 2, 3, 30] * 20, [3, 2, 1] * 30])
    inputs = swiglu_tensors(2)
    weight_R = weights_for(row_R)
    first = outputs_and_gradients(grouped_swiglu, inputs, row_R, offset_G1, weight_R)
    second = outputs_and_gradients(grouped_swiglu, inputs, row_R, offset_G1, weight_R)
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


ROW, OFFSET, WEIGHT = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]), torch.ones(3)
X, W = torch.zeros(4, 6), torch.zeros(2, 5, 6)
WRONG_LINEAR_CALLS = {
    r"x_TD \(2, 4, 6\).*\(T, D\)": (torch.zeros(2, 4, 6), W, ROW, OFFSET),
    "x_TD.*int64": (torch.zeros(4, 6, dtype=torch.int64), W, ROW, OFFSET),
    "row_R.*float32.*int64 or torch.int32; cast": (X, W, ROW.float(), OFFSET),
    r"offset_G1 \(1, 3\).*\(3\)": (X, W, ROW, OFFSET[None]),
    r"offset_G1 \(\[0, 1, 2\]\).*routed rows \(3\)": (X, W, ROW, torch.tensor([0, 1, 2])),
    r"offset_G1 \(\[1, 1, 3\]\)": (X, W, ROW, torch.tensor([1, 1, 3])),
    r"offset_G1 \(\[0, 4, 3\]\)": (X, W, ROW, torch.tensor([0, 4, 3])),
    r"offset_G1 \(4,\).*\(3\), \(G1\)": (X, W, ROW, torch.tensor([0, 1, 3, 3])),
    r"w_GFD \(2, 5, 7\).*\(2, 5, 6\)": (X, torch.zeros(2, 5, 7), ROW, OFFSET),
    r"w_GFD \(5, 6\).*\(G, F, 6\)": (X, torch.zeros(5, 6), ROW, OFFSET),
    "w_GFD.*float64.*must be torch.float32": (X, W.double(), ROW, OFFSET),
    r"weight_R \(2,\).*\(3\)": (X, W, ROW, OFFSET, torch.ones(2)),
    "weight_R.*float32": (X, W, ROW, OFFSET, WEIGHT.bfloat16()),
    r"row_R \(meta\).*device": (X, W, ROW.to("meta"), OFFSET),
}


@pytest.mark.parametrize("message", WRONG_LINEAR_CALLS)
def test_a_wrong_argument_is_named_with_its_value_and_rule(message):
    with pytest.raises(ValueError, match=message):
        grouped_linear(*WRONG_LINEAR_CALLS[message])


def test_swiglu_names_the_projection_that_does_not_fit():
    w2 = torch.zeros(2, 6, 5)
    with pytest.raises(ValueError, match=r"w3_GFD \(2, 4, 6\).*\(2, 5, 6\)"):
        grouped_swiglu(X, W, torch.zeros(2, 4, 6), w2, ROW, OFFSET)
    with pytest.raises(ValueError, match=r"w2_GDF \(2, 5, 6\).*\(2, 6, 5\)"):
        grouped_swiglu(X, W, W, W, ROW, OFFSET)


def test_row_movers_and_top_k_name_a_wrong_argument():
    with pytest.raises(ValueError, match=r"row_R \(3,\).*\(4\)"):
        scatter_add_rows(X, ROW, 4)
    with pytest.raises(ValueError, match=r"tokens \(-1\)"):
        scatter_add_rows(X[:3], ROW, -1)
    with pytest.raises(ValueError, match=r"weight_R \(2,\).*\(3\)"):
        scatter_add_rows(X[:3], ROW, 4, torch.ones(2))
    with pytest.raises(ValueError, match=r"x_TD \(6,\).*\(T, D\)"):
        gather_rows(X[0], ROW)
    with pytest.raises(ValueError, match=r"k \(7\) must lie in \[0, 6\]"):
        select_top_k(X, 7)
    with pytest.raises(ValueError, match=r"scores_GT.*bfloat16.*float32"):
        select_top_k(X.bfloat16(), 1)


def test_a_backend_that_does_not_exist_or_cannot_run_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"backend \('cuda'\).*grouped_linear.*triton, torch, ref"):
        grouped_linear(X, W, ROW, OFFSET, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'triton'.*cannot run on cpu.*need a CUDA device"):
        grouped_linear(X, W, ROW, OFFSET, backend="triton")


def test_triton_is_neither_taken_nor_accepted_for_types_it_would_compute_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype, chosen in ((torch.float64, "torch"), (torch.bfloat16, "triton")):
        like = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert backend.resolve("op", "auto", ("triton", "torch"), like) == chosen
    for call in (
        lambda x: grouped_linear(x, W.double(), ROW, OFFSET, backend="triton"),
        lambda x: scatter_add_rows(x[:3], ROW, 4, backend="triton"),
        lambda x: gather_rows(x, ROW, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"backend \('triton'\).*not torch.float64"):
            call(X.double())


def test_auto_says_once_what_it_took(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        for _ in range(2):
            grouped_linear(X, W, ROW, OFFSET)
        grouped_linear(X, W, ROW, OFFSET, backend="reference")
    assert [record.getMessage() for record in caplog.records] == [
        "grouped_linear: backend torch on cpu"
    ]


def test_top_k_without_ties_is_that_of_torch():
    scores_GT = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for k in (1, 20, 49, 50):
        assert torch.equal(select_top_k(scores_GT, k), scores_GT.topk(k, dim=1).indices)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_nan_in_one_group_moves_no_choice_of_another_and_leaves_ids_that_exist(name):
    scores_GT = torch.zeros(2, 4)
    scores_GT[0] = torch.nan  # none is at least NaN, and twice as many as wanted are at least 0
    broken, whole = select_top_k(scores_GT, 2, backend=name).tolist()
    assert whole == [0, 1] and len(set(broken) & {0, 1, 2, 3}) == 2


def test_a_tie_at_the_last_place_is_seen():
    scores_GT = torch.tensor([[0.0, 3.0, 1.0, 2.0, 1.0]])
    assert select_top_k(scores_GT, 3).tolist() == [[1, 3, 2]]
    assert select_top_k(scores_GT.flip(1), 3).tolist() == [[3, 1, 0]]
