"""Finds raw shards: files, folders of tars, glob and brace patterns; names files that are none."""

import glob
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand

from earlyfuse.data.raw.file_kinds import other_kind
from earlyfuse.data.raw.safety import checked_shard

ENDINGS = (".tar", ".tar.gz", ".tgz")
_MOST_SHARDS = 1_000_000  # of one pattern
_SHOWN = 3
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")

Paths = str | Path | Sequence[str | Path]


def find_shards(label: str, paths: Paths) -> tuple[Path, ...]:
    """Files of ``paths``, one or several: each sorted by name, without repetitions.

    Braces are expanded as by webdataset (``{000000..000002}``, ``{a,b}``), then glob patterns.
    Raises ``FileNotFoundError`` where nothing is found, ``PermissionError`` for unreadable files,
    ``ValueError`` for URLs, commands and unbalanced braces.
    """
    shards: list[Path] = []
    for path in _several(paths):
        shards += [checked_shard(match) for match in _expanded(label, str(path))]
    return tuple(dict.fromkeys(shards))


def check_kinds(label: str, shards: Sequence[Path], failed: bool) -> None:
    """Raise ``ValueError`` for shards that are no tars, naming their format; ``failed``: accept
    what a failed download leaves.
    """
    with ThreadPoolExecutor() as threads:
        found = zip(shards, threads.map(other_kind, shards), strict=True)
        others = [(shard, kind) for shard, kind in found if kind and not (failed and kind.failed)]
    if others:
        shard, kind = others[0]
        more = f" ({len(others) - 1:,} more shards are no tars)" if len(others) > 1 else ""
        raise ValueError(f"{label}: shard {shard} is {kind.text}{more}")


def unused_files(paths: Paths) -> list[str]:
    """A line for each folder in ``paths`` with other files than shards: how many of each ending."""
    lines = []
    for folder in dict.fromkeys(str(path) for path in _several(paths)):
        if os.path.isdir(folder) and (others := _others(folder)):
            lines.append(f"{folder}: {_listed(others)}")
    return lines


def _several(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _expanded(label: str, path: str) -> list[str]:
    """Files that ``path`` matches. ``FileNotFoundError`` where one of its braces matches none."""
    names = [path]
    if "{" in path and not os.path.lexists(path):
        sizes = [
            1 + abs(int(last) - int(first)) // max(1, abs(int(step or 1)))
            for first, last, step in _RANGE.findall(path)
        ]
        if math.prod(sizes) > _MOST_SHARDS:
            raise ValueError(f"{label}: {path} stands for more than {_MOST_SHARDS:,} shards")
        try:
            names = list(dict.fromkeys(braceexpand(path, escape=False)))
        except ValueError as error:
            raise ValueError(
                f"{label}: shards {path}: {error}; write a range as {{000..127}}"
            ) from error
    matches = {name: _matches(label, name) for name in names}
    missing = [name for name, found in matches.items() if not found]
    if not missing:
        return [match for found in matches.values() for match in found]
    if len(names) > 1:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise FileNotFoundError(
            f"{label}: {len(missing)} of the {len(names)} shards of {path} do not exist: {shown}; "
            "correct the range, or use * for those that exist"
        )
    advice = "give a file, a folder of tars, or a pattern with * or {000..127}"
    if os.path.isdir(path):
        advice = f"the folder holds {_listed(_others(path)) or 'nothing'}; {advice}"
    raise FileNotFoundError(f"{label}: no shard (.tar, .tar.gz) at {path}; {advice}")


def _matches(label: str, path: str) -> list[str]:
    if os.path.isdir(path):
        # hidden files are skipped, as by patterns: macOS leaves "._a.tar" beside a.tar
        return [os.path.join(path, name) for name in _names(label, path) if _is_shard_name(name)]
    if not os.path.lexists(path) and glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        # ** also matches folders, which are skipped; one called like a shard is refused by name
        return [m for m in found if not os.path.isdir(m) or _is_shard_name(os.path.basename(m))]
    return [path] if os.path.lexists(path) or ":" in path else []


def _names(label: str, folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        what = f"{label}: folder {folder} cannot be read ({error.strerror}); make it readable"
        raise type(error)(what) from error


def _is_shard_name(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def _others(folder: str) -> dict[str, list[str]]:
    """Names in ``folder`` that are no shards, by their kind."""
    others: dict[str, list[str]] = defaultdict(list)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if _is_shard_name(entry.name):
            continue
        if entry.name.startswith("."):
            kind = "hidden"
        elif entry.is_dir():
            kind = "folder"
        else:
            kind = os.path.splitext(entry.name)[1] or "without ending"
        others[kind].append(entry.name)
    return others


def _listed(others: dict[str, list[str]]) -> str:
    kinds = sorted(others.items(), key=lambda item: -len(item[1]))
    shown = [
        f"{len(names):,} {kind} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for kind, names in kinds[: 2 * _SHOWN]
    ]
    hidden = sum(len(names) for _, names in kinds[2 * _SHOWN :])
    return ", ".join(shown) + (f", {hidden:,} of other kinds" if hidden else "")
