"""Gathers and scatters rows by a route, and selects rows by top-k.

T tokens, R routed rows, G groups, D model.

=============  =====================  ==============================================================
argument       shape, dtype           meaning
=============  =====================  ==============================================================
``x_TD``       (T, D) float           tokens
``y_RD``       (R, D) float           one result per routed row
``row_R``      (R,) int64 or int32    the token of each routed row; tokens may repeat or be missing
``weight_R``   (R,) fp32 or none      factor of each routed row; none: 1
``scores_GT``  (G, T) fp32            score of each token for each group; -inf: last of all
=============  =====================  ==============================================================

All three give the same result on every run. Backends: ``triton`` (CUDA), ``torch`` (fast, CPU and
CUDA) and ``reference``.
"""

import torch

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.checks import FLOATS, INDICES, SAME, check, check_ids, rules
from earlyfuse.kernels.permute import op, reference

BACKENDS = ("triton", "torch", "reference")
_GATHER = rules(x_TD=FLOATS, row_R=INDICES)
_SCATTER = rules(y_RD=FLOATS, row_R=INDICES, weight_R=(torch.float32, SAME))


def gather_rows(x_TD: torch.Tensor, row_R: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x[row] → (R, D), dtype of ``x``.

    Raises ``ValueError`` on wrong shapes, dtypes or devices, and on a CPU on missing rows.
    """
    check(_GATHER, (x_TD, row_R))
    check_ids("row_R", row_R, x_TD.shape[0], "the rows of x_TD")
    chosen = resolve("gather_rows", backend, BACKENDS, x_TD)
    if chosen == "reference":
        return reference.gather_rows(x_TD, row_R)
    return op.gather_rows(x_TD, row_R, chosen)


def scatter_add_rows(
    y_RD: torch.Tensor,
    row_R: torch.Tensor,
    tokens: int,
    weight_R: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """out[row] += weight · y over all routed rows → (tokens, D), dtype of ``y``; else 0.

    Gradients reach ``y`` and ``weight_R``. Raises ``ValueError`` on wrong shapes, dtypes or
    devices, and on a CPU on missing rows.
    """
    check(_SCATTER, (y_RD, row_R, weight_R))
    if tokens < 0:
        raise ValueError(f"tokens ({tokens}) must not be negative; pass the rows of the result")
    check_ids("row_R", row_R, tokens, "the tokens")
    chosen = resolve("scatter_add_rows", backend, BACKENDS, y_RD)
    if chosen == "reference":
        return reference.scatter_add_rows(y_RD, row_R, tokens, weight_R)
    return op.scatter_add_rows(y_RD, row_R, tokens, weight_R, chosen)


def select_top_k(scores_GT: torch.Tensor, k: int, *, backend: str = "auto") -> torch.Tensor:
    """Ids of each group's ``k`` highest scores → (G, k) int64, highest first, ties by lower id.

    No gradient. NaN has no place in the order. Raises ``ValueError`` unless ``scores_GT`` is a
    float32 matrix and 0 ≤ k ≤ T.
    """
    if scores_GT.ndim != 2 or scores_GT.dtype != torch.float32:
        raise ValueError(
            f"scores_GT ({tuple(scores_GT.shape)}, {scores_GT.dtype}) must be a float32 matrix "
            "(G, T): lower precision makes ties; cast it"
        )
    if not 0 <= k <= scores_GT.shape[1]:
        raise ValueError(
            f"k ({k}) must lie in [0, {scores_GT.shape[1]}], the number of tokens; lower it"
        )
    chosen = resolve("select_top_k", backend, BACKENDS, scores_GT)
    if chosen == "reference":
        return reference.select_top_k(scores_GT.detach(), k)
    return op.select_top_k(scores_GT.detach(), k, chosen)
