"""Registration with ``torch.library``: shapes, gradients and FLOPs; the work is in ``*_impl.py``.

B rows, L tokens, D channels, W taps, V = W - 1.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from earlyfuse.kernels.backend import implementation

Conv = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("earlyfuse::causal_conv1d", mutates_args=())
def causal_conv1d(
    x_BLD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None,
    positions_BL: torch.Tensor | None,
    state_BVD: torch.Tensor | None,
    silu: bool,
    backend: str,
) -> Conv:
    """y (B, L, D) and the final state (B, V, D)."""
    forward = implementation(__package__, backend).forward
    return forward(x_BLD, weight_DW, bias_D, positions_BL, state_BVD, silu)


@causal_conv1d.register_fake
def _(x_BLD: torch.Tensor, weight_DW: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    B, L, D = x_BLD.shape
    return x_BLD.new_empty(B, L, D), x_BLD.new_empty(B, weight_DW.shape[1] - 1, D)


@torch.library.custom_op("earlyfuse::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dy_BLD: torch.Tensor,
    dfinal_BVD: torch.Tensor,
    x_BLD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None,
    positions_BL: torch.Tensor | None,
    state_BVD: torch.Tensor | None,
    silu: bool,
    need: list[bool],
    backend: str,
) -> Gradients:
    """Gradients of x, weight, bias and initial state; empty where ``need`` (of x, of weight or
    bias) or the argument is missing."""
    backward = implementation(__package__, backend).backward
    return backward(
        dy_BLD, dfinal_BVD, x_BLD, weight_DW, bias_D, positions_BL, state_BVD, silu, need
    )


@causal_conv1d_backward.register_fake
def _(
    dy_BLD: torch.Tensor,
    dfinal_BVD: torch.Tensor,
    x_BLD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None,
    positions_BL: torch.Tensor | None,
    state_BVD: torch.Tensor | None,
    silu: bool,
    need: list[bool],
    backend: str,
) -> Gradients:
    need_inputs, need_parameters = need

    def gradient(of: torch.Tensor | None, needed: bool) -> torch.Tensor:
        if of is None or not needed:
            return x_BLD.new_empty(0)
        return of.new_empty(of.shape)

    return (
        gradient(x_BLD, need_inputs),
        gradient(weight_DW, need_parameters),
        gradient(bias_D, need_parameters),
        gradient(state_BVD, need_inputs),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Conv) -> None:
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy_BLD: torch.Tensor, dfinal_BVD: torch.Tensor) -> tuple[Any, ...]:
    x_BLD, weight_DW, bias_D, positions_BL, state_BVD = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_state, _, _ = ctx.needs_input_grad
    dx_BLD, dweight_DW, dbias_D, dstate_BVD = causal_conv1d_backward(
        dy_BLD,
        dfinal_BVD,
        x_BLD,
        weight_DW,
        bias_D,
        positions_BL,
        state_BVD,
        ctx.silu,
        [need_x or need_state, need_weight or need_bias],
        ctx.backend,
    )
    return (
        dx_BLD if need_x else None,
        dweight_DW if need_weight else None,
        dbias_D if need_bias else None,
        None,  # positions
        dstate_BVD if need_state else None,
        None,  # silu
        None,  # backend
    )


causal_conv1d.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.earlyfuse.causal_conv1d)
def _forward_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """A product and a sum per tap; SiLU is not counted."""
    B, L, D = x_shape
    return 2 * B * L * D * weight_shape[1]


@register_flop_formula(torch.ops.earlyfuse.causal_conv1d_backward)
def _backward_flops(
    dy_shape: Any,
    dfinal_shape: Any,
    x_shape: Any,
    weight_shape: Any,
    bias_shape: Any,
    positions_shape: Any,
    state_shape: Any,
    silu: bool,
    need: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    """The same once each for dx, for dweight, and for what SiLU's derivative needs again."""
    B, L, D = x_shape
    return 2 * B * L * D * weight_shape[1] * (silu + sum(need))
