"""Documents, the common form of all raw layouts: ordered lists of text and media segments.

A document holds media as encoded bytes; they are decoded, and found to be corrupt, where pixels or
samples are needed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from earlyfuse.data.console import printable
from earlyfuse.models.vocabulary import Modality

_LONGEST_MESSAGE = 1000  # characters; a damaged file can put anything into an error


@dataclass(frozen=True)
class Segment:
    """Content of one modality; ``payload`` is text, or the bytes of an image or audio file.

    ``origin``: the member or entry it comes from, for messages. ``continues``: it is a further
    frame of the video to which the segment before it belongs.
    """

    modality: Modality
    payload: str | bytes
    origin: str = field(default="", compare=False)
    continues: bool = False

    def __post_init__(self) -> None:
        wanted = str if self.modality == Modality.TEXT else bytes
        if not isinstance(self.payload, wanted):
            raise TypeError(
                f"payload of a {self.modality.label} segment must be {wanted.__name__}, "
                f"not {type(self.payload).__name__}"
            )


@dataclass(frozen=True)
class Document:
    """Segments in reading order; ``key`` is the sample's name inside its shard.

    ``unused``: (kind, name) of members that no segment comes from (``(".cls", "0001.cls")``) and
    of images that are listed without their bytes.
    """

    key: str
    segments: tuple[Segment, ...]
    unused: tuple[tuple[str, str], ...] = field(default=(), compare=False)


class BadSample(ValueError):
    """A sample, or the rest of a shard, that cannot be used.

    ``cause`` is a short kebab-case name, counted per shard (``missing-member``, ``corrupt-image``,
    ``corrupt-audio``, ``bad-json``, …); the message says what was found and where, escaped for a
    console. Readers *yield* it, so that the policy (skip, stop) is applied in one place.
    """

    def __init__(self, cause: str, message: str) -> None:
        message = printable(message)
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]}…"
        super().__init__(cause, message)  # both as args: pickles across processes
        self.cause = cause
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.cause}]"


# causes of ``LostSamples`` only
LOST_CAUSES = ("truncated", "corrupt-tar", "corrupt-file")


class LostSamples(BadSample):
    """The unreadable rest of a shard or of one of its row groups, or all of it.

    ``size``: bytes of the archive as far as known; ``good_bytes``: offset of the end of its last
    good sample; ``sample_bytes``: mean size of its samples, 0 without any.
    """

    def __init__(
        self, cause: str, message: str, size: float, good_bytes: int, sample_bytes: float
    ) -> None:
        super().__init__(cause, message)
        self.args = (cause, message, size, good_bytes, sample_bytes)
        self.size, self.good_bytes, self.sample_bytes = size, good_bytes, sample_bytes

    def samples(self, expected: float = 1.0) -> int:
        """Estimated number of lost samples, by their bytes, at least one.

        ``expected``: usual size of the source's shards over the size of this one, as the original
        size of a truncated file is unknown.
        """
        if not self.sample_bytes:
            return 1
        missing = self.size * max(1.0, expected) - self.good_bytes
        return max(1, round(missing / self.sample_bytes))


@dataclass
class Tally:
    """Counts by kind (a cause, a suffix), and the first example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Add ``count`` of ``kind``; ``example`` is stored if it is the first."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.examples.setdefault(kind, printable(example))

    def __str__(self) -> str:
        """``corrupt-image 2 (0.tar: sample '0003' …), .cls 7 (0.tar: 0001.cls)``, by kind."""
        return ", ".join(
            f"{kind} {count} ({self.examples[kind]})"
            if self.examples.get(kind)
            else f"{kind} {count}"
            for kind, count in sorted(self.counts.items())
        )


@contextmanager
def decoding(cause: str, what: str) -> Iterator[None]:
    """Turn every error inside into ``BadSample(cause, what: error)``, and suppress warnings.

    For third-party decoders, which raise nearly anything on damaged files (``MemoryError``,
    ``RecursionError``, ``struct.error``, ``SyntaxError`` …).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise BadSample(cause, f"{what} cannot be decoded ({found})") from error
