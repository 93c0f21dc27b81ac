"""Norms of gradients, whatever is spread how, and clipping by them."""

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip(
    groups: Sequence[Iterable[torch.Tensor]], max_norm: float, pipeline_ranks: int = 1
) -> torch.Tensor:
    """Scale the gradients of each group of parameters, in place, so that their joint norm is at
    most ``max_norm``.

    Returns the norm of each group before, equal on all ranks; 0 of one without gradients. Each rank
    sums the squares of what it holds, divided by the number of ranks that hold the same; one
    all-reduce of a number for each group adds them up. Of ``pipeline_ranks`` ranks each has
    gradients of its own.
    """
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    alike = dist.get_world_size() // pipeline_ranks
    any_gradient = next(gradient for group in gradients for gradient in group)
    totals = torch.zeros(len(gradients), device=any_gradient.device)
    for index, group in enumerate(gradients):
        if group:
            totals[index] = _squares(group, alike)
    if dist.get_world_size() > 1:
        totals = _sum_over_ranks(totals, any_gradient)
    norms = totals.sqrt()
    for group, norm in zip(gradients, norms, strict=True):
        if group:
            torch._foreach_mul_(_held(group), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norms


def _squares(gradients: list[torch.Tensor], alike: int) -> torch.Tensor:
    """Sum of the squares of what this rank holds, each divided by the ranks that hold the same."""
    norms = torch.stack(torch._foreach_norm(_held(gradients))).float()
    copies = torch.tensor([alike // _parts(g) for g in gradients], device=norms.device)
    return (norms.square() / copies).sum()


def _held(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _parts(gradient: torch.Tensor) -> int:
    """Parts that a gradient is cut into, each on a rank of its own."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return prod(
        mesh.size(dim) for dim, placement in enumerate(gradient.placements) if placement.is_shard()
    )


def _sum_over_ranks(totals: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Under CPU offload gradients lie on the host, but the ranks' collectives are on the device."""
    if isinstance(gradient, DTensor):
        totals = totals.to(gradient.device_mesh.device_type)
    dist.all_reduce(totals)
    return totals.to(gradient.device)
