"""What every raw layout is turned into: an ordered list of text and media segments.

A document keeps media as the encoded bytes it was read with; decoding (and finding out that an
image is corrupt) is the business of whoever needs pixels or samples.
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
    """One stretch of one modality; ``payload`` is text, or an image or audio file's bytes.

    ``origin``: the member or entry that it comes from, for messages.
    """

    modality: Modality
    payload: str | bytes
    origin: str = field(default="", compare=False)

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

    ``unused``: what else the sample holds, as (kind, name): members that no segment comes from
    (``(".cls", "0001.cls")``) and images that are listed without their bytes.
    """

    key: str
    segments: tuple[Segment, ...]
    unused: tuple[tuple[str, str], ...] = field(default=(), compare=False)


class BadSample(ValueError):
    """A sample, or the rest of a shard, that cannot be used.

    ``cause`` is a short kebab-case name, counted per shard (``missing-member``, ``corrupt-image``,
    ``corrupt-audio``, ``bad-json``, …); the message says what was found and where. Readers *yield*
    it, so that a policy (skip, stop) is chosen in one place; whoever stops on it raises it. What
    the message quotes of a file is escaped for a console here.
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


@dataclass
class Tally:
    """How often each kind of thing was met (a cause, a suffix), and the first example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """``count`` more of ``kind``; ``example`` is kept where it is the first."""
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
    """Turns every error inside into ``BadSample(cause, what: error)``, and hushes warnings.

    For calls of other people's decoders on one sample: they raise nearly anything on damaged
    files (``MemoryError``, ``RecursionError``, ``struct.error``, ``SyntaxError`` …).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(cause, f"{what} cannot be decoded ({type(error).__name__}: {error})") from (
            error
        )
