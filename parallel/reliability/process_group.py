"""Leaves the job's process group on every way out of a process, and waits for no dead peer.

gloo's threads drop the tensors of a collective a moment after it. Where such a thread meets an
interpreter that is ending, the process aborts. So whoever joins a group calls ``leave_at_exit``:
a normal end, an exception, ``sys.exit`` and a stop all pass there.
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
PATIENCE_WHEN_TOLD = 1.0  # the launcher, which knows of a dead peer, wants this rank to end
_LEFT = "ranks that have left"

_registered = False
_status: int | None = None


def leave_at_exit() -> None:
    """From now on, the end of this process leaves the process group; safe to call again."""
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_at_exit)


def exit_with(status: int) -> NoReturn:
    """End this process with ``status``, whatever the threads of a library still do."""
    global _status
    _status = status
    preemption.ignore()
    sys.exit(status)


def leave() -> bool:
    """Destroy all process groups; False if a peer that does not answer kept them from ending.

    The rank that holds the job's store stays until the others have left, for a few seconds at most:
    they may still read there why the job ended (``last_words``).
    """
    if not dist.is_initialized():
        return True
    store, rank, ranks = job_store(), dist.get_rank(), dist.get_world_size()
    destroyed = within(PATIENCE, _destroy)
    if store is not None:
        within(PATIENCE, lambda: count_as_left(store))
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _wait_for_others(store, ranks)
    return bool(destroyed)


def job_store() -> dist.Store | None:
    """Where the ranks of this attempt of the job leave notes; None without launcher or group."""
    if "RANK" not in os.environ or not dist.is_initialized():
        return None
    return notes(dist.distributed_c10d._get_default_store())


def notes(store: dist.Store) -> dist.Store:
    """The part of the job's ``store`` that is about how this attempt ends; some outlive it."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"notes of attempt {attempt}", store)


def count_as_left(store: dist.Store) -> int:
    """This rank ends, and reads no more in ``store``, the notes."""
    return store.add(_LEFT, 1)


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """What ``action`` returns; None if it fails, or is not done in time and is left behind."""
    results: list[Any] = []

    def act() -> None:
        with suppress(Exception):
            results.append(action())

    thread = threading.Thread(target=act, name="bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _destroy() -> bool:
    dist.destroy_process_group()
    gc.collect()  # gloo's connections close with the last reference: those of a model are cycles
    return True


def _wait_for_others(store: dist.Store, ranks: int) -> None:
    deadline = time.monotonic() + PATIENCE
    told = False
    while time.monotonic() < deadline and (store.add(_LEFT, 0) < ranks):
        if not told and preemption.requested():
            told, deadline = True, min(deadline, time.monotonic() + PATIENCE_WHEN_TOLD)
        time.sleep(0.01)


def _at_exit() -> None:
    leave()
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_status)
