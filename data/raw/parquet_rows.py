"""Rows of a parquet file to samples with the members that a tar of the same data would have."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from earlyfuse.data.documents import BadSample
from earlyfuse.data.json_files import shown
from earlyfuse.data.media import MEDIA, Medium
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.media_files import is_url
from earlyfuse.data.raw.members import bad, decoded_base64
from earlyfuse.data.raw.parquet_columns import INFO, ITEM, TEXT, TEXTS, TURNS, Columns
from earlyfuse.data.raw.url_files import read_reference

_Items = list[bytes | None]


def sample_of(key: str, row: Mapping[str, Any], columns: Columns, root: Path | None) -> Sample:
    """The sample of a row; ``row``: value by column."""
    sample = Sample(key)
    try:
        _fill(sample, row, columns, root)
    except BadSample as problem:
        sample.spoil(bad(sample, problem.cause, problem.message))
    return sample


def _fill(sample: Sample, row: Mapping[str, Any], columns: Columns, root: Path | None) -> None:
    text = row[columns.text] if columns.text else None
    if INFO in (kind for _, _, kind in columns.media):
        ((_, column, _),) = columns.media
        _add_matched(sample, text, row[column], root)
        return
    media: dict[str, _Items] = {}
    for label, column, kind in columns.media:
        cells = [row[column]] if kind == ITEM else row[column] or []
        media[label] = _items(sample, cells, MEDIA[label], root, omit=columns.form == TEXTS)
    if columns.form == TEXTS:
        _add_lists(sample, text or [], media)
    elif columns.form == TURNS:
        _add_turns(sample, text or [], media)
    else:
        _add_text_and_media(sample, columns.form == TEXT, text, media)


def _add_text_and_media(sample: Sample, pair: bool, text: Any, media: dict[str, _Items]) -> None:
    """A text, a pair, or items (without text, or before it if there are several)."""
    found = [(label, item) for label in media for item in media[label] if item is not None]
    if len(found) > 1 or not pair:
        entries: list[Any] = list(found)
        _add_entries(sample, entries + ([_string(text)] if text is not None else []))
        return
    for label, item in found:
        sample.members[MEDIA[label].suffixes[0]] = item
    if text is not None:
        sample.members["txt"] = text if isinstance(text, bytes) else _string(text).encode()


def _items(
    sample: Sample, cells: Sequence[Any], medium: Medium, root: Path | None, omit: bool
) -> _Items:
    """File bytes of each cell, none for null. ``omit``: items that are absent are none too, and
    noted in ``sample.absent``, unless all are.
    """
    items: _Items = []
    problem: BadSample | None = None
    for cell in cells:
        try:
            items.append(_item(sample, cell, medium, root))
        except BadSample as error:
            if not (omit and error.cause == "missing-file"):
                raise
            problem = error
            sample.absent.append((error.cause, error.message))
            items.append(None)
    if problem is not None and not any(item is not None for item in items):
        raise problem
    return items


def _item(sample: Sample, cell: Any, medium: Medium, root: Path | None) -> bytes | None:
    """File bytes in, or named by, a cell: bytes, base64, a struct of bytes and path, a reference.

    Raises ``BadSample``, also of causes of ``read_reference``.
    """
    if isinstance(cell, dict):
        held, path = cell.get("bytes"), cell.get("path")
        if held is None and path:
            return _referenced(str(path), medium, root)
        return _decoded(sample, held, medium) if isinstance(held, str) else held
    if isinstance(cell, str) and not cell.strip():
        return None
    if isinstance(cell, str):
        inline = cell[:5].lower() == "data:"
        refers = is_url(cell) or (root is not None and not inline)
        return _referenced(cell, medium, root) if refers else _decoded(sample, cell, medium)
    if cell is not None and not isinstance(cell, bytes):
        raise BadSample("foreign-layout", f"{shown(cell)} is no {medium.payload}")
    return cell


def _referenced(reference: str, medium: Medium, root: Path | None) -> bytes:
    if root is not None:
        return read_reference(root, reference, medium)
    what = f"{shown(reference)} is not in the file, and nothing is fetched: download it and give "
    raise BadSample("remote-file" if is_url(reference) else "missing-file", f"{what}--media-root")


def _decoded(sample: Sample, value: str, medium: Medium) -> bytes:
    try:
        return decoded_base64(sample, value)
    except BadSample as error:
        cause = f"corrupt-{medium.payload}"
        raise BadSample(cause, f"{shown(value)} is not base64") from error


def _add_lists(sample: Sample, texts: Sequence[Any], media: dict[str, _Items]) -> None:
    """Parallel lists, in the members of layout ``interleaved``."""
    fields: dict[str, list[Any]] = {"texts": list(texts)}
    for label, items in media.items():
        medium = MEDIA[label]
        names = [
            None if item is None else f"{place}.{medium.suffixes[0]}"
            for place, item in enumerate(items)
        ]
        fields[medium.list_name] = names
        sample.members |= {
            name: item
            for name, item in zip(names, items, strict=True)
            if name is not None and item is not None
        }
    if not media:
        fields[MEDIA["image"].list_name] = [None] * len(texts)
    sample.members["json"] = json.dumps(fields).encode()


def _add_turns(sample: Sample, turns: Sequence[Any], media: dict[str, _Items]) -> None:
    """A conversation and the files of its media, in the members of layout ``turns``."""
    fields: dict[str, Any] = {"conversations": turns}
    for label, items in media.items():
        medium = MEDIA[label]
        held = [item for item in items if item is not None]
        names = [f"{place}.{medium.suffixes[0]}" for place in range(len(held))]
        fields[medium.list_name] = names
        sample.members |= zip(names, held, strict=True)
    try:
        sample.members["json"] = json.dumps(fields).encode()
    except TypeError as error:  # a part that holds bytes
        raise BadSample("foreign-layout", f"the turns hold more than text ({error})") from error


def _add_entries(sample: Sample, entries: Sequence[Any]) -> None:
    """Texts, and (label, item) pairs, in order."""
    texts = [entry if isinstance(entry, str) else None for entry in entries]
    labels = {entry[0] for entry in entries if not isinstance(entry, str)}
    media: dict[str, _Items] = {
        label: [
            entry[1] if not isinstance(entry, str) and entry[0] == label else None
            for entry in entries
        ]
        for label in MEDIA
        if label in labels
    }
    _add_lists(sample, texts, media)


def _string(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadSample("not-utf8", f"the text is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise BadSample("foreign-layout", f"the text is {shown(value)}, not a string")
    return value


def _add_matched(sample: Sample, texts: Any, infos: Any, root: Path | None) -> None:
    """Texts, and images that name the text they match, in the members of layout ``mmc4``."""
    medium = MEDIA["image"]
    entries = []
    for place, info in enumerate(infos or []):
        entry = {"matched_text_index": info.get("matched_text_index")}
        names = ("image_base64", "bytes", "path", "raw_url", "url", "image_name")
        cell = next((info[name] for name in names if info.get(name)), None)
        try:
            item = _item(sample, cell, medium, root)
        except BadSample as error:
            if error.cause != "missing-file":
                raise
            item, entry["image_name"] = None, str(cell)  # counted by the parser
        if item is not None:
            entry["image_name"] = f"{place}.{medium.suffixes[0]}"
            sample.members[entry["image_name"]] = item
        entries.append(entry)
    sample.members["json"] = json.dumps({"text_list": texts or [], "image_info": entries}).encode()
