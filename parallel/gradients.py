"""The norm of all gradients, whatever is spread how, and clipping by it."""

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip(
    parameters: Iterable[torch.Tensor], max_norm: float, pipeline_ranks: int = 1
) -> torch.Tensor:
    """Scale all gradients, in place, so that their joint norm is at most ``max_norm``.

    Returns the norm before, a scalar equal on all ranks. Each rank sums the squares of what it
    holds, divided by the number of ranks that hold the same; one scalar all-reduce adds them up.
    Of ``pipeline_ranks`` ranks each has gradients of its own.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    held = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch.stack(torch._foreach_norm(held)).float()
    alike = dist.get_world_size() // pipeline_ranks
    copies = torch.tensor([alike // _parts(g) for g in gradients], device=norms.device)
    total = (norms.square() / copies).sum()
    if dist.get_world_size() > 1:
        total = _sum_over_ranks(total, gradients[0])
    norm = total.sqrt()
    torch._foreach_mul_(held, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _parts(gradient: torch.Tensor) -> int:
    """Parts that a gradient is cut into, each on a rank of its own."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return prod(
        mesh.size(dim) for dim, placement in enumerate(gradient.placements) if placement.is_shard()
    )


def _sum_over_ranks(total: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Under CPU offload gradients lie on the host, but the ranks' collectives are on the device."""
    if isinstance(gradient, DTensor):
        total = total.to(gradient.device_mesh.device_type)
    dist.all_reduce(total)
    return total.to(gradient.device)
