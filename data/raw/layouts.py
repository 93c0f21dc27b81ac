"""One parser per layout of raw sample, each turning a ``Sample`` into a ``Document``.

=============  ==================================================================================
layout         members of one sample
=============  ==================================================================================
pairs          an image (jpg, jpeg, png, webp) or an utterance (wav, flac), and ``txt``, else
               ``caption`` in ``json``, else of an utterance ``text`` there
interleaved    ``json`` with lists ``texts``, ``images`` and ``audio`` of one length, null in all
               but one of them at each place, and a member for each name (OBELICS, Energon);
               ``images`` or ``audio`` may be absent. With ``matched_text_indices``, images stand
               before the text they match instead, and there is no audio
mmc4           ``json`` with ``text_list`` and ``image_info``, images in it as base64
text           ``txt``, else ``text`` in ``json``
=============  ==================================================================================

Parsers raise ``BadSample``: ``missing-member``, ``bad-json``, ``not-utf8``, ``empty-text``,
``corrupt-image`` (base64 that is none), ``unsupported-media`` (video, audio in other containers),
``foreign-layout``.
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
AUDIO_SUFFIXES = ("wav", "flac")
MEDIA_SUFFIXES = {Modality.IMAGE: IMAGE_SUFFIXES, Modality.SPEECH: AUDIO_SUFFIXES}
_BYTES_LITERAL = re.compile(r"b(['\"])(.*)\1", re.DOTALL)


def parse_pair(sample: Sample, image_first: float) -> Document:
    """Image or utterance, and caption; the medium leads for a share ``image_first`` of keys, by
    their hash.
    """
    media = media_members(sample)
    if not media:
        raise _bad(sample, "missing-member", f"no image or audio among {_listed(sample.members)}")
    if len(media) > 1:
        what = f"a pair has one image or utterance, this one {_listed(name for _, name in media)}"
        raise _bad(sample, "foreign-layout", what)
    ((modality, name),) = media
    caption = _decode(sample, "txt").strip() if "txt" in sample.members else ""
    if not caption and "json" in sample.members:
        caption = _caption(sample, ("caption", "text")[: 2 if modality == Modality.SPEECH else 1])
    elif "txt" not in sample.members:
        raise _bad(sample, "missing-member", "neither txt nor json holds a caption")
    if not caption:
        raise _bad(sample, "empty-text", "the caption is empty")
    medium = Segment(modality, sample.members[name])
    text = Segment(Modality.TEXT, caption)
    digest = hashlib.blake2b(sample.key.encode(), digest_size=8).digest()
    leads = int.from_bytes(digest, "big") < image_first * 2**64
    return Document(sample.key, (medium, text) if leads else (text, medium))


def media_members(sample: Sample) -> list[tuple[Modality, str]]:
    """Modality and name of the members that are an image or audio, by their plain suffix."""
    return [
        (modality, suffix)
        for modality, suffixes in MEDIA_SUFFIXES.items()
        for suffix in suffixes
        if suffix in sample.members
    ]


def _caption(sample: Sample, names: tuple[str, ...]) -> str:
    """The first of these json fields that is not empty."""
    fields = _fields(sample)
    for name in names:
        if fields.get(name):
            return _text(sample, f"json field {name!r}", fields[name]).strip()
    return ""


def parse_interleaved(sample: Sample) -> Document:
    """Lists in step, or texts with images matched to them by index."""
    fields = _fields(sample)
    if any(item is not None for item in _optional(fields, "video")):
        raise _bad(sample, "unsupported-media", "video members are not read")
    texts, audio = _list(sample, fields, "texts"), _optional(fields, "audio")
    heard = any(item is not None for item in audio)
    images: list[Any] = [None] * len(texts)
    if "images" in fields or not isinstance(fields.get("audio"), list):
        images = _list(sample, fields, "images")
    if not heard:
        audio = [None] * len(texts)
    in_step = len(texts) == len(images) == len(audio) and all(
        sum(item is not None for item in place) <= 1
        for place in zip(texts, images, audio, strict=True)
    )
    if not in_step and "matched_text_indices" in fields and not heard:
        matches = _list(sample, fields, "matched_text_indices")
        if len(matches) != len(images):
            what = f"{len(images)} images, but {len(matches)} matched_text_indices"
            raise _bad(sample, "foreign-layout", what)
        named = [
            (image, at) for image, at in zip(images, matches, strict=True) if image is not None
        ]
        placed = [(_member(sample, Modality.IMAGE, image), at) for image, at in named]
        return _placed(sample, texts, placed)
    if not in_step:
        raise _bad(
            sample,
            "foreign-layout",
            f"texts ({len(texts)}) and images ({len(images)}) must be of one length, "
            "with null in one of them at each place"
            + (f"; so must audio ({len(audio)}), with null in all but one" if heard else ""),
        )
    segments: list[Segment] = []
    for text, image, utterance in zip(texts, images, audio, strict=True):
        for modality, name in ((Modality.IMAGE, image), (Modality.SPEECH, utterance)):
            if name is not None:
                segments.append(Segment(modality, _member(sample, modality, name)))
        if text not in (None, ""):
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
        raise _bad(sample, "empty-text", "it holds neither text nor media")
    return Document(sample.key, tuple(segments))


def _member(sample: Sample, modality: Modality, name: object) -> bytes:
    """Bytes of the member ``name``, whose case is no matter."""
    image = modality == Modality.IMAGE
    what, field = ("image", "images") if image else ("wav or flac audio", "audio")
    if not isinstance(name, str):
        raise _bad(sample, "foreign-layout", f"{field} holds {name!r}, not a member name or null")
    suffixes = MEDIA_SUFFIXES[modality]
    if not name.lower().endswith(tuple(f".{suffix}" for suffix in suffixes)):
        raise _bad(
            sample, "unsupported-media", f"{name!r} is no {what}; known are {_listed(suffixes)}"
        )
    if name.lower() in sample.members:
        return sample.members[name.lower()]
    raise _bad(
        sample,
        "missing-member",
        f"json names {'image' if image else 'audio'} {name!r}, there is {_listed(sample.members)}",
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
