"""Bytes that one rank needs in a training step: an estimate from the config alone.

Parameters, gradients and optimizer states are exact: a rank's shard of every unit, with padding.
The rest is an estimate of the highest moment, at the start of backward: what FSDP holds gathered,
what autograd has saved, logits with their gradient. Not counted: the allocator's fragmentation, the
runtime itself, buffers of the collectives library.

T tokens of a micro-batch, D width, N heads of width H, K key/value heads, F inner width, R routed
rows, V vocabulary.
"""

from dataclasses import dataclass, fields

from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    FullAC,
    SelectiveAC,
)

from earlyfuse.models.blocks.experts import MixtureOfExperts
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.parallel.traffic import routed_rows
from earlyfuse.parallel.units import Unit, fsdp_units

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
    logits: int

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
    """What a rank needs; the arguments are those of ``plan.parallelize``."""
    units = fsdp_units(model, dims, parallelism)
    held = sum(unit.shard for unit in units) * TORCH_DTYPE_MAP[training.dtype].itemsize
    param = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    tokens = training.local_batch_size * training.seq_len
    return Memory(
        parameters=held,
        gradients=held,
        optimizer=ADAM_STATES * held,
        gathered=_gathered(units, param, dims.world_size == 1 and param == FP32),
        activations=tokens * param * _saved_by_all(model, dims, training, ac_config),
        logits=_logits(tokens * (model.vocab_size // dims.tp), param),
    )


def _gathered(units: list[Unit], param: int, unwrapped: bool) -> int:
    """Units that stay, the two largest others (one in use, one prefetched), and the gradient of
    one, in its own precision and as it is reduced.
    """
    if unwrapped:
        return 0
    freed = sorted((unit.gathered for unit in units if not unit.kept), reverse=True)
    kept = sum(unit.gathered for unit in units if unit.kept)
    largest = max(unit.gathered for unit in units)
    return (kept + sum(freed[:2])) * param + largest * (param + FP32)


def _logits(numel: int, param: int) -> int:
    """Logits, their gradient in fp32, and that in the logits' precision where it differs."""
    return numel * (param + FP32 + (param if param != FP32 else 0))


def _saved_by_all(
    model: Decoder.Config,
    dims: ParallelDims,
    training: TrainingConfig,
    ac_config: ActivationCheckpointing.Config | None,
) -> int:
    """Elements per token that autograd keeps of all blocks and the last norm."""
    saved = [saved_per_token(layer, training, dims.tp) for layer in model.layers]
    if isinstance(ac_config, FullAC.Config):  # inputs of all blocks, and one block recomputed
        blocks = len(saved) * model.dim + max(saved)
    elif isinstance(ac_config, SelectiveAC.Config):
        kept = [_kept_by_selective(layer, dims.tp) for layer in model.layers]
        blocks = sum(kept) + max(saved)
    else:
        blocks = sum(saved)
    return blocks + 2 * model.dim


def saved_per_token(layer: Block.Config, training: TrainingConfig, tensor_ranks: int = 1) -> int:
    """Elements per token that autograd keeps of one block.

    Attention: its input; q and k before and after their norm, and rotated; v; the output, twice.
    Norms: the normed input. Feed-forward: its input; gate, SiLU of it, up and their product, or, in
    the grouped product, gate and up of each routed row. Untied: the gains of each token too.
    """
    attention, feed_forward = layer.attention, layer.feed_forward
    width = attention.heads * attention.head_dim // tensor_ranks
    kv_width = attention.kv_heads * attention.head_dim // tensor_ranks
    normed = 2 if attention.qk_norm else 0  # before and after; rotated are counted always
    per_projection = 1 + normed + (attention.groups > 1 and attention.qk_norm)
    saved = per_projection * (width + kv_width) + kv_width + 2 * width
    saved += (4 + 2 * (layer.norm_groups > 1)) * attention.dim
    if isinstance(feed_forward, MixtureOfExperts.Config):
        tokens = training.local_batch_size * training.seq_len
        for pool in feed_forward.pools:
            rows = routed_rows(pool, training)
            saved += 2 * pool.hidden_dim * rows // tokens // tensor_ranks
        return saved
    copies = 2 if feed_forward.groups > 1 else 4
    return saved + copies * feed_forward.hidden_dim // tensor_ranks


def _kept_by_selective(layer: Block.Config, tensor_ranks: int) -> int:
    """Input, attention's output, and every second plain matrix product of torchtitan's policy."""
    attention, feed_forward = layer.attention, layer.feed_forward
    width = attention.heads * attention.head_dim // tensor_ranks
    kept = attention.dim + width
    if attention.groups == 1:
        kept += width + attention.kv_heads * attention.head_dim // tensor_ranks
    if not isinstance(feed_forward, MixtureOfExperts.Config) and feed_forward.groups == 1:
        kept += feed_forward.hidden_dim // tensor_ranks + feed_forward.dim
    return kept
