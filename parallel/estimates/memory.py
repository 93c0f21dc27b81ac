"""Bytes that one rank needs in a training step: an estimate from the config alone.

Parameters, gradients and optimizer states are exact: a rank's shard of every unit, with padding.
The rest is an estimate of the highest moment, in the head: what FSDP holds gathered, what autograd
has saved, gradients of the head, which its forward makes, and a chunk of logits. Of a pipeline it
is the fullest rank that counts. Not counted: the allocator's fragmentation, the runtime itself,
buffers of the collectives library.

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
from earlyfuse.kernels.selective_scan.chunks import count_chunks
from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.experts import MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.parallel.estimates.communication import routed_rows
from earlyfuse.parallel.estimates.fsdp_units import Unit, fsdp_units
from earlyfuse.parallel.strategies.pipeline import SCHEDULES, microbatch, rank_stages, stage_blocks

FP32 = 4
ADAM_STATES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. ``gathered``: whole units and their gradients, as FSDP holds them."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(
    model: Decoder.Config,
    dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    ac_config: ActivationCheckpointing.Config | None,
) -> Memory:
    """What a rank needs, the fullest of a pipeline; the arguments are those of
    ``plan.parallelize``.
    """
    ranks = (
        _pipeline_rank_memory(model, dims, training, parallelism, ac_config, rank)
        for rank in range(dims.pp)
    )
    return max(ranks, key=lambda memory: memory.total)


def _pipeline_rank_memory(
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
    kept, recomputed = _saved(layers, dims, part, ac_config)
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
    """Parts of a micro-batch whose activations the ``rank``-th rank of a pipeline holds at the
    most; a part counts in each of the rank's stages.
    """
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if degree == 1 or schedule == "GPipe":
        return parts
    after = degree - 1 - rank
    if schedule == "1F1B":
        return min(parts, after + 1)
    stages = SCHEDULES[schedule]
    # arXiv 2104.04473, 2.2: a round of parts goes through each stage but the last, and two parts
    # for each rank below; then every forward is followed by a backward
    a_round = parts // (parts // degree)
    return min(parts * stages, (stages - 1) * a_round + 2 * after + 1)


def _gathered(units: list[Unit], param: int, dims: ParallelDims) -> int:
    """Units that stay, the two largest others (one in use, one prefetched), and the gradient of
    one, in its own precision and as it is reduced. In a pipeline gradients too stay whole until all
    micro-batches are through.
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
    """What its forward keeps of each part of a batch, and one chunk of logits."""
    dtype, words = TORCH_DTYPE_MAP[training.mixed_precision_param], model.vocab_size // dims.tp
    tokens = training.local_batch_size * training.seq_len
    chunk = chunk_tokens(tokens, words, dtype, "cuda") * words * dtype.itemsize
    return chunk + held_parts * kept_by_head(tokens, words, model.dim, dtype)


