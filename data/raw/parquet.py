"""Rows of parquet files as samples; consecutive row groups are the unit of work.

A unit is a row group, or consecutive ones of together at most 64 MiB: files of text have hundreds
of small ones. Its rows are decoded in batches, page by page, with strings and bytes as references
into the pages' dictionaries: a cell that a file of some KB repeats a million times is not copied.

Left out: encrypted files, extension types, column chunks in other files. docs/data.md has the
layouts, ``parquet_columns`` the columns.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from earlyfuse.data.documents import BadSample, LostSamples
from earlyfuse.data.raw.archive import MOST_SAMPLE_BYTES, Sample
from earlyfuse.data.raw.parquet_columns import NO_COLUMNS, Columns, columns_of
from earlyfuse.data.raw.parquet_rows import sample_of
from earlyfuse.data.raw.shard import RawShard, ReadOptions

# uncompressed bytes of a row group, in the columns that are read
MOST_ROW_GROUP_BYTES = 16 << 30
UNIT_BYTES = 64 << 20  # of consecutive row groups that are one unit of work
_BATCH_BYTES = 64 << 20
_BATCH_ROWS = 1024
_MOST_FOOTER = 512 << 20
_BUFFER = 1 << 20


@dataclass(frozen=True)
class RowGroups(RawShard):
    """Row groups ``groups`` (first, last) of a file: a raw shard.

    ``problem``: why no row of the file can be read.
    """

    groups: tuple[int, int] = (0, 0)
    columns: Columns = NO_COLUMNS
    root: Path | None = None
    problem: str = ""

    def sha256(self) -> str:
        """SHA-256 of schema and column chunks; with a media root, of all members of its samples:
        files that arrive later make another shard.
        """
        if self.problem:
            return super().sha256()
        digest = hashlib.sha256()
        if self.root is None:
            digest.update(_schema_text(_metadata(self.path).schema.to_arrow_schema()))
            digest.update(super().sha256().encode())
            return digest.hexdigest()
        for sample in read_rows(self):
            if isinstance(sample, Sample):
                for name, content in sample.members.items():
                    digest.update(f"{sample.key}\0{name}\0".encode())
                    digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


def problem_of(file: Path) -> str:
    """Why no row of a file can be read, empty if there is no reason."""
    try:
        metadata = _metadata(file)
        metadata.schema.to_arrow_schema()
        numbers = range(metadata.num_row_groups)
        end = max((_extent(metadata.row_group(number))[1] for number in numbers), default=0)
        if end > (size := file.stat().st_size):
            return f"column chunks end at byte {end:,} of {size:,}"
    except Exception as error:  # pyarrow raises nearly anything on damaged files
        return _first_line(error)
    return ""


def row_groups(file: Path, options: ReadOptions) -> list[RowGroups]:
    """The units of a file; one without rows for a file that cannot be read.

    Raises ``ValueError`` naming the file: unclear columns, no rows, a row group above
    ``MOST_ROW_GROUP_BYTES``.
    """
    if problem := problem_of(file):
        what = f"{file}: it cannot be read as parquet ({problem})"
        return [RowGroups(file, "parquet", problem=what)]
    metadata = _metadata(file)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    schema = metadata.schema.to_arrow_schema()
    try:
        columns = columns_of(
            schema, dict(options.columns), references=options.media_root is not None
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not metadata.num_rows:
        raise ValueError(f"{file} has no rows; leave it out")
    units: list[tuple[int, int]] = []
    unit_bytes = UNIT_BYTES
    for number, group in enumerate(groups):
        read = _read_bytes(group, columns)
        if read > MOST_ROW_GROUP_BYTES:
            raise ValueError(
                f"{file}: row group {number} has {read:,} bytes in columns "
                f"{', '.join(columns.names)}, above {MOST_ROW_GROUP_BYTES:,}; write the file again "
                "with fewer rows a group (row_group_size of pyarrow.parquet.write_table)"
            )
        unit_bytes += read
        if unit_bytes > UNIT_BYTES or not units:
            units.append((number, number))
            unit_bytes = read
        else:
            units[-1] = (units[-1][0], number)
    shards = []
    for part, (first, last) in enumerate(units):
        extents = [_extent(group) for group in groups[first : last + 1]]
        start, stop = min(start for start, _ in extents), max(stop for _, stop in extents)
        own = part if len(units) > 1 else None
        shards.append(
            RowGroups(
                file, "parquet", own, start, stop, 0, (), (first, last), columns, options.media_root
            )
        )
    return shards


def read_rows(shard: RowGroups) -> Iterator[Sample | BadSample]:
    """A sample for each row, whose key is ``file/row group/row``; one ``LostSamples`` for the rest
    of each row group that cannot be decoded.
    """
    if shard.problem:
        yield LostSamples("corrupt-file", shard.problem, shard.size, 0, 0)
        return
    metadata = _metadata(shard.path)
    for group in range(shard.groups[0], shard.groups[1] + 1):
        row = 0
        try:
            for batch in _batches(shard.path, group, shard.columns):
                for place in range(batch.num_rows):
                    yield _sample(f"{shard.path.stem}/{group}/{row}", batch, place, shard)
                    row += 1
        except _Broken as broken:
            missing = max(1, metadata.row_group(group).num_rows - row)
            what = f"{shard}: row group {group} cannot be decoded after row {row:,} ({broken})"
            yield LostSamples("corrupt-file", what, missing, 0, 1)


def _sample(key: str, batch: pa.RecordBatch, place: int, shard: RowGroups) -> Sample:
    row = batch.slice(place, 1)
    try:
        size = sum(map(_content_bytes, row.columns))
        if size > MOST_SAMPLE_BYTES:
            what = f"the row has {size:,} bytes; a sample may have {MOST_SAMPLE_BYTES:,}"
            return _spoilt(key, "too-large", what, shard)
        values = {name: row.column(name)[0].as_py() for name in row.schema.names}
    except UnicodeDecodeError as error:
        return _spoilt(key, "not-utf8", f"a cell is not UTF-8 ({error})", shard)
    except Exception as error:  # pyarrow raises nearly anything on damaged files
        return _spoilt(key, "corrupt-cell", f"a cell cannot be read ({_first_line(error)})", shard)
    sample = sample_of(key, values, shard.columns, shard.root)
    if (problem := sample.problem) is not None:
        sample.problem = BadSample(problem.cause, f"{shard}: {problem.message}")
    return sample


def _spoilt(key: str, cause: str, what: str, shard: RowGroups) -> Sample:
    sample = Sample(key)
    sample.spoil(BadSample(cause, f"{shard}: sample {key!r}: {what}"))
    return sample


class _Broken(Exception):
    """A row group that cannot be decoded to its end."""


def _batches(path: Path, group: int, columns: Columns) -> Iterator[pa.RecordBatch]:
    """Batches of a row group, small enough that none decodes to much more than ``_BATCH_BYTES``
    unless a cell does. Raises ``_Broken``.
    """
    metadata = _metadata(path)
    found = metadata.row_group(group)
    leaves = [found.column(number) for number in range(found.num_columns)]
    strings = [leaf.path_in_schema for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    row_bytes = _read_bytes(found, columns) // max(1, found.num_rows)
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
    try:
        with pa.OSFile(os.fspath(path)) as source:
            file = pq.ParquetFile(
                source,
                metadata=metadata,
                read_dictionary=strings,
                buffer_size=_BUFFER,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            batches = file.iter_batches(rows, [group], columns.names, use_threads=False)
            while (batch := next(batches, None)) is not None:
                yield batch
    except Exception as error:
        raise _Broken(_first_line(error)) from error


def _content_bytes(array: pa.Array) -> int:
    """Bytes of strings and binaries in ``array`` once they are copied out of its dictionary.

    Raises ``IndexError`` for an entry that the dictionary lacks.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_content_bytes, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _content_bytes(array.flatten()) + 8 * len(array.flatten())
    return int(array.nbytes)


