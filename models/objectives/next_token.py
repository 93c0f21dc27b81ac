"""Chameleon's objective: next token over all modalities, and z-loss (arXiv 2405.09818, 2.3).

Over videos, with VideoLLM-online's streaming loss (arXiv 2406.11816) as an option: after each frame
the model decides whether to go on (the frame separator) or to speak (the end of the video), and
these decisions have a weight of their own.
"""

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
    """Σ weight · (nll + z_loss · log² Z) over labelled positions; labels are the next tokens.

    The weight is ``stream_loss_weight`` at the last token of each frame or image, 1 elsewhere. As
    in the public code the total is divided by the number of labels, not by the sum of weights.
    ``Losses.sums`` are without weights, so losses of runs with different weights are comparable.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        z_loss: float = 1e-5
        """Weight of log² Z; 0 turns it off. Chameleon: 1e-5."""

        stream_loss_weight: float = 1.0
        """Weight of the decision after each frame of a video, to go on or to speak
        (VideoLLM-online); 1: as any other token. Needs data with videos."""

        def __post_init__(self) -> None:
            self.check()

        def check(self) -> None:
            """``ValueError`` for a value out of range; called again before a run starts."""
            if not 0 <= self.z_loss < math.inf:
                raise ValueError(
                    f"z_loss ({self.z_loss}) must not be negative or infinite; 0 turns it off"
                )
            if not 0 <= self.stream_loss_weight < math.inf:
                raise ValueError(
                    f"stream_loss_weight ({self.stream_loss_weight}) must not be negative or "
                    "infinite; 1 turns it off"
                )

    sum_names: tuple[str, ...] = ("loss", "z_loss")
    """Names of ``Losses.sums``, also for ranks without the head."""

    def __init__(self, config: Config, **_: Any):
        self.z_loss = config.z_loss
        self.stream_loss_weight = config.stream_loss_weight

    def loss_of(self, batch: MixedBatch, sources: int = 1) -> Callable[..., Losses]:
        """The ``loss`` of ``Decoder.forward`` for this batch of so many ``sources``.

        Called with hidden states (T, D), the head's weight (V, D), and ``shard`` under tensor
        parallelism.
        """
        labels_T, bucket_T = batch.labels_BS.reshape(-1), label_buckets(batch)
        shape = (sources, len(Modality))
        weight_T: torch.Tensor | None = None
        if self.stream_loss_weight != 1:
            weight_T = torch.where(frame_ends(batch), self.stream_loss_weight, 1.0).flatten()

        def loss(x_TD: torch.Tensor, w_VD: torch.Tensor, **shard: Any) -> Losses:
            total, nll_K, z_K = linear_cross_entropy(
                x_TD,
                w_VD,
                labels_T,
                bucket_T,
                modalities=math.prod(shape),
                z_weight=self.z_loss,
                weight_T=weight_T,
                **shard,
            )
            sums = {"loss": nll_K.view(shape), "z_loss": self.z_loss * z_K.view(shape)}
            return Losses(total, sums)

        return loss


def frame_ends(batch: MixedBatch) -> torch.Tensor:
    """(B, S) bool: the last token of each frame of a video; an image is a video of one frame.

    A sentinel follows it, which is text.
    """
    image = int(Modality.IMAGE)
    return (batch.modality_BS == image) & (batch.label_modality_BS != image)
