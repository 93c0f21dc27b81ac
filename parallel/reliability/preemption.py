"""Handles preemption: SIGTERM and SIGUSR1, to this process or to its host's launcher, ask to stop;
a process also ends with a parent that was killed.

A launcher that must outlive the request (``tools/launch.py``) cannot pass a signal on to ranks that
are still starting. It makes a file instead, whose path its ranks find in the environment.

Only the standard library is imported, so that ``train.py`` listens before its long imports.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_FILE = "EARLYFUSE_STOP_FILE"
"""Environment variable: path of the file that asks to stop by existing."""

PARENT_PIPE = "EARLYFUSE_PARENT_PIPE"
"""Environment variable: descriptor of a pipe that closes when the parent ends, however it does."""

PARENT_GONE = 71  # exit status

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# a plain value: what takes a lock cannot be used in a handler that another signal may interrupt
_signalled = False


def listen() -> None:
    """From now on the signals only ask to stop; for the main thread of a process that trains."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)


@contextmanager
def listening() -> Iterator[None]:
    """``listen`` within the block, then put the handlers from before back and forget requests."""
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
    """From now on, end this process at once when the parent that gave it a pipe is gone; nothing
    without one. Children of this process do not inherit it.
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
    """Ignore the signals for the rest of this process: it ends, and its exit status stands."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> bool:
    """Whether this process, or the launcher of its host, has been asked to stop."""
    path = os.environ.get(STOP_FILE)
    return _signalled or (path is not None and os.path.exists(path))


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True
