"""Definitions of gather, scatter and top-k in plain PyTorch.

T tokens, R routed rows, G groups, D model.
"""

import torch


def gather_rows(x_TD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
    """x[row] → (R, D)."""
    return x_TD[row_R]


def scatter_add_rows(
    y_RD: torch.Tensor, row_R: torch.Tensor, tokens: int, weight_R: torch.Tensor | None = None
) -> torch.Tensor:
    """out[row] += weight · y over all rows → (tokens, D), summed in fp32 (fp64 stays fp64)."""
    out_RD = y_RD.to(torch.promote_types(y_RD.dtype, torch.float32))
    if weight_R is not None:
        out_RD = out_RD * weight_R[:, None]
    out_TD = out_RD.new_zeros(tokens, y_RD.shape[1])
    return out_TD.index_add(0, row_R, out_RD).to(y_RD.dtype)


def select_top_k(scores_GT: torch.Tensor, k: int) -> torch.Tensor:
    """The k best tokens of each group, best first; a stable sort leaves ties in index order."""
    return scores_GT.sort(dim=1, descending=True, stable=True).indices[:, :k]
