"""Finds the columns of a parquet file that hold text and media, by their types and names.

=========  =========================================  ==========================================
role       type of its column                         document of a row
=========  =========================================  ==========================================
text       string                                     the text; with media a pair (several
                                                      items of a list come before the text)
text       list<string>                               interleaved with the lists of media: one
                                                      length, null in all but one at each place
text       list<struct> with role and content, from   a conversation; ``<image>`` in a turn is
           and value, or user and assistant           the next item, else all come first
images,    struct<bytes, path>, binary, string        one item: file bytes, else the path under
audio      (base64; a path or URL with a media root)  the media root
images,    list of these                              several items
audio
images     list<struct> with matched_text_index       MMC4: each image before the text it matches
=========  =========================================  ==========================================

Media are recognised by the Hugging Face features in the file, then by name. A schema that allows
several answers raises ``ValueError`` with the schema and the option that decides.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from earlyfuse.data.media import MEDIA

TURN_FIELDS = (("role", "content"), ("from", "value"))
ANSWERED = ("user", "assistant")
TEXT, TEXTS, TURNS, ITEM, INFO, LIST = "string", "list of strings", "turns", "item", "info", "list"

_TEXT_NAMES = frozenset(
    "text texts text_list caption content raw_content conversation conversations messages turns "
    "transcription transcript sentence".split()
)
_HELD_IN_NAME = re.compile(r"_(bytes|base64|data|list|info)$")
_REFERENCE_IN_NAME = re.compile(r"_(paths?|urls?|files?|names?)$")
_URL_NAME = re.compile(r"(image_|img_)?urls?")
_FEATURES = {"Image": "image", "Audio": "speech"}  # of Hugging Face datasets
_MOST_SHOWN = 40  # columns of a schema in a message
_LONGEST_TYPE = 90


@dataclass(frozen=True)
class Columns:
    """``text``: column, or "". ``form``: of the text, ``TEXT``, ``TEXTS``, ``TURNS`` or "".

    ``media``: (label of the medium, column, ``ITEM``, ``LIST`` or ``INFO``).
    """

    text: str = ""
    form: str = ""
    media: tuple[tuple[str, str, str], ...] = ()

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [*([self.text] if self.text else []), *(column for _, column, _ in self.media)]


NO_COLUMNS = Columns()


def columns_of(schema: pa.Schema, named: Mapping[str, str], references: bool) -> Columns:
    """The columns by role: those ``named``, or all recognised. ``references``: strings of media
    columns are paths and URLs.

    Raises ``ValueError`` with the problem, the schema, and what to pass.
    """
    try:
        found = dict(named) if named else _recognised(schema, references)
        return _checked(schema, found)
    except _Unclear as problem:
        shown = [f"{field.name}: {str(field.type)[:_LONGEST_TYPE]}" for field in schema]
        more = f", and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
        what = f"{problem}; its columns are {', '.join(shown[:_MOST_SHOWN])}{more}"
        raise ValueError(f"{what}; {_remedy(schema)}") from problem


class _Unclear(Exception):
    """Why the columns are not clear, for a message that begins with the file."""


def _checked(schema: pa.Schema, found: Mapping[str, str]) -> Columns:
    by_list = {medium.list_name: label for label, medium in MEDIA.items()}
    media: list[tuple[str, str, str]] = []
    for role, column in found.items():
        if schema.names.count(column) != 1:
            what = "no column" if column not in schema.names else "more than one column"
            raise _Unclear(f"{what} is called {column!r}, to be read as {role}")
        kind = _media_kind(schema.field(column).type)
        if role in by_list and not kind:
            raise _Unclear(f"column {column!r} has no type that {role} can be read from")
        if role in by_list:
            media.append((by_list[role], column, kind))
    text = found.get("text", "")
    form = _text_form(schema.field(text).type) if text else ""
    if text and not form:
        raise _Unclear(f"column {text!r} has no type that text can be read from")
    kinds = {kind for _, _, kind in media}
    if form == TEXTS and ITEM in kinds:
        raise _Unclear(f"the texts of list column {text!r} interleave with lists of media only")
    if INFO in kinds and (form != TEXTS or len(media) > 1):
        raise _Unclear("images with matched_text_index need a list of strings as text")
    if form == TEXT and len(media) > 1:
        raise _Unclear("a pair is one text and media of one kind, here there are two")
    return Columns(text, form, tuple(media))


def _recognised(schema: pa.Schema, references: bool) -> dict[str, str]:
    """Column by role."""
    features = _features(schema)
    found: dict[str, str] = {}
    for label, medium in MEDIA.items():
        names = {label, medium.list_name, medium.payload, medium.item, *medium.suffixes}
        names |= {"img", "pictures", "picture"} if label == "image" else set()
        of_medium = [
            field.name
            for field in schema
            if _media_kind(field.type)
            and features.get(field.name, label) == label
            and (field.name in features or _base(field.name, references) in names)
        ]
        if not of_medium and references and label == "image" and _captions_urls(schema):
            of_medium = [f.name for f in schema if _media_kind(f.type) and _is_url_name(f.name)]
        if column := _only(of_medium, medium.list_name):
            found[medium.list_name] = column
    unclear = [
        field.name
        for field in schema
        if field.name not in found.values() and _is_file(field.type, bytes_too=not found)
    ]
    if unclear:
        raise _Unclear(f"column {unclear[0]!r} holds files, of a kind that its name does not say")
    return _with_text(schema, found)


def _with_text(schema: pa.Schema, found: dict[str, str]) -> dict[str, str]:
    """``found`` with the column of the text."""
    texts = [
        field.name
        for field in schema
        if field.name not in found.values()
        and (form := _text_form(field.type))
        and not pa.types.is_binary(field.type)
        and (form == TURNS or field.name.lower() in _TEXT_NAMES)
    ]
    if not texts:
        strings = [f.name for f in schema if f.name not in found.values() and _is_string(f.type)]
        texts = [name for name in strings if not _is_url_name(name)] if len(strings) < 3 else []
        if len(texts) != 1:
            raise _Unclear("no column says by its name or type that it is the text")
    text = _only(texts, "text")
    if not found and _captions_urls(schema):
        raise _Unclear(
            f"column {text!r} seems to caption images at URLs, which are never fetched: download "
            "them (img2dataset writes tars that are read as they are), or give --media-root"
        )
    return {"text": text, **found}


def _captions_urls(schema: pa.Schema) -> bool:
    """True for rows as img2dataset takes them; a text with the URL of its page is none."""
    names = {name.lower() for name in schema.names}
    return any(map(_is_url_name, names)) and bool(names & {"caption", "width", "height"})


def _only(columns: list[str], role: str) -> str:
    """The one of ``columns``, "" if there is none."""
    if len(columns) > 1:
        raise _Unclear(f"columns {' and '.join(map(repr, columns[:4]))} can each be the {role}")
    return columns[0] if columns else ""


def _remedy(schema: pa.Schema) -> str:
    """The option that decides, with columns that fit as an example."""
    texts = [
        field.name
        for field in schema
        if _text_form(field.type) and not _is_file(field.type, bytes_too=True)
    ] or ["COLUMN"]
    best = next((name for name in texts if name.lower() in _TEXT_NAMES), texts[0])
    files = [field.name for field in schema if _is_file(field.type, bytes_too=True)]
    media = files or [f.name for f in schema if _media_kind(f.type) and f.name not in texts]
    named = ["text", *(medium.list_name for medium in MEDIA.values())]
    example = f"text={best}" + (f" images={media[0]}" if media else "")
    return (
        f"name them by role ({', '.join(named)}): --columns {example}, with SOURCE: before each "
        "role where other sources have other columns"
    )


def _base(name: str, references: bool) -> str:
    """A column's name without what it says of the form: ``image_bytes`` is ``image``."""
    base = _HELD_IN_NAME.sub("", name.lower())
    return _REFERENCE_IN_NAME.sub("", base) if references else base


