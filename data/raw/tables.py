"""Tables of texts and the files they belong to, as published speech corpora have them.

==================  ============================================================================
Common Voice        ``train.tsv`` with columns ``path`` and ``sentence``, files in ``clips/``
LJSpeech            ``metadata.csv`` of ``id|text|normalised text`` without a heading, files in
                    ``wavs/`` as ``id.wav``
Hugging Face        ``metadata.csv`` with ``file_name`` and a column of texts
others              columns named like the fields of JSON lines
==================  ============================================================================

Rows are read as JSON lines are, with the columns as fields.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from earlyfuse.data.documents import BadSample
from earlyfuse.data.media import MEDIA
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.file_kinds import OtherKind, other_than
from earlyfuse.data.raw.lines import failed_download, line_parts, read_lines
from earlyfuse.data.raw.rows import TEXT_FIELDS, row_media
from earlyfuse.data.raw.shard import RawShard, ReadOptions

TABLES = (".tsv", ".csv")
_LJSPEECH = {2: ("file_name", "text"), 3: ("file_name", "written", "text")}  # the last is spoken
# where the files of a row may be: as named, Common Voice, LJSpeech
_PLACES = ("{}", "clips/{}", "wavs/{}.wav")
_HEADING_BYTES = 1 << 16


class _Form(NamedTuple):
    """Columns of a table, their separator, and whether its first line names them."""

    columns: tuple[str, ...]
    separator: str
    headed: bool


def table_shards(files: Sequence[Path], options: ReadOptions) -> list[RawShard]:
    """Parts of each table. ``ValueError`` for a table whose columns are not recognised."""
    parts: list[RawShard] = []
    for path in files:
        form = _form(path)
        if form is None and not table_problem(path):
            raise ValueError(
                f"table {path} must have a heading with a column of file names (file_name, path, "
                "audio, image …) and one of texts (text, sentence, transcription, caption …), "
                "separated by commas in .csv and tabs in .tsv; docs/data.md lists them. Or give "
                "its media files as a pattern"
            )
        parts += line_parts(path, "table", _between_rows(form))
    return parts


def table_samples(shard: RawShard, options: ReadOptions) -> Iterator[Sample | BadSample]:
    """A sample for each row; its key is ``train.tsv:12``."""
    form = _form(shard.path)
    if lost := failed_download(shard, table_problem(shard.path)):
        yield lost
        return
    assert form is not None, "checked when shards were found"
    root = options.media_root or shard.path.parent
    numbers: list[int] = []

    def lines() -> Iterator[str]:
        for number, line in read_lines(shard):
            numbers.append(number)
            yield (line or b"").decode("utf-8-sig", "surrogateescape") + "\n"

    rows = csv.reader(
        lines(),
        delimiter=form.separator,
        quoting=csv.QUOTE_MINIMAL if form.separator == "," else csv.QUOTE_NONE,
    )
    while True:
        numbers.clear()
        try:
            cells = next(rows, None)
            problem = None
        except csv.Error as error:
            cells, problem = [], str(error)
        if cells is None:
            return
        if form.headed and numbers[0] == 1:
            continue
        sample = Sample(f"{shard.path.name}:{numbers[0]}", root=root)
        if problem is None and len(cells) != len(form.columns):
            problem = f"{len(cells)} cells in a table of {len(form.columns)} columns"
        if problem is not None:
            what = f"{shard}: line {numbers[0]}: {problem}; mend its quotes or separators"
            sample.spoil(BadSample("bad-row", what))
        else:
            fields = _fields(dict(zip(form.columns, cells, strict=True)), root)
            sample.members["json"] = json.dumps(fields).encode()
        yield sample


def table_problem(path: Path) -> OtherKind | None:
    """The other format of a file that holds no table."""
    return other_than(path, "a table", ("plain text",))


def _form(path: Path) -> _Form | None:
    with open(path, "rb") as file:
        heading = file.readline(_HEADING_BYTES).decode("utf-8-sig", "replace").rstrip("\r\n")
    separator = "\t" if path.name.lower().endswith(".tsv") else ","
    cells = [cell.strip().lower() for cell in next(csv.reader([heading], delimiter=separator), ())]
    texts = {*TEXT_FIELDS, *(name for m in MEDIA.values() for name in m.caption_fields)}
    if len(set(cells)) == len(cells) and texts & set(cells) and any(map(_names_media, cells)):
        return _Form(tuple(cells), separator, headed=True)
    width = heading.count("|") + 1
    return _Form(_LJSPEECH[width], "|", headed=False) if width in _LJSPEECH else None


def _names_media(column: str) -> bool:
    suffixes = [suffix for medium in MEDIA.values() for suffix in medium.suffixes]
    return any(row_media({column: f"a.{suffix}"}) for suffix in suffixes)


def _fields(row: dict[str, str], root: Path) -> dict[str, str]:
    """Cells that are not empty, names of files as the place where they are."""
    fields = {column: cell for column, cell in row.items() if cell}
    for column, cell in fields.items():
        if _names_media(column):
            places = [place.format(cell) for place in _PLACES]
            fields[column] = next((p for p in places if _exists(root, p)), cell)
    return fields


def _exists(root: Path, name: str) -> bool:
    return "\0" not in name and os.path.isfile(root / name)


def _between_rows(form: _Form | None) -> Callable[[bytes], bool]:
    """A function of each line in order: true if a row ends with it, as no quote is open."""
    quotes = 0

    def ends(line: bytes) -> bool:
        nonlocal quotes
        quotes += line.count(b'"') if form is not None and form.separator == "," else 0
        return quotes % 2 == 0

    return ends
