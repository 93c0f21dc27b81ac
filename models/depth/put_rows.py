"""Puts rows that a block computed back into their places.

T tokens, D width, R kept rows.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def put_rows(
    base_TD: torch.Tensor, y_RD: torch.Tensor, row_R: torch.Tensor, real_R: torch.Tensor
) -> torch.Tensor:
    """A copy of ``base_TD`` with the rows ``y_RD`` in the places ``row_R``, where ``real_R`` is
    True. The places are all different.
    """
    return _PutRows.apply(base_TD, y_RD, row_R, real_R)


class _PutRows(torch.autograd.Function):
    """Rows that are not real go to a place behind the last one."""

    @staticmethod
    def forward(
        ctx: Any,
        base_TD: torch.Tensor,
        y_RD: torch.Tensor,
        row_R: torch.Tensor,
        real_R: torch.Tensor,
    ) -> torch.Tensor:
        place_R = torch.where(real_R, row_R, len(base_TD))
        ctx.save_for_backward(place_R)
        return _one_more(base_TD).index_copy_(0, place_R, y_RD)[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (place_R,) = ctx.saved_tensors
        dbase_TD = _one_more(dout_TD)
        dy_RD = dbase_TD.index_select(0, place_R)
        return dbase_TD.index_fill_(0, place_R, 0)[:-1], dy_RD, None, None  # row_R, real_R


def _one_more(x_TD: torch.Tensor) -> torch.Tensor:
    """A copy with a row of zeros behind."""
    copy_TD = x_TD.new_empty(len(x_TD) + 1, x_TD.shape[1])
    copy_TD[:-1] = x_TD
    copy_TD[-1] = 0
    return copy_TD
