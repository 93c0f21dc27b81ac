"""Tensor parallelism: attention heads, feed-forward widths and the vocabulary, cut over a mesh.

Inside a cut region every rank works on the same tokens with its part of the parameters: the first
matrix is cut by its outputs, the last by its inputs, so each rank has a summand of the region's
output (Megatron-LM, arXiv 1909.08053). Entering costs an all-reduce of the input's gradient,
leaving one of the output. Norms and routers are whole on every rank.

The embedding is cut by columns, which an all-gather puts together; the head by words: a loss is
told which words are here, logits are gathered.

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
    """Shards parameters by the ``tensor_split`` of each module, in place, and joins regions."""
    for module in list(model.modules()):
        split = getattr(module, "tensor_split", None)
        if not split:
            continue
        for name, dim in split.items():
            _cut(module, name, dim, mesh)
        if isinstance(module, Embedding):
            module.register_forward_hook(lambda _, args, out: _Gather.apply(out, mesh))
            continue
        module.register_forward_pre_hook(partial(_enter, mesh=mesh))
        if isinstance(module, Head):
            module.register_forward_hook(partial(_gather_logits, mesh=mesh))
        else:
            module.register_forward_hook(lambda _, args, out: _Sum.apply(out, mesh))


def check_tensor_parallel(parallelism: ParallelismConfig, model: Decoder.Config) -> None:
    """``ValueError`` unless all that is split divides evenly."""
    degree, experts = parallelism.tensor_parallel_degree, parallelism.expert_parallel_degree
    if degree == 1:
        return
    if experts > 1:
        raise ValueError(
            f"parallelism.expert_parallel_degree ({experts}) must be 1 together with "
            f"tensor_parallel_degree ({degree}), which splits experts too; use one of the two, and "
            "FSDP for the rest"
        )
    field = f"parallelism.tensor_parallel_degree ({degree})"
    model.check_use("tensor_parallel", f"{field} must be 1")
    sizes = {"dim": model.dim, "vocab_size": model.vocab_size} | model.even_sizes("tensor")
    for name, size in sizes.items():
        if size % degree:
            raise ValueError(
                f"{field} must divide {name} ({size}) of the model; lower it or change the model"
            )


def _cut(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = getattr(module, owner_name, None) if owner_name else module
    if owner is None:  # no qk-norm
        return
    weight = owner.get_parameter(leaf)
    part = distribute_tensor(weight, mesh, [Shard(weight.ndim + dim)], src_data_rank=None)
    owner.register_parameter(leaf, nn.Parameter(part))


def _enter(module: nn.Module, args: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    """What reaches a cut region has gradients from all ranks: tokens, and weights of routes. A loss
    in the head is told which words this rank has.
    """
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
    """A loss is the same on all ranks already."""
    _, loss = args
    return _Gather.apply(out, mesh) if loss is None else out


class _Copy(torch.autograd.Function):
    """The input; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(dx.contiguous(), "sum", ctx.mesh), None  # mesh


class _Sum(torch.autograd.Function):
    """The sum over ranks; every rank's summand has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        return all_reduce(x.contiguous(), "sum", mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx, None  # mesh


class _Gather(torch.autograd.Function):
    """All ranks' columns side by side; each rank's gradient is that of its own columns."""

    @staticmethod
    def forward(ctx: Any, x_TC: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.columns, ctx.rank = x_TC.shape[-1], mesh.get_local_rank()
        return all_gather_single(x_TC.contiguous(), x_TC.ndim - 1, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx.narrow(-1, ctx.rank * ctx.columns, ctx.columns), None  # mesh
