"""Grouped matrix products on routed rows: one weight matrix per group, rows selected by a route.

T tokens, R routed rows, G groups, D model, F hidden.

=================  =====================  =========================================================
argument           shape, dtype           meaning
=================  =====================  =========================================================
``x_TD``           (T, D) float           tokens
``w_GFD``          (G, F, D), as x        one matrix (out, in) per group, as ``nn.Linear`` stores it
``row_R``          (R,) int64 or int32    the token each routed row reads and adds to, by group
``offset_G1``      (G+1,) int64 or int32  group g owns rows offset[g] … offset[g+1]-1; 0 … R
``weight_R``       (R,) fp32, x or none   factor of each routed row's result; none: 1
``unique_tokens``  bool                   the caller's promise that no token occurs twice: results
                                          are written straight to their tokens, not added up
=================  =====================  =========================================================

Groups may be empty or ragged; a token may occur in several groups, twice in one, or nowhere (its
result is 0). A padded row is any token with weight 0. Gradients reach ``x``, every ``w`` and
``weight_R``. Backends: ``triton`` (CUDA), ``torch`` (fast, CPU and CUDA) and ``reference`` (the
definition).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.checks import FLOATS, INDICES, SAME, check, check_ids, readable, rules
from earlyfuse.kernels.grouped_gemm import op, reference
from earlyfuse.kernels.registration import needs_gradient

BACKENDS = ("triton", "torch", "reference")
_ROUTES: dict[str, Sequence[torch.dtype | str]] = {
    "row_R": INDICES,
    "offset_G1": INDICES,
    "weight_R": (torch.float32, SAME),
}
_LINEAR = rules(x_TD=FLOATS, w_GFD=(SAME,), **_ROUTES)
_SWIGLU = rules(x_TD=FLOATS, w1_GFD=(SAME,), w3_GFD=(SAME,), w2_GDF=(SAME,), **_ROUTES)


def grouped_linear(
    x_TD: Tensor,
    w_GFD: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None = None,
    *,
    unique_tokens: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y[row] += weight · (x[row] @ w[g].T) over all routed rows → (T, F), dtype of ``x``.

    Raises ``ValueError`` on wrong shapes, dtypes, devices or offsets, and on an unavailable
    backend.
    """
    arguments = op.Linear(x_TD, w_GFD, row_R, offset_G1, weight_R, unique_tokens)
    check(_LINEAR, arguments)
    _check_routes(x_TD, row_R, offset_G1)
    chosen = resolve("grouped_linear", backend, BACKENDS, x_TD)
    if chosen == "reference":
        return reference.grouped_linear(arguments)
    return op.grouped_linear(*arguments, chosen)


def grouped_swiglu(
    x_TD: Tensor,
    w1_GFD: Tensor,
    w3_GFD: Tensor,
    w2_GDF: Tensor,
    row_R: Tensor,
    offset_G1: Tensor,
    weight_R: Tensor | None = None,
    *,
    unique_tokens: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y[row] += weight · w2[g] (silu(w1[g] x[row]) ⊙ w3[g] x[row]) → (T, D), dtype of ``x``.

    One expert MLP per group: ``w1`` is the gate, ``w3`` the up, ``w2`` the down projection. Raises
    ``ValueError`` on wrong shapes, dtypes, devices or offsets, and on an unavailable backend.
    """
    arguments = op.Swiglu(x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, offset_G1, weight_R, unique_tokens)
    check(_SWIGLU, arguments)
    _check_routes(x_TD, row_R, offset_G1)
    chosen = resolve("grouped_swiglu", backend, BACKENDS, x_TD)
    if chosen == "reference":
        return reference.grouped_swiglu(arguments)
    return op.grouped_swiglu(*arguments, needs_gradient(arguments), chosen)[0]


def _check_routes(x_TD: Tensor, row_R: Tensor, offset_G1: Tensor) -> None:
    if readable(offset_G1):
        offsets, rows = offset_G1.tolist(), row_R.shape[0]
        if not offsets or offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
            raise ValueError(
                f"offset_G1 ({offsets}) must rise from 0 to the number of routed rows ({rows}); "
                "pass the first row of each group, then that number"
            )
    check_ids("row_R", row_R, x_TD.shape[0], "the rows of x_TD")
