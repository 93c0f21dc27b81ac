"""Transfusion's objective (arXiv 2408.11039, 3): next token for text, diffusion for vectors.

Language-model loss over labels + λ · squared error of what the model predicts of noised vectors,
each divided by its own global count. All vectors of an image have one time. Times, noise and
dropped conditions are hashes of (seed, step, place in the global batch).

B rows, S positions, P numbers in a vector, T = B·S, N data sources, M modality ids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch

from earlyfuse.models.batch import (
    PADDING,
    MixedBatch,
    first_of_spans,
    places_in_documents,
    vector_spans,
    without_clean_copies,
)
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.field_checks import check_choices
from earlyfuse.models.hashed_noise import key_of, normal, uniform
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.objectives.sums import LABELS, Losses, buckets, table
from earlyfuse.models.precision import wide
from earlyfuse.models.vocabulary import Modality

VECTORS = "vectors"  # name of the count of scored vectors


class TransfusionObjective(ChameleonObjective):
    """Σ nll / labels + λ · Σ mean squared error of a vector / vectors.

    ``diffusion_loss`` is the mean squared error in ``loss_in`` of one number of a vector.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChameleonObjective.Config):
        z_loss: float = 0.0
        """Weight of log² Z; 0 turns it off."""

        diffusion_weight: float = 5.0
        """λ, the weight of the diffusion loss; Transfusion: 5."""

        loss_in: Literal["", "epsilon", "v", "x"] = ""
        """Space of the squared error; empty: what the model predicts."""

        times: Literal["uniform", "logit_normal"] = "uniform"
        """Distribution of the times in training."""

        times_mean: float = 0.0
        """Mean of the logit of the time with times logit_normal; above 0: more noise."""

        times_std: float = 1.0
        """Standard deviation of the logit of the time with times logit_normal."""

        cap_before_caption: float = 0.5
        """Largest time of an image that no text precedes in its document; Transfusion: 500 of 1000
        steps. 1 turns it off."""

        drop_condition: float = 0.1
        """Share of images that do not see what precedes them in training, for guidance."""

        seed: int | None = None
        """Seed of times, noise and dropped conditions; by default debug.seed, or 0."""

        def check(self) -> None:
            """``ValueError`` for a value out of range."""
            ChameleonObjective.Config.check(self)
            check_choices(
                self, loss_in=("", "epsilon", "v", "x"), times=("uniform", "logit_normal")
            )
            for name in ("diffusion_weight", "times_std"):
                if not 0 <= (value := getattr(self, name)) < math.inf:
                    raise ValueError(f"{name} ({value}) must not be negative or infinite")
            if not math.isfinite(self.times_mean):
                raise ValueError(f"times_mean ({self.times_mean}) must be finite")
            if self.times == "uniform" and (self.times_mean, self.times_std) != (0.0, 1.0):
                raise ValueError(
                    f"times_mean ({self.times_mean}) and times_std ({self.times_std}) need times "
                    "logit_normal; leave them out"
                )
            if not 0 < self.cap_before_caption <= 1:
                raise ValueError(
                    f"cap_before_caption ({self.cap_before_caption}) must lie in (0, 1]; 1 is off"
                )
            if not 0 <= self.drop_condition < 1:
                raise ValueError(f"drop_condition ({self.drop_condition}) must lie in [0, 1)")

    sum_names = ("loss", "z_loss", "diffusion_loss")
    count_names = (LABELS, VECTORS)
    count_of: ClassVar[dict[str, str]] = {"diffusion_loss": VECTORS}

    def __init__(self, config: Config, **_: Any):
        super().__init__(config)
        self.config = config
        self.weights = {"loss": 1.0, "diffusion_loss": config.diffusion_weight}
        self.diffusion: Diffusion | None = None

    def for_model(self, model: Decoder.Config) -> Self:
        """See ``ChameleonObjective``; the model decides schedule and prediction."""
        if model.vectors is None:
            raise ValueError(
                "loss (TransfusionObjective) needs a model with vectors; set vectors in the "
                "model's config, or use ChameleonObjective"
            )
        self.diffusion = model.vectors.diffusion.build()
        return self

    def counts(self, batch: MixedBatch, sources: int = 1) -> dict[str, torch.Tensor]:
        """Labels, and vectors that are scored."""
        vectors_NM = torch.zeros(
            sources, len(Modality), dtype=torch.int64, device=batch.tokens_BS.device
        )
        if (span_BS := vector_spans(batch)) is not None:
            noised_T = (without_clean_copies(span_BS) != 0).flatten()
            bucket_T = buckets(batch.source_BS, batch.modality_BS)
            vectors_NM = table(noised_T.long(), noised_T, bucket_T, sources)
        return super().counts(batch, sources) | {VECTORS: vectors_NM}

    def prepare(self, batch: MixedBatch, settings: ForwardSettings) -> MixedBatch:
        """The batch with noised vectors, their times and targets, and dropped conditions.

        A dropped condition: a new document begins at the image's begin sentinel.
        """
        span_BS = vector_spans(batch)
        if span_BS is None or batch.vectors_BSP is None:
            return batch
        assert self.diffusion is not None, "for_model comes first"
        config, span_BS = self.config, without_clean_copies(span_BS)
        rows, seq_len, width = batch.vectors_BSP.shape
        row_B1 = torch.arange(rows, device=span_BS.device)[:, None] + settings.first_row
        place_S = torch.arange(seq_len, device=span_BS.device)
        first_BS = first_of_spans(span_BS)
        image_BS = row_B1 * seq_len + first_BS

        def draw(what: str) -> int:
            return key_of("transfusion", config.seed or 0, settings.step, what)

        if config.times == "uniform":
            time_BS = uniform(draw("time"), image_BS)
        else:
            normal_BS = normal(draw("time"), image_BS)
            time_BS = (config.times_mean + config.times_std * normal_BS).sigmoid()
        begin_BS = (first_BS - 1).clamp(min=0)  # of its block
        others_BS = _others_before(batch).gather(1, begin_BS)
        # begin-of-document is one
        largest_BS = torch.where(others_BS <= 1, config.cap_before_caption, 1.0)
        time_BS = self.diffusion.times(time_BS, largest_BS) * (span_BS != 0)

        clean_BSP = batch.vectors_BSP.float()
        index_BSP = (row_B1 * seq_len + place_S)[..., None] * width
        index_BSP = index_BSP + torch.arange(width, device=span_BS.device)
        noise_BSP = normal(draw("noise"), index_BSP)
        noised_BSP = self.diffusion.noised(clean_BSP, noise_BSP, time_BS)  # clean at time 0

        dropped_BS = (first_BS == place_S) & (span_BS != 0)
        # not in validation, which has no step
        share = config.drop_condition if settings.step else 0.0
        dropped_BS &= uniform(draw("condition"), image_BS) < share
        return replace(
            batch,
            vectors_BSP=noised_BSP,
            time_BS=time_BS,
            target_BSP=self.diffusion.target(clean_BSP, noise_BSP, time_BS),
            document_BS=_split_before(batch.document_BS, dropped_BS),
        )

    def loss_of(self, batch: MixedBatch, sources: int = 1) -> Callable[..., Losses]:
        """See ``ChameleonObjective``; also called with the predictions (T, P)."""
        language = super().loss_of(batch, sources)
        span_BS = vector_spans(batch)

        def loss(
            x_TD: torch.Tensor, w_VD: torch.Tensor, *, predicted_TP: torch.Tensor, **shard: Any
        ) -> Losses:
            totals, sums = language(x_TD, w_VD, **shard)
            if span_BS is None:
                error_T = predicted_TP.sum(-1).float()  # masked; every module is in the graph
                noised_T = torch.zeros_like(error_T, dtype=torch.bool)
            else:
                error_T = self._error(predicted_TP, batch)
                noised_T = (without_clean_copies(span_BS) != 0).flatten()
            error_T = torch.where(noised_T, error_T, 0)
            bucket_T = buckets(batch.source_BS, batch.modality_BS)
            error_NM = table(error_T.detach(), noised_T, bucket_T, sources)
            total = self.config.diffusion_weight * error_T.sum()
            return Losses(totals | {VECTORS: total}, sums | {"diffusion_loss": error_NM})

        return loss

    def _error(self, predicted_TP: torch.Tensor, batch: MixedBatch) -> torch.Tensor:
        """(T,) fp32: mean squared error of each vector, in the space of the loss."""
        assert self.diffusion is not None and batch.target_BSP is not None
        assert batch.vectors_BSP is not None and batch.time_BS is not None
        predicted_TP, target_TP = wide(predicted_TP), batch.target_BSP.flatten(0, 1)
        if self.config.loss_in not in ("", self.diffusion.config.predicts):
            # both by the same formula: where it clips, a perfect prediction still has no error
            at = batch.vectors_BSP.flatten(0, 1), batch.time_BS.flatten()
            predicted_TP, target_TP = (
                getattr(self.diffusion.values(value_TP, *at), self.config.loss_in)
                for value_TP in (predicted_TP, target_TP)
            )
        return (predicted_TP - target_TP).square().mean(-1)


def _others_before(batch: MixedBatch) -> torch.Tensor:
    """(B, S) int64: tokens of the same document up to each position, without vectors and their
    sentinels, the tokens beside vectors.
    """
    assert batch.has_vector_BS is not None, "there are spans of vectors"
    vector_BS, document_BS = batch.has_vector_BS, batch.document_BS
    same_BS = document_BS[:, 1:] == document_BS[:, :-1]
    other_BS = ~vector_BS
    other_BS[:, :-1] &= ~(vector_BS[:, 1:] & same_BS)
    other_BS[:, 1:] &= ~(vector_BS[:, :-1] & same_BS)
    place_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    begin_BS = place_S - places_in_documents(document_BS)
    others_BS = other_BS.cumsum(1)
    return others_BS - (others_BS - other_BS.long()).gather(1, begin_BS)


def _split_before(document_BS: torch.Tensor, first_BS: torch.Tensor) -> torch.Tensor:
    """``document_BS`` with a new document from the token before each position of ``first_BS``."""
    begins_BS = first_BS.roll(-1, 1)
    begins_BS[:, -1] = False
    more_BS = begins_BS.cumsum(1, dtype=document_BS.dtype)
    return torch.where(document_BS == PADDING, PADDING, document_BS + more_BS)
