"""Lanes: which document comes next, and how documents are cut into rows.

Row i of the global batch is lane i of N: an endless stream that owns every N-th document of each
source's order and packs by itself. What a lane does next is a pure function of (blend, seed, lane,
state), and its state is a handful of integers, so a run resumes exactly and on any number of ranks.

- **Order**: epoch e of a source is a permutation of its documents, a function of (seed, e, name)
  that needs no memory. Epochs follow one another as one stream of positions; lane i takes positions
  i, i+N, …
- **Mixing** is by token share: the source whose drawn tokens lag furthest behind its share is next.
- **Quota** (``media_share``): a lane below its share of media codes prefers a piece that raises it,
  a lane above one that lowers it. The quota decides how much comes from media-rich and media-poor
  sources, the shares decide within each side (``Blend.effective_shares``). It counts the codes of
  all media together: the shares decide also how much of them is image and how much speech.
- **Cutting**: text may be cut at the end of a row, the tail is the source's next piece. A media
  block (begin, codes, end) is never cut: another source's text fills the room, and if there is
  none, padding.

Shape suffix: Q positions. Columns of a lane's state, S sources and M modalities: documents taken
(S), tokens taken of the current document (S), tokens drawn (S), codes drawn per medium (M-1),
padding, rows.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from earlyfuse.data.media import Vectors
from earlyfuse.data.shards.source import TokenSource, check_same_vocabulary
from earlyfuse.models.batch import IGNORE_LABEL
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

# Maps a lane's positions (int64, increasing) to document numbers; shorter where the stream ends.
Order = Callable[[np.ndarray], np.ndarray]

_AHEAD = 64  # documents whose numbers are computed at once: amortises numpy's call overhead


class Shuffle:
    """Stream position → document: every epoch of a source is another permutation.

    A Feistel network on the smallest power of two that holds all documents is a bijection whatever
    its round function; values outside are fed back until they fall inside (cycle walking), fewer
    than two passes on average. Hence O(1) memory and O(1) access at any position.
    """

    ROUNDS = 6

    def __init__(self, documents: int, seed: int, name: str) -> None:
        self.documents = documents
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        self._key = np.uint64(int.from_bytes(digest, "little"))
        bits = (documents - 1).bit_length()
        self._right_bits = np.uint64(bits - bits // 2)
        self._right_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._left_mask = np.uint64((1 << (bits // 2)) - 1)

    def __call__(self, position_Q: np.ndarray) -> np.ndarray:
        """Stream positions → document numbers, int64 (Q,); position // documents is the epoch."""
        epoch_Q, place_Q = np.divmod(position_Q, self.documents)
        key_Q = _scramble(self._key + epoch_Q.astype(np.uint64))
        value_Q = self._pass(place_Q.astype(np.uint64), key_Q)
        outside = np.flatnonzero(value_Q >= self.documents)
        while len(outside):
            value_Q[outside] = self._pass(value_Q[outside], key_Q[outside])
            outside = outside[value_Q[outside] >= self.documents]
        return value_Q.astype(np.int64)

    def _pass(self, value_Q: np.ndarray, key_Q: np.ndarray) -> np.ndarray:
        left_Q, right_Q = value_Q >> self._right_bits, value_Q & self._right_mask
        for number in range(self.ROUNDS):
            key_Q = key_Q + np.uint64(0x9E3779B97F4A7C15)
            if number % 2:
                left_Q = left_Q ^ (_scramble(right_Q ^ key_Q) & self._left_mask)
            else:
                right_Q = right_Q ^ (_scramble(left_Q ^ key_Q) & self._right_mask)
        return (left_Q << self._right_bits) | right_Q


