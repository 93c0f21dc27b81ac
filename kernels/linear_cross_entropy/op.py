"""The head with its loss as a torch operator: shapes, gradient and FLOPs.

The gradients of x and w are outputs of the forward op, computed if needed; backward multiplies them
by the gradient of the total, so it has no op of its own.

T tokens, V vocabulary, D model.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from earlyfuse.kernels.backend import implementation

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def compute(
    x_TD: torch.Tensor,
    w_VD: torch.Tensor,
    labels_T: torch.Tensor,
    z_weight: float,
    need: list[bool],
    first: int,
    vocabulary: int,
    group: str,
    group_size: int,
    backend: str,
    weight_T: torch.Tensor | None = None,
) -> Outputs:
    """Total (), nll (T,), log Z (T,), and the total's gradients of x and of w, the latter in at
    least fp32; empty unless in ``need`` (of x, of w). w is rows ``first`` … of ``vocabulary``,
    sharded over ``group``; all rows if that is ""."""
    forward = implementation(__package__, backend).forward
    shard = (first, vocabulary, group, group_size)
    return forward(x_TD, w_VD, labels_T, z_weight, need, *shard, weight_T)


linear_cross_entropy = torch.library.custom_op(
    "earlyfuse::linear_cross_entropy", compute, mutates_args=()
)


@linear_cross_entropy.register_fake
def _(
    x_TD: torch.Tensor,
    w_VD: torch.Tensor,
    labels_T: torch.Tensor,
    z_weight: float,
    need: list[bool],
    *_: Any,
) -> Outputs:
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return (
        x_TD.new_empty((), dtype=dtype),
        x_TD.new_empty(x_TD.shape[0], dtype=dtype),
        x_TD.new_empty(x_TD.shape[0], dtype=dtype),
        x_TD.new_empty(x_TD.shape if need[0] else 0),
        w_VD.new_empty(w_VD.shape if need[1] else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, nll_T, log_z_T, dx_TD, dw_VD = output
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)  # else zeros as large as the weight are allocated for dw_VD
    ctx.mark_non_differentiable(nll_T, log_z_T, dx_TD, dw_VD)
    ctx.save_for_backward(dx_TD, dw_VD)


def _backward(ctx: Any, dtotal: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    if dtotal is None:
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # create_graph: the gradients would look constant in x and w
        raise RuntimeError(
            "linear_cross_entropy has no second derivative, as forward computes its gradients; "
            "choose backend='reference'"
        )
    dx_TD, dw_VD = ctx.saved_tensors
    need_x, need_w, *others = ctx.needs_input_grad
    return (
        _scaled(dx_TD, dtotal, ctx.dtype) if need_x else None,
        _scaled(dw_VD, dtotal, ctx.dtype) if need_w else None,
        *(None for _ in others),  # labels … weights
    )


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The product in ``dtype``, rounded once, without an intermediate copy."""
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.earlyfuse.linear_cross_entropy)
def _flops(
    x_shape: Any,
    w_shape: Any,
    labels_shape: Any,
    z_weight: float,
    need: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of the logits, and of their gradient times w and times x if needed."""
    return 2 * x_shape[0] * w_shape[0] * w_shape[1] * (1 + sum(need))
