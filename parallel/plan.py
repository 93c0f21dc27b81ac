"""The parallel plan: one function that applies everything, in order.

0. pipeline parallelism — before all this, ``strategies/pipeline.py`` cuts the model into stages;
   each goes through the plan by itself;
1. tensor parallelism and expert parallelism — cut the parameters themselves, so everything after
   works on what a rank holds; sequence parallelism — the model is told which part of each row it
   gets, its parameters stay whole, and FSDP shards them over these ranks too;
2. activation checkpointing — wraps blocks before they are compiled, so that compile sees the
   recomputation;
3. compile — per block, so that all layers share one graph;
4. FSDP2 or HSDP — last, around compiled blocks: its hooks gather parameters outside the graph. Its
   units are the embedding, each block, and norm with head; with expert parallelism, the experts of
   a block are gathered beside the rest of it, from those ranks that hold the same ones; a
   scan and a router are units of their own, in fp32 whatever the rest computes in.

n ranks compute what one rank computes on the same global batch: gradients are summed, not averaged,
because losses are already divided by global counts.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import Shard
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing

from earlyfuse.models.blocks.experts import Experts, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.precision import fp32_modules
from earlyfuse.models.routing.token_choice import TokenChoice, experts_served
from earlyfuse.parallel.compat import reduce_with_plain_sums
from earlyfuse.parallel.strategies.activation_checkpointing import checkpoint_activations
from earlyfuse.parallel.strategies.context import PartOverRanks, context_problems
from earlyfuse.parallel.strategies.expert import spread_experts
from earlyfuse.parallel.strategies.pipeline import pipeline_problems
from earlyfuse.parallel.strategies.tensor import cut_tensors


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
    if parallel_dims.tp_enabled:
        cut_tensors(model, parallel_dims.get_mesh("tp"))
    if parallel_dims.ep_enabled:
        spread_experts(model, parallel_dims.get_mesh("ep"))
    if parallel_dims.cp_enabled:
        model.row_part = PartOverRanks(parallel_dims.get_mesh("cp"))
    if ac_config is not None:
        checkpoint_activations(model, ac_config, dump_folder)
    if compile_config.enable and "model" in compile_config.components:
        for block in model.layers.values():
            block.compile(backend=compile_config.backend)
    plain_fp32 = training.mixed_precision_param == "float32" and not training.enable_cpu_offload
    if parallel_dims.world_size > 1 or not plain_fp32:
        _shard(model, parallel_dims, training, parallelism)
    return model


def check_parallelism(
    parallelism: ParallelismConfig, training: TrainingConfig, model: Decoder.Config, ranks: int
) -> None:
    """Refuse what this plan cannot spread over ``ranks`` ranks, before anything is built.

    Raises ``ValueError`` naming the field.
    """
    if training.enable_cpu_offload and not torch.accelerator.is_available():
        raise ValueError(
            "training.enable_cpu_offload (True) must be False without a GPU: everything is in host "
            "memory already"
        )
    for problem in pipeline_problems(parallelism, training, model):
        raise ValueError(f"parallelism.{problem}")
    for problem in context_problems(parallelism, training, model):
        raise ValueError(f"parallelism.{problem}")
    for problem in _ranks(parallelism, ranks):
        raise ValueError(f"parallelism.{problem}")
    for rule in (_unsupported, _tensor, _experts):
        for problem in rule(parallelism, model):
            raise ValueError(f"parallelism.{problem}")


# ---------------------------------------------------------------- what cannot be spread


def _unsupported(parallelism: ParallelismConfig, model: Decoder.Config) -> Iterator[str]:
    if parallelism.spmd_backend != "partial_dtensor":
        yield (
            f"spmd_backend ({parallelism.spmd_backend}) must be partial_dtensor: the others do not "
            "shard plain parameters on torch 2.13"
        )
    if parallelism.tensor_parallel_degree > 1 and parallelism.expert_parallel_degree > 1:
        yield (
            f"expert_parallel_degree ({parallelism.expert_parallel_degree}) must be 1 together "
            f"with tensor_parallel_degree ({parallelism.tensor_parallel_degree}), which cuts "
            "experts too; use one of the two, and FSDP for the rest"
        )


def _ranks(parallelism: ParallelismConfig, ranks: int) -> Iterator[str]:
    shard, replicate = (
        parallelism.data_parallel_shard_degree,
        parallelism.data_parallel_replicate_degree,
    )
    tensor, experts = parallelism.tensor_parallel_degree, parallelism.expert_parallel_degree
    pipeline, context = parallelism.pipeline_parallel_degree, parallelism.context_parallel_degree
    fixed = replicate * tensor * pipeline * context * max(shard, 1)
    if ranks % fixed or (shard > 0 and ranks != fixed):
        yield (
            f"data_parallel_replicate_degree ({replicate}) x data_parallel_shard_degree ({shard}; "
            f"-1: all that is left) x pipeline_parallel_degree ({pipeline}) x "
            f"context_parallel_degree ({context}) x tensor_parallel_degree ({tensor}) must make up "
            f"the {ranks} ranks of the job; change one of them or the number of ranks"
        )
    sharded = ranks // (replicate * tensor * pipeline)
    if sharded % experts:
        yield (
            f"expert_parallel_degree ({experts}) must divide the {sharded} ranks that FSDP shards "
            "over; change it or the number of ranks"
        )


def _tensor(parallelism: ParallelismConfig, model: Decoder.Config) -> Iterator[str]:
    degree = parallelism.tensor_parallel_degree
    sizes = {"dim": model.dim, "vocab_size": model.vocab_size}
    for index, layer in enumerate(model.layers):
        at, feed_forward = f"layers[{index}]", layer.feed_forward
        if layer.mamba is not None and degree > 1:
            yield (
                f"tensor_parallel_degree ({degree}) must be 1: {at} is a Mamba block, whose "
                "channels all meet in one projection; use FSDP"
            )
            return
        if layer.attention is not None:
            sizes[f"{at}.attention.heads"] = layer.attention.heads
            sizes[f"{at}.attention.kv_heads"] = layer.attention.kv_heads
        if isinstance(feed_forward, FeedForward.Config):
            sizes[f"{at}.feed_forward.hidden_dim"] = feed_forward.hidden_dim
        elif feed_forward is not None:
            for pool in feed_forward.pools:
                sizes[f"{at}.feed_forward.{pool.name}.hidden_dim"] = pool.hidden_dim
            for number, shared in enumerate(feed_forward.shared):
                sizes[f"{at}.feed_forward.shared[{number}].hidden_dim"] = shared.hidden_dim
    for name, size in sizes.items():
        if size % degree:
            yield (
                f"tensor_parallel_degree ({degree}) must divide {name} ({size}) of the model; "
                "lower it or change the model"
            )


def _experts(parallelism: ParallelismConfig, model: Decoder.Config) -> Iterator[str]:
    degree = parallelism.expert_parallel_degree
    if degree == 1:
        return
    mixtures = [
        layer.feed_forward
        for layer in model.layers
        if isinstance(layer.feed_forward, MixtureOfExperts.Config)
    ]
    if not mixtures:
        yield f"expert_parallel_degree ({degree}) must be 1: this model has no routed experts"
    for pool in (pool for mixture in mixtures for pool in mixture.pools):
        counts = [pool.experts]
        if isinstance(pool.router, TokenChoice.Config):
            counts = list(experts_served(pool.router, pool.experts).values())
        for count in counts:
            if count % degree:
                yield (
                    f"expert_parallel_degree ({degree}) must divide the {count} {pool.name} "
                    "experts, so that every rank holds as many; lower it or change the experts"
                )


# ---------------------------------------------------------------- FSDP2 and HSDP


def _shard(
    model: Decoder,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
) -> None:
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
    # a stage stays gathered for all micro-batches of a schedule
    reshard = parallelism.fsdp_reshard_after_forward != "never" and not parallel_dims.pp_enabled
    settings: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy(),
    }

    over_all = over_experts = _mesh_info(mesh)
    if parallel_dims.ep_enabled:
        over_experts = _mesh_info(parallel_dims.get_mesh([*replicate, "efsdp"]))
    experts = {
        parameter
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    }

    def place(parameter: nn.Parameter) -> ShardPlacementResult:
        over = over_experts if parameter in experts else over_all
        cut = {p.dim for p in getattr(parameter, "placements", ()) if isinstance(p, Shard)}
        dim = shard_dimension(parameter.shape, cut, over.mesh.size(-1))
        return ShardPlacementResult(Shard(dim), over)

    def shard(
        module: nn.Module | list[nn.Module], reshard_after_forward: bool, **others: Any
    ) -> None:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=place,
            **(settings | others),
        )

    in_fp32 = replace(settings["mp_policy"], param_dtype=torch.float32)
    for module in fp32_modules(model):
        shard(module, reshard, mp_policy=in_fp32)

    if model.tok_embeddings is not None:
        shard(model.tok_embeddings, reshard)
    for block in model.layers.values():
        shard(block, reshard)
    if model.norm is not None and model.lm_head is not None:
        # backward begins with the head, at once: keep it gathered unless told otherwise
        shard([model.norm, model.lm_head], parallelism.fsdp_reshard_after_forward == "always")
    shard(model, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    reduce_with_plain_sums(model)


def _mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, replicate_mesh_dim=0, shard_mesh_dim=1)


def shard_dimension(shape: Sequence[int], cut: Collection[int], ranks: int) -> int:
    """The first dimension of a parameter that divides evenly and is not ``cut`` already; else 0.

    A few experts cannot be shared out whole among many ranks: their widths can.
    """
    even = (dim for dim, size in enumerate(shape) if dim not in cut and size % ranks == 0)
    return next(even, 0)
