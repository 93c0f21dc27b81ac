"""Tolerates failed writes of metrics, pictures and run.json: reports, counts, and continues.

Checkpoints have rules of their own (``checkpoint/manager.py``).
"""

import mmap
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from earlyfuse.data.console import error_text
from earlyfuse.parallel.reporting import rank_log

_in_a_row: Counter[Path] = Counter()
_in_all: Counter[Path] = Counter()


@contextmanager
def tolerate(path: Path) -> Iterator[None]:
    """Catch an ``OSError`` of writing ``path``; the first of several in a row is reported."""
    try:
        yield
    except OSError as error:
        _in_a_row[path] += 1
        _in_all[path] += 1
        if _in_a_row[path] == 1:
            rank_log.tell(
                f"warning: {path} is not written: {error.strerror or error_text(error)}. "
                "The run continues without it"
            )
    else:
        if lost := _in_a_row.pop(path, 0):
            rank_log.tell(f"{path} is written again; {lost} writes were lost")


def lost_writes(folder: Path) -> str:
    """Failed writes in ``folder``, for the last line of a run; "" if there were none."""
    lost = [f"{path.name} {n}" for path, n in _in_all.items() if path.is_relative_to(folder)]
    return f"Writes lost: {', '.join(lost)}. " if lost else ""


def append_line(path: Path, line: str) -> None:
    """Append ``line`` and a line break to ``path``, after dropping an unfinished last line.

    On ``OSError`` (a full disk) no part of ``line`` stays.
    """
    with FileIO(path, "a+") as file:
        end = _end_of_lines(file)
        file.truncate(end)
        left = memoryview(f"{line}\n".encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


def _end_of_lines(file: FileIO) -> int:
    """Size of the whole lines of ``file``; a killed process may leave a part of one."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return size
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1
