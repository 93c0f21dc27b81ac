"""Tensor parallelism: attention heads, feed-forward widths and the vocabulary, sharded over a mesh.

Inside a parallel region every rank computes the same tokens with its shard of the parameters: the
first matrix is sharded by outputs, the last by inputs, so each rank has a summand of the output
(Megatron-LM, arXiv 1909.08053). Entering all-reduces the input's gradient, leaving the output.
Norms and routers are replicated.

The embedding is sharded by columns, joined by an all-gather; the head by words: a loss is given its
``VocabularyShard``, logits are all-gathered.

T tokens, D width.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_gather_single, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.config import ParallelismConfig

from earlyfuse.kernels.linear_cross_entropy import VocabularyShard
from earlyfuse.models.decoder import Decoder, Embedding, Head
from earlyfuse.models.routes import Routes


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Shard parameters by the ``tensor_split`` of each module, in place, and hook its region."""
    for module in list(model.modules()):
        split = getattr(module, "tensor_split", None)
        if not split:
            continue
        for name, dim in split.items():
            _shard(module, name, dim, mesh)
        if isinstance(module, Embedding):
            module.register_forward_hook(lambda _, args, out: _Gather.apply(out, mesh))
            continue
        module.register_forward_pre_hook(partial(_enter, mesh=mesh))
        if isinstance(module, Head):
            module.register_forward_hook(partial(_gather_logits, mesh=mesh))
        else:
            module.register_forward_hook(lambda _, args, out: _Sum.apply(out, mesh))


def check_tensor_parallel(parallelism: ParallelismConfig, model: Decoder.Config) -> None:
    """``ValueError`` unless all sharded sizes divide evenly."""
    degree, experts = parallelism.tensor_parallel_degree, parallelism.expert_parallel_degree
    if degree == 1:
        return
    if experts > 1:
        raise ValueError(
            f"parallelism.expert_parallel_degree ({experts}) must be 1 together with "
            f"tensor_parallel_degree ({degree}), which shards experts too; use one, and FSDP"
        )
    field = f"parallelism.tensor_parallel_degree ({degree})"
    model.check_use("tensor_parallel", f"{field} must be 1")
    sizes = {"dim": model.dim, "vocab_size": model.vocab_size} | model.even_sizes("tensor")
    for name, size in sizes.items():
        if size % degree:
            raise ValueError(
                f"{field} must divide {name} ({size}) of the model; lower it or change the model"
            )


def _shard(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = getattr(module, owner_name, None) if owner_name else module
    if owner is None:  # no qk-norm
        return
    weight = owner.get_parameter(leaf)
    part = distribute_tensor(weight, mesh, [Shard(weight.ndim + dim)], src_data_rank=None)
    owner.register_parameter(leaf, nn.Parameter(part))


def _enter(module: nn.Module, args: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    """Sum the gradients of tokens and route weights over ranks; give a loss its words."""
    x_TD, *rest = args
    if isinstance(module, Head) and rest[0] is not None:
        rest = [partial(rest[0], shard=_words(module, mesh))]
    rest = [
        one._replace(weight_R=_Copy.apply(one.weight_R, mesh)) if isinstance(one, Routes) else one
        for one in rest
    ]
    return _Copy.apply(x_TD, mesh), *rest


def _words(head: Head, mesh: DeviceMesh) -> VocabularyShard:
    words = head.weight.shape[0] // mesh.size()
    return VocabularyShard(mesh.get_local_rank() * words, head.weight.shape[0], mesh.get_group())


def _gather_logits(head: nn.Module, args: tuple[Any, ...], out: Any, mesh: DeviceMesh) -> Any:
    """All-gather logits; a loss is equal on all ranks already."""
    _, loss = args
    return _Gather.apply(out, mesh) if loss is None else out


class _Copy(torch.autograd.Function):
    """Identity; backward all-reduces."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(dx.contiguous(), "sum", ctx.mesh), None  # mesh


class _Sum(torch.autograd.Function):
    """All-reduces; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        return all_reduce(x.contiguous(), "sum", mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx, None  # mesh


class _Gather(torch.autograd.Function):
    """All-gathers columns; backward takes those of this rank."""

    @staticmethod
    def forward(ctx: Any, x_TC: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.columns, ctx.rank = x_TC.shape[-1], mesh.get_local_rank()
        return all_gather_single(x_TC.contiguous(), x_TC.ndim - 1, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx.narrow(-1, ctx.rank * ctx.columns, ctx.columns), None  # mesh
