"""Files that a row names, read from its folder and from nowhere else."""

import os
import re
import stat
from functools import lru_cache
from pathlib import Path, PurePosixPath

from earlyfuse.data.documents import BadSample
from earlyfuse.data.json_files import shown
from earlyfuse.data.raw.archive import MOST_SAMPLE_BYTES

_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+://")


def is_url(name: str) -> bool:
    """True for ``https://…``, ``s3://…``; nothing is fetched."""
    return _URL.match(name) is not None


def read_file(root: Path, name: str) -> bytes:
    """The content of the file ``name`` in the folder ``root``.

    Raises ``BadSample``: ``remote-file`` for a URL, ``unsafe-path`` for a path that leads out of
    ``root``, by ``..`` or by a link, ``missing-file`` for no readable plain file, ``too-large``.
    """
    if is_url(name):
        what = f"{shown(name)} is a URL, and nothing is fetched: download it, and name the file"
        raise BadSample("remote-file", what)
    try:
        inside = _resolved(root)
        path = Path(os.path.realpath(inside / name))
        if ".." in PurePosixPath(name).parts or not path.is_relative_to(inside):
            what = (
                f"{shown(name)} leads out of the media root {root}; give --media-root, the folder"
            )
            raise BadSample("unsafe-path", f"{what} that holds the files, or copy the file there")
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise BadSample("missing-file", f"{shown(name)} in {root} is no plain file")
        if state.st_size > MOST_SAMPLE_BYTES:
            what = f"{shown(name)} has {state.st_size:,} bytes; a file may have"
            raise BadSample("too-large", f"{what} {MOST_SAMPLE_BYTES:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, BadSample):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        what = f"{shown(name)} cannot be read in the media root {root} ({reason})"
        raise BadSample("missing-file", what) from error


@lru_cache(maxsize=64)
def _resolved(root: Path) -> Path:
    return Path(os.path.realpath(root))
