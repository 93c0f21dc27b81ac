"""What a shard must not hold and where it must not come from: things that run code when opened.

earlyfuse opens none of these itself; they are refused because the next tool to meet the shard may
(webdataset's decoders unpickle ``.pyd`` and ``.pth`` members, its ``pipe:`` runs a shell).
"""

import io
import re
import zipfile
from pathlib import Path

import numpy as np

_CODE = frozenset(
    "pickle pkl pyd pth pt ckpt dill joblib marshal py pyc pyo sh so dll dylib exe".split()
)
_SCHEME = re.compile(r"(?i)([a-z][a-z0-9+.-]+):")


def checked_shard(shard: Path | str) -> Path:
    """``shard`` as the path of an existing local file.

    Raises ``ValueError`` for ``pipe:`` commands and URLs, ``FileNotFoundError`` for no file.
    """
    text = str(shard)
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "pipe":
        raise ValueError(
            f"shard {text!r} would run a shell command; run it yourself and give the tar's path"
        )
    if scheme and text[scheme.end() :].startswith("/"):
        raise ValueError(
            f"shard {text!r} is a URL, and shards are read from local files only; "
            "fetch it first and give its path"
        )
    path = Path(shard)
    if not path.is_file():
        what = "is not a plain file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"shard {text!r} {what}; give the path of a .tar or .tar.gz file")
    return path


def unsafe_reason(name: str, data: bytes) -> str | None:
    """Why a member called ``name`` could run code when decoded; none when it could not."""
    *_, suffix = parts = name.lower().split(".")
    if suffix == "gz" and len(parts) > 1:
        suffix = parts[-2]
    if suffix in _CODE:
        return f"is of a kind that runs code when loaded (.{suffix})"
    if suffix in ("npy", "npz") and _holds_objects(data, archive=suffix == "npz"):
        return "is a numpy file of pickled objects"
    return None


def _holds_objects(data: bytes, archive: bool) -> bool:
    """Whether a .npy or .npz has object arrays, by its headers; an unreadable one counts too."""
    try:
        if not archive:
            return _header_has_object(io.BytesIO(data))
        with zipfile.ZipFile(io.BytesIO(data)) as entries:
            for entry in entries.namelist():
                with entries.open(entry) as stream:
                    if _header_has_object(stream):
                        return True
        return False
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return True


def _header_has_object(stream: object) -> bool:
    version = np.lib.format.read_magic(stream)  # type: ignore[arg-type]
    if version == (1, 0):
        return bool(np.lib.format.read_array_header_1_0(stream)[2].hasobject)  # type: ignore[arg-type]
    return bool(np.lib.format.read_array_header_2_0(stream)[2].hasobject)  # type: ignore[arg-type]
