"""Handles preemption: SIGTERM or SIGUSR1, to this process or to its host's launcher, requests a
stop; a process also ends with a parent that was killed.

A launcher that must outlive the request (``tools/launch.py``) cannot forward a signal to ranks that
are still starting. It creates a file instead, whose path its ranks find in the environment.

Imports only the standard library, so that ``train.py`` listens before its long imports.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_FILE = "EARLYFUSE_STOP_FILE"
"""Environment variable: path of the file whose existence requests a stop."""

PARENT_PIPE = "EARLYFUSE_PARENT_PIPE"
"""Environment variable: descriptor of a pipe that closes when the parent ends, however it does."""

PARENT_GONE = 71  # exit status

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# a plain value: a handler that another signal may interrupt must take no lock
_signalled = False


def listen() -> None:
    """Lets the signals only request a stop; for the main thread of a process that trains."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)


@contextmanager
def listening() -> Iterator[None]:
    """Listens within the block; then restores the handlers and forgets requests."""
    global _signalled
    before = [signal.getsignal(number) for number in SIGNALS]
    listen()
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
        _signalled = False


def end_with_parent() -> None:
    """Lets this process end at once when a parent that gave it a pipe is gone. Children of this
    process do not inherit the pipe.
    """
    descriptor = os.environ.pop(PARENT_PIPE, "")
    if not descriptor:
        return

    def wait() -> None:
        while os.read(int(descriptor), 1):
            pass
        os._exit(PARENT_GONE)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def ignore() -> None:
    """Ignores the signals until this process ends, so that its exit status stands."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> bool:
    """True if a stop of this process, or of the launcher of its host, was requested."""
    path = os.environ.get(STOP_FILE)
    return _signalled or (path is not None and os.path.exists(path))


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True
