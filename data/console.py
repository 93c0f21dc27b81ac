"""Console output: text from outside cannot control the terminal, and a console that is closed or
full loses lines instead of stopping the process.
"""

import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, TextIO

# direction marks reorder what surrounds them; line separators break one line into two
_REORDERING = frozenset("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e") | frozenset(
    "\u2066\u2067\u2068\u2069"
)
_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")


def printable(text: str, keep: str = "") -> str:
    """Escape control characters, surrogates and direction marks in ``text`` as Python does.

    ``keep``: characters that are not escaped, such as ``"\\n\\t"`` for a text of several lines.
    File names, sample keys, generated text and values from files are escaped before ``print``.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(letter) if letter not in keep else letter for letter in text)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) in ("Cc", "Cs") or letter in _REORDERING:
        return letter.encode("unicode_escape").decode()
    return letter


def error_text(error: BaseException) -> str:
    """The message of ``error``, printable; of an ``OSError`` with the file first."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = error.filename
        return printable(f"{os.fsdecode(name) if isinstance(name, bytes) else name}: ") + (
            error.strerror
        )
    return printable(str(error) or type(error).__name__, keep="\n\t")


def near_names(word: str, known: Iterable[str]) -> str:
    """``"; did you mean a or b?"`` for an unknown ``word``; empty if no known name resembles it."""
    near = get_close_matches(word, list(known), n=3)
    return printable(f"; did you mean {' or '.join(near)}?") if near else ""


def protect_console() -> None:
    """Replace standard output and error by ``console_stream``; called first in every ``main``.

    Streams that are not the interpreter's own (a test's, a notebook's) are not replaced.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream: Any = getattr(sys, name)
        if stream is None:  # descriptor closed at start: no file may reuse it
            _open_null(number)
            setattr(sys, name, console_stream(number))
        elif _writes_to(stream, number):
            with suppress(OSError):
                stream.flush()
            lines = stream.line_buffering or stream.write_through
            setattr(sys, name, console_stream(number, stream.encoding, lines))


def console_stream(descriptor: int, encoding: str = "utf-8", lines: bool = True) -> TextIO:
    """A text stream to ``descriptor`` that never raises: output that cannot be written is lost.

    Characters that ``encoding`` lacks are escaped, and so are those that ``printable`` escapes,
    except line breaks and tabs, and in a terminal colours and carriage returns.
    ``lines``: flush at every line break, not only when the buffer is full.
    """
    return _Console(
        io.BufferedWriter(_Lossy(descriptor, "w", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=lines,
    )


class _Lossy(io.FileIO):
    """A descriptor that drops what cannot be written."""

    def write(self, data: Any) -> int:
        written: int | None = None
        with suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


class _Console(io.TextIOWrapper):
    def write(self, text: str) -> int:
        if not self.isatty():
            super().write(printable(text, keep="\n\t"))
        else:  # progress bars use carriage returns
            parts = enumerate(_COLOURS.split(text))
            super().write(
                "".join(part if i % 2 else printable(part, keep="\n\t\r") for i, part in parts)
            )
        return len(text)


def _writes_to(stream: Any, number: int) -> bool:
    """True if ``stream`` is the interpreter's own for descriptor ``number``."""
    if type(stream) is not io.TextIOWrapper:
        return False
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return type(raw) is io.FileIO and raw.fileno() == number


def _open_null(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != number:
            os.dup2(null, number)
            os.close(null)
