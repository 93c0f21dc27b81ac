"""Causal depthwise convolution over packed documents, with SiLU: Mamba's, before its scan.

B rows, L tokens of a row, D channels, W taps (2, 3 or 4), V = W - 1.

=====================  ========================  ===================================================
argument               shape, dtype              meaning
=====================  ========================  ===================================================
``x_BLD``              (B, L, D) float           inputs, time-major; channels next to each other
``weight_DW``          (D, W), as x or fp32      taps of each channel; the last is the token's own
``bias_D``             (D,), as weight; or none  added before the SiLU; none: 0
``positions_BL``       (B, L) int64 or int32     0 at a document's first token, then 1, 2 …; none:
                       or none                   each row continues one document
``initial_state_BVD``  (B, V, D), as x; or none  the V inputs before the segment; none: zeros
=====================  ========================  ===================================================

A token reads itself and at most min(position, V) tokens before it: no tap crosses the start of its
document. A document that began before the segment has positions that say so, and reads the initial
state. The final state is the last V inputs, whichever documents they belong to, so consecutive
segments (over calls or ranks) joined by their states equal the whole sequence, gradients included.
A decoding step is a convolution of length 1.

The function is that of Dao's ``causal_conv1d`` (https://github.com/Dao-AILab/causal-conv1d) in the
time-major layout that projections produce, with positions instead of sequence ids. All backends
give the same bits on every run. Backends: ``triton``, ``torch``, ``reference``.
"""

import torch

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.causal_conv1d import op, reference
from earlyfuse.kernels.checks import FLOATS, INDICES, SAME, check, rules

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
