"""Routes: which rows go to which group, with which weight. Behind every sparse layer here.

Every system of the papers picks rows, runs a function on them and adds the result back with a
weight. Makers of routes: ``by_modality`` below (built once per batch) and ``models/routing``;
consumers: ``kernels.grouped_gemm`` and ``kernels.permute``, which take the three tensors alone.

T tokens (B rows × S positions, flattened), R routed rows, G groups.
"""

from typing import NamedTuple

import torch


class Routes(NamedTuple):
    """Rows sorted by group. Unpack it into a kernel: ``grouped_linear(x_TD, w_GFD, *routes)``.

    ``row_R``      (R,) int64: the token each routed row reads and writes, sorted by group
    ``offset_G1``  (G+1,) int64: group g owns rows ``offset[g] … offset[g+1]-1``
    ``weight_R``   (R,) fp32 or None: factor of each row's result; None means 1
    """

    row_R: torch.Tensor
    offset_G1: torch.Tensor
    weight_R: torch.Tensor | None = None


def by_modality(group_T: torch.Tensor, groups: int) -> Routes:
    """Every token once, in the group of its modality; tokens keep their order inside a group.

    ``group_T`` (T,) integer group of each token, in ``0 … groups-1``. No host synchronisation.
    """
    row_T = torch.argsort(group_T, stable=True)
    group_G1 = torch.arange(groups, device=group_T.device).unsqueeze(1)
    count_G = (group_T.unsqueeze(0) == group_G1).sum(1)
    return Routes(row_T, torch.nn.functional.pad(count_G.cumsum(0), (1, 0)))


def group_of_rows(offset_G1: torch.Tensor, rows: int) -> torch.Tensor:
    """(R,) int64 group of each routed row. No host synchronisation."""
    return torch.searchsorted(
        offset_G1[1:], torch.arange(rows, device=offset_G1.device), right=True
    )
