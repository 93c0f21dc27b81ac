"""Predicts collectives and bytes of a training step in closed form, for any config and ranks.

Pure functions of what ``parallel/plan.py`` makes ranks exchange. Tests compare them with the
collectives counted in real steps.

=====================  ==============  ============================================================
purpose                kind            bytes of the whole tensor, per micro-batch
=====================  ==============  ============================================================
parameters forward     all_gather      every FSDP unit, in the parameter dtype; scans
                                       and routers in fp32
parameters backward    all_gather      the same again, where a unit is freed in between
gradients              reduce_scatter  every FSDP unit, in the reduce dtype
gradient replicas      all_reduce      HSDP: a rank's shard of every unit, in the reduce dtype
split activations      all_reduce      tensor parallel: (T, D) for each region, forward and
                                       backward; (R,) weights of routes, backward
embedding columns      all_gather      tensor parallel: (T, D)
split losses           all_gather      tensor parallel: three fp32 numbers per token of each rank
expert rows            all_to_all      expert parallel: (R, D) of every pool, to the experts and
                                       back, forward and backward
expert counts          all_gather      expert parallel, token choice or exact budgets: rows of each
                                       expert on each rank, int64
keys and values        all_gather,     sequence parallel: (B, S, 2K, H) of the row, forward; their
                       reduce_scatter  gradients, backward
conv halo              all_gather,     sequence parallel: (B, V, I) of each rank, forward; their
                       reduce_scatter  gradients, backward
scan states            all_gather      sequence parallel: two fp32 (B, I, N) of each rank forward,
                                       one backward, whatever the length of rows
stage activations      receive         pipeline: (T, D) from the stage before, forward
stage gradients        receive         pipeline: (T, D) from the stage after, backward
=====================  ==============  ============================================================

Not in the table: routing, which sends nothing; counts, losses and the gradient norm, a few numbers
per step; with token choice the loads of experts, 8 bytes each per step. With token choice the
experts of a rank receive as many rows as chose them, R on average over the ranks.

Activation checkpointing repeats what a block sends in forward, except expert rows if it is
selective. Uneven shards are padded to the largest, padding included in the bytes. A pipeline splits
the micro-batch: T are the tokens of such a part, and all but parameters and gradients is sent once
per part. Its ranks differ.

The head communicates in chunks of tokens of the size used on GPUs; on CPUs chunks are smaller.

T tokens of a micro-batch on one rank, R routed rows of a pool, D width; B rows, S positions of a
row, K key/value heads of width H, I inner width, N states, V inputs before of a Mamba block.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.kernels.linear_cross_entropy.chunked import chunk_tokens
from earlyfuse.models.blocks.branch import FP32, Kind
from earlyfuse.parallel.estimates.fsdp_units import fsdp_units
from earlyfuse.parallel.estimates.step import Step


@dataclass(frozen=True)
class Traffic:
    """``calls`` collectives of one kind and purpose over the ``ranks`` of a mesh axis.

    ``size``: bytes of the whole tensor (gathered, before reduction, or sent), over all calls.
    """

    purpose: str
    kind: Kind
    axis: str
    ranks: int
    calls: int
    size: int

    @property
    def received(self) -> float:
        """Bytes that one rank receives with ring algorithms, as NCCL counts."""
        return received(self.kind, self.ranks, self.size)

    @property
    def received_on_gloo(self) -> float:
        """Traffic on gloo, whose reduce_scatter is an all_reduce."""
        kind = "all_reduce" if self.kind == "reduce_scatter" else self.kind
        return received(kind, self.ranks, self.size)


def received(kind: Kind, ranks: int, size: int) -> float:
    """Bytes that each of ``ranks`` receives in a collective over a tensor of ``size`` bytes."""
    if kind == "receive":
        return size
    return (2 if kind == "all_reduce" else 1) * size * (ranks - 1) / ranks


def step_traffic(step: Step) -> list[Traffic]:
    """Traffic of an optimizer step, most bytes first, without axes of one rank; in a pipeline that
    of the rank that receives most.
    """

    def on_rank(pipeline_rank: int) -> list[Traffic]:
        calls: Counter[tuple[str, Kind, str]] = Counter()
        sizes: Counter[tuple[str, Kind, str]] = Counter()
        for purpose, kind, axis, size in microbatch_calls(step, pipeline_rank):
            calls[purpose, kind, axis] += step.microbatches
            sizes[purpose, kind, axis] += step.microbatches * size
        found = [
            Traffic(*key, ranks=step.axis_ranks(key[2]), calls=calls[key], size=size)
            for key, size in sizes.items()
        ]
        return sorted((one for one in found if one.ranks > 1), key=lambda one: -one.received)

    return max(map(on_rank, range(step.dims.pp)), key=total)


def total(traffic: Iterable[Traffic], *, on_gloo: bool = False) -> float:
    """Bytes that a rank receives in a step."""
    return sum(one.received_on_gloo if on_gloo else one.received for one in traffic)


class Call(NamedTuple):
    """One collective along a mesh axis; ``size``: bytes of the whole tensor."""

    purpose: str
    kind: Kind
    axis: str
    size: int


def microbatch_calls(step: Step, pipeline_rank: int = 0) -> Iterator[Call]:
    """Every collective of a micro-batch on a rank of a pipeline, including those of one rank."""
    param = step.param_dtype.itemsize
    reduce = TORCH_DTYPE_MAP[step.training.mixed_precision_reduce].itemsize
    for unit in fsdp_units(step, pipeline_rank):
        yield Call("parameters forward", "all_gather", unit.axis, unit.gathered_bytes(param))
        if not unit.kept:
            yield Call("parameters backward", "all_gather", unit.axis, unit.gathered_bytes(param))
        yield Call("gradients", "reduce_scatter", unit.axis, unit.gathered * reduce)
        yield Call("gradient replicas", "all_reduce", "dp_replicate", unit.shard * reduce)
    for blocks in step.stages(pipeline_rank):
        yield from list(_stage(step, blocks)) * step.parts


def _stage(step: Step, blocks: range) -> Iterator[Call]:
    """Collectives of a stage of ``blocks``, with embedding and head at its ends."""
    model, batch, dtype = step.model, step.local_batch, step.param_dtype
    full = isinstance(step.recompute, FullAC.Config)
    recomputed = full or isinstance(step.recompute, SelectiveAC.Config)
    activations = batch.tokens * model.dim * dtype.itemsize
    if blocks.start == 0:
        yield Call("embedding columns", "all_gather", "tp", activations)
    else:
        yield Call("stage activations", "receive", "pp", activations)
    if blocks.stop == len(model.layers):
        yield Call("split activations", "all_reduce", "tp", activations)  # backward
        chunk = chunk_tokens(batch.tokens, model.vocab_size // step.dims.tp, dtype, "cuda")
        for first in range(0, batch.tokens, chunk):
            numbers = 3 * min(chunk, batch.tokens - first) * step.dims.tp
            yield Call("split losses", "all_gather", "tp", numbers * FP32)
    else:
        yield Call("stage gradients", "receive", "pp", activations)
    for block in blocks:
        for one in model.layers[block].collectives(batch):
            forwards = one.forward * (2 if full or (recomputed and not one.kept) else 1)
            call = Call(one.purpose, one.kind, one.axis, one.size)
            yield from [call] * (forwards + one.backward)
