"""Estimates the bytes that a rank needs in a training step, from the config alone.

Parameters, their averages, gradients and optimizer states are exact: a rank's shard of every unit,
with padding. The rest estimates the peak, in the head: gathered units, tensors saved by autograd,
gradients of the head, which its forward computes, and a chunk of logits. In a pipeline the fullest
rank counts.
Not counted: fragmentation, the runtime, buffers of the collectives library.

T tokens of a micro-batch, D width, N heads of width H, K key/value heads, F inner width, R routed
rows, V vocabulary.
"""

from dataclasses import astuple, dataclass
from math import ceil

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.kernels.linear_cross_entropy.chunked import chunk_tokens
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.branch import FP32
from earlyfuse.parallel.estimates.fsdp_units import Unit, fsdp_units
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.parallel.strategies.pipeline import SCHEDULES

ADAM_STATES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. ``gathered``: whole units and their gradients in FSDP."""

    parameters: int
    averages: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(astuple(self))


def rank_memory(step: Step) -> Memory:
    """Memory of the fullest rank."""
    ranks = (_memory(step, rank) for rank in range(step.dims.pp))
    return max(ranks, key=lambda memory: memory.total)


def _memory(step: Step, rank: int) -> Memory:
    """Memory of a rank of a pipeline."""
    model, batch, stages = step.model, step.local_batch, step.stages(rank)
    units = fsdp_units(step, rank)
    shard = sum(unit.shard for unit in units)
    held = shard * TORCH_DTYPE_MAP[step.training.dtype].itemsize
    parts = in_flight(step, rank)
    has_head = stages[-1].stop == len(model.layers)
    layers = [model.layers[block] for blocks in stages for block in blocks]
    kept, recomputed = _saved(layers, step)
    kept += 2 * model.dim * has_head  # around the last norm
    if model.vectors is not None and stages[0].start == 0:
        kept += model.vectors.saved(model.dim)
    saved = parts * kept // len(stages) + recomputed
    return Memory(
        parameters=held,
        averages=step.averages * shard * FP32,
        gradients=held,
        optimizer=ADAM_STATES * held,
        gathered=_gathered(units, step),
        activations=batch.rows * batch.seq_len * batch.itemsize * saved,
        head=has_head * _head(step, ceil(parts / len(stages))),
    )


def in_flight(step: Step, rank: int) -> int:
    """Maximal number of parts of a micro-batch whose activations a pipeline rank holds; a part
    counts in each stage of the rank.
    """
    degree, parts = step.parallelism.pipeline_parallel_degree, step.parts
    schedule = step.parallelism.pipeline_parallel_schedule
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


def _gathered(units: list[Unit], step: Step) -> int:
    """Kept units, the two largest others (in use, prefetched), and one gradient, as computed and as
    reduced. In a pipeline all units and gradients stay whole until the last micro-batch.
    """
    param = step.param_dtype.itemsize
    if step.dims.world_size == 1 and param == FP32:
        return 0
    if step.dims.pp > 1:
        whole = [unit.gathered for unit in units]
        in_use = sum(unit.gathered_bytes(param) for unit in units)
        return in_use + sum(whole) * FP32 + max(whole) * param
    freed = sorted((unit.gathered_bytes(param) for unit in units if not unit.kept), reverse=True)
    kept = sum(unit.gathered_bytes(param) for unit in units if unit.kept)
    largest = max(unit.gathered for unit in units)
    return kept + sum(freed[:2]) + largest * (param + FP32)


def _head(step: Step, parts: int) -> int:
    """Tensors saved of each part of a batch, and a chunk of logits."""
    dtype, words, batch = step.param_dtype, step.model.vocab_size // step.dims.tp, step.local_batch
    tokens = batch.rows * batch.seq_len
    chunk = chunk_tokens(tokens, words, dtype, "cuda") * words * dtype.itemsize
    return chunk + parts * kept_by_head(tokens, words, step.model.dim, dtype)


def kept_by_head(tokens: int, words: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes saved of head and loss: gradients of the input, and of the weight in fp32."""
    return tokens * dim * dtype.itemsize + words * dim * FP32


def _saved(layers: list[Block.Config], step: Step) -> tuple[int, int]:
    """Elements per token saved of all blocks, and of one while it is recomputed."""
    batch = step.local_batch
    saved, inputs = [layer.saved(batch) for layer in layers], [layer.dim for layer in layers]
    if isinstance(step.recompute, FullAC.Config):
        return sum(inputs), max(saved)
    if isinstance(step.recompute, SelectiveAC.Config):
        return sum(inputs) + sum(layer.saved_by_selective(batch) for layer in layers), max(saved)
    return sum(saved), 0
