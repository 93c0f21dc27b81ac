"""The causal convolution as a torch operator; shapes as in the package."""

from typing import NamedTuple

from torch import Tensor

from earlyfuse.kernels.registration import register


class Convolution(NamedTuple):
    """Arguments of ``causal_conv1d``."""

    x_BLD: Tensor
    weight_DW: Tensor
    bias_D: Tensor | None
    positions_BL: Tensor | None
    initial_state_BVD: Tensor | None
    silu: bool


def _fake(of: Convolution) -> tuple[Tensor, Tensor]:
    B, L, D = of.x_BLD.shape
    return of.x_BLD.new_empty(B, L, D), of.x_BLD.new_empty(B, of.weight_DW.shape[1] - 1, D)


def _flops(of: Convolution) -> int:
    """A product and a sum per tap; SiLU is not counted."""
    B, L, D = of.x_BLD
    return 2 * B * L * D * of.weight_DW[1]


def _backward_flops(of: Convolution, need: list[bool]) -> int:
    """The same once each for inputs, for parameters, and to recompute the input of SiLU."""
    x, weight, bias, _, state = need
    return _flops(of) * (of.silu + (x or state) + (weight or bias))


causal_conv1d, causal_conv1d_backward = register(
    "causal_conv1d", Convolution, __package__ or "", outputs=2,
    fake=_fake, flops=(_flops, _backward_flops),
)  # fmt: skip
