"""The causal convolution on CUDA: launches of ``triton_kernels``.

B rows, L tokens, D channels, W taps, V = W - 1, C chunks of tokens.
"""

from collections.abc import Sequence

import torch
import triton

from earlyfuse.kernels.causal_conv1d.op import Convolution
from earlyfuse.kernels.causal_conv1d.triton_kernels import (
    BACKWARD_TOKENS,
    FORWARD_TOKENS,
    UNROLLED,
    backward_kernel,
    forward_kernel,
)
from earlyfuse.kernels.triton_support import on_its_device


@on_its_device
def causal_conv1d(arguments: Convolution) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, D) and the final state (B, V, D)."""
    x_BLD, weight_DW, bias_D, positions_BL, state_BVD, _ = arguments
    B, L, D = x_BLD.shape
    W = weight_DW.shape[1]
    y_BLD = x_BLD.new_empty(B, L, D)
    if y_BLD.numel() == 0:
        final_BVD = x_BLD.new_zeros(B, W - 1, D)
        return y_BLD, final_BVD if state_BVD is None else final_BVD.copy_(state_BVD)
    final_BVD = x_BLD.new_empty(B, W - 1, D)
    chunks = triton.cdiv(L, FORWARD_TOKENS)
    forward_kernel[lambda meta: (triton.cdiv(D, meta["CHANNELS"]), chunks, B)](
        *(x_BLD, *_dense(weight_DW, bias_D, positions_BL, state_BVD), y_BLD, final_BVD),
        *(B, L, D, *x_BLD.stride()[:2]),
        TOKENS=FORWARD_TOKENS,
        **_options(arguments),
    )
    return y_BLD, final_BVD


@on_its_device
def causal_conv1d_backward(
    dy_BLD: torch.Tensor, dfinal_BVD: torch.Tensor, arguments: Convolution, need: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """Gradients of x, weight, bias and initial state; all are computed, the unneeded dropped."""
    x_BLD, weight_DW, bias_D, positions_BL, state_BVD, _ = arguments
    B, L, D = x_BLD.shape
    W = weight_DW.shape[1]
    dx_BLD = x_BLD.new_empty(B, L, D)
    dstate_BVD = dfinal_BVD.clone(memory_format=torch.contiguous_format)  # the result if L is 0
    chunks = triton.cdiv(L, BACKWARD_TOKENS)
    partial_NXD = x_BLD.new_empty(B * chunks, W + 1, D, dtype=torch.float32)
    if dx_BLD.numel():
        dy_BLD = dy_BLD if dy_BLD.stride(2) == 1 else dy_BLD.contiguous()
        backward_kernel[lambda meta: (triton.cdiv(D, meta["CHANNELS"]), chunks, B)](
            *(dy_BLD, dfinal_BVD.contiguous(), x_BLD),
            *(*_dense(weight_DW, bias_D, positions_BL, state_BVD), dx_BLD, dstate_BVD, partial_NXD),
            *(B, L, D, *dy_BLD.stride()[:2], *x_BLD.stride()[:2]),
            TOKENS=BACKWARD_TOKENS,
            **_options(arguments),
        )
    sums_XD = partial_NXD.sum(0)
    return {
        "x_BLD": dx_BLD,
        "weight_DW": sums_XD[:W].t(),
        "bias_D": sums_XD[W].clone(),  # outputs of an op must not share memory
        "initial_state_BVD": dstate_BVD,
    }


def _options(of: Convolution) -> dict[str, int | bool]:
    """Constants of a launch."""
    return {
        "W": of.weight_DW.shape[1],
        "STEPS": UNROLLED,
        "SILU": of.silu,
        "HAS_BIAS": of.bias_D is not None,
        "HAS_POSITIONS": of.positions_BL is not None,
        "HAS_STATE": of.initial_state_BVD is not None,
    }


def _dense(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]
