"""Projections and norms, shared by all tokens or untied by modality.

``groups`` is the number of parameter sets: 1 is shared, M one per modality group (arXiv
2411.04996, section 2). Both forms are called as ``module(x_TD, context)``. T tokens, D width in, F
width out, G groups, N heads, H head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torchtitan.protocols.module import Module

from earlyfuse.kernels.grouped_gemm import grouped_linear
from earlyfuse.models.blocks.branch import Matrix
from earlyfuse.models.blocks.indexed_parameters import scaled_by_group
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.init_weights import Draw, constant

NORM_EPS = 1e-5


def parameter(groups: int, *shape: int) -> nn.Parameter:
    """Uninitialised parameter of ``shape``, or (groups, *shape) untied by modality."""
    return nn.Parameter(torch.empty(groups, *shape) if groups > 1 else torch.empty(shape))


def to_local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter under tensor or expert parallelism, else all of it.

    Layers take their sizes from the shard, not from their config.
    """
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Linear(Module):
    """x W^T, without bias. Weight (F, D), or (G, F, D) untied by modality."""

    def __init__(self, matrix: Matrix):
        super().__init__()
        self.untied = matrix.groups > 1
        self.weight = parameter(matrix.groups, matrix.outputs, matrix.inputs)

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, F)."""
        if self.untied:
            weight = to_local(self.weight)
            return grouped_linear(x_TD, weight, *context.by_group, unique_tokens=True)
        return F.linear(x_TD, to_local(self.weight))


class RMSNorm(Module):
    """x / rms(x) · weight, in fp32. Weight (D,), or (G, D) untied by modality."""

    def __init__(self, dim: int, groups: int = 1):
        super().__init__()
        self.untied = groups > 1
        self.weight = parameter(groups, dim)

    def draws(self) -> dict[str, Draw]:
        return {"weight": constant(1.0)}

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D)."""
        if self.untied:
            return scaled_by_group(_divided_by_rms(x_TD), self.weight, None, context.group_T)
        if x_TD.device.type == "cpu":
            return _divided_by_rms(x_TD) * self.weight
        return F.rms_norm(x_TD, self.weight.shape, self.weight, NORM_EPS)


def _divided_by_rms(x_TD: torch.Tensor) -> torch.Tensor:
    if x_TD.device.type == "cpu" and x_TD.dtype == torch.float32:
        return _DividedByRms.apply(x_TD)
    return F.rms_norm(x_TD, x_TD.shape[-1:], eps=NORM_EPS)


class _DividedByRms(torch.autograd.Function):
    """x / rms(x), fp32: torch has no fused CPU kernel, and its composition takes twice as long."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor) -> torch.Tensor:
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        scale_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(NORM_EPS).rsqrt_()
        y_TD = x_TD * scale_T1
        ctx.save_for_backward(y_TD, scale_T1)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> torch.Tensor:
        y_TD, scale_T1 = ctx.saved_tensors
        along_TD = y_TD * dy_TD
        mean_T1 = along_TD.mean(-1, keepdim=True)
        # (dy - y · mean(y · dy)) / rms, in one buffer
        return torch.addcmul(dy_TD, y_TD, mean_T1, value=-1, out=along_TD).mul_(scale_T1)


class HeadNorm(Module):
    """Chameleon's qk-norm: LayerNorm over each head with a weight and bias of its own per head.

    Weight and bias (N, H), or (G, N, H) untied by modality. Rows differ between heads: public
    checkpoints share one between the heads of a model-parallel shard (arXiv 2405.09818, 2.3).
    """

    def __init__(self, heads: int, head_dim: int, groups: int = 1):
        super().__init__()
        self.untied = groups > 1
        self.weight = parameter(groups, heads, head_dim)
        self.bias = parameter(groups, heads, head_dim)

    def draws(self) -> dict[str, Draw]:
        return {"weight": constant(1.0), "bias": constant(0.0)}

    def forward(self, x_TNH: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, N, H) → (T, N, H)."""
        weight, bias = to_local(self.weight), to_local(self.bias)
        normed_TNH = F.layer_norm(x_TNH, x_TNH.shape[-1:], eps=NORM_EPS)
        if self.untied:
            return scaled_by_group(normed_TNH, weight, bias, context.group_T)
        return torch.addcmul(bias, normed_TNH, weight)
