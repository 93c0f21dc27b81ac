"""Handles preemption: SIGTERM, SIGUSR1 or Ctrl-C, to this process or to its host's launcher,
requests a stop, and a second Ctrl-C kills; a process also ends with a parent that was killed.

A launcher that must outlive the request (``tools/launch.py``) cannot forward a signal to ranks that
are still starting. It creates a file instead, whose path its ranks find in the environment.

Imports only the standard library, so that ``train.py`` listens before its long imports.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_FILE = "EARLYFUSE_STOP_FILE"
"""Environment variable: path of the file whose existence requests a stop."""

PARENT_PIPE = "EARLYFUSE_PARENT_PIPE"
"""Environment variable: descriptor of a pipe that closes when the parent ends, however it does."""

PARENT_GONE = 71  # exit status

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
INTERRUPTED = 130
"""Exit status after Ctrl-C, so that a shell does not run the command behind ``&&``."""

# plain values: a handler that another signal may interrupt must take no lock
_signalled = False
_interrupted = False


def listen() -> None:
    """Lets the signals only request a stop; for the main thread of a process that trains."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    on_interrupt(_request_by_interrupt)


@contextmanager
def listening() -> Iterator[None]:
    """Listens within the block; then restores the handlers and forgets requests to stop."""
    global _signalled
    numbers = (*SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    listen()
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        _signalled = False


def on_interrupt(request: Callable[[], None]) -> None:
    """Lets the first Ctrl-C call ``request``, and the second kill this process by the system's own
    action, which waits for nothing. A process started with Ctrl-C ignored still ignores it.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        request()

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, first)


def tell(line: str) -> None:
    """Writes a line to standard error; for signal handlers, which may interrupt a ``print``."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


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


def interrupted() -> bool:
    """True if this process was asked to stop by Ctrl-C."""
    return _interrupted


def requested() -> bool:
    """True if a stop of this process, or of the launcher of its host, was requested."""
    path = os.environ.get(STOP_FILE)
    return _signalled or (path is not None and os.path.exists(path))


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True


def _request_by_interrupt() -> None:
    global _signalled, _interrupted
    _signalled = _interrupted = True
    if "RANK" not in os.environ:  # else the launcher says it, once
        tell("stopping after this step, with a checkpoint; Ctrl-C again kills")
