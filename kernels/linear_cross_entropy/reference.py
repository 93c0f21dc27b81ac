"""Definition of the head with its loss: all logits at once, in fp32 (fp64 stays fp64).

T tokens, V vocabulary, D model.
"""

import torch


def token_losses(
    x_TD: torch.Tensor, w_VD: torch.Tensor, labels_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and log Z of each token (T,), with gradient; 0 where the label is -100."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TV = x_TD.to(dtype) @ w_VD.to(dtype).T
    counted_T = labels_T != -100
    log_z_T = torch.where(counted_T, logits_TV.logsumexp(1), 0.0)
    label_T = logits_TV.gather(1, labels_T.clamp(min=0)[:, None]).squeeze(1)
    return log_z_T - torch.where(counted_T, label_T, 0.0), log_z_T


def total(
    nll_T: torch.Tensor,
    log_z_T: torch.Tensor,
    z_weight: float,
    weight_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ weight · (nll + z_weight · log² Z); a weight of 1 if none are given."""
    if weight_T is not None:
        nll_T, z_T = weight_T * nll_T, weight_T * log_z_T.square()
        return nll_T.sum() + z_weight * z_T.sum()
    return nll_T.sum() + z_weight * log_z_T.square().sum()
