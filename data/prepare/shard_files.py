"""Finding shards: files, folders of tars, glob and brace patterns; what is no shard is named."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from earlyfuse.data.raw.file_kinds import other_kind
from earlyfuse.data.raw.safety import checked_shard

ENDINGS = (".tar", ".tar.gz", ".tgz")
_MOST_SHARDS = 1_000_000  # of one pattern
_SHOWN = 3
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?")
_LETTERS = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])")

Paths = str | Path | Sequence[str | Path]


def find_shards(label: str, paths: Paths) -> tuple[Path, ...]:
    """Files of ``paths``, one or several: each sorted by name, without repeats.

    Braces are expanded as webdataset does (``{000000..000002}``, ``{a,b}``), then glob patterns.
    Raises ``FileNotFoundError`` where nothing is, ``PermissionError`` for what may not be read,
    ``ValueError`` for URLs, commands and unfit braces.
    """
    shards: list[Path] = []
    for path in _several(paths):
        shards += [checked_shard(match) for match in _expanded(label, str(path))]
    return tuple(dict.fromkeys(shards))


def check_kinds(label: str, shards: Sequence[Path], failed: bool) -> None:
    """Raises ``ValueError`` for shards that are no tars, with what they are; ``failed``: lets those
    pass that a failed download left.
    """
    with ThreadPoolExecutor() as threads:
        found = zip(shards, threads.map(other_kind, shards), strict=True)
        others = [(shard, kind) for shard, kind in found if kind and not (failed and kind.failed)]
    if others:
        shard, kind = others[0]
        more = f" ({len(others) - 1:,} more shards are no tars)" if len(others) > 1 else ""
        raise ValueError(f"{label}: shard {shard} is {kind.text}{more}")


def unused_files(paths: Paths) -> list[str]:
    """A line for each folder in ``paths`` that holds more than shards: how many of which ending."""
    lines = []
    for folder in dict.fromkeys(str(path) for path in _several(paths)):
        if os.path.isdir(folder) and (others := _others(folder)):
            lines.append(f"{folder}: {_listed(others)}")
    return lines


def expand_braces(pattern: str) -> Iterator[str]:
    """Names that ``pattern`` stands for, as bash and webdataset expand it: ``{000..127}``,
    ``{0..10..2}``, ``{a..c}``, ``{a,b}``, nested or several. Raises ``ValueError``.
    """
    opening = pattern.find("{")
    while opening >= 0:
        closing = _closing(pattern, opening)
        alternatives = _alternatives(pattern[opening + 1 : closing])
        if alternatives is not None:
            for middle in alternatives:
                for rest in expand_braces(pattern[closing + 1 :]):
                    yield pattern[:opening] + middle + rest
            return
        opening = pattern.find("{", opening + 1)
    yield pattern


def _closing(pattern: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[at], 0)
        if depth == 0:
            return at
    raise ValueError("a brace is opened and not closed; write a range as {000..127}")


def _alternatives(inner: str) -> Iterable[str] | None:
    """What braces around ``inner`` stand for; none where they are only letters of a name."""
    if found := _RANGE.fullmatch(inner):
        first, last = int(found[1]), int(found[2])
        padded = any(re.match("-?0[0-9]", end) for end in found.groups()[:2])
        width = max(len(found[1]), len(found[2])) if padded else 0
        step = max(1, abs(int(found[3] or 1)))
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return (f"{number:0{width}d}" for number in numbers)
    if found := _LETTERS.fullmatch(inner):
        ends = ord(found[1]), ord(found[2])
        letters = [chr(code) for code in range(min(ends), max(ends) + 1)]
        return letters if ends[0] <= ends[1] else letters[::-1]
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(inner):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inner[begin:at])
            begin = at + 1
    if not parts:
        return None
    return (name for part in [*parts, inner[begin:]] for name in expand_braces(part))


def _several(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _expanded(label: str, path: str) -> Iterator[str]:
    """Names that ``path`` stands for. ``FileNotFoundError`` where one of its braces has none."""
    if os.path.lexists(path) or "{" not in path:
        names = [path]
    else:
        try:
            names = list(islice(expand_braces(path), _MOST_SHARDS + 1))
        except ValueError as error:
            raise ValueError(f"{label}: shards {path}: {error}") from error
        if len(names) > _MOST_SHARDS:
            raise ValueError(f"{label}: {path} stands for more than {_MOST_SHARDS:,} shards")
    matches = {name: _matches(label, name) for name in dict.fromkeys(names)}
    missing = [name for name, found in matches.items() if not found]
    if not missing:
        return iter([match for found in matches.values() for match in found])
    advice = "give a file, a folder of tars, or a pattern with * or {000..127}"
    if len(names) > 1:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise FileNotFoundError(
            f"{label}: {len(missing)} of the {len(names)} shards of {path} do not exist: {shown}; "
            "correct the range, or use * for those that are there"
        )
    if os.path.isdir(path):
        others = _others(path)
        advice = f"the folder holds {_listed(others) if others else 'nothing'}; {advice}"
    raise FileNotFoundError(f"{label}: no shard (.tar, .tar.gz) at {path}; {advice}")


def _matches(label: str, path: str) -> list[str]:
    if os.path.isdir(path):
        # hidden ones are passed over, as by patterns: macOS leaves "._a.tar" beside a.tar
        return [os.path.join(path, name) for name in _names(label, path) if _is_shard_name(name)]
    if not os.path.lexists(path) and glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        # folders on the way of ** are none; one that is called a shard is refused by name
        return [m for m in found if not os.path.isdir(m) or _is_shard_name(os.path.basename(m))]
    # URLs and commands go on, to be refused with their own reason
    return [path] if os.path.lexists(path) or ":" in path else []


def _names(label: str, folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise type(error)(
            f"{label}: folder {folder} cannot be read ({error.strerror}); make it readable"
        ) from error


def _is_shard_name(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def _others(folder: str) -> dict[str, list[str]]:
    """Names in ``folder`` that are no shards, by what they are."""
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
