"""Turns logits into losses and gradients in plain PyTorch, in place.

Exponentials are computed once, relative to the largest logit of a row; a factor per row makes them
relative to log Z.

V vocabulary, C tokens of a chunk.
"""

from functools import partial

import torch

from earlyfuse.kernels.linear_cross_entropy import chunked
from earlyfuse.kernels.linear_cross_entropy.chunked import UNCOUNTED, Combine

PIECE = 1 << 17  # logits: 512 KiB


def _turn(
    logits_CV: torch.Tensor,
    rows_C: torch.Tensor,
    z_weight: float,
    combine: Combine | None,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and log Z (C,); logits become their gradient. See ``chunked.forward``."""
    values_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    zero = values_CV.new_zeros(())
    column_C1 = rows_C.clamp(min=0)[:, None]
    label_C = torch.where(rows_C >= 0, values_CV.gather(1, column_C1).squeeze(1), zero)
    own_largest_C, sum_C = _exponentiate(values_CV)
    largest_C = own_largest_C
    if combine is not None:
        largest_C, sum_C, label_C = combine(torch.stack([largest_C, sum_C, label_C])).unbind(0)
    counted_C = rows_C != UNCOUNTED
    log_z_C = torch.where(counted_C, largest_C + sum_C.log(), zero)
    if gradient:
        factor_C = (own_largest_C - log_z_C).exp() * (1 + 2 * z_weight * log_z_C)
        values_CV.mul_(torch.where(counted_C, factor_C, zero)[:, None])
        values_CV.scatter_add_(1, column_C1, -(rows_C >= 0).to(values_CV.dtype)[:, None])
        if values_CV is not logits_CV:
            logits_CV.copy_(values_CV)
    return torch.where(counted_C, log_z_C - label_C, zero), log_z_C


def _exponentiate(values_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(values - largest of the row) in place; the largest values and the sums (C,)."""
    largest_C, sum_C = (values_CV.new_empty(values_CV.shape[0]) for _ in range(2))
    tokens = max(values_CV.shape[0], 1)
    if values_CV.device.type == "cpu":  # four passes in cache, not over memory
        tokens = max(PIECE // values_CV.shape[1], 1)
    for part, largest, sums in zip(
        values_CV.split(tokens), largest_C.split(tokens), sum_C.split(tokens), strict=True
    ):
        torch.amax(part, 1, out=largest)
        torch.sum(part.sub_(largest[:, None]).exp_(), 1, out=sums)
    return largest_C, sum_C


forward = partial(chunked.forward, turn=_turn)
