"""What every raw layout is turned into: an ordered list of text and media segments.

A document keeps media as the encoded bytes it was read with; decoding (and finding out that an
image is corrupt) is the business of whoever needs pixels or samples.
"""

from dataclasses import dataclass

from earlyfuse.models.modality import Modality


@dataclass(frozen=True)
class Segment:
    """One stretch of one modality; ``payload`` is text, or an image or audio file's bytes."""

    modality: Modality
    payload: str | bytes

    def __post_init__(self) -> None:
        wanted = str if self.modality == Modality.TEXT else bytes
        if not isinstance(self.payload, wanted):
            raise TypeError(
                f"payload of a {self.modality.label} segment must be {wanted.__name__}, "
                f"not {type(self.payload).__name__}"
            )


@dataclass(frozen=True)
class Document:
    """Segments in reading order; ``key`` is the sample's name inside its shard."""

    key: str
    segments: tuple[Segment, ...]


class BadSample(ValueError):
    """A sample, or the rest of a shard, that cannot be used.

    ``cause`` is a short kebab-case name, counted per shard (``missing-member``, ``corrupt-image``,
    ``corrupt-audio``, ``bad-json``, …); the message says what was found and where. Readers *yield*
    it, so that a policy (skip, stop) is chosen in one place; whoever stops on it raises it.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(cause, message)  # both as args: pickles across processes
        self.cause = cause
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.cause}]"
