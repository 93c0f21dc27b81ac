"""JSON lines: each line an object, read like the ``json`` member of a tar's sample, whose files lie
in a folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from earlyfuse.data.documents import BadSample
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.archive_stream import BrokenArchive
from earlyfuse.data.raw.file_kinds import OtherKind, other_than
from earlyfuse.data.raw.lines import MOST_LINE, failed_download, line_parts, lost_file, read_lines
from earlyfuse.data.raw.shard import RawShard, ReadOptions

JSON_LINES = tuple(
    f"{name}{packed}" for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")
) + (".json.gz", ".json.zst")  # as C4 is published; a plain .json is often one array


def json_line_shards(files: Sequence[Path], options: ReadOptions) -> list[RawShard]:
    """Parts of each file."""
    return [part for path in files for part in line_parts(path, "jsonl")]


def json_line_samples(shard: RawShard, options: ReadOptions) -> Iterator[Sample | BadSample]:
    """A sample for each line that is not blank; its key is ``file.jsonl:12``."""
    if lost := failed_download(shard, json_line_problem(shard.path)):
        yield lost
        return
    root = options.media_root or shard.path.parent
    try:
        for number, line in read_lines(shard):
            key = f"{shard.path.name}:{number}"
            sample = Sample(key, {} if line is None else {"json": line}, root=root)
            if line is None:
                what = f"{shard}: line {number} is longer than {MOST_LINE:,} bytes"
                sample.spoil(BadSample("too-large", what))
            yield sample
    except BrokenArchive as error:
        yield lost_file(shard, error, 0, 0)


def json_line_problem(path: Path) -> OtherKind | None:
    """The other format of a file that holds no JSON lines."""
    return other_than(path, "JSON lines", ("JSON lines", "a JSON object"))
