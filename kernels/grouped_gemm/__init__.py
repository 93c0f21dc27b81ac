"""Grouped matrix products on routed rows: one weight matrix per group, rows picked by a route.

T tokens, R routed rows, G groups, D model, F hidden.

=============  =====================  ==============================================================
argument       shape, dtype           meaning
=============  =====================  ==============================================================
``x_TD``       (T, D) float           tokens
``w_GFD``      (G, F, D), as x        one matrix (out, in) per group, as ``nn.Linear`` stores it
``row_R``      (R,) int64 or int32    the token each routed row reads and adds to, sorted by group
``offset_G1``  (G+1,) int64 or int32  group g owns routed rows offset[g] … offset[g+1]-1; 0 … R
``weight_R``   (R,) fp32 or none      factor of each routed row's result; none: 1
``once``       bool                   the caller's word that no token occurs twice: results are
                                      then written straight to their tokens, not added up
=============  =====================  ==============================================================

Groups may be empty or ragged; a token may occur in several groups, twice in one, or nowhere (its
result is 0). A padded row is any token with weight 0. Gradients reach ``x``, every ``w`` and
``weight_R``. Backends: ``triton`` (CUDA), ``torch`` (fast, CPU and CUDA) and ``reference`` (the
definition).
"""

import torch

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.grouped_gemm import op, reference

BACKENDS = ("triton", "torch", "reference")


def grouped_linear(
    x_TD: torch.Tensor,
    w_GFD: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None = None,
    *,
    once: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y[row] += weight · (x[row] @ w[g].T) over all routed rows → (T, F), dtype of ``x``.

    Raises ``ValueError`` on wrong shapes, dtypes, devices or offsets, and on an unavailable
    backend.
    """
    _check_routes(x_TD, row_R, offset_G1, weight_R)
    _check_weight("w_GFD", w_GFD, x_TD, offset_G1, (None, x_TD.shape[1]))
    chosen = resolve("grouped_linear", backend, BACKENDS, x_TD.device, x_TD.dtype)
    if chosen == "reference":
        return reference.grouped_linear(x_TD, w_GFD, row_R, offset_G1, weight_R)
    return op.grouped_linear(x_TD, w_GFD, row_R, offset_G1, weight_R, once, chosen)


def grouped_swiglu(
    x_TD: torch.Tensor,
    w1_GFD: torch.Tensor,
    w3_GFD: torch.Tensor,
    w2_GDF: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None = None,
    *,
    once: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y[row] += weight · w2[g] (silu(w1[g] x[row]) ⊙ w3[g] x[row]) → (T, D), dtype of ``x``.

    One expert MLP per group: ``w1`` is the gate, ``w3`` the up, ``w2`` the down projection. Raises
    ``ValueError`` on wrong shapes, dtypes, devices or offsets, and on an unavailable backend.
    """
    _check_routes(x_TD, row_R, offset_G1, weight_R)
    _check_weight("w1_GFD", w1_GFD, x_TD, offset_G1, (None, x_TD.shape[1]))
    hidden = w1_GFD.shape[1]
    _check_weight("w3_GFD", w3_GFD, x_TD, offset_G1, (hidden, x_TD.shape[1]))
    _check_weight("w2_GDF", w2_GDF, x_TD, offset_G1, (x_TD.shape[1], hidden))
    chosen = resolve("grouped_swiglu", backend, BACKENDS, x_TD.device, x_TD.dtype)
    tensors = (x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, offset_G1, weight_R)
    if chosen == "reference":
        return reference.grouped_swiglu(*tensors)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return op.grouped_swiglu(*tensors, once, keep, chosen)[0]


def _check_routes(
    x_TD: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
) -> None:
    if x_TD.ndim != 2 or not x_TD.is_floating_point():
        raise ValueError(
            f"x_TD ({tuple(x_TD.shape)}, {x_TD.dtype}) must be a floating-point matrix "
            "(tokens, width); flatten batch and sequence first"
        )
    for name, tensor in (("row_R", row_R), ("offset_G1", offset_G1)):
        if tensor.ndim != 1 or tensor.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name} ({tuple(tensor.shape)}, {tensor.dtype}) must be one-dimensional "
                "int64 or int32"
            )
    for name, other in (("row_R", row_R), ("offset_G1", offset_G1), ("weight_R", weight_R)):
        if other is not None and other.device != x_TD.device:
            raise ValueError(
                f"{name} ({other.device}) must be on the device of x_TD ({x_TD.device}); move it"
            )
    if weight_R is not None:
        if weight_R.shape != row_R.shape:
            raise ValueError(
                f"weight_R {tuple(weight_R.shape)} must have one entry per routed row, "
                f"as row_R {tuple(row_R.shape)}"
            )
        if weight_R.dtype not in (torch.float32, x_TD.dtype):
            raise ValueError(
                f"weight_R ({weight_R.dtype}) must be float32 or of x_TD's {x_TD.dtype}; cast it"
            )
    # elsewhere reading the offsets would wait for the device; a compiled graph has none to read
    if x_TD.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_offsets(offset_G1.tolist(), row_R.shape[0])


def _check_offsets(offsets: list[int], rows: int) -> None:
    if not offsets or offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
        raise ValueError(
            f"offset_G1 ({offsets}) must rise from 0 to the number of routed rows ({rows}); "
            "group g owns rows offset[g] … offset[g+1]-1"
        )


def _check_weight(
    name: str,
    w_GFD: torch.Tensor,
    x_TD: torch.Tensor,
    offset_G1: torch.Tensor,
    expected: tuple[int | None, int],
) -> None:
    if w_GFD.ndim != 3 or w_GFD.shape[0] != offset_G1.shape[0] - 1:
        raise ValueError(
            f"{name} {tuple(w_GFD.shape)} must have three dimensions (groups, out, in) and one "
            f"group per pair of offsets ({offset_G1.shape[0] - 1})"
        )
    if any(want not in (None, have) for want, have in zip(expected, w_GFD.shape[1:], strict=True)):
        rule = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} {tuple(w_GFD.shape)} must have (out, in) = ({rule})")
    if w_GFD.dtype != x_TD.dtype or w_GFD.device != x_TD.device:
        raise ValueError(
            f"{name} ({w_GFD.dtype} on {w_GFD.device}) must have the dtype and device of x_TD "
            f"({x_TD.dtype} on {x_TD.device}); cast one of them"
        )
