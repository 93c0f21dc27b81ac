"""Chameleon's objective: next token over all modalities, and z-loss (arXiv 2405.09818, 2.3).

Sums, not means: ranks and micro-batches hold different numbers of text and image tokens, so the
caller divides by global counts, and a batch without images is no special case.

B rows, S positions, T = B·S, V vocabulary, M modality ids.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torchtitan.config import Configurable

from earlyfuse.models.batch import IGNORE_LABEL
from earlyfuse.models.modality import Modality

MODALITIES = len(Modality)


class LossSums(NamedTuple):
    """Sums over one batch, by the modality of the *label*.

    ``nll_M``    (M,) fp32, with gradient: negative log likelihood, nats
    ``z_M``      (M,) fp32, with gradient: log² Z
    ``count_M``  (M,) int64: labels that count
    """

    nll_M: torch.Tensor
    z_M: torch.Tensor
    count_M: torch.Tensor


class ChameleonObjective(Configurable):
    """Σ nll + z_loss · Σ log² Z over labelled positions; labels are already the next tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        z_loss: float = 1e-5
        """Weight of log² Z; 0 turns it off. Chameleon: 1e-5."""

        def __post_init__(self) -> None:
            if self.z_loss < 0:
                raise ValueError(f"z_loss ({self.z_loss}) must not be negative; 0 turns it off")

    def __init__(self, config: Config, **_: Any):
        self.z_loss = config.z_loss
        self.token_losses = token_losses  # another where the logits are cut over ranks

    def sums(
        self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor, label_modality_BS: torch.Tensor
    ) -> LossSums:
        """Loss sums of one batch.

        ``logits_BSV`` (B, S, V) any float; ``labels_BS`` int64, -100 counts nothing;
        ``label_modality_BS`` uint8, modality of each label.
        """
        labels_T = labels_BS.reshape(-1)
        nll_T, log_z_T = self.token_losses(logits_BSV.flatten(0, 1), labels_T.clamp(min=0))
        member_MT = label_members(labels_T, label_modality_BS.reshape(-1))
        zero = nll_T.new_zeros(())
        return LossSums(
            torch.where(member_MT, nll_T, zero).sum(1),
            torch.where(member_MT, log_z_T.square(), zero).sum(1),
            member_MT.sum(1),
        )

    def total(self, sums: LossSums, labels: torch.Tensor | int) -> torch.Tensor:
        """The loss to minimise: sums over ``labels``, the global number of labels of the step."""
        return (sums.nll_M.sum() + self.z_loss * sums.z_M.sum()) / labels


def token_losses(
    logits_TV: torch.Tensor, labels_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood of the labels and log Z, both (T,) fp32, of logits (T, V)."""
    return _TokenLosses.apply(logits_TV, labels_T)


class _TokenLosses(torch.autograd.Function):
    """Logits (T, V) and labels (T,) → nll (T,) and log Z (T,), fp32.

    Their gradient, softmax · (dnll + dlog Z) - dnll at the label, is built in one buffer of the
    logits' size, where autograd takes four.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_z_T = logits_TV.float().logsumexp(-1)
        ctx.save_for_backward(logits_TV, labels_T, log_z_T)
        return log_z_T - logits_TV.gather(1, labels_T[:, None]).squeeze(1), log_z_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dnll_T: torch.Tensor, dlog_z_T: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        logits_TV, labels_T, log_z_T = ctx.saved_tensors
        dlogits_TV = (logits_TV - log_z_T[:, None]).exp_().mul_((dnll_T + dlog_z_T)[:, None])
        dlogits_TV.scatter_add_(1, labels_T[:, None], -dnll_T[:, None])
        return dlogits_TV.to(logits_TV.dtype), None  # labels


def label_members(labels_T: torch.Tensor, modality_T: torch.Tensor) -> torch.Tensor:
    """(M, T) bool: which labels count, by modality; -100 belongs to none."""
    ids_M1 = torch.arange(MODALITIES, device=labels_T.device).unsqueeze(1)
    return (modality_T == ids_M1) & (labels_T != IGNORE_LABEL)
