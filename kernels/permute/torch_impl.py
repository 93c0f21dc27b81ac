"""Row movers whose gradients are each other, and a top-k on keys that cannot tie.

T tokens, R routed rows, G groups, D model.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def gather_rows(x_TD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
    """x[row] → (R, D)."""
    return _GatherRows.apply(x_TD, row_R)


def scatter_add_rows(
    y_RD: torch.Tensor, row_R: torch.Tensor, tokens: int, weight_R: torch.Tensor | None = None
) -> torch.Tensor:
    """out[row] += weight · y over all rows → (tokens, D)."""
    return _ScatterAddRows.apply(y_RD, row_R, tokens, weight_R)


def select_top_k(scores_GT: torch.Tensor, k: int) -> torch.Tensor:
    """The k best tokens of each group, best first.

    ``topk`` leaves the order of ties open, so it is given keys without ties: the score's bits,
    mapped to an integer of the same order, above the token's distance from the end.
    """
    bits_GT = (scores_GT + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, its equal
    ordered_GT = bits_GT ^ ((bits_GT >> 31) & 0x7FFFFFFF)
    last_first_T = torch.arange(scores_GT.shape[1] - 1, -1, -1, device=scores_GT.device)
    key_GT = (ordered_GT.to(torch.int64) << 32) | last_first_T
    return key_GT.topk(k, dim=1).indices


def add_rows(out_TD: torch.Tensor, rows_N: torch.Tensor, y_ND: torch.Tensor) -> None:
    """out[rows] += y in place, the same result every time; rows may repeat."""
    y_ND = y_ND.to(out_TD.dtype)
    if out_TD.device.type == "cpu":
        out_TD.index_add_(0, rows_N, y_ND)
    else:  # index_add_ adds atomically on CUDA, in no fixed order; index_put_ sorts first
        out_TD.index_put_((rows_N.long(),), y_ND, accumulate=True)


def zeros_to_add_to(like: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    """Zeros (tokens, width) in at least fp32: what several rows add up to is rounded once."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_zeros(tokens, width, dtype=dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_R)
        ctx.tokens = x_TD.shape[0]
        return x_TD.index_select(0, row_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (row_R,) = ctx.saved_tensors
        dx_TD = zeros_to_add_to(dy_RD, ctx.tokens, dy_RD.shape[1])
        add_rows(dx_TD, row_R, dy_RD)
        return dx_TD.to(dy_RD.dtype), None  # row_R


class _ScatterAddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_RD: torch.Tensor,
        row_R: torch.Tensor,
        tokens: int,
        weight_R: torch.Tensor | None,
    ) -> torch.Tensor:
        # y is needed for the weight's gradient only
        y_kept = y_RD if weight_R is not None and weight_R.requires_grad else None
        ctx.save_for_backward(y_kept, row_R, weight_R)
        out_TD = zeros_to_add_to(y_RD, tokens, y_RD.shape[1])
        add_rows(out_TD, row_R, y_RD if weight_R is None else y_RD * weight_R[:, None])
        return out_TD.to(y_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y_RD, row_R, weight_R = ctx.saved_tensors
        need_y, _, _, need_weight = ctx.needs_input_grad
        dout_RD = dout_TD.index_select(0, row_R)
        dweight_R = (dout_RD * y_RD).sum(1, dtype=weight_R.dtype) if need_weight else None
        if not need_y:
            return None, None, None, dweight_R
        if weight_R is not None:
            dout_RD.mul_(weight_R[:, None])
        return dout_RD, None, None, dweight_R  # row_R, tokens
