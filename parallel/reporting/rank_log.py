"""Redirects each rank's output to ``<run folder>/logs/rank-N.log`` under a launcher.

With RANK set, stdout and stderr of the process, including those of libraries and child processes,
are appended to the rank's file. Rank 0's Python output also goes to the console; other ranks reach
it by ``tell`` and ``show`` only. Without a launcher nothing is redirected.

No thread or process is in between, so a killed rank loses no output. A console or disk that fails
loses lines and raises nothing.
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
    """Redirect this process's output to its rank's file in the run ``folder``.

    No effect without a launcher. A process that trains several runs calls it for each.
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
    """True if this process's output is redirected."""
    return _current is not None


def path() -> Path | None:
    """The log file of this rank, if it is redirected."""
    return _current.path if _current is not None else None


def tell(text: str) -> None:
    """Print ``text`` on the console and in the log, with the rank's name under a launcher."""
    if _current is None:
        name = f"[{_name()}] " if "RANK" in os.environ else ""
        print(name + printable(text, keep="\n\t"), file=sys.stderr, flush=True)
    else:
        note(text)
        show(text)


def note(text: str) -> None:
    """Print ``text`` into the log file only, if there is one."""
    if _current is not None:
        _current.put(2, text)


def show(text: str) -> None:
    """Print ``text`` on the console only; output must be redirected."""
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
        """Write ``text`` with the rank's name in one call."""
        self._write(descriptor, f"[{self.name}] {text}\n")

    def _write(self, descriptor: int, text: str) -> None:
        with suppress(OSError):
            os.write(descriptor, printable(text, keep="\n\t").encode())

    def close(self) -> None:
        """Restore the original streams."""
        faulthandler.disable()
        sys.stdout.flush()
        sys.stderr.flush()
        for number, console in enumerate(self.consoles, start=1):
            os.dup2(console, number)
            os.close(console)
        sys.stdout, sys.stderr = self.streams


class _Both(io.TextIOBase):
    """Writes to a rank's file and the console; progress bars only to the console."""

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
