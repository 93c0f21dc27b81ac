"""One parser per layout of raw sample, each turning a ``Sample`` into a ``Document``.

=============  ==================================================================================
layout         members of one sample
=============  ==================================================================================
pairs          an image (jpg, jpeg, png, webp) and ``txt``, else ``caption`` in ``json``
interleaved    ``json`` with lists ``texts`` and ``images`` of one length, null in one of them at
               each place, and a member for each image name (OBELICS, Energon). With
               ``matched_text_indices``, images stand before the text they match instead
mmc4           ``json`` with ``text_list`` and ``image_info``, images in it as base64
text           ``txt``, else ``text`` in ``json``
=============  ==================================================================================

Parsers raise ``BadSample``: ``missing-member``, ``bad-json``, ``not-utf8``, ``empty-text``,
``corrupt-image`` (base64 that is none), ``unsupported-media`` (audio, video), ``foreign-layout``.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from earlyfuse.data.documents import BadSample, Document, Segment
from earlyfuse.data.raw.archive import Sample
from earlyfuse.models.modality import Modality

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_BYTES_LITERAL = re.compile(r"b(['\"])(.*)\1", re.DOTALL)


def parse_pair(sample: Sample, image_first: float) -> Document:
    """Image and caption; the image leads for a share ``image_first`` of keys, by their hash."""
    names = [name for name in IMAGE_SUFFIXES if name in sample.members]
    if not names:
        raise _bad(sample, "missing-member", f"no image among {_listed(sample.members)}")
    if len(names) > 1:
        raise _bad(sample, "foreign-layout", f"a pair has one image, this one {_listed(names)}")
    caption = _decode(sample, "txt").strip() if "txt" in sample.members else ""
    if not caption and "json" in sample.members:
        stored = _fields(sample).get("caption")
        caption = _text(sample, "json field 'caption'", stored).strip() if stored else ""
    elif "txt" not in sample.members:
        raise _bad(sample, "missing-member", "neither txt nor json holds a caption")
    if not caption:
        raise _bad(sample, "empty-text", "the caption is empty")
    image = Segment(Modality.IMAGE, sample.members[names[0]])
    text = Segment(Modality.TEXT, caption)
    digest = hashlib.blake2b(sample.key.encode(), digest_size=8).digest()
    leads = int.from_bytes(digest, "big") < image_first * 2**64
    return Document(sample.key, (image, text) if leads else (text, image))


def parse_interleaved(sample: Sample) -> Document:
    """Two lists in step, or texts with images matched to them by index."""
    fields = _fields(sample)
    texts, images = _list(sample, fields, "texts"), _list(sample, fields, "images")
    if any(item is not None for name in ("audio", "video") for item in _optional(fields, name)):
        raise _bad(sample, "unsupported-media", "audio and video members are not read")
    in_step = len(texts) == len(images) and all(
        text is None or image is None for text, image in zip(texts, images, strict=True)
    )
    if not in_step and "matched_text_indices" in fields:
        matches = _list(sample, fields, "matched_text_indices")
        if len(matches) != len(images):
            what = f"{len(images)} images, but {len(matches)} matched_text_indices"
            raise _bad(sample, "foreign-layout", what)
        named = [
            (image, at) for image, at in zip(images, matches, strict=True) if image is not None
        ]
        placed = [(_member(sample, image), at) for image, at in named]
        return _placed(sample, texts, placed)
    if not in_step:
        raise _bad(
            sample,
            "foreign-layout",
            f"texts ({len(texts)}) and images ({len(images)}) must be of one length, "
            "with null in one of them at each place",
        )
    segments: list[Segment] = []
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            segments.append(Segment(Modality.IMAGE, _member(sample, image)))
        elif text not in (None, ""):
            segments.append(Segment(Modality.TEXT, _text(sample, "an entry of texts", text)))
    return _document(sample, segments)


def parse_mmc4(sample: Sample) -> Document:
    """Images stand before the text at their ``matched_text_index``; without base64: skipped."""
    fields = _fields(sample)
    texts = _list(sample, fields, "text_list")
    placed: list[tuple[bytes, Any]] = []
    for info in _list(sample, fields, "image_info"):
        if not isinstance(info, dict):
            raise _bad(sample, "foreign-layout", "an entry of image_info is not an object")
        if info.get("image_base64"):
            placed.append((_base64(sample, info["image_base64"]), info.get("matched_text_index")))
    return _placed(sample, texts, placed)


def parse_text(sample: Sample) -> Document:
    """One stretch of text, kept as it is."""
    if "txt" in sample.members:
        text = _decode(sample, "txt")
    else:
        text = _text(sample, "json field 'text'", _fields(sample).get("text"))
    return _document(sample, [Segment(Modality.TEXT, text)] if text.strip() else [])


def json_fields(sample: Sample) -> dict[str, Any]:
    """The fields of the ``json`` member for a first look: empty when it cannot be read."""
    try:
        return _fields(sample)
    except BadSample:
        return {}


def _placed(sample: Sample, texts: list[Any], placed: list[tuple[bytes, Any]]) -> Document:
    """Texts in order, each image before the text whose index it has."""
    before: dict[int, list[bytes]] = {}
    for image, index in placed:
        if type(index) is not int or not 0 <= index < len(texts):
            what = f"an image is matched to text {index!r} of {len(texts)}"
            raise _bad(sample, "foreign-layout", what)
        before.setdefault(index, []).append(image)
    segments: list[Segment] = []
    for index, text in enumerate(texts):
        segments += [Segment(Modality.IMAGE, image) for image in before.get(index, ())]
        if text not in (None, ""):
            segments.append(Segment(Modality.TEXT, _text(sample, "an entry of the texts", text)))
    return _document(sample, segments)


def _document(sample: Sample, segments: list[Segment]) -> Document:
    if not segments:
        raise _bad(sample, "empty-text", "it holds neither text nor image")
    return Document(sample.key, tuple(segments))


def _member(sample: Sample, name: object) -> bytes:
    """Bytes of the image member ``name``; some writers put member names in lower case."""
    if not isinstance(name, str):
        raise _bad(sample, "foreign-layout", f"images holds {name!r}, not a member name or null")
    if not name.lower().endswith(tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)):
        raise _bad(
            sample,
            "unsupported-media",
            f"{name!r} is no image; known are {_listed(IMAGE_SUFFIXES)}",
        )
    for candidate in (name, name.lower()):
        if candidate in sample.members:
            return sample.members[candidate]
    raise _bad(
        sample, "missing-member", f"json names image {name!r}, there is {_listed(sample.members)}"
    )


def _base64(sample: Sample, value: object) -> bytes:
    """Decoded bytes; ``b'…'``, a bytes literal as some converters write, is unwrapped."""
    if not isinstance(value, str):
        raise _bad(sample, "corrupt-image", "image_base64 is not a string")
    wrapped = _BYTES_LITERAL.fullmatch(value)
    try:
        return base64.b64decode(wrapped[2] if wrapped else value, validate=True)
    except ValueError as error:
        raise _bad(sample, "corrupt-image", f"image_base64 is not base64 ({error})") from error


def _fields(sample: Sample) -> dict[str, Any]:
    if "json" not in sample.members:
        raise _bad(sample, "missing-member", f"no json among {_listed(sample.members)}")
    text = _decode(sample, "json")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(sample, "bad-json", f"json cannot be parsed ({error})") from error
    if not isinstance(fields, dict):
        raise _bad(sample, "bad-json", f"json holds a {type(fields).__name__}, not an object")
    return fields


def _list(sample: Sample, fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        what = f"json field {name!r} must be a list; the fields are {_listed(fields)}"
        raise _bad(sample, "foreign-layout", what)
    return value


def _optional(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    return value if isinstance(value, list) else []


def _decode(sample: Sample, name: str) -> str:
    try:
        return sample.members[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(sample, "not-utf8", f"{name} is not UTF-8 ({error})") from error


def _text(sample: Sample, what: str, value: object) -> str:
    if not isinstance(value, str):
        raise _bad(sample, "foreign-layout", f"{what} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise _bad(sample, "not-utf8", f"{what} has no UTF-8 form ({error})") from error
    return value


def _bad(sample: Sample, cause: str, what: str) -> BadSample:
    return BadSample(cause, f"sample {sample.key!r}: {what}")


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "") or "nothing"
