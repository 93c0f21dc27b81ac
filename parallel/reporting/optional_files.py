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


class LineFile:
    """Appends whole lines to a file; a line that does not fit on the disk leaves no part."""

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None

    def append(self, line: str) -> None:
        """Write ``line`` and a line break; on ``OSError`` the file is as before."""
        file = self._open()
        size = os.fstat(file.fileno()).st_size
        left = memoryview(f"{line}\n".encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> FileIO:
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink:
            return self._file
        self.close()  # deleted meanwhile
        self._file = FileIO(self.path, "a+")
        self._drop_unfinished_line(self._file)
        return self._file

    @staticmethod
    def _drop_unfinished_line(file: FileIO) -> None:
        """Remove what a killed process wrote of its last line."""
        if not os.fstat(file.fileno()).st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        file.truncate(end)
