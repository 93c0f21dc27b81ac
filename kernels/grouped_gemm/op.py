"""The grouped ops as torch operators; shapes as in the package."""

from typing import NamedTuple

from torch import Tensor

from earlyfuse.kernels.registration import register

PACKAGE = __package__ or ""


class Linear(NamedTuple):
    """Arguments of ``grouped_linear``."""

    x_TD: Tensor
    w_GFD: Tensor
    row_R: Tensor
    offset_G1: Tensor
    weight_R: Tensor | None
    unique_tokens: bool


class Swiglu(NamedTuple):
    """Arguments of ``grouped_swiglu``."""

    x_TD: Tensor
    w1_GFD: Tensor
    w3_GFD: Tensor
    w2_GDF: Tensor
    row_R: Tensor
    offset_G1: Tensor
    weight_R: Tensor | None
    unique_tokens: bool


def _linear_fake(of: Linear) -> Tensor:
    return of.x_TD.new_empty(of.x_TD.shape[0], of.w_GFD.shape[1])


def _swiglu_fake(of: Swiglu, keep: bool) -> tuple[Tensor, Tensor]:
    """(T, D), and gate and up pre-activations (2, R, F) for backward if ``keep``."""
    kept = (2, of.row_R.shape[0], of.w1_GFD.shape[1]) if keep else (0,)
    return of.x_TD.new_empty(of.x_TD.shape), of.x_TD.new_empty(kept)


# FLOPs are those of the matrix products


def _linear_flops(of: Linear) -> int:
    _, hidden, dim = of.w_GFD
    return 2 * of.row_R[0] * hidden * dim


def _linear_backward_flops(of: Linear, need: list[bool]) -> int:
    x, w, _, _, weight = need
    return _linear_flops(of) * ((x or weight) + w)


def _swiglu_flops(of: Swiglu) -> int:
    _, hidden, dim = of.w1_GFD
    return 6 * of.row_R[0] * hidden * dim


def _swiglu_backward_flops(of: Swiglu, need: list[bool]) -> int:
    return _swiglu_flops(of) // 3 * (1 + 2 * need[0] + sum(need[1:4]))


grouped_linear, grouped_linear_backward = register(
    "grouped_linear", Linear, PACKAGE,
    fake=_linear_fake, flops=(_linear_flops, _linear_backward_flops),
)  # fmt: skip
grouped_swiglu, grouped_swiglu_backward = register(
    "grouped_swiglu", Swiglu, PACKAGE, outputs=2, keeps=True,
    fake=_swiglu_fake, flops=(_swiglu_flops, _swiglu_backward_flops),
)  # fmt: skip
