"""The selective scan as operators of torch: fakes, gradient, FLOPs. Shapes as in the package."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from earlyfuse.kernels.backend import implementation
from earlyfuse.kernels.selective_scan.chunks import count_chunks

# per token, channel and state, an exponential counted as one; README.md counts them
FORWARD_FLOPS, BACKWARD_FLOPS = 7, 22


@torch.library.custom_op("earlyfuse::selective_scan", mutates_args=())
def selective_scan(
    u_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    skip_D: torch.Tensor | None,
    z_BLD: torch.Tensor | None,
    bias_GD: torch.Tensor | None,
    group_BL: torch.Tensor | None,
    reset_BL: torch.Tensor | None,
    state_BDN: torch.Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the final state, and the states before each chunk (B, I, N, D); (0,) unless ``keep``."""
    return implementation(__package__, backend).forward(
        *(u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, skip_D, z_BLD, bias_GD, group_BL, reset_BL),
        *(state_BDN, keep),
    )


@selective_scan.register_fake
def _(
    u_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    skip_D: torch.Tensor | None,
    z_BLD: torch.Tensor | None,
    bias_GD: torch.Tensor | None,
    group_BL: torch.Tensor | None,
    reset_BL: torch.Tensor | None,
    state_BDN: torch.Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, channels = u_BLD.shape
    states = A_DN.shape[1]
    kept = (batch, count_chunks(length), states, channels) if keep else (0,)
    return (
        u_BLD.new_empty(u_BLD.shape),
        A_DN.new_empty(batch, channels, states),
        A_DN.new_empty(kept),
    )


@torch.library.custom_op("earlyfuse::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy_BLD: torch.Tensor | None,
    dfinal_BDN: torch.Tensor | None,
    u_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    skip_D: torch.Tensor | None,
    z_BLD: torch.Tensor | None,
    bias_GD: torch.Tensor | None,
    group_BL: torch.Tensor | None,
    reset_BL: torch.Tensor | None,
    starts_BIND: torch.Tensor,
    need: list[bool],
    backend: str,
) -> list[torch.Tensor]:
    """Gradients of u, delta, A, B, C, skip, z, bias, state; of size 0 where not in ``need``."""
    return implementation(__package__, backend).backward(
        *(dy_BLD, dfinal_BDN, u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, skip_D, z_BLD, bias_GD),
        *(group_BL, reset_BL, starts_BIND, need),
    )


@selective_scan_backward.register_fake
def _(
    dy_BLD: torch.Tensor | None,
    dfinal_BDN: torch.Tensor | None,
    u_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    skip_D: torch.Tensor | None,
    z_BLD: torch.Tensor | None,
    bias_GD: torch.Tensor | None,
    group_BL: torch.Tensor | None,
    reset_BL: torch.Tensor | None,
    starts_BIND: torch.Tensor,
    need: list[bool],
    backend: str,
) -> list[torch.Tensor]:
    inputs = (u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, skip_D, z_BLD, bias_GD)
    gradients = [
        t.new_empty(t.shape) if t is not None and wanted else u_BLD.new_empty(0)
        for t, wanted in zip(inputs, need[:8], strict=True)
    ]
    state_shape = (u_BLD.shape[0], *A_DN.shape) if need[8] else (0,)
    return [*gradients, A_DN.new_empty(state_shape)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, _state_BDN, keep, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.backend = backend
    if keep:
        ctx.save_for_backward(*tensors, output[2])


def _backward(
    ctx: Any, dy_BLD: torch.Tensor | None, dfinal_BDN: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    need = [*wanted[:8], wanted[10]]
    gradients = selective_scan_backward(dy_BLD, dfinal_BDN, *ctx.saved_tensors, need, ctx.backend)
    found = [g if n else None for g, n in zip(gradients, need, strict=True)]
    return (*found[:8], None, None, found[8], None, None)  # group, reset; keep, backend


selective_scan.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.earlyfuse.selective_scan)
def _forward_flops(u: torch.Size, delta: torch.Size, A: torch.Size, *_: Any, **__: Any) -> int:
    return FORWARD_FLOPS * u.numel() * A[1]


@register_flop_formula(torch.ops.earlyfuse.selective_scan_backward)
def _backward_flops(
    dy: Any, dfinal: Any, u: torch.Size, delta: torch.Size, A: torch.Size, *_: Any, **__: Any
) -> int:
    return BACKWARD_FLOPS * u.numel() * A[1]
