"""Read-only mappings of shard files, bounded in number.

A process may map 65,530 regions (Linux, vm.max_map_count), and a shard is three files or four. So
the ``MOST_OPEN`` shards opened last stay mapped, over all sources, and others are mapped again when
one of their documents is read. No file descriptor is kept. A file that shrinks while it is mapped
ends the process (SIGBUS): prepare replaces files, it never rewrites them.
"""

import io
import math
import os
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from earlyfuse.data.console import printable

MOST_OPEN = 8192  # shards; those that lanes are reading stay mapped besides
REMEDY = "copy the shard again or prepare the source again"
_LONGEST_HEADER = 1 << 10  # of an array file


class MappedShard(NamedTuple):
    """``tokens``: the bytes of the tar as tokens; ``entries``: the index, int64 (documents, 2 + M),
    with vectors (documents, 3 + M); ``checksums`` uint32; ``vectors`` (N, P).
    """

    tokens: np.ndarray
    entries: np.ndarray
    checksums: np.ndarray
    vectors: np.ndarray


class Stamp(NamedTuple):
    """Identifies the state of a file that was checked."""

    inode: int
    size: int
    changed: int


def stamp(path: Path) -> Stamp | None:
    """The file's present state; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error.strerror) from error
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


class Shards(dict[int, MappedShard]):
    """The mapped shards of one source; a dict that can be referenced weakly."""


_opened: deque[tuple[weakref.ref[Shards], int]] = deque()  # of all sources, the oldest first
_lock = threading.Lock()


def keep_open(shards: Shards, number: int, mapped: MappedShard) -> None:
    """Add a shard to those of its source, and drop the one that was opened first of too many.

    Threads that open one shard together map it twice and keep one.
    """
    with _lock:
        if number not in shards:
            _opened.append((weakref.ref(shards), number))
        shards[number] = mapped
        while len(_opened) > MOST_OPEN:
            reference, first = _opened.popleft()
            if (owner := reference()) is not None:
                del owner[first]


def map_file(path: Path, size: int) -> np.ndarray:
    """The bytes of a file, read-only, uint8.

    torch's mapping keeps no file descriptor, so thousands of shards do not meet the limit on open
    files.
    """
    if not size:
        return np.empty(0, np.uint8)
    try:
        view = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise unreadable(path, str(error)) from error
    view.flags.writeable = False
    return view


def array_in(path: Path, content: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array in ``content``, the bytes of a .npy file. ``ValueError`` unless it is of this shape
    and dtype.
    """
    try:
        file = io.BytesIO(content[:_LONGEST_HEADER].tobytes())
        np.lib.format.read_magic(file)
        found, _, kind = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # damaged headers make numpy raise nearly anything
        raise ValueError(f"{path} is no array file ({printable(str(error))}); {REMEDY}") from error
    expected = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
    if found != shape or kind != dtype or len(content) != expected:
        raise ValueError(
            f"{path} holds {found} {kind} in {len(content)} bytes, the manifest expects "
            f"{shape} {np.dtype(dtype).name} in {expected}; {REMEDY}"
        )
    return content[file.tell() :].view(dtype).reshape(shape)


def unreadable(path: Path, reason: str | None) -> ValueError:
    """The error for a file that the system refuses to read."""
    return ValueError(f"{path} cannot be read ({reason}); {REMEDY}")
