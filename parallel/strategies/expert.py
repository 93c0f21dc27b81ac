"""Expert parallelism: the experts of every pool are sharded evenly over a mesh.

Two all-to-alls dispatch each routed row to the rank of its expert and return the result. Expert
choice with static budgets selects equally many rows for every expert on every rank: sizes are
fixed and equal, and no counts are exchanged. With token choice, and with exact budgets
(validation), ranks first all-gather the rows per expert, which synchronises the host once per layer
and forward.

Collectives are waited for where their result is used, forward and backward: a layer dispatches the
rows of all pools before it computes the first, so one modality's rows overlap another's compute.

T tokens of this rank, R routed rows of this rank, W ranks, E experts of a pool, H of them on each
rank, D width.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.config import ParallelismConfig

from earlyfuse.kernels.permute import gather_rows, scatter_add_rows
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routes import Routes


def is_split(module: nn.Module) -> bool:
    """True if expert parallelism shards the first dimension of ``module``'s parameters."""
    return getattr(module, "expert_split", False)


def apply_expert_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Shard the experts of every pool over ``mesh``, in place, and set its dispatcher."""
    for pool in model.modules():
        if isinstance(pool, ExpertPool):
            experts = pool.experts
            for name, weight in list(experts.named_parameters(recurse=False)):
                spread = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
                experts.register_parameter(name, nn.Parameter(spread))
            pool.dispatcher = AllToAllDispatcher(mesh, pool.config.experts // mesh.size())


def check_expert_parallel(parallelism: ParallelismConfig, model: Decoder.Config) -> None:
    """``ValueError`` unless every pool has a multiple of the degree of experts."""
    degree = parallelism.expert_parallel_degree
    if degree == 1:
        return
    field, counts = f"parallelism.expert_parallel_degree ({degree})", model.even_sizes("expert")
    if not counts:
        raise ValueError(f"{field} must be 1: this model has no routed experts")
    for name, count in counts.items():
        if count % degree:
            raise ValueError(
                f"{field} must divide {name} ({count}) of the model; lower it or change the model"
            )


class Sent(NamedTuple):
    """Dispatched rows, and what returning them needs.

    ``rows_RD``    rows in flight: dispatched sorted by expert, hence by rank
    ``to_W``       rows sent to each rank
    ``come_WH``    rows received from each rank for each expert here
    """

    rows_RD: torch.Tensor
    to_W: list[int]
    come_WH: tuple[tuple[int, ...], ...]
    static: bool
    tokens: int
    routes: Routes


class AllToAllDispatcher:
    """All-to-all over ``mesh``, with ``experts_here`` experts of a pool on each rank."""

    def __init__(self, mesh: DeviceMesh, experts_here: int):
        self.mesh, self.experts_here = mesh, experts_here

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Sent:
        """Start sending rows to the ranks of their experts."""
        ranks, here = self.mesh.size(), self.experts_here
        if static:
            rows = routes.row_R.shape[0] // (ranks * here)
            to_W, come_WH = [rows * here] * ranks, ((rows,) * here,) * ranks
        else:
            to_W, come_WH = self._counts(routes.offset_G1.diff())
        rows_RD = self._exchange(gather_rows(x_TD, routes.row_R), to_W, _totals(come_WH))
        return Sent(rows_RD, to_W, come_WH, static, x_TD.shape[0], routes)

    def receive(self, sent: Sent) -> tuple[torch.Tensor, Routes]:
        """Received rows, ordered by sender and expert, and routes that read them by expert."""
        routes = _static_routes if sent.static else _routes
        return sent.rows_RD, routes(sent.come_WH, sent.rows_RD.device)

    def send_back(self, y_RD: torch.Tensor, sent: Sent) -> Sent:
        """Start returning the results."""
        rows_RD = self._exchange(y_RD, _totals(sent.come_WH), sent.to_W)
        return sent._replace(rows_RD=rows_RD)

    def combine(self, returned: Sent) -> torch.Tensor:
        """(T, D): the weighted sum of each token's rows."""
        row_R, _, weight_R = returned.routes
        return scatter_add_rows(returned.rows_RD, row_R, returned.tokens, weight_R)

    def _exchange(self, rows_RD: torch.Tensor, to_W: list[int], from_W: list[int]) -> torch.Tensor:
        return _AllToAll.apply(rows_RD, to_W, from_W, self.mesh)

    def _counts(self, count_E: torch.Tensor) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """Rows from this rank to each rank, and from each rank to each expert here."""
        rank, here = self.mesh.get_local_rank(), self.experts_here
        counts = count_E.new_empty(self.mesh.size() * len(count_E))
        dist.all_gather_single(counts, count_E, group=self.mesh.get_group())
        counts_WE = counts.view(-1, len(count_E)).tolist()
        own_E, mine = counts_WE[rank], slice(rank * here, (rank + 1) * here)
        to_W = [sum(own_E[first : first + here]) for first in range(0, len(own_E), here)]
        return to_W, tuple(tuple(count_E[mine]) for count_E in counts_WE)


def _totals(counts_WH: tuple[tuple[int, ...], ...]) -> list[int]:
    return [sum(counts_H) for counts_H in counts_WH]


def _routes(counts_WH: tuple[tuple[int, ...], ...], device: torch.device) -> Routes:
    """Routes that read rows, ordered by sender and expert in the given numbers, by expert."""
    count_WH = torch.tensor(counts_WH, device=device)
    ranks, experts = count_WH.shape
    expert_R = torch.arange(experts, device=device).repeat(ranks)
    expert_R = expert_R.repeat_interleave(count_WH.flatten(), output_size=sum(_totals(counts_WH)))
    offset_G1 = torch.nn.functional.pad(count_WH.sum(0).cumsum(0), (1, 0))
    return Routes(expert_R.argsort(stable=True), offset_G1)


_static_routes = lru_cache(maxsize=64)(_routes)


class _AllToAll(torch.autograd.Function):
    """Asynchronous all-to-all of rows; backward sends gradients back."""

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
