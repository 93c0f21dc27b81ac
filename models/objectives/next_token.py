"""Chameleon's objective: next token over all modalities, and z-loss (arXiv 2405.09818, 2.3).

Sums, not means: ranks and micro-batches hold different numbers of text and image tokens, so the
caller divides by global counts, and a batch without images is no special case.

B rows, S positions, T = B·S, M modality ids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchtitan.config import Configurable

from earlyfuse.kernels.linear_cross_entropy import LossSums, linear_cross_entropy
from earlyfuse.models.batch import IGNORE_LABEL
from earlyfuse.models.vocabulary import Modality

MODALITIES = len(Modality)


class ChameleonObjective(Configurable):
    """Σ nll + z_loss · Σ log² Z over labelled positions; labels are already the next tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        z_loss: float = 1e-5
        """Weight of log² Z; 0 turns it off. Chameleon: 1e-5."""

        def __post_init__(self) -> None:
            if not 0 <= self.z_loss < math.inf:
                raise ValueError(
                    f"z_loss ({self.z_loss}) must not be negative or infinite; 0 turns it off"
                )

    def __init__(self, config: Config, **_: Any):
        self.z_loss = config.z_loss

    def loss_of(
        self, labels_BS: torch.Tensor, label_modality_BS: torch.Tensor
    ) -> Callable[..., LossSums]:
        """The ``loss`` for ``Decoder.forward``: sums of one batch, by the modality of the *label*.

        ``labels_BS`` int64, -100 counts nothing; ``label_modality_BS`` uint8, modality of each
        label. Divided by the number of labels, ``total`` of the sums is what to minimise.
        """
        return partial(
            linear_cross_entropy,
            labels_T=labels_BS.reshape(-1),
            modality_T=label_modality_BS.reshape(-1),
            modalities=MODALITIES,
            z_weight=self.z_loss,
        )


def label_members(labels_T: torch.Tensor, modality_T: torch.Tensor) -> torch.Tensor:
    """(M, T) bool: which labels count, by modality; -100 belongs to none."""
    ids_M1 = torch.arange(MODALITIES, device=labels_T.device).unsqueeze(1)
    return (modality_T == ids_M1) & (labels_T != IGNORE_LABEL)
