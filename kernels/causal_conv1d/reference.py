"""Definition of the causal convolution in plain PyTorch, in fp32 (fp64 stays fp64).

B rows, L tokens, D channels, W taps, V = W - 1.
"""

import torch
import torch.nn.functional as F

from earlyfuse.kernels.causal_conv1d.op import Convolution


def causal_conv1d(arguments: Convolution) -> tuple[torch.Tensor, torch.Tensor]:
    """y[t] = silu(bias + Σ_j weight[W-1-j] · x[t-j]), and the last V inputs; see the package."""
    x_BLD, weight_DW, bias_D, positions_BL, state_BVD, silu = arguments
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    B, L, D = x_BLD.shape
    V = weight_DW.shape[1] - 1
    before_BVD = x_BLD.new_zeros(B, V, D) if state_BVD is None else state_BVD
    inputs_BND = torch.cat([before_BVD, x_BLD], 1)  # N = V + L
    y_BLD = torch.zeros_like(x_BLD, dtype=dtype)
    for back in range(V + 1):
        tap_BLD = inputs_BND[:, V - back : V - back + L].to(dtype)
        if back and positions_BL is not None:
            tap_BLD = torch.where((positions_BL >= back)[..., None], tap_BLD, 0.0)
        y_BLD = y_BLD + tap_BLD * weight_DW[:, V - back].to(dtype)
    if bias_D is not None:
        y_BLD = y_BLD + bias_D.to(dtype)
    if silu:
        y_BLD = F.silu(y_BLD)
    return y_BLD.to(x_BLD.dtype), inputs_BND[:, L:]
