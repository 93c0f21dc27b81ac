"""Sums named tensors over all ranks in one collective."""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
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


class BufferSums:
    """Sums a buffer of some modules over all ranks, which have those of all pipeline stages."""

    def __init__(self, modules: Mapping[str, nn.Module], buffer: str, parallel_dims: ParallelDims):
        self.modules, self.buffer = modules, buffer
        # the ranks of a tensor-parallel group have the same tokens: one of them counts
        self.counts = is_first_along(parallel_dims, "tp")
        here = {name: getattr(module, buffer) for name, module in modules.items()}
        kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in here.items()}
        self.kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = all_stages(
            kinds, parallel_dims
        )

    def __call__(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The sum of each module here, by its name."""
        summed = sum_over_ranks(
            {
                name: getattr(self.modules[name], self.buffer) * self.counts
                if name in self.modules
                else torch.zeros(shape, dtype=dtype, device=device)
                for name, (shape, dtype) in self.kinds.items()
            }
        )
        return {name: summed[name] for name in self.modules}
