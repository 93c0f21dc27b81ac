"""Moving rows by a route, and choosing them.

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
from earlyfuse.kernels.permute import op, reference

BACKENDS = ("triton", "torch", "reference")


def gather_rows(x_TD: torch.Tensor, row_R: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x[row] → (R, D), dtype of ``x``. Raises ``ValueError`` on wrong shapes, dtypes or devices."""
    _check_rows("x_TD", x_TD, row_R)
    chosen = resolve("gather_rows", backend, BACKENDS, x_TD.device, x_TD.dtype)
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
    devices.
    """
    _check_rows("y_RD", y_RD, row_R)
    if y_RD.shape[0] != row_R.shape[0]:
        raise ValueError(
            f"y_RD {tuple(y_RD.shape)} must have one row per entry of row_R {tuple(row_R.shape)}"
        )
    if tokens < 0:
        raise ValueError(f"tokens ({tokens}) must not be negative")
    if weight_R is not None and (
        weight_R.shape != row_R.shape
        or weight_R.device != y_RD.device
        or weight_R.dtype not in (torch.float32, y_RD.dtype)
    ):
        raise ValueError(
            f"weight_R ({tuple(weight_R.shape)}, {weight_R.dtype} on {weight_R.device}) must have "
            f"the shape of row_R {tuple(row_R.shape)}, dtype float32 or {y_RD.dtype}, and be on "
            f"{y_RD.device}"
        )
    chosen = resolve("scatter_add_rows", backend, BACKENDS, y_RD.device, y_RD.dtype)
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
            "(groups, tokens): lower precision makes ties; cast it first"
        )
    if not 0 <= k <= scores_GT.shape[1]:
        raise ValueError(
            f"k ({k}) must lie in [0, {scores_GT.shape[1]}], the number of tokens; lower it"
        )
    chosen = resolve("select_top_k", backend, BACKENDS, scores_GT.device)
    if chosen == "reference":
        return reference.select_top_k(scores_GT.detach(), k)
    return op.select_top_k(scores_GT.detach(), k, chosen)


def _check_rows(name: str, tensor: torch.Tensor, row_R: torch.Tensor) -> None:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} ({tuple(tensor.shape)}, {tensor.dtype}) must be a floating-point matrix "
            "(rows, width)"
        )
    if row_R.ndim != 1 or row_R.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"row_R ({tuple(row_R.shape)}, {row_R.dtype}) must be one-dimensional int64 or int32"
        )
    if row_R.device != tensor.device:
        raise ValueError(
            f"row_R ({row_R.device}) must be on the device of {name} ({tensor.device}); move it"
        )
