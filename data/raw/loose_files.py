"""Files in folders: images and utterances with their texts beside them, and plain text files.

=======================  =========================================================================
text of ``KEY.flac``     ``KEY.txt``; ``KEY.normalized.txt`` (LibriTTS); a line ``KEY words …`` of a
                         ``*.trans.txt`` in the same folder (LibriSpeech); ``caption`` or ``text``
                         in ``KEY.json`` (img2dataset's files)
files without any media  plain text: each file a document, or each paragraph or line
=======================  =========================================================================

KEY ends at the last dot of a name. Text files beside media that belong to none are not read.
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from earlyfuse.data.documents import BadSample
from earlyfuse.data.media import MEDIA
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.archive_stream import BrokenArchive, open_archive
from earlyfuse.data.raw.lines import MOST_LINE, line_parts, lost_file, read_lines
from earlyfuse.data.raw.media_files import read_file
from earlyfuse.data.raw.shard import RawShard, ReadOptions

TEXT_ENDINGS = (".txt", ".txt.gz", ".txt.zst")
MOST_TEXT = 64 << 20  # bytes of a document of plain text
_GROUP_FILES, _GROUP_BYTES = 1000, 256 << 20
_TRANSCRIPTS = ".trans.txt"
_BESIDE = (("txt", ".txt"), ("txt", ".normalized.txt"), ("json", ".json"))


def media_endings() -> tuple[str, ...]:
    """Endings of media files."""
    return tuple(f".{suffix}" for medium in MEDIA.values() for suffix in medium.suffixes)


def loose_shards(files: Sequence[Path], options: ReadOptions) -> list[RawShard]:
    """Groups of at most 1,000 files or 256 MiB, in order: media if there are any, else texts."""
    media = [path for path in files if path.name.lower().endswith(media_endings())]
    if not media and options.text_unit != "file":
        return [part for path in files for part in _text_parts(path, options.text_unit)]
    root = Path(os.path.commonpath([os.path.abspath(path.parent) for path in files]))
    groups: list[list[str]] = [[]]
    size = 0
    for path in media or files:
        size += path.stat().st_size
        if groups[-1] and (len(groups[-1]) >= _GROUP_FILES or size > _GROUP_BYTES):
            groups.append([])
            size = 0
        groups[-1].append(os.path.relpath(os.path.abspath(path), root))
    return [RawShard(root, "files", part, files=tuple(g)) for part, g in enumerate(groups)]


def loose_samples(shard: RawShard, options: ReadOptions) -> Iterator[Sample | BadSample]:
    """A sample for each medium, or for each text file; its key is the path without the ending."""
    finished: set[str] = set()
    for name in shard.files:
        ending = next((e for e in TEXT_ENDINGS if name.lower().endswith(e)), None)
        key = name[: -len(ending)] if ending else os.path.splitext(name)[0]
        sample = Sample(key)
        if key in finished:
            what = f"{shard}: {key!r} is the name of several files; give each another name"
            sample.spoil(BadSample("duplicate-key", what))
        finished.add(key)
        try:
            if ending:
                sample.members["txt"] = _whole_text(shard.path, name)
            else:
                suffix = os.path.splitext(name)[1][1:].lower()
                sample.members = {suffix: read_file(shard.path, name), **_beside(shard.path, key)}
        except BadSample as error:
            sample.spoil(BadSample(error.cause, f"{shard}: {error.message}"))
        yield sample


def _beside(root: Path, key: str) -> dict[str, bytes]:
    """The text of a medium, as a member of its sample."""
    for member, ending in _BESIDE:
        if os.path.lexists(root / (key + ending)):
            return {member: read_file(root, key + ending)}
    folder, name = os.path.split(key)
    words = _transcripts(root, folder).get(os.fsencode(name))
    return {} if words is None else {"txt": words}


@lru_cache(maxsize=4)
def _transcripts(root: Path, folder: str) -> dict[bytes, bytes]:
    """Key → words of the ``*.trans.txt`` in a folder; a key that occurs twice has none."""
    found: dict[bytes, bytes] = {}
    twice: set[bytes] = set()
    for name in sorted(os.listdir(root / folder)):
        if name.endswith(_TRANSCRIPTS):
            for line in read_file(root, os.path.join(folder, name)).splitlines():
                key, _, words = line.partition(b" ")
                if key in found:
                    twice.add(key)
                found[key] = words
    return {key: words for key, words in found.items() if key not in twice}


def _whole_text(root: Path, name: str) -> bytes:
    """A text file, decompressed."""
    content = b""
    if name.lower().endswith(TEXT_ENDINGS[0]):
        content = read_file(root, name)
    else:
        try:
            with open_archive(root / name) as stream:
                content = stream.read(MOST_TEXT + 1)
        except BrokenArchive as error:
            raise BadSample("corrupt-file", f"{name}: {error}") from error
    if len(content) > MOST_TEXT:
        what = f"{name} has more than {MOST_TEXT:,} bytes, for one document; give --text-unit"
        raise BadSample("too-large", f"{what} paragraph or line")
    return content


def _text_parts(path: Path, unit: str) -> list[RawShard]:
    return line_parts(path, unit, lambda line: unit == "line" or not line.strip())


def text_samples(shard: RawShard, options: ReadOptions) -> Iterator[Sample | BadSample]:
    """A sample for each line (``shard.kind``), or each run of lines that are not blank."""
    held: list[bytes] = []
    first = last = size = 0

    def sample() -> Sample:
        found = Sample(f"{shard.path.name}:{first}", {"txt": b"\n".join(held)})
        if size > MOST_TEXT:
            what = f"{shard}: line {first}: a {shard.kind} of more than {MOST_TEXT:,} bytes"
            found.spoil(BadSample("too-large", what))
        return found

    try:
        for number, line in read_lines(shard):
            if held and (shard.kind == "line" or number != last + 1):
                yield sample()
                held, size = [], 0
            first = first if held else number
            last, size = number, size + (MOST_LINE if line is None else len(line))
            held.append(b"" if line is None or size > MOST_TEXT else line)
        if held:
            yield sample()
    except BrokenArchive as error:
        yield lost_file(shard, error, 0, 0)
