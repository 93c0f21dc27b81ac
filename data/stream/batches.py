"""Batches over lanes, drawn in the background.

``LaneStream`` draws the micro-batches of a range of lanes, ``Prefetcher`` does so ahead of the
consumer, ``validation_batches`` makes the fixed list that every evaluation reads.

Shape suffixes: B rows, S positions of a row, T = B·S, P pieces, L lanes, K integers of a lane's
state.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from earlyfuse.data.stream.lanes import Lane, Piece, clean_copies
from earlyfuse.data.stream.mixture import Mixture, check_seq_len
from earlyfuse.models.batch import IGNORE_LABEL, PADDING, MixedBatch, spans


def assemble(rows: list[list[Piece]], seq_len: int, mixture: Mixture) -> MixedBatch:
    """Packs the pieces of B rows into a batch of ``seq_len`` positions each.

    A padding position has the pad id, label -100, document 0 and position 0. Neither vectors nor
    what follows them are labels of a language model: a label that is a continuous medium's
    placeholder, and the one of a position that holds a vector, are -100. A clean copy has a span of
    its own and the positions of the item it copies, so that what follows is where it would be
    without copies.

    Raises ``ValueError`` for an id outside the vocabulary.
    """
    pieces: list[Piece] = []
    document_P: list[int] = []
    for row in rows:
        pieces += row
        document_P += range(1, len(row) + 1)
        if missing := seq_len - sum(len(piece.tokens) for piece in row):
            pad = np.full(missing, mixture.vocabulary.pad, np.uint32)
            pieces.append(Piece(pad, IGNORE_LABEL))
            document_P.append(PADDING)

    length_P = np.array([len(piece.tokens) for piece in pieces])
    tokens_T = np.empty(len(rows) * seq_len, np.int64)
    np.concatenate([piece.tokens for piece in pieces], out=tokens_T)
    if tokens_T.max() >= mixture.vocabulary.size:
        raise ValueError(
            f"token id {tokens_T.max()} lies outside the vocabulary of {mixture.vocabulary.size}: "
            "a shard contradicts its manifest; prepare the source again"
        )
    stop_P = np.cumsum(length_P)
    document_T = np.repeat(np.array(document_P, np.int32), length_P)
    positions_T = np.arange(len(tokens_T)) - np.repeat(stop_P - length_P, length_P)
    labels_T = np.empty_like(tokens_T)
    labels_T[:-1] = tokens_T[1:]
    labels_T[stop_P - 1] = [piece.label_after for piece in pieces]
    has_vector_T = mixture.continuous_V[tokens_T]
    modality_T = mixture.modality_V[tokens_T]
    item_T = modality_T
    if mixture.clean_copies:
        clean_T, delay_T = clean_copies(has_vector_T)
        positions_T -= delay_T - np.repeat(delay_T[stop_P - length_P], length_P)
        item_T = np.where(clean_T, 255, modality_T)  # as of another modality: another span
    padding_T = document_T == PADDING
    positions_T[padding_T] = 0
    labels_T[padding_T | has_vector_T | mixture.continuous_V[labels_T.clip(0)]] = IGNORE_LABEL
    # ids below 0 pick some modality, which is then set to 0
    label_modality_T = mixture.modality_V[labels_T.clip(0)] * (labels_T != IGNORE_LABEL)

    def tensor(values_T: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_T.reshape(len(rows), seq_len))

    return MixedBatch(
        tokens_BS=tensor(tokens_T),
        labels_BS=tensor(labels_T),
        modality_BS=tensor(modality_T),
        label_modality_BS=tensor(label_modality_T),
        document_BS=tensor(document_T),
        positions_BS=tensor(positions_T),
        span_BS=spans(tensor(item_T)),
        source_BS=tensor(np.repeat(np.array([p.source for p in pieces], np.uint8), length_P)),
        vectors_BSP=_vectors(pieces, stop_P, len(rows), mixture),
        has_vector_BS=tensor(has_vector_T) if mixture.vectors else None,
    )


def _vectors(
    pieces: list[Piece], stop_P: np.ndarray, rows: int, mixture: Mixture
) -> torch.Tensor | None:
    """float32 (B, S, P), zero at positions without a vector; None if no source has vectors."""
    if mixture.vectors is None:
        return None
    vectors_TP = torch.zeros(int(stop_P[-1]), mixture.vectors.width)
    for piece, stop in zip(pieces, stop_P.tolist(), strict=True):
        if piece.vectors is not None:
            vectors_TP[stop - len(piece.tokens) : stop] = torch.from_numpy(piece.vectors)
    return vectors_TP.reshape(rows, -1, mixture.vectors.width)


class Drawn(NamedTuple):
    """A batch, its lanes (counted from the stream's first), and their state after it, (B, K)."""

    batch: MixedBatch
    lanes: slice
    state_BK: np.ndarray


class LaneStream:
    """Endless micro-batches of ``rows`` rows that cycle through ``lanes`` (of ``total``).

    ``state_LK``: int64, a line for each lane. The seed and a lane's number decide its documents,
    not the rank that has it. ``pin``: in the prefetcher's thread, so that copies to a GPU do not
    block.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int,
        lanes: range,
        total: int,
        seq_len: int,
        rows: int,
        state_LK: np.ndarray,
        pin: bool = False,
    ) -> None:
        check_seq_len(seq_len, mixture)
        self.mixture, self.seq_len, self.rows, self.pin = mixture, seq_len, rows, pin
        self._next = int(state_LK[:, -1].argmin())  # within a step: the lanes a row behind are next
        self._lanes = [
            Lane(mixture, mixture.shuffled(seed, lane, total), seq_len, state)
            for lane, state in zip(lanes, state_LK, strict=True)
        ]

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        block = slice(self._next, self._next + self.rows)
        self._next = block.stop % len(self._lanes)
        drawn = self._lanes[block]
        batch = assemble([lane.row() for lane in drawn], self.seq_len, self.mixture)
        if self.pin:
            batch = batch.pin_memory()
        return Drawn(batch, block, np.array([lane.state() for lane in drawn], np.int64))


def validation_batches(
    mixture: Mixture,
    seq_len: int,
    rows: int,
    max_batches: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> list[MixedBatch]:
    """Every document once (or as many as ``max_batches`` hold), in stored order: the same list on
    every call.

    A batch has ``rows`` rows over all ranks; rank r gets rows r·rows/ranks … of each. Rows missing
    in the last batch are padding with every label -100, so all ranks have equally many batches of
    one shape, and sums of losses over labels do not depend on ``ranks``.

    Raises ``ValueError`` when ``ranks`` does not divide ``rows``, or a media block does not fit
    ``seq_len``.
    """
    check_seq_len(seq_len, mixture)
    if rows < 1 or rows % ranks:
        raise ValueError(
            f"rows of a validation batch ({rows}) must be a positive multiple of the ranks "
            f"({ranks}); change one"
        )
    lane = Lane(mixture, mixture.stored(), seq_len)
    mine = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
    batches: list[MixedBatch] = []
    while max_batches is None or len(batches) < max_batches:
        packed = [lane.row() for _ in range(rows)]
        if not packed[0]:
            break
        batches.append(assemble(packed[mine], seq_len, mixture))
    return batches


Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Draws from an iterator in a background thread, ``depth`` items ahead of the consumer.

    An exception there is raised by ``next`` here, after the items drawn before it. The thread ends
    with ``close`` or with the Prefetcher itself.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        pool = ThreadPoolExecutor(1, thread_name_prefix="earlyfuse-prefetch")
        self._pool, self._items = pool, items
        self._ahead = deque(pool.submit(items.__next__) for _ in range(depth))
        self.close = weakref.finalize(self, pool.shutdown, cancel_futures=True)

    def __next__(self) -> Item:
        self._ahead.append(self._pool.submit(self._items.__next__))
        item = self._ahead[0].result()  # stays in front if it raises, to be raised again
        self._ahead.popleft()
        return item
