"""Atomic writes: a file exists whole or not at all, whenever the process is killed."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".part"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends without an error.

    Data are synced to disk before the rename, so neither a killed process nor a crashed machine
    leaves a partial file under ``path``. A killed process may leave ``*.part``; see
    ``remove_temporaries``.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
            error.filename = str(path)  # errors of writing name no file
        raise
    _sync_folder(path.parent)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_write(path) as file:
        file.write(content)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON with sorted keys: equal values give equal bytes.

    A file that holds these bytes already is not rewritten.
    """
    content = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"
    if not path.exists() or path.read_bytes() != content:
        atomic_write_bytes(path, content)


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files of killed processes in ``folder``."""
    for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
