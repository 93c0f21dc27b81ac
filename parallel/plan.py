"""The parallel plan: one function that applies everything, in order.

1. activation checkpointing — wraps blocks first, so that compile sees the recomputation;
2. compile — per block, so that all layers share one graph;
3. FSDP2 or HSDP — last, around compiled blocks: its hooks gather parameters outside the graph, and
its
   units (embedding, each block, norm with head) are what one gather brings.

n ranks compute what one rank computes on the same global batch: gradients are summed, not averaged,
because losses are already divided by global counts.
"""

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing

from earlyfuse.models.decoder import Decoder
from earlyfuse.parallel.compat import reduce_with_plain_sums


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
    """Spread ``model`` (on the meta device) over the ranks of ``parallel_dims``, in place."""
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        for block in model.layers:
            block.compile(backend=compile_config.backend)
    _shard(model, parallel_dims, training, parallelism)
    return model


def check_parallelism(parallelism: ParallelismConfig) -> None:
    """Refuse what this plan cannot spread; raises ``ValueError`` naming the field."""
    for field in (
        "tensor_parallel_degree",
        "context_parallel_degree",
        "pipeline_parallel_degree",
        "expert_parallel_degree",
    ):
        if getattr(parallelism, field) != 1:
            raise ValueError(
                f"parallelism.{field} ({getattr(parallelism, field)}) must be 1: models are "
                "spread by FSDP2 "
                "(data_parallel_shard_degree) and HSDP (with data_parallel_replicate_degree)"
            )
    if parallelism.spmd_backend != "partial_dtensor":
        raise ValueError(
            f"parallelism.spmd_backend ({parallelism.spmd_backend}) must be partial_dtensor: the "
            "others do not "
            "shard plain parameters on torch 2.13"
        )


def _shard(
    model: Decoder,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
) -> None:
    plain_fp32 = training.mixed_precision_param == "float32" and not training.enable_cpu_offload
    if parallel_dims.world_size == 1 and plain_fp32:
        return  # one rank holds everything in its own precision: nothing to gather or cast
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    precision = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy()
    mesh = parallel_dims.get_mesh(names)
    reshard = parallelism.fsdp_reshard_after_forward != "never"

    def shard(module: nn.Module | list[nn.Module], reshard_after_forward: bool) -> None:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
        )

    shard(model.tok_embeddings, reshard)
    for block in model.layers:
        shard(block, reshard)
    # the head is needed again at once in backward: keep it gathered unless told otherwise
    shard([model.norm, model.lm_head], parallelism.fsdp_reshard_after_forward == "always")
    shard(model, False)
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)
    reduce_with_plain_sums(model)