def _metadata(path: Path) -> pq.FileMetaData:
    """The footer, cached: units of one file follow one another."""
    state = path.stat()
    return _read_metadata(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _read_metadata(path: Path, size: int, changed: int) -> pq.FileMetaData:
    with open(path, "rb") as file:
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if len(tail) < 8 or tail[4:] != b"PAR1":
        raise ValueError("it ends before its footer")
    footer = int.from_bytes(tail[:4], "little")
    if footer > min(size, _MOST_FOOTER):
        raise ValueError(f"its footer states {footer:,} bytes")
    with pa.OSFile(os.fspath(path)) as source:
        return pq.read_metadata(source)


def _extent(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Offsets of the first byte of a row group and behind its last."""
    starts, stops = [], []
    for number in range(group.num_columns):
        column = group.column(number)
        if column.file_path:
            raise ValueError(f"column {column.path_in_schema} is in another file")
        start = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset:
            start = min(start, column.dictionary_page_offset)
        if start < 0 or column.total_compressed_size < 0:
            raise ValueError(f"column {column.path_in_schema} is at a negative offset")
        starts.append(start)
        stops.append(start + column.total_compressed_size)
    return min(starts, default=0), max(stops, default=0)


def _read_bytes(group: pq.RowGroupMetaData, columns: Columns) -> int:
    """Uncompressed bytes of the columns that are read."""
    leaves = [group.column(number) for number in range(group.num_columns)]
    return sum(
        leaf.total_uncompressed_size
        for leaf in leaves
        if any(
            leaf.path_in_schema == name or leaf.path_in_schema.startswith(f"{name}.")
            for name in columns.names
        )
    )


def _schema_text(schema: pa.Schema) -> bytes:
    """Describes the columns: names, types and Hugging Face features."""
    lines = [f"{field.name}: {field.type}" for field in schema]
    return "\n".join(lines).encode() + (schema.metadata or {}).get(b"huggingface", b"")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
