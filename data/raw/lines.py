"""Lines of text files, plain or compressed (gzip, zstd), within bounds, and the division of a plain
file into parts that begin and end with a line.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from earlyfuse.data.documents import LostSamples
from earlyfuse.data.raw.archive_stream import BrokenArchive, is_compressed, open_archive
from earlyfuse.data.raw.file_kinds import OtherKind
from earlyfuse.data.raw.shard import RawShard

MOST_LINE = 256 << 20  # bytes; MMC4 with its images in base64 has lines of some MB
_CHUNK = 1 << 20
_PART_BYTES, _PART_LINES = 256 << 20, 10_000


def read_lines(shard: RawShard) -> Iterator[tuple[int, bytes | None]]:
    """Number from 1 and content of each line that is not blank; none for one above ``MOST_LINE``.

    Raises ``BrokenArchive`` for a damaged compressed file, before its first line.
    """
    number = shard.first
    with _chunks(shard) as chunks:
        for _, line in _split(chunks):
            number += 1
            if line is None or line.strip():
                yield number, line


def line_parts(
    path: Path, kind: str, may_cut: Callable[[bytes], bool] = lambda line: True
) -> list[RawShard]:
    """The file in parts of at most 10,000 lines or 256 MiB, give or take a record; a compressed
    file is one part, as it cannot be read from the middle.

    ``may_cut``: called with each line in order, true if a part may end behind it.
    """
    whole = RawShard(path, kind)
    if is_compressed(path):
        return [whole]
    cuts = [(0, 0)]
    at = number = 0
    with _chunks(whole) as chunks:
        for size, line in _split(chunks):
            at, number = at + size, number + 1
            full = at - cuts[-1][0] >= _PART_BYTES or number - cuts[-1][1] >= _PART_LINES
            if may_cut(line or b"") and full:
                cuts.append((at, number))
    if at > cuts[-1][0]:
        cuts.append((at, number))
    if len(cuts) <= 2:
        return [whole]
    return [
        RawShard(path, kind, part, start, stop, first)
        for part, ((start, first), (stop, _)) in enumerate(pairwise(cuts))
    ]


def lost_file(shard: RawShard, error: BrokenArchive, good: int, samples: int) -> LostSamples:
    """The loss of a damaged compressed file: all of it, as nothing is used before its checksum."""
    cause = "truncated" if error.cause == "truncated" else "corrupt-file"
    return LostSamples(cause, f"{shard}: {error}", shard.size, good, good / max(1, samples))


def failed_download(shard: RawShard, other: OtherKind | None) -> LostSamples | None:
    """The file in place of ``shard`` after a failed download, as a lost shard."""
    if other is None:
        return None
    return LostSamples("truncated", f"{shard} is {other.text}", shard.size, 0, 0)


@contextmanager
def _chunks(shard: RawShard) -> Iterator[Iterator[bytes]]:
    if is_compressed(shard.path):
        with open_archive(shard.path) as stream:
            yield iter(lambda: stream.read(_CHUNK), b"")
        return
    with open(shard.path, "rb") as file:
        yield _range(file, shard.start, shard.size)


def _range(file: BinaryIO, start: int, left: int) -> Iterator[bytes]:
    file.seek(start)
    while left > 0 and (chunk := file.read(min(left, _CHUNK))):
        left -= len(chunk)
        yield chunk


def _split(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Size with the line break, and content without it, of each line."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        begin = 0
        while begin < len(chunk):
            end = chunk.find(b"\n", begin) + 1
            size += (end or len(chunk)) - begin
            if size > MOST_LINE:
                parts.clear()
            else:
                parts.append(chunk[begin : end or len(chunk)])
            if not end:
                break
            yield size, None if size > MOST_LINE else b"".join(parts).rstrip(b"\r\n")
            parts.clear()
            begin, size = end, 0
    if size:
        yield size, None if size > MOST_LINE else b"".join(parts)
