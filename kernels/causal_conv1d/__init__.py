"""Causal depthwise convolution over packed documents, with SiLU: the short one before a scan.

B rows, L tokens of a row, D channels, W taps (2, 3 or 4), V = W - 1.

=====================  ========================  ===================================================
argument               shape, dtype              meaning
=====================  ========================  ===================================================
``x_BLD``              (B, L, D) float           inputs, time-major; channels next to each other
``weight_DW``          (D, W), as x or fp32      taps of each channel; the last is the token's own
``bias_D``             (D,), as weight; or none  added before the SiLU; none: 0
``positions_BL``       (B, L) int64 or int32     0 at a document's first token, then 1, 2 …; none:
                       or none                   a row is one document without a start
``initial_state_BVD``  (B, V, D), as x; or none  the V inputs before the segment; none: zeros
=====================  ========================  ===================================================

A token reads itself and at most min(position, V) tokens before it: no tap reaches over the start of
its document. A document that began before the segment has positions that say so, and reads the
initial state. The final state is the last V inputs, whichever documents they belong to, so a
sequence that is cut into segments (over calls or over ranks) and handed on through the states
equals the whole, gradients included.

The function is that of Dao's ``causal_conv1d`` (https://github.com/Dao-AILab/causal-conv1d) in the
time-major layout that projections produce, with positions instead of sequence ids. All backends
give the same bits on every run. Backends: ``triton``, ``torch``, ``reference``.
"""

import torch

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.causal_conv1d import op, reference
from earlyfuse.kernels.checks import FLOATS, INDICES, SAME, check, rules

__all__ = ["causal_conv1d", "causal_conv1d_step"]

WIDTHS = (2, 3, 4)
_RULES = rules(
    x_BLD=FLOATS,
    weight_DW=(SAME, torch.float32),
    bias_D=(SAME, torch.float32),
    positions_BL=INDICES,
    initial_state_BVD=(SAME,),
)


def causal_conv1d(
    x_BLD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    positions_BL: torch.Tensor | None = None,
    initial_state_BVD: torch.Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(bias + Σ_j weight[W-1-j] · x[t-j]) (B, L, D), and the final state (B, V, D).

    Both in the dtype of ``x``, computed in fp32. ``silu=False`` leaves the activation out.
    Gradients reach ``x``, ``weight``, ``bias`` and ``initial_state``, and come back through the
    final state. Raises ``ValueError`` on wrong shapes, dtypes, devices or strides, and on an
    unavailable backend.
    """
    arguments = op.Convolution(x_BLD, weight_DW, bias_D, positions_BL, initial_state_BVD, silu)
    if weight_DW.ndim != 2 or weight_DW.shape[1] not in WIDTHS:
        raise ValueError(
            f"weight_DW {tuple(weight_DW.shape)} must be (D, W) with a width W of "
            f"{', '.join(map(str, WIDTHS))}; squeeze nn.Conv1d's (D, 1, W) first"
        )
    check(_RULES, arguments, V=weight_DW.shape[1] - 1)
    if x_BLD.stride(2) != 1 and x_BLD.shape[2] > 1:
        raise ValueError(
            f"x_BLD (strides {x_BLD.stride()}) must have stride 1 in its last dimension; pass "
            "(rows, tokens, channels), not a transposed view"
        )
    if bias_D is not None and bias_D.dtype != weight_DW.dtype:
        raise ValueError(
            f"bias_D ({bias_D.dtype}) must have the type of weight_DW ({weight_DW.dtype}); cast it"
        )
    chosen = resolve("causal_conv1d", backend, ("triton", "torch", "reference"), x_BLD)
    if chosen == "reference":
        return reference.causal_conv1d(arguments)
    return op.causal_conv1d(*arguments, chosen)


def causal_conv1d_step(
    x_BD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    state_BVD: torch.Tensor,
    positions_B: torch.Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each row: (B, D), and the state for the next; equal to ``causal_conv1d``.

    ``state_BVD`` (B, V, D): the V inputs before, zeros at the start. ``positions_B`` (B,): where a
    row may begin another document. Raises ``ValueError`` as ``causal_conv1d`` does.
    """
    if x_BD.ndim != 2:
        raise ValueError(f"x_BD {tuple(x_BD.shape)} must be a matrix (rows, channels): one token")
    y_BLD, state_BVD = causal_conv1d(
        x_BD[:, None],
        weight_DW,
        bias_D,
        positions_BL=None if positions_B is None else positions_B[..., None],
        initial_state_BVD=state_BVD,
        silu=silu,
        backend=backend,
    )
    return y_BLD[:, 0], state_BVD
