"""Tensor parallelism: attention heads, feed-forward widths and the vocabulary, cut over a mesh.

Inside a cut region every rank works on the same tokens with its part of the parameters: the first
matrix is cut by its outputs, the last by its inputs, so each rank has a summand of the region's
output (Megatron-LM, arXiv 1909.08053). Entering costs an all-reduce of the input's gradient,
leaving one of the output. Norms and routers are whole on every rank.

The embedding is cut by columns, which an all-gather puts together; the head by words, and the loss
is computed from each rank's part of the logits.

T tokens, D width, V vocabulary, W ranks.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_gather_single, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.experts import Experts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Decoder, Embedding, Head
from earlyfuse.models.objectives.chameleon import token_losses
from earlyfuse.models.routes import Routes

# dimension, from the end, along which each parameter is cut: untied ones have a leading group
_FEED_FORWARD = {"w1": -2, "w3": -2, "w2": -1}
_ATTENTION = {
    "wq.weight": -2,
    "wk.weight": -2,
    "wv.weight": -2,
    "q_norm.weight": -2,
    "q_norm.bias": -2,
    "k_norm.weight": -2,
    "k_norm.bias": -2,
    "wo.weight": -1,
}
CUTS: dict[type, dict[str, int]] = {
    Attention: _ATTENTION,
    FeedForward: _FEED_FORWARD,
    Experts: _FEED_FORWARD,
    Embedding: {"weight": -1},
    Head: {"weight": -2},
}


def cut_tensors(model: Decoder, mesh: DeviceMesh) -> None:
    """Cut the parameters of ``model`` by ``CUTS``, in place, and join the cut regions."""
    for module in list(model.modules()):
        if type(module) not in CUTS:
            continue
        for name, dim in CUTS[type(module)].items():
            _cut(module, name, dim, mesh)
        if isinstance(module, Embedding):
            module.register_forward_hook(lambda _, args, out: _Gather.apply(out, mesh))
            continue
        module.register_forward_pre_hook(partial(_enter, mesh=mesh))
        if isinstance(module, Head):
            module.register_forward_hook(partial(_whole_logits_outside_training, mesh=mesh))
        else:
            module.register_forward_hook(lambda _, args, out: _Sum.apply(out, mesh))


def sharded_token_losses(vocab_size: int, mesh: DeviceMesh) -> Any:
    """``token_losses`` of the objective for logits that are cut over the vocabulary.

    Logits of all ``vocab_size`` words, as evaluation has them, are taken as they are.
    """

    def losses(
        logits_TV: torch.Tensor, labels_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logits_TV.shape[1] == vocab_size:
            return token_losses(logits_TV, labels_T)
        return _ShardedTokenLosses.apply(logits_TV, labels_T, mesh)

    return losses


def _cut(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = getattr(module, owner_name, None) if owner_name else module
    if owner is None:  # no qk-norm
        return
    weight = owner.get_parameter(leaf)
    part = distribute_tensor(weight, mesh, [Shard(weight.ndim + dim)], src_data_rank=None)
    owner.register_parameter(leaf, nn.Parameter(part))


def _enter(module: nn.Module, args: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    """What reaches a cut region has gradients from all ranks: tokens, and weights of routes."""
    x_TD, *rest = args
    if isinstance(module, Experts):
        row_R, offset_G1, weight_R = rest[0]
        rest = [Routes(row_R, offset_G1, _Copy.apply(weight_R, mesh))]
    return _Copy.apply(x_TD, mesh), *rest


def _whole_logits_outside_training(
    module: nn.Module, args: tuple[Any, ...], logits_BSV: torch.Tensor, mesh: DeviceMesh
) -> torch.Tensor:
    return logits_BSV if module.training else _Gather.apply(logits_BSV, mesh)


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


class _ShardedTokenLosses(torch.autograd.Function):
    """``token_losses`` from this rank's V/W columns of the logits: three all-reduces of (T,)."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, mesh: DeviceMesh
    ) -> tuple[torch.Tensor, torch.Tensor]:
        words = logits_TV.shape[1]
        local_T = labels_T - mesh.get_local_rank() * words
        here_T = (local_T >= 0) & (local_T < words)
        local_T = local_T.clamp(0, words - 1)
        largest_T = all_reduce(logits_TV.float().amax(1), "max", mesh)
        sum_T = (logits_TV.float() - largest_T[:, None]).exp_().sum(1)
        log_z_T = all_reduce(sum_T, "sum", mesh).log() + largest_T
        label_T = logits_TV.gather(1, local_T[:, None]).squeeze(1).float() * here_T
        ctx.save_for_backward(logits_TV, local_T, here_T, log_z_T)
        return log_z_T - all_reduce(label_T, "sum", mesh), log_z_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dnll_T: torch.Tensor, dlog_z_T: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        logits_TV, local_T, here_T, log_z_T = ctx.saved_tensors
        dlogits_TV = (logits_TV - log_z_T[:, None]).exp_().mul_((dnll_T + dlog_z_T)[:, None])
        dlogits_TV.scatter_add_(1, local_T[:, None], (-dnll_T * here_T)[:, None])
        return dlogits_TV.to(logits_TV.dtype), None, None  # labels, mesh
