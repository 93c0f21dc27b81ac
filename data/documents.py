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


# causes of ``LostSamples``, and of nothing else
LOST_CAUSES = ("truncated", "corrupt-tar")


class LostSamples(BadSample):
    """The rest of a shard, or all of it, that cannot be read; the last that a reader yields.

    ``size``: bytes of the archive as far as known; ``good_bytes``: up to the end of its last good
    sample; ``sample_bytes``: mean size of the samples there were, 0 without any.
    """

    def __init__(
        self, cause: str, message: str, size: float, good_bytes: int, sample_bytes: float
    ) -> None:
        super().__init__(cause, message)
        self.args = (cause, message, size, good_bytes, sample_bytes)
        self.size, self.good_bytes, self.sample_bytes = size, good_bytes, sample_bytes

    def samples(self, expected: float = 1.0) -> int:
        """How many are lost, by their bytes, at least one.

        ``expected``: size of the shards beside it over the size of this one; a file that was cut
        does not know how long it was.
        """
        if not self.sample_bytes:
            return 1
        missing = self.size * max(1.0, expected) - self.good_bytes
        return max(1, round(missing / self.sample_bytes))
