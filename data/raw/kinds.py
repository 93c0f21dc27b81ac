"""Kinds of file that hold raw data: which files are of a kind, how they divide into shards, and the
reader of a shard.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from earlyfuse.data.documents import BadSample
from earlyfuse.data.raw.archive import Sample, read_samples
from earlyfuse.data.raw.file_kinds import OtherKind, is_tar, other_kind
from earlyfuse.data.raw.json_lines import (
    JSON_LINES,
    json_line_problem,
    json_line_samples,
    json_line_shards,
)
from earlyfuse.data.raw.loose_files import (
    TEXT_ENDINGS,
    loose_samples,
    loose_shards,
    media_endings,
    text_samples,
)
from earlyfuse.data.raw.shard import RawShard, ReadOptions
from earlyfuse.data.raw.tables import TABLES, table_problem, table_samples, table_shards


def _whole_tars(files: Sequence[Path], options: ReadOptions) -> list[RawShard]:
    return [RawShard(path, "tar") for path in files]


def _row_groups(files: Sequence[Path], options: ReadOptions) -> list[RawShard]:
    from earlyfuse.data.raw.parquet import row_groups  # imports pyarrow

    return [shard for path in files for shard in row_groups(path, options)]


def _rows(shard: RawShard, options: ReadOptions) -> Iterator[Sample | BadSample]:
    from earlyfuse.data.raw.parquet import RowGroups, read_rows

    assert isinstance(shard, RowGroups), "made by _row_groups"
    return read_rows(shard)


def _not_parquet(path: Path) -> OtherKind | None:
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            return other_kind(path)
    from earlyfuse.data.raw.parquet import problem_of

    if problem := problem_of(path):
        what = f"a parquet file that cannot be read ({problem}): fetch or write it again"
        return OtherKind(what, failed=True)
    return None


def _tar_samples(shard: RawShard, options: ReadOptions) -> Iterator[Sample | BadSample]:
    return read_samples(shard.path)


def _any_file(path: Path) -> None:
    """Loose files are judged one by one, when they are read."""


@dataclass(frozen=True)
class Kind:
    """A row of ``KINDS``.

    ``endings``: of file names, in lower case. ``shards``: files → units of work, the same for the
    same files; called before anything is written. ``samples``: reads one shard. ``problem``: what a
    file with such an ending is instead, by its first bytes; none if it is what it should be.
    """

    name: str
    endings: tuple[str, ...]
    shards: Callable[[Sequence[Path], ReadOptions], list[RawShard]]
    samples: Callable[[RawShard, ReadOptions], Iterator[Sample | BadSample]]
    problem: Callable[[Path], OtherKind | None]


# in a folder with files of several kinds, those of the first are read
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("tar", (".tar", ".tar.gz", ".tgz"), _whole_tars, _tar_samples, other_kind),
        Kind("parquet", (".parquet",), _row_groups, _rows, _not_parquet),
        Kind("jsonl", JSON_LINES, json_line_shards, json_line_samples, json_line_problem),
        Kind("table", TABLES, table_shards, table_samples, table_problem),
        Kind("files", (), loose_shards, loose_samples, _any_file),
        # parts of plain text files, which are found as loose files
        Kind("paragraph", (), loose_shards, text_samples, _any_file),
        Kind("line", (), loose_shards, text_samples, _any_file),
    )
}
# of plain files, for messages
SHARD_ENDINGS = tuple(kind.endings[0] for kind in KINDS.values() if kind.endings)


def kind_by_name(name: str) -> str | None:
    """The kind of files with this ending."""
    name = name.lower()
    loose = "files" if name.endswith((*TEXT_ENDINGS, *media_endings())) else None
    return next((kind.name for kind in KINDS.values() if name.endswith(kind.endings)), loose)


def kind_of(path: Path) -> str:
    """The kind of a file: a tar is known by its content, under any name; others by their ending."""
    kind = kind_by_name(path.name)
    if kind == "files":  # there may be millions of them
        return kind
    return kind if kind and kind != "tar" and not is_tar(path) else "tar"


def shards_of(files: Iterable[Path], options: ReadOptions) -> list[RawShard]:
    """``files``, in order, as shards."""
    found: list[RawShard] = []
    group: list[Path] = []
    kind = ""
    for path in files:
        if (own := kind_of(path)) != kind and group:
            found += KINDS[kind].shards(group, options)
            group = []
        kind = own
        group.append(path)
    return found + (KINDS[kind].shards(group, options) if group else [])


def read_shard(shard: RawShard, options: ReadOptions) -> Iterator[Sample | BadSample]:
    """Samples of ``shard`` in order, and one ``LostSamples`` at the end if it is broken."""
    return KINDS[shard.kind].samples(shard, options)
