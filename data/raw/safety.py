"""Refuses shards and members that could run code when they are opened.

earlyfuse opens none of these itself; they are refused because other tools may (webdataset's
decoders unpickle ``.pyd`` and ``.pth`` members, its ``pipe:`` runs a shell).
"""

import io
import os
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_CODE = frozenset(
    "pickle pkl pyd pth pt ckpt dill joblib marshal py pyc pyo sh so dll dylib exe".split()
)
_MOST_HEADER = 1 << 16  # bytes of an array's header, which numpy itself limits to 10,000
_MOST_ARRAYS = 10_000  # in an .npz
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_GIVE = "give the path of a .tar or .tar.gz file"
_SCHEME = re.compile(r"(?i)([a-z][a-z0-9+.-]+):")


def checked_shard(shard: Path | str) -> Path:
    """Return ``shard`` as the path of a readable local file.

    Raises ``ValueError`` for ``pipe:`` commands and URLs, ``FileNotFoundError`` for no plain file,
    ``PermissionError`` for an unreadable one.
    """
    text = str(shard)
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "pipe":
        raise ValueError(f"shard {text!r} would run a shell command; give the path of a tar")
    if scheme and text[scheme.end() :].startswith("/"):
        raise ValueError(f"shard {text!r} is a URL; fetch it and give the path of the local file")
    path = Path(shard)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb"):
                return path
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        problem = type(error) if isinstance(error, PermissionError) else FileNotFoundError
        raise problem(f"shard {text!r} {_unreadable(path, error)}") from error
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
    raise FileNotFoundError(f"shard {text!r} is not a plain file but {kind}; {_GIVE}")


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    if path.is_symlink():
        return f"is a symbolic link to {os.readlink(path)!r}, which cannot be read; mend the link"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"does not exist; {_GIVE}"
    reason = error.strerror if isinstance(error, OSError) else error
    return f"cannot be read ({reason}); make it readable, or leave it out"


def member_problem(name: str, data: bytes) -> tuple[str, str] | None:
    """Cause and reason why a sample with this member must not be used, if there is one."""
    *_, suffix = parts = name.lower().split(".")
    packed = suffix == "gz" and len(parts) > 1
    if packed:
        suffix = parts[-2]
    if suffix in _CODE:
        return "unsafe-member", f"is of a kind that runs code when loaded (.{suffix})"
    if suffix not in ("npy", "npz"):
        return None
    try:
        heads = _inflated_heads(data, suffix) if packed else _array_heads(data, suffix)
        with warnings.catch_warnings(action="ignore"):  # numpy's, on headers of Python 2
            objects = any(_has_objects(head) for head in heads)
    except Exception as error:  # numpy, zipfile and zlib raise nearly anything on damaged bytes
        return "corrupt-array", f"is no numpy file that can be read ({_first_line(error)})"
    return ("unsafe-member", "is a numpy file of pickled objects") if objects else None


def _array_heads(data: bytes, suffix: str) -> Iterator[bytes]:
    """The first bytes of each array in a .npy or .npz, as many as a header may have."""
    if suffix == "npy":
        yield data[:_MOST_HEADER]
        return
    if data.count(b"PK\1\2") > _MOST_ARRAYS:
        raise ValueError(f"it lists more than {_MOST_ARRAYS} arrays")
    with zipfile.ZipFile(io.BytesIO(data)) as entries:
        for entry in entries.infolist():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("an entry is compressed as numpy never does")
            with entries.open(entry) as stream:
                yield stream.read(_MOST_HEADER)


def _inflated_heads(data: bytes, suffix: str) -> Iterator[bytes]:
    if suffix == "npz":
        raise ValueError("an .npz is compressed already; gzip hides what it holds")
    yield zlib.decompressobj(31).decompress(data, _MOST_HEADER)


def _has_objects(head: bytes) -> bool:
    """True if an array that begins with ``head`` holds Python objects."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return bool(np.lib.format.read_array_header_1_0(stream)[2].hasobject)
    return bool(np.lib.format.read_array_header_2_0(stream)[2].hasobject)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return (lines[0] or type(error).__name__)[:120]
