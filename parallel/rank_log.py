"""What each rank prints: ``<run folder>/logs/rank-N.log`` under a launcher, and one console.

Under a launcher (RANK is set) both output streams of the process, Python's and that of its
libraries, go to the rank's own file, appended across restarts. Rank 0's Python output shows on the
console as well; of the other ranks only ``tell`` and a last line for an uncaught exception do.
Without a launcher nothing is redirected.

Files are written without a thread or process in between: what a rank printed before it was killed
is there.
"""

import faulthandler
import io
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

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
        _current = _RankLog(folder)


def tell(text: str) -> None:
    """Print ``text`` on standard error, whatever this process's rank; with a launcher, name it."""
    if _current is None:
        print(text, file=sys.stderr, flush=True)
    else:
        _current.tell(text)


class _RankLog:
    """The redirected output of this process."""

    def __init__(self, folder: Path):
        rank, world = int(os.environ["RANK"]), os.environ.get("WORLD_SIZE", "1")
        self.name = f"rank {rank} on {socket.gethostname()}"
        self.path = folder / FOLDER / f"rank-{rank}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.streams = sys.stdout, sys.stderr
        for stream in self.streams:
            stream.flush()
        self.consoles = os.dup(1), os.dup(2)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        sys.stdout, sys.stderr = (
            _Both(_text(number), _text(console)) if rank == 0 else _text(number)
            for number, console in enumerate(self.consoles, start=1)
        )
        self.excepthook, sys.excepthook = sys.excepthook, self._uncaught
        faulthandler.enable(file=2)  # a crash in a library leaves the Python stack in the file
        header = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name}, of {world}, "
            f"pid {os.getpid()}, restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        )
        os.write(2, f"--- {header}\n".encode())

    def tell(self, text: str) -> None:
        """Print ``text`` on the console, from any rank, and into the rank's file."""
        line = f"[{self.name}] {text}\n".encode()
        os.write(2, line)
        os.write(self.consoles[1], line)

    def close(self) -> None:
        """Give the streams back to the console."""
        faulthandler.disable()
        sys.excepthook = self.excepthook
        sys.stdout.flush()
        sys.stderr.flush()
        for number, console in enumerate(self.consoles, start=1):
            os.dup2(console, number)
            os.close(console)
        sys.stdout, sys.stderr = self.streams

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.excepthook(kind, error, trace)
        if not isinstance(sys.stderr, _Both):
            os.write(self.consoles[1], f"[{self.name}] {kind.__name__}: {error}\n".encode())


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


def _text(descriptor: int) -> TextIO:
    return open(descriptor, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
