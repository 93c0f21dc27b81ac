"""The grouped ops as torch operators: fakes for compile, gradients, FLOPs.

Backends are modules with ``linear``, ``linear_backward``, ``swiglu`` and ``swiglu_backward``, all
without autograd. An empty tensor stands for what nobody needs: a gradient, or the activations of a
forward pass without a backward one.

T tokens, R routed rows, G groups, D model, F hidden.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from earlyfuse.kernels.backend import implementation

PACKAGE = __package__ or ""


def _gradients(needed: list[bool], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Uninitialised gradients of ``tensors``, for a fake; empty where not needed."""
    like = next(t for t in tensors if t is not None)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else like.new_empty(0)
        for need, t in zip(needed, tensors, strict=True)
    )


def _or_none(needed: list[bool], gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [g if need else None for need, g in zip(needed, gradients, strict=True)]


# ---------------------------------------------------------------- linear


@custom_op("earlyfuse::grouped_linear", mutates_args=())
def grouped_linear(
    x_TD: Tensor,
    w_GFD: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    backend: str,
) -> Tensor:
    chosen = implementation(PACKAGE, backend)
    return chosen.linear(x_TD, w_GFD, row_R, offset_G1, weight_R, once)


@grouped_linear.register_fake
def _(
    x_TD: Tensor,
    w_GFD: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    backend: str,
) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], w_GFD.shape[1])


@custom_op("earlyfuse::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    dy_TF: Tensor,
    x_TD: Tensor,
    w_GFD: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and the weights."""
    chosen = implementation(PACKAGE, backend)
    return chosen.linear_backward(dy_TF, x_TD, w_GFD, row_R, offset_G1, weight_R, once, need)


@grouped_linear_backward.register_fake
def _(
    dy_TF: Tensor,
    x_TD: Tensor,
    w_GFD: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, dweight = _gradients(need, x_TD, w_GFD, weight_R)
    return dx, dw, dweight


def _keep_for_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.once, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
    need = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    found = grouped_linear_backward(
        dy_TF.contiguous(), *ctx.saved_tensors, ctx.once, need, ctx.backend
    )
    dx, dw, dweight = _or_none(need, found)
    return dx, dw, None, None, dweight, None, None  # row_R, offset_G1, once, backend


grouped_linear.register_autograd(_linear_backward, setup_context=_keep_for_linear)

# ---------------------------------------------------------------- SwiGLU


@custom_op("earlyfuse::grouped_swiglu", mutates_args=())
def grouped_swiglu(
    x_TD: Tensor,
    w1_GFD: Tensor,
    w3_GFD: Tensor,
    w2_GDF: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(T, D), and gate and up pre-activations (2, R, F) for backward if ``keep``."""
    chosen = implementation(PACKAGE, backend)
    weights = (w1_GFD, w3_GFD, w2_GDF)
    return chosen.swiglu(x_TD, *weights, row_R, offset_G1, weight_R, once, keep)


@grouped_swiglu.register_fake
def _(
    x_TD: Tensor,
    w1_GFD: Tensor,
    w3_GFD: Tensor,
    w2_GDF: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kept = (2, row_R.shape[0], w1_GFD.shape[1]) if keep else (0,)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(kept)


@custom_op("earlyfuse::grouped_swiglu_backward", mutates_args=())
def grouped_swiglu_backward(
    dy_TD: Tensor,
    gate_up_2RF: Tensor,
    x_TD: Tensor,
    w1_GFD: Tensor,
    w3_GFD: Tensor,
    w2_GDF: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w3, w2 and the weights."""
    chosen = implementation(PACKAGE, backend)
    weights = (w1_GFD, w3_GFD, w2_GDF)
    return chosen.swiglu_backward(
        dy_TD, gate_up_2RF, x_TD, *weights, row_R, offset_G1, weight_R, once, need
    )


@grouped_swiglu_backward.register_fake
def _(
    dy_TD: Tensor,
    gate_up_2RF: Tensor,
    x_TD: Tensor,
    w1_GFD: Tensor,
    w3_GFD: Tensor,
    w2_GDF: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None,
    once: bool,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dw1, dw3, dw2, dweight = _gradients(need, x_TD, w1_GFD, w3_GFD, w2_GDF, weight_R)
    return dx, dw1, dw3, dw2, dweight


def _keep_for_swiglu(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.once, ctx.keep, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as the activations are made for it
    ctx.save_for_backward(output[1], *tensors)


def _swiglu_backward(ctx: Any, dy_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * len(ctx.needs_input_grad)
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 6)]
    found = grouped_swiglu_backward(
        dy_TD.contiguous(), *ctx.saved_tensors, ctx.once, need, ctx.backend
    )
    dx, dw1, dw3, dw2, dweight = _or_none(need, found)
    # row_R, offset_G1; once, keep, backend
    return dx, dw1, dw3, dw2, None, None, dweight, None, None, None


grouped_swiglu.register_autograd(_swiglu_backward, setup_context=_keep_for_swiglu)

# ---------------------------------------------------------------- FLOPs of the matrix products


@register_flop_formula(torch.ops.earlyfuse.grouped_linear)
def _linear_flops(x: tuple, w: tuple, row: tuple, *rest: Any, out_shape: tuple, **_: Any) -> int:
    return 2 * row[0] * w[1] * w[2]


@register_flop_formula(torch.ops.earlyfuse.grouped_linear_backward)
def _linear_backward_flops(
    dy: tuple, x: tuple, w: tuple, row: tuple, offset: tuple, weight: tuple, once: bool,
    need: list[bool], *rest: Any, **_: Any,
) -> int:  # fmt: skip
    return 2 * row[0] * w[1] * w[2] * ((need[0] or need[2]) + need[1])


@register_flop_formula(torch.ops.earlyfuse.grouped_swiglu)
def _swiglu_flops(
    x: tuple, w1: tuple, w3: tuple, w2: tuple, row: tuple, *rest: Any, **_: Any
) -> int:
    return 6 * row[0] * w1[1] * w1[2]


@register_flop_formula(torch.ops.earlyfuse.grouped_swiglu_backward)
def _swiglu_backward_flops(
    dy: tuple, kept: tuple, x: tuple, w1: tuple, w3: tuple, w2: tuple, row: tuple, offset: tuple,
    weight: tuple, once: bool, need: list[bool], *rest: Any, **_: Any,
) -> int:  # fmt: skip
    return 2 * row[0] * w1[1] * w1[2] * (1 + 2 * need[0] + sum(need[1:4]))
