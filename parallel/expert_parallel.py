"""Expert parallelism: the experts of every pool are spread evenly over the ranks of a mesh.

A rank sends each routed row to the rank that holds its expert, and gets the result back, in two
all-to-alls. Expert choice with static budgets takes the same number of rows for every expert on
every rank, so these are of fixed, equal sizes: no counts are exchanged and none reaches the host.
With exact budgets (validation) ranks first tell each other their counts.

Collectives are waited for where their result is used, in forward and backward: the layer sends the
rows of all pools before it computes the first, so one modality's rows travel while another's
experts work.

T tokens of this rank, R routed rows of this rank, W ranks, D width.
"""

from functools import lru_cache
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
    ``counts_W``  rows per expert on each rank
    """

    rows_RD: torch.Tensor
    counts_W: list[int]
    tokens: int
    routes: Routes


class AllToAll:
    """Exchange over the ranks of ``mesh``, each of which holds ``experts_here`` of a pool."""

    def __init__(self, mesh: DeviceMesh, experts_here: int):
        self.mesh, self.experts_here = mesh, experts_here

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Sent:
        """Start the rows' journey to their experts."""
        ranks, experts = self.mesh.size(), self.experts_here
        rows = routes.row_R.shape[0] // (ranks * experts)
        counts = [rows] * ranks if static else self._counts(rows, x_TD.device)
        travelling = self._exchange(gather_rows(x_TD, routes.row_R), [rows] * ranks, counts)
        return Sent(travelling, counts, x_TD.shape[0], routes)

    def receive(self, sent: Sent) -> tuple[torch.Tensor, Routes]:
        """What arrived lies by sender, then expert; the routes read it by expert."""
        return sent.rows_RD, _routes(self.experts_here, tuple(sent.counts_W), sent.rows_RD.device)

    def send_back(self, y_RD: torch.Tensor, sent: Sent) -> Sent:
        """Start the results' journey home."""
        own = sent.counts_W[self.mesh.get_local_rank()]
        travelling = self._exchange(y_RD, sent.counts_W, [own] * self.mesh.size())
        return sent._replace(rows_RD=travelling)

    def combine(self, returned: Sent) -> torch.Tensor:
        """(T, D): each token's weighted sum."""
        row_R, _, weight_R = returned.routes
        return scatter_add_rows(returned.rows_RD, row_R, returned.tokens, weight_R)

    def _exchange(self, rows_RD: torch.Tensor, to_W: list[int], from_W: list[int]) -> torch.Tensor:
        """Rows per expert to and from each rank."""
        here = self.experts_here
        to, come = [count * here for count in to_W], [count * here for count in from_W]
        return _AllToAll.apply(rows_RD, to, come, self.mesh)

    def _counts(self, rows: int, device: torch.device) -> list[int]:
        counts_W = torch.empty(self.mesh.size(), dtype=torch.int64, device=device)
        mine = torch.full((1,), rows, dtype=torch.int64, device=device)
        dist.all_gather_single(counts_W, mine, group=self.mesh.get_group())
        return counts_W.tolist()


@lru_cache(maxsize=64)
def _routes(experts: int, counts_W: tuple[int, ...], device: torch.device) -> Routes:
    """Rows that lie by sender, then expert, each ``counts_W`` long, read by expert."""
    first, starts = 0, []
    for count in counts_W:
        starts.append(first)
        first += count * experts
    row_R = [
        torch.arange(start + expert * count, start + (expert + 1) * count, device=device)
        for expert in range(experts)
        for start, count in zip(starts, counts_W, strict=True)
    ]
    offset_G1 = torch.arange(experts + 1, device=device) * sum(counts_W)
    return Routes(torch.cat(row_R), offset_G1)


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
