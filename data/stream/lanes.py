"""Lanes: endless streams of rows, packed from documents.

Row i of the global batch is lane i of N: it owns every N-th document of each source's order
(``mixture.py``) and packs by itself. What a lane does next is a pure function of (mixture, seed,
lane, state), and its state is a few integers, so a run resumes exactly and on any number of ranks.

- **Mixing**: the source whose drawn tokens lag furthest behind its share is next. With a quota, a
  lane below its share of media codes prefers a piece that raises it, a lane above one that lowers
  it.
- **Packing**: text may be split at the end of a row; its tail is the source's next piece. A media
  block (begin, codes, end) is never split: another source's text fills the room, and if there is
  none, padding. A video may be split between its frames, before a separator: its tail begins with
  the separator, and the label of the frame before is still the separator.
- **Clean copies**: each item of a continuous medium is doubled when its document is opened, as in
  BAGEL (arXiv 2505.14683): the copy that the objective noises, then the one that later tokens see.

Columns of a lane's state, S sources and M modalities: documents taken (S), tokens taken of the
current document (S), tokens drawn (S), codes drawn per medium (M-1), padding, rows.
"""

from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture, Order
from earlyfuse.models.batch import IGNORE_LABEL
from earlyfuse.models.vocabulary import MediaCodes, Modality

_AHEAD = 64  # documents whose numbers are computed at once: amortises numpy's call overhead


class Piece(NamedTuple):
    """Part of a document in a row: tokens (n,), label of the last one (-100: document's end),
    number of its source; vectors (n, P), zero on discrete tokens, of a source that has vectors.
    """

    tokens: np.ndarray
    label_after: int
    source: int = 0
    vectors: np.ndarray | None = None


class _Reader:
    """A lane's place in one source: the current document, the part taken, where it may be split."""

    def __init__(
        self, number: int, source: TokenSource, order: Order, mixture: Mixture, seq_len: int
    ) -> None:
        self.number, self.source, self.order, self.seq_len = number, source, order, seq_len
        self.modality_V, self.clean_copies = mixture.modality_V, mixture.clean_copies
        self.media = source.vocabulary.modalities[1:]
        self.continuous = [self._medium(m).continuous for m in self.media]
        self.placeholders = source.vocabulary.placeholders
        self.taken, self.offset, self.drawn = 0, 0, 0
        self._ahead: list[int] = []
        self._ahead_from = 0
        self._open_at = -1  # value of ``taken`` that the fields below belong to
        self._tokens = np.empty(0, np.uint16)
        self._codes: list[int] = []  # of each medium in the whole document
        # begin and stop (sentinels included), medium and codes of each block or frame of a video;
        # found at the first split
        self._blocks: tuple[list[int], list[int], list[int], list[int]] | None = None

    def fits(self, room: int) -> int:
        """Tokens of the current document that fit ``room`` positions; 0: none, or no document."""
        if self._open_at != self.taken and not self._open():
            return 0
        end = self.offset + room
        if end >= len(self._tokens):
            return len(self._tokens) - self.offset
        begins, stops, *_ = self._find_blocks()
        block = bisect_left(begins, end) - 1
        if block >= 0 and end < stops[block]:
            end = begins[block]
        return end - self.offset

    def codes(self, count: int) -> list[int]:
        """Codes of each medium among the next ``count`` tokens; ``count`` comes from ``fits``."""
        if count == len(self._tokens):
            return self._codes
        codes = [0] * len(self.media)
        begins, _, kinds, counts = self._find_blocks()
        first = bisect_left(begins, self.offset)
        for block in range(first, bisect_left(begins, self.offset + count)):
            codes[kinds[block]] += counts[block]
        return codes

    def take(self, count: int) -> Piece:
        """The next ``count`` tokens; moves on."""
        start, end = self.offset, self.offset + count
        self.drawn += count
        vectors = self._vectors(start, end) if self.source.vectors else None
        if end < len(self._tokens):
            self.offset, label_after = end, int(self._tokens[end])
        else:
            self.taken, self.offset, label_after = self.taken + 1, 0, IGNORE_LABEL
        return Piece(self._tokens[start:end], label_after, self.number, vectors)

    def _vectors(self, start: int, end: int) -> np.ndarray:
        """(end - start, P): vectors of these positions of the current document."""
        found = self.source.document_vectors(self._ahead[self.taken - self._ahead_from])
        vectors = np.zeros((end - start, found.shape[1]), np.float32)
        copies = [np.isin(self._tokens[:end], self.placeholders)]
        if self.clean_copies:
            clean, _ = clean_copies(copies[0])
            copies = [copies[0] & ~clean, clean]
        for copy in copies:
            first = int(copy[:start].sum())
            vectors[copy[start:]] = found[first : first + int(copy[start:].sum())]
        return vectors

    def _open(self) -> bool:
        """Make document ``taken`` of the order the current one; False where the order ends."""
        while True:
            place = self.taken - self._ahead_from
            if not 0 <= place < len(self._ahead):
                self._ahead_from, place = self.taken, 0
                self._ahead = self.order(np.arange(self.taken, self.taken + _AHEAD)).tolist()
                if not self._ahead:
                    return False
            self._tokens, (_, *self._codes) = self.source.document(self._ahead[place])
            if len(self._tokens):
                if self.clean_copies:
                    self._add_clean_copies()
                self._open_at, self._blocks = self.taken, None
                return True
            self.taken += 1

    def _add_clean_copies(self) -> None:
        if any(count for count, twice in zip(self._codes, self.continuous, strict=True) if twice):
            # the placeholders of an item are equal: repeating each repeats the item
            self._tokens = self._tokens.repeat(1 + np.isin(self._tokens, self.placeholders))
            self._codes = [n * (1 + c) for n, c in zip(self._codes, self.continuous, strict=True)]

    def _find_blocks(self) -> tuple[list[int], list[int], list[int], list[int]]:
        if self._blocks is not None:
            return self._blocks
        begins, stops, kinds, counts = self._blocks = [], [], [], []
        if any(self._codes):
            modality = self.modality_V[self._tokens]
            edges = np.flatnonzero(modality[1:] != modality[:-1]) + 1
            for start, stop in pairwise([0, *edges.tolist(), len(modality)]):
                if modality[start]:
                    kind = self.media.index(Modality(int(modality[start])))
                    self._check_block(start, stop, kind)
                    begins.append(start - 1)
                    # a separator belongs to the frame after it
                    ended = self._tokens[stop] == self._medium(self.media[kind]).end
                    stops.append(stop + int(ended))
                    kinds.append(kind)
                    counts.append(stop - start)
        return self._blocks

    def _medium(self, modality: Modality) -> MediaCodes:
        return self.source.vocabulary.medium(modality)

    def _check_block(self, start: int, stop: int, kind: int) -> None:
        medium = self._medium(self.media[kind])
        copies = 1 + (self.clean_copies and self.continuous[kind])
        label, codes = medium.modality.label, (stop - start) // copies
        inside = start > 0 and stop < len(self._tokens)
        before, after = self._tokens[[start - 1, stop]].tolist() if inside else (-1, -1)
        number = self._ahead[self.taken - self._ahead_from]
        where = f"document {number} of {self.source.folder}: {codes} {label} codes at {start}"
        framed = before in (medium.begin, medium.separator) and after in medium.sentinels[1:]
        if not framed or (medium.block and codes != medium.block):
            raise ValueError(
                f"{where} must be {medium.block or 'any number of'} codes between {medium.begin} "
                f"and {medium.end}"
                + ("" if medium.separator is None else f", or a separator {medium.separator}")
                + "; prepare the source again"
            )
        if stop - start + 2 > self.seq_len:
            with_copy = ", their clean copy" if copies > 1 else ""
            raise ValueError(
                f"{where}{with_copy} and 2 sentinels must fit seq_len ({self.seq_len}), as blocks "
                "are never split; raise seq_len"
            )


