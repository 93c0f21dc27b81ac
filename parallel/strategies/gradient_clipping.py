"""Clips gradients by their norm, for any sharding."""

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class GradientClipping:
    """Scales the gradients of each group of parameters to a joint norm of at most ``max_norm``.

    Each rank sums the squares of its shards, divided by the number of ranks with the same shard;
    one all-reduce of a number per group adds them up. Pipeline ranks have different gradients.
    """

    def __init__(
        self, groups: Sequence[Iterable[torch.Tensor]], max_norm: float, pipeline_ranks: int = 1
    ):
        self.groups = [list(group) for group in groups]
        self.max_norm = max_norm
        self.ranks = dist.get_world_size() // pipeline_ranks
        # (group, number of gradients) → ranks with the same shard, of each gradient
        self.copies: dict[tuple[int, int], torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Clip in place; returns the norm of each group before, equal on all ranks, 0 without
        gradients. Synchronises the host in the first call only.
        """
        gradients = [[p.grad for p in group if p.grad is not None] for group in self.groups]
        any_gradient = next(gradient for group in gradients for gradient in group)
        totals = torch.zeros(len(gradients), device=any_gradient.device)
        for index, group in enumerate(gradients):
            if group:
                totals[index] = self._squares(index, group)
        if dist.get_world_size() > 1:
            totals = _sum_over_ranks(totals, any_gradient)
        norms = totals.sqrt()
        for group, norm in zip(gradients, norms, strict=True):
            if group:
                factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(_shards(group), factor)
        return norms

    def _squares(self, index: int, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Sum of squares of this rank's shards, each divided by the ranks with the same shard."""
        norms = torch.stack(torch._foreach_norm(_shards(gradients))).float()
        key = (index, len(gradients))
        if key not in self.copies:
            copies = [self.ranks // _shard_count(gradient) for gradient in gradients]
            self.copies[key] = torch.tensor(copies, device=norms.device)
        return (norms.square() / self.copies[key]).sum()


def _shards(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _shard_count(gradient: torch.Tensor) -> int:
    """Number of different shards of a gradient."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return prod(
        mesh.size(dim) for dim, placement in enumerate(gradient.placements) if placement.is_shard()
    )


def _sum_over_ranks(totals: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """All-reduce on the mesh's device, as gradients are on the host under CPU offload."""
    if isinstance(gradient, DTensor):
        totals = totals.to(gradient.device_mesh.device_type)
    dist.all_reduce(totals)
    return totals.to(gradient.device)
