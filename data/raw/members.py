"""Members of one raw sample: found by name, decoded to text, JSON or bytes.

Errors are ``BadSample``: ``missing-member``, ``bad-json``, ``not-utf8``, ``corrupt-image``.
"""

import base64
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

from earlyfuse.data.documents import BadSample
from earlyfuse.data.json_files import load_json
from earlyfuse.data.raw.archive import Sample

_BYTES_LITERAL = re.compile(r"b(['\"])(.*)\1", re.DOTALL)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_SPACE = re.compile(r"\s|\\[nr]")  # a bytes literal spells out its line breaks
# what data frames and ``str()`` write for a missing value
_MISSING = frozenset({"None", "nan", "NaN", "null", "NULL", "<NA>"})


def is_missing(value: object) -> bool:
    """True for null, NaN, and words for them such as ``nan``."""
    if isinstance(value, str):
        return value.strip() in _MISSING
    return value is None or value != value


def find_member(sample: Sample, name: object) -> str | None:
    """The member called ``name``: what follows the key, or the whole file name, with or without
    folders, in upper or lower case.
    """
    if not isinstance(name, str):
        return None
    name, key = name.lower(), sample.key.lower()
    prefixes = ("", f"{key}.", f"{key.rpartition('/')[2]}.")
    names = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
    return next((candidate for candidate in names if candidate in sample.members), None)


def unused_members(sample: Sample, used: Collection[str]) -> list[tuple[str, str]]:
    """(last suffix, file name) of each member outside ``used``."""
    return [
        (f".{name.rpartition('.')[2]}", f"{sample.key}.{name}")
        for name in sample.members
        if name not in used
    ]


def json_fields(sample: Sample) -> dict[str, Any]:
    """The fields of the ``json`` member."""
    if "json" not in sample.members:
        raise bad(sample, "missing-member", f"no json among {listed(sample.members)}")
    decoded_text(sample, "json")
    try:
        fields = _parsed(sample.members["json"])
    except (ValueError, MemoryError) as error:
        raise bad(sample, "bad-json", str(error) or type(error).__name__) from error
    if not isinstance(fields, dict):
        raise bad(sample, "bad-json", f"json holds a {type(fields).__name__}, not an object")
    return fields


@lru_cache(maxsize=1)
def _parsed(content: bytes) -> Any:
    """Parsed JSON, read-only: cached because choosing a parser and parsing both read it."""
    text = content.decode("utf-8-sig")
    return load_json(text, "json", "write the member again", unique_names=True)


def decoded_text(sample: Sample, name: str) -> str:
    """The member ``name`` as text, decoded from UTF-8."""
    try:
        return sample.members[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad(sample, "not-utf8", f"{name} is not UTF-8 ({error})") from error


def decoded_base64(sample: Sample, value: object) -> bytes:
    """Decode base64 in its usual variants: in lines, as a data URL, URL-safe, without padding, as a
    bytes literal (``b'…'``).
    """
    if not isinstance(value, str):
        raise bad(sample, "corrupt-image", "image_base64 is not a string")
    wrapped = _BYTES_LITERAL.fullmatch(value.strip())
    text = _SPACE.sub("", wrapped[2] if wrapped else value)
    text = _DATA_URL.sub("", text, count=1) if text[:5].lower() == "data:" else text
    text = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise bad(sample, "corrupt-image", f"image_base64 is not base64 ({error})") from error


def bad(sample: Sample, cause: str, what: str) -> BadSample:
    """A ``BadSample`` whose message names the sample."""
    return BadSample(cause, f"sample {sample.key!r}: {what}")


def listed(names: Iterable[str]) -> str:
    """The first of ``names`` in alphabetical order, for a message."""
    shown = sorted(names)
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "") or "nothing"