def clean_copies(vector_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the clean copies among positions whose runs of ``vector_T`` are an item and its copy.

    Returns the positions of copies, (T,) bool, and by how many positions the copies up to here,
    the open one included, have put off what follows, (T,) int64.
    """
    edges = np.flatnonzero(np.diff(vector_T.astype(np.int8), prepend=0, append=0))
    half_R = (edges[1::2] - edges[::2]) // 2
    clean_T = np.zeros(len(vector_T) + 1, np.int8)
    clean_T[edges[1::2]], clean_T[edges[::2] + half_R] = -1, 1
    delay_T = np.zeros(len(vector_T), np.int64)
    delay_T[edges[::2] + half_R] = half_R
    return clean_T.cumsum()[:-1].astype(bool), delay_T.cumsum()


class Lane:
    """A stream of rows, endless as its orders. ``state``: int64 (k,), the values of ``state()``."""

    def __init__(
        self, mixture: Mixture, orders: list[Order], seq_len: int, state: np.ndarray | None = None
    ) -> None:
        self.seq_len = seq_len
        self.quota = mixture.media_share
        self.shares = mixture.effective_shares()
        self.readers = [
            _Reader(number, source, order, mixture, seq_len)
            for number, (source, order) in enumerate(zip(mixture.sources, orders, strict=True))
        ]
        if state is None:
            state = np.zeros(mixture.state_size(), np.int64)
        of_readers = state[: 3 * len(self.readers)].reshape(3, -1).T.tolist()
        for reader, values in zip(self.readers, of_readers, strict=True):
            reader.taken, reader.offset, reader.drawn = values
        self.codes: list[int]
        *self.codes, self.padding, self.rows = state[3 * len(self.readers) :].tolist()

    def state(self) -> list[int]:
        """All that the next rows depend on; the module docstring names the columns."""
        values = zip(*((r.taken, r.offset, r.drawn) for r in self.readers), strict=True)
        return [*sum(values, ()), *self.codes, self.padding, self.rows]

    def row(self) -> list[Piece]:
        """Pieces of the next row; a rest below ``seq_len`` is padding. Empty: no document left."""
        pieces: list[Piece] = []
        room = self.seq_len
        while room and (choice := self._choose(room)):
            reader, count, codes = choice
            self.codes = [before + new for before, new in zip(self.codes, codes, strict=True)]
            pieces.append(reader.take(count))
            room -= count
        if pieces:
            self.padding += room
            self.rows += 1
        return pieces

    def _choose(self, room: int) -> tuple[_Reader, int, list[int]] | None:
        """The source that is next, the tokens it may place in ``room``, and the codes in them."""
        total = sum([reader.drawn for reader in self.readers])
        lag = [share * total - r.drawn for share, r in zip(self.shares, self.readers, strict=True)]
        second: tuple[_Reader, int, list[int]] | None = None
        for index in sorted(range(len(lag)), key=lag.__getitem__, reverse=True):
            reader = self.readers[index]
            count = reader.fits(room)
            if not count:
                continue
            codes = reader.codes(count)
            if self.quota is None:
                return reader, count, codes
            if (sum(codes) > self.quota * count) == (sum(self.codes) < self.quota * total):
                return reader, count, codes
            second = second or (reader, count, codes)
        return second
