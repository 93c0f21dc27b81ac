"""Parameters indexed by token, with gradients summed over tokens in fp32.

Plain indexing, ``weight[index_T]``, has the same values, but its backward accumulates in the
weight's dtype: in bf16 such a sum stops growing after a few hundred tokens.

T tokens, G groups, V vocabulary, D width; "..." the shape of one token, such as (D,) or (N, H).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from earlyfuse.models.precision import wide, wide_type


def scaled_by_group(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group_T: torch.Tensor
) -> torch.Tensor:
    """x · weight[group] + bias[group] → (T, ...).

    ``x`` (T, ...), ``weight`` and ``bias`` (G, ...), ``group_T`` (T,) int64. No host
    synchronisation.
    """
    return _ScaledByGroup.apply(x, weight, bias, group_T)


def embedding(tokens_T: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Rows of a table, (T,) int64 → (T, D)."""
    return _Embedding.apply(tokens_T, weight_VD)


def sums_by_group(values: torch.Tensor, group_T: torch.Tensor, groups: int) -> torch.Tensor:
    """(T, ...) → (G, ...), fp32 at least: sums over the tokens of each group; 0 of an empty one."""
    if values.device.type != "cpu":  # index_add_ uses atomics there: no fixed order
        return masked_sums(values, group_T, groups)
    sums = values.new_zeros(groups, *values.shape[1:], dtype=wide_type(values.dtype))
    return sums.index_add_(0, group_T, wide(values))


def masked_sums(values: torch.Tensor, group_T: torch.Tensor, groups: int) -> torch.Tensor:
    """``sums_by_group`` as one reduction per group, in a fixed order.

    A product with a one-hot matrix would spread non-finite values of one group to all.
    """
    dtype = wide_type(values.dtype)
    lead = (-1,) + (1,) * (values.ndim - 1)
    masks = ((group_T == group).view(lead) for group in range(groups))
    return torch.stack([values.where(mask, 0).sum(0, dtype=dtype) for mask in masks])


class _ScaledByGroup(torch.autograd.Function):
    """Saves its input for backward, not the weight of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        group_T: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, group_T)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if bias is None:
            return x * weight.index_select(0, group_T)
        return torch.addcmul(bias.index_select(0, group_T), x, weight.index_select(0, group_T))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, group_T = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        groups, dx, dweight, dbias = len(weight), None, None, None
        if need_x:
            dx = (dy * weight.index_select(0, group_T)).to(x.dtype)
        if need_weight:
            dweight = sums_by_group(dy * x, group_T, groups).to(weight.dtype)
        if need_bias:
            dbias = sums_by_group(dy, group_T, groups).to(ctx.bias_dtype)
        return dx, dweight, dbias, None  # group_T


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_T: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.rows, ctx.dtype = len(weight_VD), weight_VD.dtype
        return F.embedding(tokens_T, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[None, torch.Tensor]:
        (tokens_T,) = ctx.saved_tensors
        dweight_VD = torch.ops.aten.embedding_dense_backward(
            wide(dy_TD), tokens_T, ctx.rows, -1, False
        )
        return None, dweight_VD.to(ctx.dtype)  # tokens_T
