"""Sums named tensors over all ranks in one collective."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torchtitan.distributed import ParallelDims

Value = TypeVar("Value")


def sum_over_ranks(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor summed over all ranks, which have the same names, shapes and one dtype."""
    if dist.get_world_size() == 1 or not named:
        return named
    flat = torch.cat([tensor.flatten() for tensor in named.values()])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in named.values()])
    return {
        name: part.view_as(tensor)
        for (name, tensor), part in zip(named.items(), parts, strict=True)
    }


def is_first_along(parallel_dims: ParallelDims, axis: str) -> bool:
    """True if this rank is the first of its group along a mesh axis."""
    mesh = parallel_dims.get_optional_mesh(axis)
    return mesh is None or mesh.get_local_rank() == 0


def all_stages(here: dict[str, Value], parallel_dims: ParallelDims) -> dict[str, Value]:
    """``here`` and the entries of other pipeline stages, in the same order on all ranks."""
    if not parallel_dims.pp_enabled:
        return here
    group = parallel_dims.get_mesh("pp").get_group()
    stages: list[dict[str, Value]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(stages, here, group=group)
    return {name: here.get(name, value) for stage in stages for name, value in stage.items()}
