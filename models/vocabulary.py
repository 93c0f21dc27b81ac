"""Modalities, and the layout of one vocabulary of text pieces and media codes.

An early-fusion model has one embedding and one head, and only the id distinguishes an image code
from a text piece: the layout is the contract between tokenizers, data and models. Sentinels (begin
and end of an image …) count as text, as in Chameleon.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # command lines read tables of media without torch
    import torch


class _Registry(type):
    """Iterates, counts and looks up the registered modalities, as if ``Modality`` were an enum."""

    def __iter__(cls) -> Iterator["Modality"]:
        return map(Modality, range(len(Modality.LABELS)))

    def __len__(cls) -> int:
        return len(Modality.LABELS)

    def __getitem__(cls, name: str) -> "Modality":
        if name.lower() not in Modality.LABELS:
            raise KeyError(f"{name} is no modality; known are {', '.join(Modality.LABELS)}")
        return Modality(Modality.LABELS.index(name.lower()))


class Modality(int, metaclass=_Registry):
    """Id of a modality in ``MixedBatch.modality_BS``; indexes every per-modality tensor.

    An open enum: ``register`` gives a further medium the next id (``data/media.py``).
    """

    __slots__ = ()
    LABELS: ClassVar[list[str]] = ["text", "image", "speech"]
    TEXT: ClassVar["Modality"]
    IMAGE: ClassVar["Modality"]
    SPEECH: ClassVar["Modality"]

    def __new__(cls, value: int) -> "Modality":
        if not 0 <= value < len(cls.LABELS):
            raise ValueError(f"{value} is no modality; ids are 0 to {len(cls.LABELS) - 1}")
        return super().__new__(cls, value)

    @classmethod
    def register(cls, label: str) -> "Modality":
        """The modality called ``label``, with the next free id if it is new."""
        if label not in cls.LABELS:
            cls.LABELS.append(label)
        return cls[label]

    @property
    def label(self) -> str:
        """Lower-case name in metrics, manifests and configs: ``text``, ``image``, ``speech``."""
        return self.LABELS[self]

    def __repr__(self) -> str:
        return f"Modality[{self.label!r}]"

    def __str__(self) -> str:
        return str(int(self))


Modality.TEXT, Modality.IMAGE, Modality.SPEECH = Modality


@dataclass(frozen=True)
class MediaCodes:
    """One medium's codes: ``count`` ids from ``start``, and the sentinels around a block of them.

    ``block``: codes of an item; 0 where items vary in length. A continuous medium has one code, the
    placeholder of its vectors. ``separator``: stands between the frames of a video, which is one
    block of several items; None where the data have no videos.
    """

    modality: Modality
    start: int
    count: int
    begin: int
    end: int
    block: int = 0
    separator: int | None = None

    @property
    def continuous(self) -> bool:
        """True where an item is vectors, at repetitions of the one id; codebooks have at least 2
        codes.
        """
        return self.count == 1

    @property
    def sentinels(self) -> tuple[int, ...]:
        """Begin, end and, if there is one, the separator."""
        separators = () if self.separator is None else (self.separator,)
        return (self.begin, self.end, *separators)

    def block_of(self, items: Sequence[Sequence[int]]) -> list[int]:
        """One item, or the frames of a video, as a block; codes are ids of the vocabulary.

        ``ValueError`` for several items without a separator.
        """
        if len(items) > 1 and self.separator is None:
            raise ValueError(
                f"a video of {len(items)} frames needs a frame separator, which the vocabulary "
                "lacks; prepare the data with --video-frames"
            )
        tokens = [self.begin, *items[0]]
        for item in items[1:]:
            assert self.separator is not None, "checked above"
            tokens += [self.separator, *item]
        return [*tokens, self.end]


@dataclass(frozen=True)
class Vocabulary:
    """Layout of all ids ``0 … size-1``: text pieces wherever no medium has codes.

    ``ValueError`` if code ranges leave the vocabulary or overlap, or a sentinel is among codes.
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
            if medium.separator is not None:
                sentinels[f"separator of {medium.modality.label}"] = medium.separator
                if medium.separator in (medium.begin, medium.end):
                    raise ValueError(
                        f"separator of {medium.modality.label} ({medium.separator}) must differ "
                        "from its begin and end; give it an id of its own"
                    )
        for name, token in sentinels.items():
            if not 0 <= token < self.size:
                raise ValueError(f"{name} ({token}) must lie in [0, {self.size}); correct the id")
            if any(start <= token < stop for start, stop, _ in ranges):
                raise ValueError(f"{name} ({token}) lies among media codes; sentinels are text ids")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Its modalities in id order, text first."""
        return (Modality.TEXT, *sorted(m.modality for m in self.media))

    @property
    def placeholders(self) -> tuple[int, ...]:
        """The ids that stand for vectors, one of each continuous medium."""
        return tuple(medium.start for medium in self.media if medium.continuous)

    def medium(self, modality: Modality) -> MediaCodes:
        """The codes of ``modality``; ``KeyError`` if there are none."""
        for media in self.media:
            if media.modality == modality:
                return media
        raise KeyError(
            f"vocabulary has no {modality.label} codes, only {[m.label for m in self.modalities]}"
        )

    def modality_of(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """Modality of each id, uint8 of the same shape; ids outside the vocabulary are text."""
        import torch

        modality = torch.zeros_like(tokens, dtype=torch.uint8)
        for medium in self.media:
            inside = (tokens >= medium.start) & (tokens < medium.start + medium.count)
            modality.masked_fill_(inside, int(medium.modality))
        return modality

    def holds_vector(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """True where an id is a placeholder; bool of the same shape."""
        import torch

        return torch.isin(tokens, tokens.new_tensor(self.placeholders))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` is its inverse."""
        fields = asdict(self)
        for medium in fields["media"]:
            medium["modality"] = Modality(medium["modality"]).label
            if medium["separator"] is None:  # as vocabularies were before there were videos
                del medium["separator"]
        fields["media"] = list(fields["media"])
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Vocabulary":
        """Inverse of ``to_dict``."""
        media = tuple(
            MediaCodes(**{**medium, "modality": Modality[medium["modality"]]})
            for medium in fields["media"]
        )
        return cls(**{**fields, "media": media})
