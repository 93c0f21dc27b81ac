"""Chameleon's objective: next token over all modalities, and z-loss (arXiv 2405.09818, 2.3)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.config import Configurable

from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.objectives.sums import Losses, label_buckets
from earlyfuse.models.vocabulary import Modality


class ChameleonObjective(Configurable):
    """Σ nll + z_loss · Σ log² Z over labelled positions; labels are already the next tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        z_loss: float = 1e-5
        """Weight of log² Z; 0 turns it off. Chameleon: 1e-5."""

        def __post_init__(self) -> None:
            self.check()

        def check(self) -> None:
            """``ValueError`` for a value out of range; called again before a run starts."""
            if not 0 <= self.z_loss < math.inf:
                raise ValueError(
                    f"z_loss ({self.z_loss}) must not be negative or infinite; 0 turns it off"
                )

    sum_names: tuple[str, ...] = ("loss", "z_loss")
    """Names of ``Losses.sums``, also for ranks without the head."""

    def __init__(self, config: Config, **_: Any):
        self.z_loss = config.z_loss

    def loss_of(self, batch: MixedBatch, sources: int = 1) -> Callable[..., Losses]:
        """The ``loss`` of ``Decoder.forward`` for this batch of so many ``sources``.

        Called with hidden states (T, D), the head's weight (V, D), and ``shard`` under tensor
        parallelism.
        """
        labels_T, bucket_T = batch.labels_BS.reshape(-1), label_buckets(batch)
        shape = (sources, len(Modality))

        def loss(x_TD: torch.Tensor, w_VD: torch.Tensor, **shard: Any) -> Losses:
            total, nll_K, z_K = linear_cross_entropy(
                x_TD,
                w_VD,
                labels_T,
                bucket_T,
                modalities=math.prod(shape),
                z_weight=self.z_loss,
                **shard,
            )
            sums = {"loss": nll_K.view(shape), "z_loss": self.z_loss * z_K.view(shape)}
            return Losses(total, sums)

        return loss
