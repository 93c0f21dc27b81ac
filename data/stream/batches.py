"""Batches over lanes: rows are filled together, ahead of the consumer, and never shuffled between
ranks.

``LaneStream`` draws the micro-batches of a range of lanes, ``Prefetcher`` does so in the
background, ``validation_batches`` makes the fixed list that every evaluation reads.

Shape suffixes: B rows, S positions of a row, T = B·S, P pieces, L lanes, K integers of a lane's
state.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from earlyfuse.data.media import Vectors
from earlyfuse.data.stream.lanes import Blend, Lane, Piece, check_seq_len
from earlyfuse.models.batch import IGNORE_LABEL, MixedBatch


def assemble(rows: list[list[Piece]], seq_len: int, blend: Blend) -> MixedBatch:
    """Pieces of B rows → batch of B rows of ``seq_len`` positions (``models/batch.py`` has the
    fields).

    A padding position has the pad id, label -100 and position 0: to the masks derived from
    positions it is a document of its own, which attends to itself, and to which nothing else
    attends.

    Raises ``ValueError`` for an id outside the vocabulary.
    """
    parts: list[np.ndarray] = []
    length_P: list[int] = []
    after_P: list[int] = []
    padding: list[slice] = []
    for number, row in enumerate(rows):
        used = 0
        for piece in row:
            parts.append(piece.tokens)
            length_P.append(len(piece.tokens))
            after_P.append(piece.label_after)
            used += length_P[-1]
        if used < seq_len:
            parts.append(np.full(seq_len - used, blend.vocabulary.pad, np.uint32))
            length_P.append(seq_len - used)
            after_P.append(IGNORE_LABEL)
            padding.append(slice(number * seq_len + used, (number + 1) * seq_len))

    tokens_T = np.empty(len(rows) * seq_len, np.int64)
    np.concatenate(parts, out=tokens_T)
    if tokens_T.max() >= blend.vocabulary.size:
        raise ValueError(
            f"token id {tokens_T.max()} lies outside the vocabulary of {blend.vocabulary.size}: "
            "a shard is not what its manifest says; run the source's verify, or prepare it again"
        )
    stop_P = np.cumsum(length_P)
    positions_T = np.arange(len(tokens_T)) - np.repeat(stop_P - length_P, length_P)
    labels_T = np.empty_like(tokens_T)
    labels_T[:-1] = tokens_T[1:]
    labels_T[stop_P - 1] = after_P
    for pad in padding:
        positions_T[pad] = 0
        labels_T[pad] = IGNORE_LABEL

    shape = (len(rows), seq_len)
    modality_BS = blend.modality_V[tokens_T].reshape(shape)
    return MixedBatch(
        tokens_BS=torch.from_numpy(tokens_T.reshape(shape)),
        labels_BS=torch.from_numpy(labels_T.reshape(shape)),
        modality_BS=torch.from_numpy(modality_BS),
        positions_BS=torch.from_numpy(positions_T.reshape(shape)),
        span_BS=torch.from_numpy(_spans(modality_BS)),
        vectors_BSP=_vectors(rows, seq_len, blend.vectors),
    )


def _vectors(rows: list[list[Piece]], seq_len: int, vectors: Vectors | None) -> torch.Tensor | None:
    """float32 (B, S, P), zero where there are none; None if no source has any."""
    if vectors is None:
        return None
    vectors_BSP = torch.zeros(len(rows), seq_len, vectors.width)
    for row, vectors_SP in zip(rows, vectors_BSP, strict=True):
        start = 0
        for piece in row:
            if piece.vectors is not None:
                vectors_SP[start : start + len(piece.tokens)] = torch.from_numpy(piece.vectors)
            start += len(piece.tokens)
    return vectors_BSP


def _spans(modality_BS: np.ndarray) -> np.ndarray:
    """int32 (B, S): number of the media block in its row, from 1; 0 on text.

    Sentinels stand between blocks and blocks are whole, so a run of one modality is one block.
    """
    begins_BS = modality_BS != 0
    media_BS = begins_BS.copy()
    begins_BS[:, 1:] &= modality_BS[:, 1:] != modality_BS[:, :-1]
    return np.cumsum(begins_BS, axis=1, dtype=np.int32) * media_BS


class Drawn(NamedTuple):
    """A batch, its lanes (counted from the stream's first), and their state after it, (B, K)."""

    batch: MixedBatch
    lanes: slice
    state_BK: np.ndarray


class LaneStream:
    """Endless micro-batches of ``rows`` rows: ``lanes`` (of ``total``) in turn, again and again.

    ``state_LK``: int64, a line for each lane. The seed and a lane's number decide its documents,
    not the rank that holds it.
    """

    def __init__(
        self,
        blend: Blend,
        seed: int,
        lanes: range,
        total: int,
        seq_len: int,
        rows: int,
        state_LK: np.ndarray,
    ) -> None:
        check_seq_len(seq_len, blend)
        self.blend, self.seq_len, self.rows = blend, seq_len, rows
        self._next = int(state_LK[:, -1].argmin())  # within a step: the lanes a row behind are next
        self._lanes = [
            Lane(blend, blend.shuffled(seed, lane, total), seq_len, state)
            for lane, state in zip(lanes, state_LK, strict=True)
        ]

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        block = slice(self._next, self._next + self.rows)
        self._next = block.stop % len(self._lanes)
        drawn = self._lanes[block]
        batch = assemble([lane.row() for lane in drawn], self.seq_len, self.blend)
        return Drawn(batch, block, np.array([lane.state() for lane in drawn], np.int64))


def validation_batches(
    blend: Blend,
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
    check_seq_len(seq_len, blend)
    if rows < 1 or rows % ranks:
        raise ValueError(
            f"rows of a validation batch ({rows}) must be a positive multiple of the ranks "
            f"({ranks}); change one"
        )
    lane = Lane(blend, blend.stored(), seq_len)
    mine = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
    batches: list[MixedBatch] = []
    while max_batches is None or len(batches) < max_batches:
        packed = [lane.row() for _ in range(rows)]
        if not packed[0]:
            break
        batches.append(assemble(packed[mine], seq_len, blend))
    return batches


Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Draws from an iterator in a background thread: ``depth`` items wait, one more is in the
    making.

    An exception there is raised by ``next`` here, after the items drawn before it. The thread ends
    with ``close``, with the Prefetcher itself, or with the interpreter; it holds no reference to
    its owner.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(depth)
        stop = threading.Event()
        thread = threading.Thread(
            target=_draw, args=(items, self._queue, stop), name="earlyfuse-prefetch", daemon=True
        )
        self.close = weakref.finalize(self, _end, thread, self._queue, stop)
        thread.start()

    def __next__(self) -> Item:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended: whoever asks again meets the same error
            raise item
        return item


def _draw(
    items: Iterator[Item], ahead: "queue.Queue[Item | BaseException]", stop: threading.Event
) -> None:
    try:
        for item in items:
            ahead.put(item)
            if stop.is_set():
                return
    except BaseException as error:  # handed to the consumer, who raises it
        ahead.put(error)
    else:
        ahead.put(StopIteration())


def _end(thread: threading.Thread, ahead: "queue.Queue", stop: threading.Event) -> None:
    stop.set()
    while thread.is_alive():
        try:
            ahead.get_nowait()  # room for the item the thread may be waiting to put
        except queue.Empty:
            thread.join(0.01)
