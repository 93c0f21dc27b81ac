"""The selective scan as a torch operator; shapes as in the package."""

from typing import NamedTuple

from torch import Tensor

from earlyfuse.kernels.registration import register
from earlyfuse.kernels.selective_scan.chunks import count_chunks

# per token, channel and state, an exponential counted as one; README.md counts them
FORWARD_FLOPS, BACKWARD_FLOPS = 7, 22


class Scan(NamedTuple):
    """Arguments of ``selective_scan``."""

    u_BLD: Tensor
    delta_BLD: Tensor
    A_DN: Tensor
    B_BLN: Tensor
    C_BLN: Tensor
    skip_D: Tensor | None
    z_BLD: Tensor | None
    bias_GD: Tensor | None
    group_BL: Tensor | None
    reset_BL: Tensor | None
    state_BDN: Tensor | None


def _fake(of: Scan, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states before each chunk (B, I, N, D); (0,) unless ``keep``."""
    batch, length, channels = of.u_BLD.shape
    states = of.A_DN.shape[1]
    kept = (batch, count_chunks(length), states, channels) if keep else (0,)
    return (
        of.u_BLD.new_empty(of.u_BLD.shape),
        of.A_DN.new_empty(batch, channels, states),
        of.A_DN.new_empty(kept),
    )


def _elements(of: Scan) -> int:
    B, L, D = of.u_BLD
    return B * L * D * of.A_DN[1]


selective_scan, selective_scan_backward = register(
    "selective_scan", Scan, __package__ or "", outputs=3, keeps=True, fake=_fake,
    flops=(
        lambda of: FORWARD_FLOPS * _elements(of),
        lambda of, need: BACKWARD_FLOPS * _elements(of),
    ),
)  # fmt: skip