def _is_url_name(name: str) -> bool:
    return _URL_NAME.fullmatch(name.lower()) is not None


def _features(schema: pa.Schema) -> dict[str, str]:
    """Label of the medium of each column that Hugging Face datasets wrote as an image or audio."""
    try:
        info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
        found = {}
        for name, feature in features.items():
            inner = feature[0] if isinstance(feature, list) else feature
            inner = inner.get("feature", inner)  # Sequence and List
            if (kind := inner.get("_type")) in _FEATURES:
                found[name] = _FEATURES[kind]
        return found
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError):
        return {}  # written by another tool: names decide


def _is_string(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _element(kind: pa.DataType) -> pa.DataType | None:
    """The type of a list's elements, none for another type."""
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if any(check(kind) for check in is_list) else None


def _fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}


def _text_form(kind: pa.DataType) -> str:
    element = _element(kind)
    if _is_string(kind) or _is_bytes(kind):
        return TEXT
    if element is None:
        return ""
    if _is_string(element):
        return TEXTS
    names = _fields(element).keys()
    return TURNS if any(names >= set(pair) for pair in (*TURN_FIELDS, ANSWERED)) else ""


def _media_kind(kind: pa.DataType) -> str:
    """``ITEM``, ``LIST`` or ``INFO`` of a column that can hold media, else ""."""
    if _is_item(kind):
        return ITEM
    element = _element(kind)
    if element is None:
        return ""
    if "matched_text_index" in _fields(element):
        return INFO
    return LIST if _is_item(element) else ""


def _is_item(kind: pa.DataType) -> bool:
    return _is_string(kind) or _is_bytes(kind) or _is_struct_item(kind)


def _is_struct_item(kind: pa.DataType) -> bool:
    held = _fields(kind).get("bytes")
    return held is not None and (_is_bytes(held) or _is_string(held))


def _is_file(kind: pa.DataType, bytes_too: bool) -> bool:
    """True if the column, or each element, is a struct of file bytes, or plain bytes."""
    inner = _element(kind) or kind
    return _is_struct_item(inner) or (bytes_too and _is_bytes(inner))
