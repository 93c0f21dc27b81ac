"""The norm of all gradients, whatever is spread how, and clipping by it."""

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale all gradients, in place, so that their joint norm is at most ``max_norm``.

    Returns the norm before, a scalar equal on all ranks. Each rank sums the squares of what it
    holds, divided by the number of ranks that hold the same; one scalar all-reduce adds them up.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    held = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch.stack(torch._foreach_norm(held)).float()
    copies = torch.tensor([_copies(g) for g in gradients], device=norms.device)
    total = (norms.square() / copies).sum()
    if dist.get_world_size() > 1:
        total = _sum_over_ranks(total, gradients[0])
    norm = total.sqrt()
    torch._foreach_mul_(held, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _copies(gradient: torch.Tensor) -> int:
    """Ranks that hold the same part of a gradient."""
    world = dist.get_world_size()
    if not isinstance(gradient, DTensor):
        return world
    mesh = gradient.device_mesh
    parts = prod(
        mesh.size(dim) for dim, placement in enumerate(gradient.placements) if placement.is_shard()
    )
    return world // parts


def _sum_over_ranks(total: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Under CPU offload gradients lie on the host, but the ranks' collectives are on the device."""
    if isinstance(gradient, DTensor):
        total = total.to(gradient.device_mesh.device_type)
    dist.all_reduce(total)
    return total.to(gradient.device)