def kept_by_head(tokens: int, words: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of the head with its loss: the gradient of its input, and that of
    its weight, summed over tokens, in fp32.
    """
    return tokens * dim * dtype.itemsize + words * dim * FP32


def _saved(
    layers: list[Block.Config],
    dims: ParallelDims,
    training: TrainingConfig,
    ac_config: ActivationCheckpointing.Config | None,
) -> tuple[int, int]:
    """Elements per token that autograd keeps of blocks, and of one more while it is recomputed."""
    saved = [saved_per_token(layer, training, dims.tp, dims.cp) for layer in layers]
    if isinstance(ac_config, FullAC.Config):  # inputs of all blocks
        return sum(layer.dim for layer in layers), max(saved)
    if isinstance(ac_config, SelectiveAC.Config):
        return sum(_kept_by_selective(layer, dims.tp) for layer in layers), max(saved)
    return sum(saved), 0


def saved_per_token(
    layer: Block.Config, training: TrainingConfig, tensor_ranks: int = 1, parts: int = 1
) -> int:
    """Elements per token that autograd keeps of one block, its branches' norms included; on the
    rank that has the last of the ``parts`` of each row. ``training.seq_len`` is that of a part.

    A norm: its input and the normed input.
    """
    saved = 0
    if layer.attention is not None:
        saved += _saved_by_attention(layer.attention, tensor_ranks, parts)
    if layer.mamba is not None:
        saved += _saved_by_mamba(layer.mamba, training, parts)
    if layer.feed_forward is not None:
        saved += _saved_by_feed_forward(layer.feed_forward, training, tensor_ranks)
    return saved + 2 * len(layer.branches) * layer.dim


def _saved_by_attention(config: Attention.Config, tensor_ranks: int, parts: int) -> int:
    """Its input; q and k before and after their norm, and rotated; v; the output, twice; rotated k
    and v of the other parts too.
    """
    width = config.heads * config.head_dim // tensor_ranks
    kv_width = config.kv_heads * config.head_dim // tensor_ranks
    normed = 2 if config.qk_norm else 0  # before and after; rotated are counted always
    others = 2 * (parts - 1) * kv_width
    return (1 + normed) * (width + kv_width) + kv_width + 2 * width + others


def _saved_by_mamba(config: Mamba.Config, training: TrainingConfig, parts: int) -> int:
    """x and z, u, step sizes, the gated output; what x_proj selects; in fp32, the states before
    each chunk, and what other parts leave of a state.
    """
    wide = FP32 // TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    kept = count_chunks(training.seq_len) + parts - 1
    states = wide * config.inner_dim * config.states * kept
    selected = config.dt_rank + 2 * config.states
    return 5 * config.inner_dim + selected + states // training.seq_len


def _saved_by_feed_forward(
    config: FeedForward.Config | MixtureOfExperts.Config,
    training: TrainingConfig,
    tensor_ranks: int,
) -> int:
    """Its input; gate, SiLU of it, up and their product, or, in the grouped product, gate and up of
    each routed row; of routers what they compute with, in fp32.
    """
    saved, plain = 0, [config] if isinstance(config, FeedForward.Config) else config.shared
    if isinstance(config, MixtureOfExperts.Config):
        tokens = training.local_batch_size * training.seq_len
        wide = FP32 // TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
        for pool in config.pools:
            rows = routed_rows(pool, training)
            saved += 2 * pool.hidden_dim * rows // tokens // tensor_ranks
            if wide > 1:  # the router's copy of its input
                saved += wide * pool.dim
            causal = isinstance(pool.router, ExpertChoice.Config) and pool.router.causal
            if causal:  # hidden width before and after SiLU, logits
                saved += wide * (2 * (pool.dim // 2) + 2 * pool.experts)
    for one in plain:
        copies = 2 if one.groups > 1 else 4
        saved += copies * one.hidden_dim // tensor_ranks
    return saved


def _kept_by_selective(layer: Block.Config, tensor_ranks: int) -> int:
    """Input, attention's output, and every second plain matrix product of torchtitan's policy."""
    kept, feed_forward = layer.dim, layer.feed_forward
    if layer.attention is not None:
        attention = layer.attention
        width = attention.heads * attention.head_dim // tensor_ranks
        kept += width
        if attention.groups == 1:
            kept += width + attention.kv_heads * attention.head_dim // tensor_ranks
    if layer.mamba is not None:
        mamba = layer.mamba
        products = (
            (mamba.in_proj_groups, 2 * mamba.inner_dim),
            (mamba.x_proj_groups, mamba.dt_rank + 2 * mamba.states),
            (mamba.dt_proj_groups, mamba.inner_dim),
            (mamba.out_proj_groups, mamba.dim),
        )
        plain = [width for groups, width in products if groups == 1]
        kept += sum(plain[::2])
    if feed_forward is not None:
        mixture = isinstance(feed_forward, MixtureOfExperts.Config)
        for one in feed_forward.shared if mixture else [feed_forward]:
            if one.groups == 1:
                kept += one.hidden_dim // tensor_ranks + one.dim
    return kept
