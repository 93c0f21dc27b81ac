"""FSDP2 and HSDP: which ranks shard each parameter, and the units that are gathered together.

Units are the embedding, each block, norm with head, and the adapters of vectors; fp32 modules
(scans, routers) are units of their own. With expert parallelism, the experts of a block are
gathered separately, from the ranks that hold the same ones.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod
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
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.precision import fp32_modules
from earlyfuse.parallel.compat import reduce_with_plain_sums
from earlyfuse.parallel.strategies.expert import is_split


def apply_fsdp(
    model: Decoder,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
) -> None:
    """Shards ``model`` over the ``fsdp`` mesh, in place, and replicates over ``dp_replicate``."""
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
    # a pipeline stage stays gathered for all micro-batches
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
    experts = {p for module in model.modules() if is_split(module) for p in module.parameters()}

    def place(parameter: nn.Parameter) -> ShardPlacementResult:
        over = over_experts if parameter in experts else over_all
        split = {p.dim for p in getattr(parameter, "placements", ()) if isinstance(p, Shard)}
        dim = shard_dimension(parameter.shape, split, over.mesh.size(-1))
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
    for adapter in (model.vector_input, model.vector_output):
        if adapter is not None:
            shard(adapter, reshard)
    for block in model.layers.values():
        shard(block, reshard)
    if model.norm is not None and model.lm_head is not None:
        # backward begins with the head: keep it gathered by default
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


def shard_dimension(shape: Sequence[int], split: Collection[int], ranks: int) -> int:
    """The first dimension that divides evenly by ``ranks`` and is not ``split`` yet; else 0.

    Few experts cannot be sharded over many ranks, but their widths can.
    """
    even = (dim for dim, size in enumerate(shape) if dim not in split and size % ranks == 0)
    return next(even, 0)


def check_fsdp(parallelism: ParallelismConfig, ranks: int) -> None:
    """``ValueError`` unless the degrees make up the ``ranks`` of the job."""
    if parallelism.spmd_backend != "partial_dtensor":
        raise ValueError(
            f"parallelism.spmd_backend ({parallelism.spmd_backend}) must be partial_dtensor: "
            "others do not shard plain parameters on torch 2.13"
        )
    degrees = {
        "data_parallel_replicate": parallelism.data_parallel_replicate_degree,
        "data_parallel_shard": parallelism.data_parallel_shard_degree,
        "pipeline_parallel": parallelism.pipeline_parallel_degree,
        "context_parallel": parallelism.context_parallel_degree,
        "tensor_parallel": parallelism.tensor_parallel_degree,
    }
    shard = degrees["data_parallel_shard"]
    fixed = prod(max(degree, 1) for degree in degrees.values())
    if ranks % fixed or (shard > 0 and ranks != fixed):
        product = " x ".join(f"{name}_degree ({degree})" for name, degree in degrees.items())
        raise ValueError(
            f"parallelism.{product} must make up the {ranks} ranks of the job (shard -1: all "
            "remaining); change a degree or the number of ranks"
        )
    replicated = ("data_parallel_replicate", "pipeline_parallel", "tensor_parallel")
    sharded = ranks // prod(degrees[name] for name in replicated)
    experts = parallelism.expert_parallel_degree
    if sharded % experts:
        raise ValueError(
            f"parallelism.expert_parallel_degree ({experts}) must divide the {sharded} ranks that "
            "FSDP shards over; change it or the number of ranks"
        )
