"""Estimates the bytes that a rank needs in a training step, from the config alone.

Parameters, gradients and optimizer states are exact: a rank's shard of every unit, with padding.
The rest estimates the peak, in the head: gathered units, tensors saved by autograd, gradients of
the head, which its forward computes, and a chunk of logits. In a pipeline the fullest rank counts.
Not counted: fragmentation, the runtime, buffers of the collectives library.

T tokens of a micro-batch, D width, N heads of width H, K key/value heads, F inner width, R routed
rows, V vocabulary.
"""

from dataclasses import dataclass, fields
from math import ceil

import torch
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    FullAC,
    SelectiveAC,
)

from earlyfuse.kernels.linear_cross_entropy.chunked import chunk_tokens
from earlyfuse.models.blocks.branch import FP32, Microbatch
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.parallel.estimates.communication import local_batch
from earlyfuse.parallel.estimates.fsdp_units import Unit, fsdp_units
from earlyfuse.parallel.strategies.pipeline import SCHEDULES, microbatch, rank_stages, stage_blocks

ADAM_STATES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. ``gathered``: whole units and their gradients in FSDP."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(
    model: Decoder.Config,
    dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    ac_config: ActivationCheckpointing.Config | None,
) -> Memory:
    """Memory of the fullest rank; arguments as of ``plan.parallelize``."""

    def on_rank(rank: int) -> Memory:
        return _rank_memory(model, dims, training, parallelism, ac_config, rank)

    return max(map(on_rank, range(dims.pp)), key=lambda memory: memory.total)


def _rank_memory(
    model: Decoder.Config,
    dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    ac_config: ActivationCheckpointing.Config | None,
    rank: int,
) -> Memory:
    units = fsdp_units(model, dims, parallelism, rank)
    held = sum(unit.shard for unit in units) * TORCH_DTYPE_MAP[training.dtype].itemsize
    param = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    part = microbatch(parallelism, training)
    tokens = part.local_batch_size * part.seq_len
    parts = training.local_batch_size // part.local_batch_size
    held_parts = in_flight(parallelism, parts, rank)
    stages = stage_blocks(parallelism, len(model.layers))
    own = [stages[index] for index in rank_stages(parallelism, rank)]
    layers = [model.layers[block] for blocks in own for block in blocks]
    has_head = own[-1].stop == len(model.layers)
    kept, recomputed = _saved(layers, local_batch(part, dims), ac_config)
    kept += 2 * model.dim * has_head  # around the last norm
    return Memory(
        parameters=held,
        gradients=held,
        optimizer=ADAM_STATES * held,
        gathered=_gathered(units, param, dims),
        activations=tokens * param * (held_parts * kept // len(own) + recomputed),
        head=has_head * _head(model, dims, part, ceil(held_parts / len(own))),
    )


def in_flight(parallelism: ParallelismConfig, parts: int, rank: int) -> int:
    """Maximal number of parts of a micro-batch whose activations a pipeline rank holds; a part
    counts in each stage of the rank.
    """
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if degree == 1 or schedule == "GPipe":
        return parts
    after = degree - 1 - rank
    if schedule == "1F1B":
        return min(parts, after + 1)
    stages = SCHEDULES[schedule]
    # arXiv 2104.04473, 2.2: a round of parts passes every stage but the last, and two parts for
    # each later rank; then forward and backward alternate
    a_round = parts // (parts // degree)
    return min(parts * stages, (stages - 1) * a_round + 2 * after + 1)


def _gathered(units: list[Unit], param: int, dims: ParallelDims) -> int:
    """Kept units, the two largest others (in use, prefetched), and one gradient, as computed and as
    reduced. In a pipeline all units and gradients stay whole until the last micro-batch.
    """
    if dims.world_size == 1 and param == FP32:
        return 0
    if dims.pp > 1:
        whole = [unit.gathered for unit in units]
        in_use = sum(unit.gathered_bytes(param) for unit in units)
        return in_use + sum(whole) * FP32 + max(whole) * param
    freed = sorted((unit.gathered_bytes(param) for unit in units if not unit.kept), reverse=True)
    kept = sum(unit.gathered_bytes(param) for unit in units if unit.kept)
    largest = max(unit.gathered for unit in units)
    return kept + sum(freed[:2]) + largest * (param + FP32)


def _head(
    model: Decoder.Config, dims: ParallelDims, training: TrainingConfig, held_parts: int
) -> int:
    """Tensors saved of each part of a batch, and a chunk of logits."""
    dtype, words = TORCH_DTYPE_MAP[training.mixed_precision_param], model.vocab_size // dims.tp
    tokens = training.local_batch_size * training.seq_len
    chunk = chunk_tokens(tokens, words, dtype, "cuda") * words * dtype.itemsize
    return chunk + held_parts * kept_by_head(tokens, words, model.dim, dtype)


def kept_by_head(tokens: int, words: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes saved of head and loss: gradients of the input, and of the weight in fp32."""
    return tokens * dim * dtype.itemsize + words * dim * FP32


def _saved(
    layers: list[Block.Config],
    batch: Microbatch,
    ac_config: ActivationCheckpointing.Config | None,
) -> tuple[int, int]:
    """Elements per token saved of all blocks, and of one while it is recomputed."""
    saved = [saved_per_token(layer, batch) for layer in layers]
    if isinstance(ac_config, FullAC.Config):  # inputs of all blocks
        return sum(layer.dim for layer in layers), max(saved)
    if isinstance(ac_config, SelectiveAC.Config):
        branches = [branch for layer in layers for branch in layer.branches.values()]
        kept = sum(branch.saved_by_selective(batch) for branch in branches)
        return sum(layer.dim for layer in layers) + kept, max(saved)
    return sum(saved), 0


def saved_per_token(layer: Block.Config, batch: Microbatch) -> int:
    """Elements per token saved of a block, by its branches and norms, on the rank with the last
    positions of each row.
    """
    branches = layer.branches.values()
    return sum(branch.saved(batch) for branch in branches) + 2 * len(branches) * layer.dim
