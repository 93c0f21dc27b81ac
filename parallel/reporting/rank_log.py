"""Redirects each rank's output to ``<run folder>/logs/rank-N.log`` under a launcher.

Under a launcher (RANK is set) both output streams of the process, Python's and that of its
libraries, go to the rank's own file, appended across restarts. Rank 0's Python output shows on the
console as well; of the other ranks only ``tell`` and ``show`` do. Without a launcher nothing is
redirected.

Files are written without a thread or process in between: what a rank printed before it was killed
is there. A console or a disk that takes no more costs lines and raises nothing.
"""

import faulthandler
import io
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from earlyfuse.data.console import console_stream, error_text, printable

FOLDER = "logs"

_current: "_RankLog | None" = None


def start(folder: Path) -> None:
    """From now to its end, send this process's output to its rank's file in the run ``folder``.

    Without a launcher: nothing. A process that trains several runs calls it for each.
    """
    global _current
    if _current is not None:
        _current.close()
        _current = None
    if "RANK" in os.environ:
        try:
            _current = _RankLog(folder)
        except OSError as error:
            tell(f"warning: no log file: {error_text(error)}")


def is_open() -> bool:
    """Whether this process's output goes to a file of its rank."""
    return _current is not None


def path() -> Path | None:
    """The file of this process's rank, if it has one."""
    return _current.path if _current is not None else None


def tell(text: str) -> None:
    """Print ``text`` on standard error, whatever this process's rank; with a launcher, name it."""
    if _current is None:
        name = f"[{_name()}] " if "RANK" in os.environ else ""
        print(name + printable(text, keep="\n\t"), file=sys.stderr, flush=True)
    else:
        note(text)
        show(text)


def note(text: str) -> None:
    """Print ``text`` into the rank's file alone, if it has one."""
    if _current is not None:
        _current.put(2, text)


def show(text: str) -> None:
    """Print ``text`` on the console alone, whatever this process's rank; it must have a file."""
    assert _current is not None, "show without a log of the rank"
    _current.put(_current.consoles[1], text)


def _name() -> str:
    return f"rank {os.environ['RANK']} on {socket.gethostname()}"


class _RankLog:
    """The redirected output of this process."""

    def __init__(self, folder: Path):
        rank, world = int(os.environ["RANK"]), os.environ.get("WORLD_SIZE", "1")
        self.name = _name()
        self.path = folder / FOLDER / f"rank-{rank}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.streams = sys.stdout, sys.stderr
        for stream in self.streams:
            stream.flush()
        self.consoles = os.dup(1), os.dup(2)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        sys.stdout, sys.stderr = (
            _Both(console_stream(number), console_stream(console))
            if rank == 0
            else console_stream(number)
            for number, console in enumerate(self.consoles, start=1)
        )
        faulthandler.enable(file=2)  # a crash in a library leaves the Python stack in the file
        header = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name}, of {world}, "
            f"pid {os.getpid()}, restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        )
        self._write(2, f"--- {header}\n")

    def put(self, descriptor: int, text: str) -> None:
        """Write ``text`` with this rank's name, in one piece."""
        self._write(descriptor, f"[{self.name}] {text}\n")

    def _write(self, descriptor: int, text: str) -> None:
        with suppress(OSError):
            os.write(descriptor, printable(text, keep="\n\t").encode())

    def close(self) -> None:
        """Give the streams back to the console."""
        faulthandler.disable()
        sys.stdout.flush()
        sys.stderr.flush()
        for number, console in enumerate(self.consoles, start=1):
            os.dup2(console, number)
            os.close(console)
        sys.stdout, sys.stderr = self.streams


class _Both(io.TextIOBase):
    """A rank's file and the console; the live line of a terminal stays out of the file."""

    def __init__(self, file: TextIO, console: TextIO):
        self.file, self.console = file, console

    def write(self, text: str) -> int:
        if "\r" not in text:
            self.file.write(text)
        return self.console.write(text)

    def flush(self) -> None:
        self.file.flush()
        self.console.flush()

    def isatty(self) -> bool:
        return self.console.isatty()

    def fileno(self) -> int:
        return self.console.fileno()
