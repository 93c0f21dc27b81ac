"""Modalities and where each one's codes lie in the one vocabulary.

A model of early fusion has a single embedding and a single head. What distinguishes an image code
from a text piece is only its id, so the layout below is the contract between tokenizers, data and
models. Sentinels (begin and end of an image …) count as text, as in Chameleon.
"""

from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import torch


class Modality(IntEnum):
    """Ids as they stand in ``MixedBatch.modality_BS``; they index every per-modality tensor."""

    TEXT = 0
    IMAGE = 1
    SPEECH = 2

    @property
    def label(self) -> str:
        """Lower-case name in metrics, manifests and configs: ``text``, ``image``, ``speech``."""
        return self.name.lower()


@dataclass(frozen=True)
class MediaCodes:
    """One medium's codes: ``count`` ids from ``start``, and the sentinels round a block of them.

    ``block`` is the number of codes between ``begin`` and ``end``; 0 where blocks vary in length.
    """

    modality: Modality
    start: int
    count: int
    begin: int
    end: int
    block: int = 0


@dataclass(frozen=True)
class Vocabulary:
    """ForwardContext of all ids ``0 … size-1``: text pieces wherever no medium's codes lie.

    Raises ``ValueError`` when code ranges leave the vocabulary or overlap, or a sentinel lies among
    codes.
    """

    size: int
    bos: int
    eos: int
    pad: int
    media: tuple[MediaCodes, ...] = ()

    def __post_init__(self) -> None:
        ranges = sorted((m.start, m.start + m.count, m.modality.label) for m in self.media)
        for start, stop, name in ranges:
            if start < 0 or stop > self.size or start >= stop:
                raise ValueError(
                    f"{name} codes [{start}, {stop}) must be a non-empty part of the vocabulary "
                    f"[0, {self.size}); change their start or count, or the size"
                )
        for (_, stop, left), (start, _, right) in pairwise(ranges):
            if start < stop:
                raise ValueError(
                    f"{left} and {right} codes overlap at id {start}; move one of them"
                )
        sentinels = {"bos": self.bos, "eos": self.eos, "pad": self.pad}
        for medium in self.media:
            sentinels[f"begin of {medium.modality.label}"] = medium.begin
            sentinels[f"end of {medium.modality.label}"] = medium.end
        for name, token in sentinels.items():
            if not 0 <= token < self.size:
                raise ValueError(f"{name} ({token}) must lie in [0, {self.size}); correct the id")
            if any(start <= token < stop for start, stop, _ in ranges):
                raise ValueError(f"{name} ({token}) lies among media codes; sentinels are text ids")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Modalities that occur, in id order; text is always the first."""
        return (Modality.TEXT, *sorted(m.modality for m in self.media))

    def medium(self, modality: Modality) -> MediaCodes:
        """The codes of ``modality``; ``KeyError`` names the ones that exist."""
        for media in self.media:
            if media.modality == modality:
                return media
        raise KeyError(
            f"vocabulary has no {modality.label} codes, only {[m.label for m in self.modalities]}"
        )

    def modality_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Modality of each id: any shape, integer → same shape, uint8. Ids outside the vocabulary
        count as text.
        """
        modality = torch.zeros_like(tokens, dtype=torch.uint8)
        for medium in self.media:
            inside = (tokens >= medium.start) & (tokens < medium.start + medium.count)
            modality.masked_fill_(inside, int(medium.modality))
        return modality

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` is its inverse."""
        fields = asdict(self)
        for medium in fields["media"]:
            medium["modality"] = Modality(medium["modality"]).label
        fields["media"] = list(fields["media"])
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Vocabulary":
        """Inverse of ``to_dict``."""
        media = tuple(
            MediaCodes(**{**medium, "modality": Modality[medium["modality"].upper()]})
            for medium in fields["media"]
        )
        return cls(**{**fields, "media": media})
