"""Chooses the next document: the order within each source, and the mixture of sources.

- **Order**: epoch e of a source is a permutation of its documents, a pure function of (seed, e,
  name) that needs no memory. Epochs follow one another as one stream of positions; lane i of N
  takes positions i, i+N, …
- **Shares** are of tokens. **Quota** (``media_share``): the share of media codes, all media
  together. It decides how much comes from media-rich and from media-poor sources; the shares decide
  within each side, and so also how much of the codes is image and how much speech.

Shape suffix: Q positions.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from earlyfuse.data.media import Vectors
from earlyfuse.data.shards.source import TokenSource, check_same_vocabulary
from earlyfuse.models.vocabulary import Modality, Vocabulary

# Maps a lane's positions (int64, increasing) to document numbers; shorter where the stream ends.
Order = Callable[[np.ndarray], np.ndarray]


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
    """Mixes every bit of a uint64 into the low bits (multiply, fold, multiply, fold)."""
    value_Q = value_Q * np.uint64(0xBF58476D1CE4E5B9)
    value_Q = (value_Q ^ (value_Q >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return value_Q ^ (value_Q >> np.uint64(32))


@dataclass(frozen=True)
class Mixture:
    """Sources, their shares of the tokens, and the quota of media codes.

    ``shares`` are positive and sum to 1; ``media_share`` in (0, 1) needs a source with more media
    codes and one with fewer. ``clean_copies``: each item of a continuous medium comes twice, first
    the copy that the objective noises, then one that stays clean (``lanes.py``); it needs such a
    medium. ``ValueError`` otherwise, or when the sources' tokenizers differ.
    """

    sources: tuple[TokenSource, ...]
    shares: tuple[float, ...]
    media_share: float | None = None
    clean_copies: bool = False

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.shares):
            raise ValueError(
                f"{len(self.sources)} sources with {len(self.shares)} shares: give at least one "
                "source, and one share for each"
            )
        check_same_vocabulary(self.sources)
        if len(self.sources) > 256:
            raise ValueError(
                f"{len(self.sources)} sources must be at most 256: source_BS is uint8; prepare "
                "some of them together"
            )
        named = dict(zip((source.name for source in self.sources), self.shares, strict=True))
        for name, share in named.items():
            if not share > 0:
                raise ValueError(
                    f"share of source {name!r} ({share}) must be above 0; leave the source out"
                )
        total = sum(self.shares)
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"shares of sources {named} must sum to 1, not {total:.6g}; rescale them"
            )
        if self.clean_copies and self.vectors is None:
            raise ValueError(
                "clean_copies (True) needs a source with continuous vectors; turn it off, or "
                "prepare one, for images with --image-tokenizer pixels or vae"
            )
        fractions = {s.name: round(self.media_fraction(s), 4) for s in self.sources}
        if self.media_share is not None and not min(excess := self._excess()) < 0 < max(excess):
            raise ValueError(
                f"media_share ({self.media_share}) must lie between the lowest and the highest "
                f"share of media codes in the sources, {fractions}; add a source on the missing "
                "side, change it, or take the sources as they are: --dataloader.media_share None"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        """The layout of ids, the same in all sources."""
        return self.sources[0].vocabulary

    @property
    def vectors(self) -> Vectors | None:
        """Type of the vectors of continuous media; tokenizers decide it, so all sources agree."""
        return next((source.vectors for source in self.sources if source.vectors), None)

    def media_fraction(self, source: TokenSource) -> float:
        """Media (codes and vectors) as a fraction of the positions of all documents."""
        tokens = positions_of(source, self.clean_copies)
        return 1 - tokens[Modality.TEXT.label] / sum(tokens.values())

    @cached_property
    def modality_V(self) -> np.ndarray:
        """uint8 (V,): modality of every id of the vocabulary."""
        return self.vocabulary.modality_of(torch.arange(self.vocabulary.size)).numpy()

    @cached_property
    def continuous_V(self) -> np.ndarray:
        """bool (V,): ids that are the placeholder of a continuous medium's vectors."""
        return self.vocabulary.holds_vector(torch.arange(self.vocabulary.size)).numpy()

    def in_order(self, names: Sequence[str]) -> "Mixture":
        """This mixture with its sources in the order of ``names``, which must be theirs."""
        by_name = {s.name: (s, x) for s, x in zip(self.sources, self.shares, strict=True)}
        if len(names) != len(by_name) or set(names) != by_name.keys():
            raise ValueError(f"order of the sources ({names}) must name {sorted(by_name)}")
        sources, shares = zip(*(by_name[name] for name in names), strict=True)
        return replace(self, sources=sources, shares=shares)

    def effective_shares(self) -> tuple[float, ...]:
        """Token shares that meet the quota in the long run; ``shares`` without a quota.

        With f the media fraction of a source and m the quota, sources with f > m are weighted by
        what the others lack, and the reverse, so that sum(share · (f − m)) = 0 while ratios within
        a side stay.
        """
        if self.media_share is None:
            return self.shares
        pairs = list(zip(self.shares, self._excess(), strict=True))
        above = sum(share * excess for share, excess in pairs if excess > 0)
        below = -sum(share * excess for share, excess in pairs if excess <= 0)
        weights = [share * (below if excess > 0 else above) for share, excess in pairs]
        return tuple(weight / sum(weights) for weight in weights)

    def modality_shares(self) -> dict[str, float]:
        """Modality label → share of the tokens of a run, in the long run."""
        shares = dict.fromkeys((m.label for m in self.vocabulary.modalities), 0.0)
        for source, share in zip(self.sources, self.effective_shares(), strict=True):
            tokens = positions_of(source, self.clean_copies)
            for label, count in tokens.items():
                shares[label] += share * count / sum(tokens.values())
        return shares

    def _excess(self) -> list[float]:
        """f − m of each source."""
        assert self.media_share is not None, "only a mixture with a quota has an excess"
        return [self.media_fraction(source) - self.media_share for source in self.sources]

    def state_size(self) -> int:
        """Number of integers in a lane's state (``lanes.py``)."""
        return 3 * len(self.sources) + len(self.vocabulary.modalities) + 1

    def shuffled(self, seed: int, lane: int, lanes: int) -> list[Order]:
        """One endless order per source for lane ``lane`` of ``lanes``."""

        def every_nth(shuffle: Shuffle) -> Order:
            return lambda taken_Q: shuffle(lane + lanes * taken_Q)

        return [every_nth(Shuffle(len(s), seed, s.name)) for s in self.sources]

    def stored(self) -> list[Order]:
        """One finite order per source: every document once, as stored."""

        def until(documents: int) -> Order:
            return lambda taken_Q: taken_Q[taken_Q < documents]

        return [until(len(source)) for source in self.sources]


