"""Finds raw shards: files, folders, glob and brace patterns; names files that are none."""

import glob
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand

from earlyfuse.data.raw.kinds import KINDS, SHARD_ENDINGS, kind_by_name, kind_of, shards_of
from earlyfuse.data.raw.safety import checked_shard
from earlyfuse.data.raw.shard import RawShard, ReadOptions

_MOST_SHARDS = 1_000_000  # of one pattern
_SHOWN = 3
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")

Paths = str | Path | Sequence[str | Path]


def find_shards(
    label: str, paths: Paths, options: ReadOptions | None = None, *, failed: bool = False
) -> tuple[RawShard, ...]:
    """Shards of ``paths``, one or several: each sorted by name, without repetitions.

    Braces are expanded as by webdataset (``{000000..000002}``, ``{a,b}``), then glob patterns.
    Raises ``FileNotFoundError`` where nothing is found, ``PermissionError`` for unreadable files,
    ``ValueError`` for URLs, commands, unbalanced braces, and files that are of another format than
    their names say; ``failed``: accept what a failed download leaves.
    """
    files: list[Path] = []
    for path in _several(paths):
        matches = _expanded(label, str(path))
        # files of a folder are judged one by one, when they are read
        loose = len(matches) > 1 and all(kind_by_name(match) == "files" for match in matches)
        files += map(Path if loose else checked_shard, matches)
    files = list(dict.fromkeys(files))
    _check_kinds(label, files, failed)
    try:
        return tuple(shards_of(files, options or ReadOptions()))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _check_kinds(label: str, files: Sequence[Path], failed: bool) -> None:
    with ThreadPoolExecutor() as threads:
        found = zip(files, threads.map(lambda f: KINDS[kind_of(f)].problem(f), files), strict=True)
        others = [(file, other) for file, other in found if other and not (failed and other.failed)]
    if others:
        file, other = others[0]
        more = f" ({len(others) - 1:,} more shards cannot be read)" if len(others) > 1 else ""
        raise ValueError(f"{label}: shard {file} is {other.text}{more}")


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
    kinds = f"shards are {', '.join(SHARD_ENDINGS)}, images, audio and .txt"
    advice = f"give a file, a folder, or a pattern with * or {{000..127}}; {kinds}"
    if os.path.isdir(path):
        advice = f"the folder holds {_listed(_others(path)) or 'nothing'}; {advice}"
    raise FileNotFoundError(f"{label}: no shard at {path}; {advice}")


def _matches(label: str, path: str) -> list[str]:
    if os.path.isdir(path):
        names = _shard_names(_names(label, path))
        return [os.path.join(path, name) for name in names] or _loose_files(path)
    if not os.path.lexists(path) and glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        # ** also matches folders, which are skipped; one called like a shard is refused by name
        return [m for m in found if not os.path.isdir(m) or kind_by_name(m)]
    return [path] if os.path.lexists(path) or ":" in path else []


def _names(label: str, folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        what = f"{label}: folder {folder} cannot be read ({error.strerror}); make it readable"
        raise type(error)(what) from error


def _shard_names(names: Sequence[str]) -> list[str]:
    """Names in a folder that are shards: of one kind, the first of ``KINDS`` that is there.

    Hidden files are skipped, as by patterns: macOS leaves "._a.tar" beside a.tar.
    """
    kinds = {name: kind_by_name(name) for name in names if not name.startswith(".")}
    first = next((kind for kind in KINDS if kind in kinds.values() and kind != "files"), "")
    return [name for name, kind in kinds.items() if kind == first]


def _loose_files(folder: str) -> list[str]:
    """Media and texts in a folder and those below it, without hidden ones and links to folders."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        known = [n for n in names if kind_by_name(n) == "files" and not n.startswith(".")]
        found += [os.path.join(where, name) for name in known]
    return sorted(found)


def _others(folder: str) -> dict[str, list[str]]:
    """Names in ``folder`` that are no shards, by their kind."""
    others: dict[str, list[str]] = defaultdict(list)
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    shards = set(_shard_names([entry.name for entry in entries]))
    for entry in entries:
        loose = not shards and (entry.is_dir() or kind_by_name(entry.name) == "files")
        if entry.name in shards or loose:
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
