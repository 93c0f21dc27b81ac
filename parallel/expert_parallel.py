"""Expert parallelism: the experts of every pool are spread evenly over the ranks of a mesh.

A rank sends each routed row to the rank that holds its expert, and gets the result back, in two
all-to-alls. Expert choice with static budgets takes the same number of rows for every expert on
every rank, so these are of fixed, equal sizes: no counts are exchanged and none reaches the host.
Other routes (exact budgets, causal routing) may have any number of rows for each expert: ranks
first tell each other all counts.

Collectives are waited for where their result is used, in forward and backward: the layer sends the
rows of all pools before it computes the first, so one modality's rows travel while another's
experts work.

T tokens of this rank, R routed rows of this rank, W ranks, D width.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from earlyfuse.kernels.permute import gather_rows, scatter_add_rows
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routes import Routes


def spread_experts(model: Decoder, mesh: DeviceMesh) -> None:
    """Give each rank of ``mesh`` an equal part of every pool, in place, and connect them."""
    for pool in model.modules():
        if isinstance(pool, ExpertPool):
            experts = pool.experts
            for name, weight in list(experts.named_parameters(recurse=False)):
                spread = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
                experts.register_parameter(name, torch.nn.Parameter(spread))
            pool.exchange = AllToAll(mesh, pool.config.experts // mesh.size())


class Sent(NamedTuple):
    """Rows on their way, and what is needed to bring them home.

    ``rows_RD``   this rank's routed rows, sorted by expert, hence by the rank they go to
    ``to_W``      rows that this rank sends to each rank
    ``came_WE``   rows that each rank sends to each of the experts here
    """

    rows_RD: torch.Tensor
    to_W: list[int]
    came_WE: tuple[tuple[int, ...], ...]
    static: bool
    tokens: int
    routes: Routes

    @property
    def from_W(self) -> list[int]:
        """Rows that each rank sends to this one."""
        return [sum(count_E) for count_E in self.came_WE]


class AllToAll:
    """Exchange over the ranks of ``mesh``, each of which holds ``experts_here`` of a pool."""

    def __init__(self, mesh: DeviceMesh, experts_here: int):
        self.mesh, self.experts_here = mesh, experts_here

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Sent:
        """Start the rows' journey to their experts."""
        ranks, here = self.mesh.size(), self.experts_here
        if static:
            rows = routes.row_R.shape[0] // (ranks * here)
            to_W, came_WE = [rows * here] * ranks, ((rows,) * here,) * ranks
        else:
            to_W, came_WE = self._counts(routes.offset_G1.diff())
        sent = Sent(gather_rows(x_TD, routes.row_R), to_W, came_WE, static, x_TD.shape[0], routes)
        return sent._replace(rows_RD=_AllToAll.apply(sent.rows_RD, to_W, sent.from_W, self.mesh))

    def receive(self, sent: Sent) -> tuple[torch.Tensor, Routes]:
        """What arrived lies by sender, then expert; the routes read it by expert."""
        by_expert = _equal_routes_by_expert if sent.static else _routes_by_expert
        return sent.rows_RD, by_expert(sent.came_WE, sent.rows_RD.device)

    def send_back(self, y_RD: torch.Tensor, sent: Sent) -> Sent:
        """Start the results' journey home."""
        return sent._replace(rows_RD=_AllToAll.apply(y_RD, sent.from_W, sent.to_W, self.mesh))

    def combine(self, returned: Sent) -> torch.Tensor:
        """(T, D): each token's weighted sum."""
        row_R, _, weight_R = returned.routes
        return scatter_add_rows(returned.rows_RD, row_R, returned.tokens, weight_R)

    def _counts(self, count_G: torch.Tensor) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """``to_W`` and ``came_WE`` of ``Sent``; ``count_G``: rows of this rank for every expert."""
        ranks, here = self.mesh.size(), self.experts_here
        count_WG = count_G.new_empty(ranks * len(count_G))
        dist.all_gather_single(count_WG, count_G.contiguous(), group=self.mesh.get_group())
        by_rank_WG = count_WG.view(ranks, -1).tolist()
        rank = self.mesh.get_local_rank()
        mine = by_rank_WG[rank]
        to_W = [sum(mine[first : first + here]) for first in range(0, len(mine), here)]
        return to_W, tuple(tuple(row[rank * here : (rank + 1) * here]) for row in by_rank_WG)


def _routes_by_expert(came_WE: tuple[tuple[int, ...], ...], device: torch.device) -> Routes:
    """Rows that lie by sender, then expert, as many as ``came_WE`` says, read by expert."""
    ranges_EW: list[list[torch.Tensor]] = [[] for _ in came_WE[0]]
    start = 0
    for count_E in came_WE:
        for ranges_W, count in zip(ranges_EW, count_E, strict=True):
            ranges_W.append(torch.arange(start, start + count, device=device))
            start += count
    ends = accumulate((sum(map(len, ranges_W)) for ranges_W in ranges_EW), initial=0)
    rows = [rows for ranges_W in ranges_EW for rows in ranges_W]
    return Routes(torch.cat(rows), torch.tensor(list(ends), device=device))


# with static budgets the same in every step
_equal_routes_by_expert = lru_cache(maxsize=64)(_routes_by_expert)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; the gradient travels back. Neither waits for its own result."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: torch.Tensor, to_W: list[int], from_W: list[int], mesh: DeviceMesh
    ) -> torch.Tensor:
        ctx.to_W, ctx.from_W, ctx.mesh = to_W, from_W, mesh
        return all_to_all_single(rows_RD.contiguous(), from_W, to_W, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        drows_RD = all_to_all_single(drows_RD.contiguous(), ctx.to_W, ctx.from_W, ctx.mesh)
        return drows_RD, None, None, None  # to_W, from_W, mesh
