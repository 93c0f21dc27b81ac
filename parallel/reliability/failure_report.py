"""Reports why a job failed: once, last on the console, by the rank that failed first.

A failing rank breaks the connections of the others, and each of them could report that. So the
first to fail enters its cause, before its connections close, where all ranks look: in the job's
store or, until the ranks are connected, beside the launcher's error files of this host. A rank that
fails later finds that cause, writes its own error to its log only, and exits with the cause's
status.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

from earlyfuse.data.console import error_text
from earlyfuse.parallel.reliability.process_group import PATIENCE, job_store, within
from earlyfuse.parallel.reporting import rank_log

REFUSED = 2
"""Exit status: config, data or files must change; the same command would fail again."""

FAILED, INTERRUPTED = 1, 130
CLOSING = 30.0  # seconds
_KEY = "cause"
# errors of a path that the user named; other file errors may be transient
_WRONG_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Cause(NamedTuple):
    """Cause of a rank's end; ``text``: a line for the console."""

    rank: int
    status: int
    text: str


def say(error: BaseException, close: Callable[[], None] | None = None) -> int:
    """Reports ``error``, which ends this rank; returns the exit status of the job.

    ``close`` then writes pending files, for a limited time: it may wait for other ranks.
    """
    mine = _cause(error)
    first = _first(mine)
    explained = isinstance(error, (ValueError, OSError, KeyboardInterrupt))
    trace = "" if explained else "".join(traceback.format_exception(error))
    if first != mine:
        rank_log.note(trace.rstrip() or mine.text)
        follow(first)
    elif trace and rank_log.is_open():
        rank_log.note(trace.rstrip())
        rank_log.show(f"traceback: {rank_log.path()}")
        rank_log.show(mine.text)
    else:
        rank_log.tell(trace.rstrip() or mine.text)
    if close is not None:
        within(CLOSING, close)
    return first.status


def entered(store: dist.Store | None) -> Cause | None:
    """Returns the cause in ``store``, the notes of the job, if a rank has entered one."""
    if store is None or not store.check([_KEY]):
        return None
    return Cause(*json.loads(store.get(_KEY)))


def follow(cause: Cause) -> None:
    """Writes to this rank's log which other rank ended the job."""
    rank_log.note(f"rank {cause.rank} failed first, with: {cause.text}")


def say_uncaught() -> None:
    """Under a launcher, reports uncaught exceptions as ``say`` does."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        say(error)

    if rank_log.is_open():
        sys.excepthook = hook


def _cause(error: BaseException) -> Cause:
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, KeyboardInterrupt):
        text = "stopped without a checkpoint; the same command resumes from the last one"
        return Cause(rank, INTERRUPTED, text)
    if isinstance(error, ValueError):
        return Cause(rank, REFUSED, f"error: {error_text(error)}")
    if isinstance(error, OSError):
        status = REFUSED if isinstance(error, _WRONG_PATH) else FAILED
        return Cause(rank, status, f"error: {error_text(error)}")
    # torch appends a C++ stack to its messages
    first, *_ = error_text(error).splitlines() or [""]
    return Cause(rank, FAILED, f"{type(error).__name__}: {first}")


def _first(mine: Cause) -> Cause:
    """Returns the cause that was entered first; ``mine`` if it is that, or nobody answers."""
    if (store := job_store()) is not None:
        entry = json.dumps(mine)
        found = within(PATIENCE, lambda: store.compare_set(_KEY, "", entry))
        return Cause(*json.loads(found)) if found else mine
    if (path := _file_of_this_host()) is not None:
        with suppress(OSError, ValueError):
            return _enter(path, mine)
    return mine


def _file_of_this_host() -> Path | None:
    """Returns a file in the launcher's folder of this attempt, in which each rank has a folder."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent / f"{_KEY}.json" if error_file else None


def _enter(path: Path, mine: Cause) -> Cause:
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(json.dumps(mine))
    try:
        os.link(own, path)  # atomic; fails if another rank was faster
    except FileExistsError:
        pass
    finally:
        own.unlink()
    return Cause(*json.loads(path.read_text()))