def _scramble(value_Q: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 into the low bits of the result (multiply, fold, multiply, fold)."""
    value_Q = value_Q * np.uint64(0xBF58476D1CE4E5B9)
    value_Q = (value_Q ^ (value_Q >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return value_Q ^ (value_Q >> np.uint64(32))


class Piece(NamedTuple):
    """Part of a document in a row: tokens (n,), label of the last one (-100: document's end),
    the number of its source; vectors (n, P) of a source that has some, zero on discrete tokens.
    """

    tokens: np.ndarray
    label_after: int
    source: int = 0
    vectors: np.ndarray | None = None


class _Reader:
    """A lane's place in one source: the current document, what of it is taken, where to cut it."""

    def __init__(
        self, source: TokenSource, order: Order, modality_V: np.ndarray, seq_len: int
    ) -> None:
        self.source, self.order, self.modality_V, self.seq_len = source, order, modality_V, seq_len
        self.media = source.vocabulary.modalities[1:]
        labels = source.vectors.media if source.vectors else ()
        self.vector_V = np.isin(modality_V, [Modality[label] for label in labels])
        self.taken, self.offset, self.drawn = 0, 0, 0
        self._ahead: list[int] = []
        self._ahead_from = 0
        self._open_at = -1  # which ``taken`` the fields below belong to
        self._tokens = np.empty(0, np.uint16)
        self._codes: list[int] = []  # of each medium in the whole document
        self._blocks: tuple[list[int], list[int], list[int]] | None = None  # found when first cut

    def fits(self, room: int) -> int:
        """Tokens of the current document that fit ``room`` positions; 0: none, or no document."""
        if self._open_at != self.taken and not self._open():
            return 0
        end = self.offset + room
        if end >= len(self._tokens):
            return len(self._tokens) - self.offset
        begins, stops, _ = self._find_blocks()
        block = bisect_left(begins, end) - 1
        if block >= 0 and end < stops[block]:
            end = begins[block]
        return end - self.offset

    def codes(self, count: int) -> list[int]:
        """Codes of each medium among the next ``count`` tokens; ``count`` comes from ``fits``."""
        if count == len(self._tokens):
            return self._codes
        codes = [0] * len(self.media)
        begins, stops, kinds = self._find_blocks()
        first = bisect_left(begins, self.offset)
        for block in range(first, bisect_left(begins, self.offset + count)):
            codes[kinds[block]] += stops[block] - begins[block] - 2
        return codes

    def take(self, count: int) -> Piece:
        """The next ``count`` tokens; moves on."""
        start, end = self.offset, self.offset + count
        self.drawn += count
        vectors = self._vectors(start, end) if self.source.vectors else None
        if end < len(self._tokens):
            self.offset = end
            return Piece(self._tokens[start:end], int(self._tokens[end]), vectors=vectors)
        self.taken, self.offset = self.taken + 1, 0
        return Piece(self._tokens[start:end], IGNORE_LABEL, vectors=vectors)

    def _vectors(self, start: int, end: int) -> np.ndarray:
        """(end - start, P): vectors of these positions of the current document."""
        found = self.source.document_vectors(self._ahead[self.taken - self._ahead_from])
        continuous = self.vector_V[self._tokens[:end]]
        first = int(continuous[:start].sum())
        vectors = np.zeros((end - start, found.shape[1]), np.float32)
        vectors[continuous[start:]] = found[first : first + int(continuous[start:].sum())]
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
                self._open_at, self._blocks = self.taken, None
                return True
            self.taken += 1

    def _find_blocks(self) -> tuple[list[int], list[int], list[int]]:
        """Begin and stop (sentinels included) and medium of the current document's media blocks."""
        if self._blocks is not None:
            return self._blocks
        blocks: tuple[list[int], list[int], list[int]] = [], [], []
        if any(self._codes):
            modality = self.modality_V[self._tokens]
            edges = np.flatnonzero(modality[1:] != modality[:-1]) + 1
            for start, stop in pairwise([0, *edges.tolist(), len(modality)]):
                if modality[start]:
                    kind = self.media.index(Modality(int(modality[start])))
                    self._check_block(start, stop, self.source.vocabulary.medium(self.media[kind]))
                    for values, value in zip(blocks, (start - 1, stop + 1, kind), strict=True):
                        values.append(value)
        self._blocks = blocks
        return blocks

    def _check_block(self, start: int, stop: int, medium: MediaCodes) -> None:
        label, codes = medium.modality.label, stop - start
        where = f"document {self._ahead[self.taken - self._ahead_from]} of {self.source.folder}"
        framed = start > 0 and stop < len(self._tokens)
        framed = framed and self._tokens[start - 1] == medium.begin
        framed = framed and self._tokens[stop] == medium.end
        if not framed or (medium.block and codes != medium.block):
            raise ValueError(
                f"{where}: {codes} {label} codes at {start} must be "
                f"{medium.block or 'any number of'} codes between {medium.begin} and {medium.end}; "
                "prepare the source again"
            )
        if codes + 2 > self.seq_len:
            raise ValueError(
                f"{where}: a block of {codes} {label} codes and its 2 sentinels must fit seq_len "
                f"({self.seq_len}), for it is never cut; raise seq_len"
            )


@dataclass(frozen=True)
class Blend:
    """Sources, their shares of the tokens, and the quota of media codes.

    ``shares`` are positive and sum to 1; ``media_share`` in (0, 1) needs a source with more media
    codes and one with fewer. ``ValueError`` otherwise, or when the sources' tokenizers differ.
    """

    sources: tuple[TokenSource, ...]
    shares: tuple[float, ...]
    media_share: float | None = None

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.shares):
            raise ValueError(
                f"{len(self.sources)} sources with {len(self.shares)} shares: give at least one "
                "source, and one share for each"
            )
        check_same_vocabulary(self.sources)
        if len(self.sources) > 256:
            raise ValueError(
                f"{len(self.sources)} sources must be at most 256, the numbers of one byte; "
                "prepare some of them together"
            )
        named = dict(zip((source.name for source in self.sources), self.shares, strict=True))
        for name, share in named.items():
            if not share > 0:
                raise ValueError(
                    f"share of source {name!r} ({share}) must be above 0; "
                    "leave the source out instead"
                )
        total = sum(self.shares)
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"shares of sources {named} must sum to 1, not {total:.6g}; rescale them"
            )
        if self.media_share is not None:
            self._check_quota(self.media_share)

    def _check_quota(self, quota: float) -> None:
        fractions = {source.name: source.media_fraction for source in self.sources}
        if not min(fractions.values()) < quota < max(fractions.values()):
            rounded = {name: round(fraction, 4) for name, fraction in fractions.items()}
            raise ValueError(
                f"media_share ({quota}) must lie between the lowest and the highest share of media "
                f"codes in the sources, {rounded}; add a source on the missing side or change "
                "the quota"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        """The layout that all sources share."""
        return self.sources[0].vocabulary

    @property
    def vectors(self) -> Vectors | None:
        """The vectors of the sources that have some; tokenizers decide, so all have the same."""
        return next((source.vectors for source in self.sources if source.vectors), None)

    @cached_property
    def modality_V(self) -> np.ndarray:
        """uint8 (V,): modality of every id of the vocabulary."""
        return self.vocabulary.modality_of(torch.arange(self.vocabulary.size)).numpy()

    def in_order(self, names: Sequence[str]) -> "Blend":
        """The same with its sources in the order of ``names``, which must be theirs."""
        by_name = {s.name: (s, x) for s, x in zip(self.sources, self.shares, strict=True)}
        if len(names) != len(by_name) or set(names) != by_name.keys():
            raise ValueError(f"order of the sources ({names}) must name {sorted(by_name)}")
        sources, shares = zip(*(by_name[name] for name in names), strict=True)
        return replace(self, sources=sources, shares=shares)

    def effective_shares(self) -> tuple[float, ...]:
        """Token shares that meet the quota in the long run; ``shares`` themselves without one.

        With f the media fraction of a source and m the quota, sources with f > m are weighted by
        what the others lack, and the reverse, so that sum(share * (f - m)) = 0 while ratios within
        a side stay.
        """
        if self.media_share is None:
            return self.shares
        excess = [source.media_fraction - self.media_share for source in self.sources]
        above = sum(s * e for s, e in zip(self.shares, excess, strict=True) if e > 0)
        below = -sum(s * e for s, e in zip(self.shares, excess, strict=True) if e <= 0)
        weights = [
            s * (below if e > 0 else above) for s, e in zip(self.shares, excess, strict=True)
        ]
        return tuple(weight / sum(weights) for weight in weights)

    def state_size(self) -> int:
        """Integers in the state of a lane."""
        return 3 * len(self.sources) + len(self.vocabulary.modalities) + 1

    def shuffled(self, seed: int, lane: int, lanes: int) -> list[Order]:
        """One endless order per source: lane ``lane`` of ``lanes``."""

        def every_nth(shuffle: Shuffle) -> Order:
            return lambda taken_Q: shuffle(lane + lanes * taken_Q)

        return [every_nth(Shuffle(len(s), seed, s.name)) for s in self.sources]

    def stored(self) -> list[Order]:
        """One finite order per source: every document once, as stored."""

        def until(documents: int) -> Order:
            return lambda taken_Q: taken_Q[taken_Q < documents]

        return [until(len(source)) for source in self.sources]


def check_seq_len(seq_len: int, blend: Blend) -> None:
    """``ValueError`` when a media block with its sentinels does not fit a row."""
    if seq_len < 1:
        raise ValueError(f"seq_len ({seq_len}) must be at least 1")
    for medium in blend.vocabulary.media:
        if medium.block + 2 > seq_len:
            raise ValueError(
                f"seq_len ({seq_len}) must be at least {medium.block + 2}: a block of "
                f"{medium.block} {medium.modality.label} codes and its 2 sentinels is never cut; "
                "raise seq_len or prepare with fewer codes a block"
            )
        for source in blend.sources:
            longest = source.longest.get(medium.modality.label, 0)
            if longest + 2 > seq_len:
                raise ValueError(
                    f"seq_len ({seq_len}) must be at least {longest + 2}: the longest block of "
                    f"{medium.modality.label} in {source.folder} has {longest} codes and 2 "
                    "sentinels, and is never cut; raise seq_len, or prepare again with a lower "
                    f"{medium.modality.label}_seconds, which drops longer ones"
                )


class Lane:
    """A stream of rows, endless as its orders. ``state``: int64 (k,), the values of ``state()``."""

    def __init__(
        self, blend: Blend, orders: list[Order], seq_len: int, state: np.ndarray | None = None
    ) -> None:
        self.seq_len = seq_len
        self.quota = blend.media_share
        self.shares = blend.effective_shares()
        self.readers = [
            _Reader(source, order, blend.modality_V, seq_len)
            for source, order in zip(blend.sources, orders, strict=True)
        ]
        values = (np.zeros(blend.state_size(), np.int64) if state is None else state).tolist()
        sources = len(blend.sources)
        for i, reader in enumerate(self.readers):
            reader.taken, reader.offset, reader.drawn = (
                values[i],
                values[sources + i],
                values[2 * sources + i],
            )
        self.codes: list[int]
        *self.codes, self.padding, self.rows = values[3 * sources :]

    def state(self) -> list[int]:
        """All that the next rows depend on; the module's first lines name the columns."""
        readers = self.readers
        values = (
            [r.taken for r in readers] + [r.offset for r in readers] + [r.drawn for r in readers]
        )
        return [*values, *self.codes, self.padding, self.rows]

    def row(self) -> list[Piece]:
        """Pieces of the next row; what lacks to ``seq_len`` is padding. Empty: no document left."""
        pieces: list[Piece] = []
        room = self.seq_len
        while room and (choice := self._choose(room)):
            reader, count, codes = choice
            self.codes = [before + new for before, new in zip(self.codes, codes, strict=True)]
            pieces.append(reader.take(count)._replace(source=self.readers.index(reader)))
            room -= count
        if pieces:
            self.padding += room
            self.rows += 1
        return pieces

    def _choose(self, room: int) -> tuple[_Reader, int, list[int]] | None:
        """The source that is due, the tokens it may place in ``room``, and the codes among them."""
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
