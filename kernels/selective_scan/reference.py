"""Definition of the selective scan: one loop over tokens, in fp32 (fp64 stays fp64)."""

import torch
import torch.nn.functional as F

from earlyfuse.kernels.selective_scan.op import Scan


def selective_scan(scan: Scan) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``earlyfuse.kernels.selective_scan``."""
    u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, skip_D, z_BLD, bias_GD, group_BL, reset_BL, state_BDN = (
        scan
    )
    wide = torch.float64 if u_BLD.dtype == torch.float64 else torch.float32
    u, delta, B, C = (t.to(wide) for t in (u_BLD, delta_BLD, B_BLN, C_BLN))
    dt_BLD = step_sizes(delta, bias_GD, group_BL)
    decay_BLDN = torch.exp(dt_BLD[..., None] * A_DN)
    if reset_BL is not None:
        decay_BLDN = decay_BLDN.masked_fill(reset_BL[..., None, None], 0)
    source_BLDN = (dt_BLD * u)[..., None] * B[:, :, None]
    h_BDN = u.new_zeros(u.shape[0], *A_DN.shape) if state_BDN is None else state_BDN.clone()
    rows = [u.new_zeros(u.shape[0], 0, u.shape[2])]
    for decay, source, C_BN in zip(
        decay_BLDN.unbind(1), source_BLDN.unbind(1), C.unbind(1), strict=True
    ):
        h_BDN = decay * h_BDN + source
        rows.append((h_BDN @ C_BN[..., None]).mT)
    y_BLD = torch.cat(rows, 1)
    if skip_D is not None:
        y_BLD = y_BLD + skip_D * u
    if z_BLD is not None:
        y_BLD = y_BLD * F.silu(z_BLD.to(wide))
    return y_BLD.to(u_BLD.dtype), h_BDN


def step_sizes(
    delta_BLD: torch.Tensor, bias_GD: torch.Tensor | None, group_BL: torch.Tensor | None
) -> torch.Tensor:
    """softplus(delta + the bias of the token's group), in the dtype of ``delta_BLD``."""
    if bias_GD is not None:
        rows = bias_GD[0] if group_BL is None else bias_GD[group_BL.long()]
        delta_BLD = delta_BLD + rows
    return F.softplus(delta_BLD)
