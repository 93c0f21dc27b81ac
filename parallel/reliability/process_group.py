"""Leaves the job's process group on every way out of a process, and never waits for a dead peer.

gloo's threads release the tensors of a collective shortly after it; if one does so while the
interpreter exits, the process aborts. So whoever joins a group calls ``leave_at_exit``: a normal
end, an exception, ``sys.exit`` and a stop all pass there.
"""

import atexit
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from earlyfuse.parallel.reliability import preemption

T = TypeVar("T")

PATIENCE = 5.0  # seconds for a peer that may be gone
PATIENCE_WHEN_ASKED = 1.0  # after a stop request: the launcher knows of a dead peer
_LEFT = "ranks that have left"

_registered = False
_status: int | None = None


def leave_at_exit() -> None:
    """Lets the end of this process leave the process group; safe to call again."""
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_at_exit)


def exit_with(status: int) -> NoReturn:
    """Ends this process with ``status``, whatever the threads of a library still do."""
    global _status
    _status = status
    preemption.ignore()
    sys.exit(status)


def leave() -> None:
    """Destroys all process groups, unless a peer that does not answer prevents it.

    The rank that keeps the job's store stays until the others have left, for a few seconds at most:
    they may still read there why the job ended (``failure_report``).
    """
    if not dist.is_initialized():
        return
    store, rank, ranks = job_store(), dist.get_rank(), dist.get_world_size()
    within(PATIENCE, _destroy)
    if store is not None:
        within(PATIENCE, lambda: count_as_left(store))
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _wait_for_others(store, ranks)


def job_store() -> dist.Store | None:
    """Returns the notes of this attempt of the job; None without launcher or group."""
    if "RANK" not in os.environ or not dist.is_initialized():
        return None
    return notes(dist.distributed_c10d._get_default_store())


def notes(store: dist.Store) -> dist.Store:
    """Returns the part of ``store`` for notes on how this attempt ends; a store may outlive it."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"notes of attempt {attempt}", store)


def count_as_left(store: dist.Store) -> int:
    """Records in the notes ``store`` that this rank reads no more in it."""
    return store.add(_LEFT, 1)


class BoundedCalls:
    """Calls functions that may never return, such as those of a store whose process is stopped.

    A call that is not done in time is left behind in its thread; until it returns, further calls
    are not made.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def within(self, seconds: float, action: Callable[[], T]) -> T | None:
        """Returns the result of ``action``; None if it fails, or is not done in time."""
        results: list[Any] = []

        def act() -> None:
            with suppress(Exception):
                results.append(action())

        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread = threading.Thread(target=act, name="bounded", daemon=True)
        self._thread.start()
        self._thread.join(seconds)
        return results[0] if results else None


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """Returns the result of ``action``; None if it fails, or is not done in time."""
    return BoundedCalls().within(seconds, action)


def _destroy() -> None:
    dist.destroy_process_group()
    gc.collect()  # gloo's connections close with the last reference: those of a model are cycles


def _wait_for_others(store: dist.Store, ranks: int) -> None:
    deadline = time.monotonic() + PATIENCE
    asked = False
    while time.monotonic() < deadline and (store.add(_LEFT, 0) < ranks):
        if not asked and preemption.requested():
            asked, deadline = True, min(deadline, time.monotonic() + PATIENCE_WHEN_ASKED)
        time.sleep(0.01)


def _at_exit() -> None:
    leave()
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_status)