def positions_of(source: TokenSource, clean_copies: bool) -> dict[str, int]:
    """Modality label → positions that all documents of ``source`` take in rows."""
    doubled = source.vectors.media if clean_copies and source.vectors else ()
    return {label: count * (1 + (label in doubled)) for label, count in source.tokens.items()}


def check_seq_len(seq_len: int, mixture: Mixture) -> None:
    """``ValueError`` when a media block with its sentinels does not fit a row."""
    if seq_len < 1:
        raise ValueError(f"seq_len ({seq_len}) must be at least 1")
    for medium in mixture.vocabulary.media:
        label = medium.modality.label
        copies = 1 + (mixture.clean_copies and medium.continuous)
        twice = ", each twice for its clean copy," if copies > 1 else ""
        blocks = [
            (medium.block, f"each {label} block", "prepare with fewer codes a block"),
            *(
                (
                    source.longest.get(label, 0),
                    f"the longest {label} block in {source.folder}",
                    f"prepare again with a lower {label}_seconds, which drops longer ones",
                )
                for source in mixture.sources
            ),
        ]
        for codes, block, remedy in blocks:
            if copies * codes + 2 > seq_len:
                raise ValueError(
                    f"seq_len ({seq_len}) must be at least {copies * codes + 2}: {block} has "
                    f"{codes} codes{twice} and 2 sentinels, and is never split; raise seq_len or "
                    f"{remedy}"
                )
