"""Definition of the grouped ops in plain PyTorch, in fp32 (fp64 stays fp64).

T tokens, R routed rows, G groups, D model, F hidden.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from earlyfuse.kernels.grouped_gemm.op import Linear, Swiglu


def grouped_linear(arguments: Linear) -> torch.Tensor:
    """y[row] += weight · (x[row] @ w[g].T); see ``grouped_gemm`` for shapes."""
    x_TD, w_GFD, row_R, offset_G1, weight_R, _ = arguments
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TF = x_TD.new_zeros(x_TD.shape[0], w_GFD.shape[1], dtype=dtype)
    for group, rows_N, weight_N in _groups(row_R, offset_G1, weight_R):
        y_NF = x_TD[rows_N].to(dtype) @ w_GFD[group].to(dtype).T
        y_TF = _add_rows(y_TF, rows_N, y_NF, weight_N)
    return y_TF.to(x_TD.dtype)


def grouped_swiglu(arguments: Swiglu) -> torch.Tensor:
    """y[row] += weight · w2[g] (silu(w1[g] x[row]) ⊙ w3[g] x[row]); shapes in ``grouped_gemm``."""
    x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, offset_G1, weight_R, _ = arguments
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=dtype)
    for group, rows_N, weight_N in _groups(row_R, offset_G1, weight_R):
        x_ND = x_TD[rows_N].to(dtype)
        gate_NF = x_ND @ w1_GFD[group].to(dtype).T
        up_NF = x_ND @ w3_GFD[group].to(dtype).T
        y_ND = (F.silu(gate_NF) * up_NF) @ w2_GDF[group].to(dtype).T
        y_TD = _add_rows(y_TD, rows_N, y_ND, weight_N)
    return y_TD.to(x_TD.dtype)


def _groups(
    row_R: torch.Tensor, offset_G1: torch.Tensor, weight_R: torch.Tensor | None
) -> list[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """Each group's number, its token ids and their weights."""
    offsets = offset_G1.tolist()
    slices = [slice(start, stop) for start, stop in pairwise(offsets)]
    return [
        (group, row_R[at], None if weight_R is None else weight_R[at])
        for group, at in enumerate(slices)
    ]


def _add_rows(
    y_TD: torch.Tensor, rows_N: torch.Tensor, y_ND: torch.Tensor, weight_N: torch.Tensor | None
) -> torch.Tensor:
    """``y`` with the weighted rows added; rows may repeat."""
    if weight_N is not None:
        y_ND = y_ND * weight_N[:, None].to(y_ND.dtype)
    return y_TD.index_add(0, rows_N, y_ND)
