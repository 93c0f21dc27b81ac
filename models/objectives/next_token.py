"""Chameleon's objective: next token over all modalities, and z-loss (arXiv 2405.09818, 2.3).

Over videos, with VideoLLM-online's streaming loss (arXiv 2406.11816) as an option: after each frame
the model decides whether to go on (the frame separator) or to speak (the end of the video), and
these decisions have a weight of their own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torchtitan.config import Configurable

from earlyfuse.kernels.checks import readable
from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from earlyfuse.models.batch import IGNORE_LABEL, MixedBatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.sums import LABELS, Losses, label_buckets, label_counts
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
    count_names: tuple[str, ...] = (LABELS,)
    """Names of ``counts``."""
    count_of: ClassVar[dict[str, str]] = {}
    """Name of a sum → name of the count that divides it, where that is not the labels."""

    def __init__(self, config: Config, **_: Any):
        self.z_loss = config.z_loss
        self.stream_loss_weight = config.stream_loss_weight
        self.weights = {"loss": 1.0}  # of the sums that ``minimised`` adds up

    def for_model(self, model: Decoder.Config) -> Self:
        """This objective, for ``model``. ``ValueError`` if they do not fit."""
        if model.vectors is not None:
            raise ValueError(
                "loss (ChameleonObjective) must be TransfusionObjective for a model with vectors, "
                "which would not be trained; set the config's loss"
            )
        return self

    def counts(self, batch: MixedBatch, sources: int = 1) -> dict[str, torch.Tensor]:
        """Name → (N, M) int64: what the losses of ``batch`` are divided by."""
        return {LABELS: label_counts(batch, sources)}

    def counts_of(self, counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Name of each sum → the count that divides it."""
        return {name: counts[self.count_of.get(name, LABELS)] for name in self.sum_names}

    def minimised(
        self, sums: dict[str, torch.Tensor], counts: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """() fp64: the loss of a step, which decides whether it is skipped, without z-loss; from
        global ``sums`` and ``counts`` (N, M).
        """
        divisors = self.counts_of(counts)
        means = [
            weight * sums[name].double().sum() / divisors[name].sum().clamp_min(1)
            for name, weight in self.weights.items()
        ]
        return torch.stack(means).sum()

    def prepare(self, batch: MixedBatch, settings: ForwardSettings) -> MixedBatch:
        """The batch that the model reads and ``loss_of`` scores."""
        return batch

    def loss_of(self, batch: MixedBatch, sources: int = 1) -> Callable[..., Losses]:
        """The ``loss`` of ``Decoder.forward`` for this batch of so many ``sources``.

        Called with hidden states (T, D), the head's weight (V, D), and ``shard`` under tensor
        parallelism.
        """
        labels_T, bucket_T = batch.labels_BS.reshape(-1), label_buckets(batch)
        shape, rows_R = (sources, len(Modality)), labelled_rows(labels_T)
        weight_T: torch.Tensor | None = None
        if self.stream_loss_weight != 1:
            weight_T = torch.where(frame_ends(batch), self.stream_loss_weight, 1.0).flatten()

        if rows_R is not None:
            labels_T, bucket_T = labels_T[rows_R], bucket_T[rows_R]
            weight_T = None if weight_T is None else weight_T[rows_R]

        def loss(x_TD: torch.Tensor, w_VD: torch.Tensor, **shard: Any) -> Losses:
            if rows_R is not None:
                x_TD = x_TD.index_select(0, rows_R)
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
            return Losses({LABELS: total}, sums)

        return loss


def labelled_rows(labels_T: torch.Tensor) -> torch.Tensor | None:
    """(R,) the tokens with a label, so that the head leaves out the others, where a quarter or more
    have none and values can be read for free; None: all.
    """
    if not readable(labels_T):
        return None
    labelled_T = labels_T != IGNORE_LABEL
    found = int(labelled_T.sum())
    return labelled_T.nonzero().flatten() if 4 * found <= 3 * len(labels_T) else None


def frame_ends(batch: MixedBatch) -> torch.Tensor:
    """(B, S) bool: the last token of each frame of a video; an image is a video of one frame.

    A sentinel follows it, which is text.
    """
    image = int(Modality.IMAGE)
    return (batch.modality_BS == image) & (batch.label_modality_BS != image)
