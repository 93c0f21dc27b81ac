"""Readers of documents: next-token logits and vector predictions, with or without a decode cache.

R rows, S positions, V vocabulary, n vectors of an item, P numbers in a vector.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from earlyfuse.models.batch import MixedBatch, with_shared_positions
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.generate.constrained import Item, Row
from earlyfuse.models.vocabulary import MediaCodes, Vocabulary


class Rereading:
    """Reads all rows as a whole, each time."""

    def __init__(self, model: Decoder, vocabulary: Vocabulary, settings: ForwardSettings):
        self.model, self.vocabulary, self.settings = model, vocabulary, settings
        self.device = next(model.parameters()).device
        vectors = model.config.vectors
        self.width = 0 if vectors is None else vectors.width
        self.shared_positions = vectors is not None and vectors.rotary == "shared"

    def read(self, rows: list[Row]) -> torch.Tensor:
        """Next-token logits (R, V) of each row."""
        batch, real_R = self._batch(rows)
        logits_RSV = self.model(batch, self.settings)
        return logits_RSV[torch.arange(len(rows), device=self.device), real_R - 1]

    def predict(
        self, rows: list[Row], media: Sequence[MediaCodes], z_RnP: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Predictions for noised vectors that follow each row, (R, n, P) fp32; a row has
        as many of them as an item of its medium, the others mean nothing.
        """
        batch, real_R = self._batch(_with_items(rows, media, z_RnP))
        before_R = real_R - torch.tensor([m.block for m in media], device=self.device)
        place_Rn = before_R[:, None] + torch.arange(z_RnP.shape[1], device=self.device)
        place_S = torch.arange(batch.tokens_BS.shape[1], device=self.device)
        noised_RS = batch.has_vector_BS & (place_S >= before_R[:, None])  # type: ignore[operator]
        batch.time_BS = noised_RS * time.to(self.device)
        predicted_RSP = self._predicted(batch)
        place_Rn = place_Rn.clamp(max=len(place_S) - 1)
        return predicted_RSP.gather(1, place_Rn[..., None].expand(-1, -1, self.width))

    def select(self, kept: list[int]) -> None:
        """Keeps these rows; nothing is cached."""

    def _predicted(self, batch: MixedBatch, **options: Any) -> torch.Tensor:
        predicted_TP = self.model(batch, self.settings, loss=_predictions, **options)
        return predicted_TP.float().unflatten(0, batch.tokens_BS.shape)

    def _batch(self, rows: list[Row]) -> tuple[MixedBatch, torch.Tensor]:
        """(R, S), filled from the left, and the length of each row, (R,)."""
        longest = max(len(row.tokens) for row in rows)
        padded = [row.tokens + [self.vocabulary.pad] * (longest - len(row.tokens)) for row in rows]
        tokens_RS = torch.tensor(padded, device=self.device)
        real_R = torch.tensor([len(row.tokens) for row in rows], device=self.device)
        batch = MixedBatch.of(tokens_RS, self.vocabulary.modality_of(tokens_RS))
        if not any(row.items for row in rows):
            return batch, real_R
        vectors_RSP = torch.zeros(*tokens_RS.shape, self.width, device=self.device)
        for number, row in enumerate(rows):
            for start, vectors_nP in row.items:
                vectors_RSP[number, start : start + len(vectors_nP)] = vectors_nP
        has_vector_RS = self.vocabulary.holds_vector(tokens_RS)
        return replace(batch, vectors_BSP=vectors_RSP, has_vector_BS=has_vector_RS), real_R


class Cached(Rereading):
    """Reads with a decode cache what a row has beyond what was read of it; a row that does not
    continue what was read begins another document.
    """

    def __init__(
        self, model: Decoder, vocabulary: Vocabulary, settings: ForwardSettings, slots: int
    ):
        super().__init__(model, vocabulary, settings)
        model.config.check_use("decoding", "the model cannot generate with a cache (cache=True)")
        self.slots = slots
        self.cache: DecodeCache | None = None
        self.rows: list[Row] = []  # that were read

    def read(self, rows: list[Row]) -> torch.Tensor:
        """Next-token logits (R, V); those of rows with nothing new mean nothing."""
        if self.cache is None:
            self.cache, self.rows = DecodeCache(len(rows), self.slots), [Row([], [])] * len(rows)
        before = [_common(read, row) for read, row in zip(self.rows, rows, strict=True)]
        new = [row.part(start) for row, start in zip(rows, before, strict=True)]
        self.rows = [Row([*row.tokens], [*row.items]) for row in rows]
        if not any(row.tokens for row in new):
            return torch.zeros(len(rows), self.vocabulary.size, device=self.device)
        batch = self._start(new, rows, before)
        return self.model(batch, self.settings, cache=self.cache).squeeze(1)

    def predict(
        self, rows: list[Row], media: Sequence[MediaCodes], z_RnP: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """See ``Rereading``; ``rows`` were read."""
        before = [len(row.tokens) for row in rows]
        new = _with_items([Row([], []) for _ in rows], media, z_RnP)
        batch = self._start(new, rows, before, kept=False)
        batch.time_BS = batch.has_vector_BS * time.to(self.device)  # type: ignore[operator]
        return self._predicted(batch, cache=self.cache)

    def select(self, kept: list[int]) -> None:
        """Keeps the cache of these rows."""
        self.rows = [self.rows[row] for row in kept]
        if self.cache is not None and kept:
            self.cache.select(torch.tensor(kept, device=self.device))

    def _start(
        self, new: list[Row], rows: list[Row], before: list[int], kept: bool = True
    ) -> MixedBatch:
        """The batch of what is new in ``rows``, behind ``before`` tokens of each."""
        assert self.cache is not None, "rows are read before items are predicted"
        batch, real_R = self._batch(new)
        before_R = torch.tensor(before, device=self.device)
        longest = max(before) + batch.tokens_BS.shape[1]
        self.cache.start_step(real_R, longest, (before_R == 0) & (real_R > 0), kept)
        place_S = torch.arange(batch.tokens_BS.shape[1], device=self.device)
        if self.shared_positions:
            skipped = [
                sum(len(vectors) - 1 for at, vectors in row.items if at < start)
                for row, start in zip(rows, before, strict=True)
            ]
            before_R = before_R - torch.tensor(skipped, device=self.device)
        batch.positions_BS = before_R[:, None] + place_S
        return with_shared_positions(batch) if self.shared_positions else batch


def _predictions(*_: torch.Tensor, predicted_TP: torch.Tensor, **__: Any) -> torch.Tensor:
    """The predictions of vectors, as the loss of a decoder."""
    return predicted_TP


def _with_items(rows: list[Row], media: Sequence[MediaCodes], z_RnP: torch.Tensor) -> list[Row]:
    """``rows`` with an item of each medium behind them."""
    return [
        Row(
            row.tokens + [medium.start] * medium.block,
            [*row.items, Item(len(row.tokens), z_nP[: medium.block])],
        )
        for row, medium, z_nP in zip(rows, media, z_RnP, strict=True)
    ]


def _common(read: Row, row: Row) -> int:
    """Tokens of ``row`` that were read; 0 if it is another document."""
    length = len(read.tokens)
    return length if row.tokens[:length] == read.tokens else 0
