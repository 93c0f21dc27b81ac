"""Gather, scatter and top-k: every backend equals the definition, here in Triton's interpreter."""

import pytest
import torch
from kernel_checks import DEVICE, assert_equal, outputs_and_gradients, strided

from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k

pytest.importorskip("triton")
FAST = pytest.mark.parametrize("backend", ["torch", "triton"])
ROW = [3, 3, 0, 8, 3, 1, 0]  # tokens repeat and are missing


def normal(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()


@FAST
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("width", [5, 130])
def test_gather_and_scatter_equal_the_definition(backend, width):
    x, y, weight_R = normal(9, width), normal(7, width), torch.rand(7, device=DEVICE)
    weight_R.requires_grad_()
    row_R = torch.tensor(ROW, device=DEVICE)
    twos_R = torch.tensor(2.0, device=DEVICE).expand(7)
    for op, inputs, rest in (
        (gather_rows, (x,), (row_R,)),
        (gather_rows, (x,), (strided(row_R.int()),)),
        (scatter_add_rows, (y,), (row_R, 9, weight_R)),
        (scatter_add_rows, (y.detach(),), (row_R, 9, weight_R)),
        (scatter_add_rows, (strided(y),), (row_R.int(), 9, strided(weight_R))),
        (scatter_add_rows, (y.T.contiguous().T,), (strided(row_R), 9, twos_R)),
        (scatter_add_rows, (y,), (row_R, 9)),
    ):
        expected = outputs_and_gradients(op, inputs, *rest, backend="reference")
        assert_equal(outputs_and_gradients(op, inputs, *rest, backend=backend), expected, 1e-6)


@FAST
def test_no_rows_or_no_width_scatter_to_zeros(backend):
    for rows, width, tokens in ((0, 3, 4), (2, 0, 4), (0, 3, 0)):
        y_RD, row_R = torch.ones(rows, width), torch.zeros(rows, dtype=torch.int64)
        out_TD = scatter_add_rows(y_RD.to(DEVICE), row_R.to(DEVICE), tokens, backend=backend)
        assert torch.equal(out_TD.cpu(), torch.zeros(tokens, width))


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


# ---------------------------------------------------------------- top-k


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("k", [0, 1, 3, 17, 64])
def test_top_k_orders_by_score_and_breaks_ties_by_the_lower_index(k, backend):
    scores_GT = torch.randint(-2, 3, (6, 64), generator=torch.Generator().manual_seed(0)).float()
    scores_GT[1] = 0.0
    scores_GT[2, ::3] = -0.0  # equal to 0.0
    scores_GT[3, :60] = -torch.inf  # fewer candidates than k
    scores_GT[4, 7] = torch.inf
    scores_GT[5, :4] = torch.tensor([1e-45, -1e-45, 3e38, 1.0 + 2**-23])
    expected = [
        sorted(range(64), key=lambda t, group=group: (-group[t], t))[:k]
        for group in scores_GT.tolist()
    ]
    chosen = select_top_k(scores_GT.to(DEVICE), k, backend=backend)
    assert chosen.dtype == torch.int64 and chosen.shape == (6, k)
    assert chosen.tolist() == expected


@FAST
def test_top_k_over_several_blocks_of_all_magnitudes(backend):
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-140, 120, (2, 9000), generator=generator)
    signs = torch.randint(0, 2, (2, 9000), generator=generator) * 2 - 1
    scores_GT = (torch.ldexp(signs.double(), exponents)).float().to(DEVICE)
    expected = select_top_k(scores_GT, 700, backend="reference")
    assert torch.equal(select_top_k(scores_GT, 700, backend=backend), expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nan_in_one_group_moves_no_choice_of_another_and_leaves_ids_that_exist(backend):
    scores_GT = torch.zeros(2, 4)
    scores_GT[0] = torch.nan  # none is at least NaN, and twice as many as wanted are at least 0
    broken, whole = select_top_k(scores_GT, 2, backend=backend).tolist()
    assert whole == [0, 1] and len(set(broken) & {0, 1, 2, 3}) == 2
