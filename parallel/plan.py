"""Parallelizes a model: one function that applies all strategies, in order.

0. pipeline parallelism: ``strategies/pipeline.py`` splits the model into stages beforehand; each
   goes through this plan by itself;
1. tensor and expert parallelism: shard the parameters, so that later steps see a rank's shards.
   Context parallelism changes no parameters: forwards are given the ``SequenceShard``, and FSDP
   shards over these ranks too;
2. activation checkpointing: wraps blocks before compile, which then sees the recomputation;
3. compile: per block, so that all layers share one graph;
4. FSDP2 or HSDP: last, so that its hooks gather parameters outside the compiled graphs.

n ranks compute what one rank computes on the same global batch: gradients are summed, not averaged,
as losses are already divided by global counts.
"""

import torch
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing

from earlyfuse.models.decoder import Decoder
from earlyfuse.parallel.strategies.activation_checkpointing import checkpoint_activations
from earlyfuse.parallel.strategies.context import check_context_parallel
from earlyfuse.parallel.strategies.expert import apply_expert_parallel, check_expert_parallel
from earlyfuse.parallel.strategies.fsdp import apply_fsdp, check_fsdp
from earlyfuse.parallel.strategies.pipeline import check_pipeline
from earlyfuse.parallel.strategies.tensor import apply_tensor_parallel, check_tensor_parallel


def parallelize(
    model: Decoder,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointing.Config | None,
    dump_folder: str,
) -> Decoder:
    """Parallelize ``model`` (on the meta device) over ``parallel_dims``, in place."""
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))
    if parallel_dims.ep_enabled:
        apply_expert_parallel(model, parallel_dims.get_mesh("ep"))
    if ac_config is not None:
        checkpoint_activations(model, ac_config, dump_folder)
    if compile_config.enable and "model" in compile_config.components:
        for block in model.layers.values():
            block.compile(backend=compile_config.backend)
    plain_fp32 = training.mixed_precision_param == "float32" and not training.enable_cpu_offload
    if parallel_dims.world_size > 1 or not plain_fp32:
        apply_fsdp(model, parallel_dims, training, parallelism)
    return model


def check_parallelism(
    parallelism: ParallelismConfig, training: TrainingConfig, model: Decoder.Config, ranks: int
) -> None:
    """``ValueError`` naming the field if this plan cannot run ``model`` on ``ranks`` ranks."""
    if training.enable_cpu_offload and not torch.accelerator.is_available():
        raise ValueError(
            "training.enable_cpu_offload (True) must be False without a GPU: parameters are "
            "in host memory already"
        )
    check_pipeline(parallelism, training, model)
    check_context_parallel(parallelism, training, model)
    check_fsdp(parallelism, ranks)
    check_tensor_parallel(parallelism, model)
    check_expert_parallel(parallelism, model)
