"""Predicts FSDP's units and each rank's shards of them, as ``parallel/plan.py`` makes them.

Parameters are built on the meta device, without memory.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch
from torchtitan.distributed import ParallelDims

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.precision import fp32_parameters
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.parallel.strategies.expert import is_split
from earlyfuse.parallel.strategies.fsdp import shard_dimension


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    ``shard``: elements per rank, with padding. ``kept``: stays gathered from forward to backward.
    ``fp32``: gathered in fp32 whatever the parameter dtype.
    """

    name: str
    axis: str
    ranks: int
    shard: int
    kept: bool
    fp32: bool

    @property
    def gathered(self) -> int:
        """Elements of the gathered tensor, with padding."""
        return self.shard * self.ranks

    def gathered_bytes(self, param: int) -> int:
        """Bytes of the gathered tensor, for a parameter dtype of ``param`` bytes."""
        return self.gathered * (torch.float32.itemsize if self.fp32 else param)


def fsdp_units(step: Step, pipeline_rank: int = 0) -> list[Unit]:
    """Units of ``plan.parallelize`` on a rank of a pipeline, in the order of the forward pass."""
    dims, reshard = step.dims, step.parallelism.fsdp_reshard_after_forward
    held = _held(step, pipeline_rank)
    with torch.device("meta"):
        built = step.model.build()
    in_fp32 = fp32_parameters(built)
    shards: dict[tuple[str, str], int] = defaultdict(int)
    for name, shape, cut in _parameters(built, dims):
        unit, axis = (in_fp32[name], "fsdp") if name in in_fp32 else _unit_of(name, dims)
        if _part_of(name) in held:
            shards[unit, axis] += _shard_numel(shape, cut, step.axis_ranks(axis))
    return [
        Unit(
            name=unit,
            axis=axis,
            ranks=step.axis_ranks(axis),
            shard=shard,
            kept=reshard == "never" or dims.pp > 1 or (unit == "head" and reshard != "always"),
            fp32=unit in in_fp32.values(),
        )
        for (unit, axis), shard in shards.items()
    ]


def _held(step: Step, pipeline_rank: int) -> set[str]:
    """Names of the embedding, adapters, blocks and head on a rank of a pipeline."""
    names: set[str] = set()
    for blocks in step.stages(pipeline_rank):
        names |= {f"layers.{block}" for block in blocks}
        if blocks.start == 0:
            names |= {"embedding", "vector_input"}
        if blocks.stop == len(step.model.layers):
            names |= {"head", "vector_output"}
    return names


def _parameters(built: Decoder, dims: ParallelDims) -> Iterator[tuple[str, list[int], int | None]]:
    """Name and shape of each parameter after tensor and expert parallelism, and the dimension that
    they shard.
    """
    for prefix, module in built.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name, shape, cut = f"{prefix}.{leaf}", list(parameter.shape), None
            if is_split(module) and dims.ep > 1:
                cut, ways = 0, dims.ep
            elif dims.tp > 1:
                cut, ways = _tensor_cut(built, name, parameter.ndim), dims.tp
            if cut is not None:
                shape[cut] //= ways
            yield name, shape, cut


def _tensor_cut(model: Decoder, name: str, ndim: int) -> int | None:
    """Dimension of a parameter that tensor parallelism shards, if any."""
    parts = name.split(".")
    for depth in range(len(parts)):
        split = getattr(model.get_submodule(".".join(parts[:depth])), "tensor_split", None)
        if split:
            dim = split.get(".".join(parts[depth:]))
            return None if dim is None else ndim + dim
    return None


def _unit_of(name: str, dims: ParallelDims) -> tuple[str, str]:
    # the experts of a block are gathered together, from the ranks that hold the same ones
    return _part_of(name), "efsdp" if ".experts." in name and dims.ep > 1 else "fsdp"


def _part_of(name: str) -> str:
    """Embedding, head, adapter or block of a parameter."""
    first, second, *_ = name.split(".")
    if first == "layers":
        return f"{first}.{second}"
    if first in ("vector_input", "vector_output"):
        return first
    return "embedding" if first == "tok_embeddings" else "head"


def _shard_numel(shape: list[int], cut: int | None, ranks: int) -> int:
    """Elements of the largest shard."""
    dim = shard_dimension(shape, () if cut is None else (cut,), ranks)
    return ceil(shape[dim] / ranks) * prod(shape) // shape[dim]
