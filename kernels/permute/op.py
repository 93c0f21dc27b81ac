"""The row movers and top-k as torch operators: fakes for compile, gradients, FLOPs.

The gradient of a gather is a scatter and vice versa. A backend is a module with ``gather_rows``,
``scatter_add_rows``, ``scatter_add_rows_backward`` and ``select_top_k``, all without autograd. An
empty tensor stands for an unneeded gradient.

T tokens, R routed rows, G groups, D model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from earlyfuse.kernels.backend import implementation

PACKAGE = __package__ or ""

# ---------------------------------------------------------------- gather


@custom_op("earlyfuse::gather_rows", mutates_args=())
def gather_rows(x_TD: Tensor, row_R: Tensor, backend: str) -> Tensor:
    return implementation(PACKAGE, backend).gather_rows(x_TD, row_R)


@gather_rows.register_fake
def _(x_TD: Tensor, row_R: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(row_R.shape[0], x_TD.shape[1])


def _keep_for_gather(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_TD, row_R, ctx.backend = inputs
    ctx.save_for_backward(row_R)
    ctx.tokens = x_TD.shape[0]


def _gather_backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
    (row_R,) = ctx.saved_tensors
    dx_TD = scatter_add_rows(dy_RD.contiguous(), row_R, ctx.tokens, None, ctx.backend)
    return dx_TD, None, None  # row_R, backend


gather_rows.register_autograd(_gather_backward, setup_context=_keep_for_gather)

# ---------------------------------------------------------------- scatter


@custom_op("earlyfuse::scatter_add_rows", mutates_args=())
def scatter_add_rows(
    y_RD: Tensor, row_R: Tensor, tokens: int, weight_R: Tensor | None, backend: str
) -> Tensor:
    return implementation(PACKAGE, backend).scatter_add_rows(y_RD, row_R, tokens, weight_R)


@scatter_add_rows.register_fake
def _(y_RD: Tensor, row_R: Tensor, tokens: int, *_: Any) -> Tensor:
    return y_RD.new_empty(tokens, y_RD.shape[1])


@custom_op("earlyfuse::scatter_add_rows_backward", mutates_args=())
def scatter_add_rows_backward(
    dout_TD: Tensor,
    y_RD: Tensor | None,
    row_R: Tensor,
    weight_R: Tensor | None,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the weights; ``y_RD`` is needed for the latter only."""
    run = implementation(PACKAGE, backend).scatter_add_rows_backward
    return run(dout_TD, y_RD, row_R, weight_R, need)


@scatter_add_rows_backward.register_fake
def _(
    dout_TD: Tensor, _: Any, row_R: Tensor, weight_R: Tensor | None, need: list[bool], *__: Any
) -> tuple[Tensor, Tensor]:
    dy_RD = dout_TD.new_empty(row_R.shape[0], dout_TD.shape[1]) if need[0] else dout_TD.new_empty(0)
    if weight_R is None or not need[1]:
        return dy_RD, dout_TD.new_empty(0)
    return dy_RD, weight_R.new_empty(weight_R.shape)


def _keep_for_scatter(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y_RD, row_R, _, weight_R, ctx.backend = inputs
    kept = y_RD if weight_R is not None and weight_R.requires_grad else None
    ctx.save_for_backward(kept, row_R, weight_R)


def _scatter_backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
    y_RD, row_R, weight_R = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    dy_RD, dweight_R = scatter_add_rows_backward(
        dout_TD.contiguous(), y_RD, row_R, weight_R, need, ctx.backend
    )
    # row_R, tokens; backend
    return dy_RD if need[0] else None, None, None, dweight_R if need[1] else None, None


scatter_add_rows.register_autograd(_scatter_backward, setup_context=_keep_for_scatter)

# ---------------------------------------------------------------- top-k


@custom_op("earlyfuse::select_top_k", mutates_args=())
def select_top_k(scores_GT: Tensor, k: int, backend: str) -> Tensor:
    return implementation(PACKAGE, backend).select_top_k(scores_GT, k)


@select_top_k.register_fake
def _(scores_GT: Tensor, k: int, backend: str) -> Tensor:
    return scores_GT.new_empty(scores_GT.shape[0], k, dtype=torch.int64)
