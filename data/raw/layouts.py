"""One parser per layout of raw sample, each turning a ``Sample`` into a ``Document``.

=============  ==================================================================================
layout         members of one sample
=============  ==================================================================================
pairs          an image (jpg, jpeg, png, webp, gif) or an utterance (wav, flac), and ``txt``, else
               ``caption`` in ``json``, else, of an utterance, ``text`` there
interleaved    ``json`` with lists ``texts``, ``images``, ``frames`` and ``audio`` of one length,
               null in all but one of them at each place, and a member for each name (OBELICS,
               Energon); an entry of ``frames`` is a list of names, the frames of one video. All
               lists but ``texts`` may be absent. With ``matched_text_indices``, images stand
               before the text they match instead, and there is nothing else
mmc4           ``json`` with ``text_list`` and ``image_info``, images in it as base64 or as members
               that ``image_name`` names
turns          ``conversations``, ``messages`` or ``texts`` in ``json``, a list of objects
text           ``txt``, else ``text`` in ``json``
=============  ==================================================================================

A member is named by what follows its key, or by its whole file name. Texts and names that a data
frame writes for missing values (``nan``, ``None`` …) count as null. Members that no segment comes
from are listed in ``Document.unused``.

Parsers raise ``BadSample``: ``missing-member``, ``bad-json``, ``not-utf8``, ``empty-text``,
``corrupt-image`` (invalid base64), ``unsupported-media`` (video, other audio containers),
``foreign-layout``; of rows also those of ``media_files.read_file``.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from earlyfuse.data.documents import BadSample, Document, Segment
from earlyfuse.data.json_files import shown
from earlyfuse.data.media import MEDIA, Medium
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.members import (
    bad,
    decoded_base64,
    decoded_text,
    find_member,
    is_missing,
    json_fields,
    listed,
    unused_members,
)
from earlyfuse.data.raw.rows import (
    TEXT_FIELDS,
    media_entry,
    row_file,
    row_media,
    row_segments,
    row_texts,
    turn_segments,
)
from earlyfuse.data.raw.tiff_pages import TIFF, tiff_pages
from earlyfuse.models.vocabulary import Modality

_IMAGE_WITHOUT_BYTES = "image_info without its image"  # a kind of ``Document.unused``


def parse_pair(sample: Sample, image_first: float) -> Document:
    """A media item and its caption; the item leads in a share ``image_first`` of keys, decided by
    the hash of the key.
    """
    media = media_members(sample)
    if not media and sample.root is not None:
        return _row_pair(sample, image_first)
    if not media:
        what = f"no {payloads()} among {listed(sample.members)}; a pair is one member such as .jpg "
        raise bad(sample, "missing-member", f"{what}or .wav and its caption in .txt or .json")
    if len(media) > 1:
        items = " or ".join(medium.item for medium in MEDIA.values())
        what = f"a pair has one {items}, this one {listed(name for _, name in media)}"
        raise bad(sample, "foreign-layout", what)
    ((medium, name),) = media
    caption, origin = _caption(sample, medium.caption_fields)
    item = Segment(medium.modality, sample.members[name], name)
    text = Segment(Modality.TEXT, caption, origin)
    leads = _media_lead(sample, image_first)
    return _document(sample, [item, text] if leads else [text, item], ("txt",))


def _row_pair(sample: Sample, image_first: float) -> Document:
    """The media that a row names and their text, in the order of its placeholders if it has any."""
    fields = json_fields(sample)
    media = row_media(fields)
    captions = media[0][0].caption_fields if media else ()
    name, value = next(row_texts(fields, captions), ("", None))
    if not name:
        wanted = listed({*captions, *TEXT_FIELDS})
        raise bad(sample, "empty-text", f"no text in {wanted}; its fields are {listed(fields)}")
    text = _text(sample, f"field {name!r}", value)
    segments, placed = row_segments(sample, fields, text)
    if not placed and not _media_lead(sample, image_first):
        segments = segments[-1:] + segments[:-1]
    return _document(sample, segments, ("json",))


def _media_lead(sample: Sample, image_first: float) -> bool:
    key = sample.key.encode(errors="surrogateescape")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < image_first * 2**64


def parse_turns(sample: Sample) -> Document:
    """The turns of a conversation, with media at their placeholders, else before all turns."""
    return _document(sample, turn_segments(sample, json_fields(sample)), ("json",))


def media_members(sample: Sample) -> list[tuple[Medium, str]]:
    """(medium, name) of each member whose name is a suffix of a medium."""
    return [
        (medium, suffix)
        for medium in MEDIA.values()
        for suffix in medium.suffixes
        if suffix in sample.members
    ]


def payloads() -> str:
    """``image or audio``: the kinds of media member, for messages."""
    return " or ".join(medium.payload for medium in MEDIA.values())


def _caption(sample: Sample, names: tuple[str, ...]) -> tuple[str, str]:
    """The caption of a pair, and the member that holds it: ``txt``, else ``names`` in ``json``."""
    found = "no caption"
    if "txt" in sample.members:
        caption = decoded_text(sample, "txt").strip()
        if caption and not is_missing(caption):
            return caption, "txt"
        found = f"txt holds {caption!r}, a missing value" if caption else "txt is empty"
    elif "json" not in sample.members:
        what = f"neither txt nor json holds a caption; the members are {listed(sample.members)}"
        raise bad(sample, "missing-member", what)
    if "json" in sample.members:
        fields = json_fields(sample)
        for name in names:
            value = fields.get(name)
            if value and not is_missing(value):
                caption = _text(sample, f"json field {name!r}", value).strip()
                if caption:
                    return caption, "json"
        wanted = " or ".join(map(repr, names))
        found += f"; json has no text in {wanted}, its fields are {listed(fields)}"
    raise bad(sample, "empty-text", found)


def parse_interleaved(sample: Sample) -> Document:
    """Parallel lists of texts and media, or texts with images matched to them by index."""
    fields = json_fields(sample)
    if any(item is not None for item in _optional(fields, "video")):
        raise bad(sample, "unsupported-media", "video members are not read")
    texts = _list(sample, fields, "texts")
    media = media_lists()
    lists = {name: _optional(fields, name) for name in media}
    columns = {name: found for name, found in lists.items() if any(n is not None for n in found)}
    image = MEDIA[Modality.IMAGE.label].list_name
    only_images = columns.keys() <= {image}
    if image in fields or not any(isinstance(fields.get(name), list) for name in media):
        columns[image] = _list(sample, fields, image)
    parallel = all(len(names) == len(texts) for names in columns.values()) and all(
        sum(entry is not None for entry in row) <= 1
        for row in zip(texts, *columns.values(), strict=True)
    )
    if not parallel and "matched_text_indices" in fields and only_images:
        return _matched(sample, fields, texts, columns[image])
    if not parallel:
        found = " and ".join(f"{name} ({len(entries)})" for name, entries in columns.items())
        what = f"texts ({len(texts)}) and {found} must be of one length, with null in all but one"
        raise bad(sample, "foreign-layout", f"{what} of them at each place")
    segments: list[Segment] = []
    pages = tiff_pages(sample, lists.get(image, ()))
    for text, *entries in zip(texts, *columns.values(), strict=True):
        for name, entry in zip(columns, entries, strict=True):
            if entry is not None and name == media[name].video_list:
                segments += _video(sample, media[name], entry)
            elif entry is not None and pages is not None and name == image:
                segments.append(Segment(Modality.IMAGE, next(pages), "tiff"))
            elif entry is not None:
                segments.append(media_entry(sample, media[name], entry))
        segments += _text_entry(sample, text)
    return _document(sample, segments, ("json", *TIFF) if pages is not None else ("json",))


def media_lists() -> dict[str, Medium]:
    """Name of a list in the JSON of interleaved samples → medium of its entries."""
    return {
        name: medium
        for medium in MEDIA.values()
        for name in (medium.list_name, medium.video_list)
        if name
    }


def _matched(
    sample: Sample, fields: dict[str, Any], texts: list[Any], images: list[Any]
) -> Document:
    """Each image before the text that its entry of ``matched_text_indices`` names."""
    matches = _list(sample, fields, "matched_text_indices")
    if len(matches) != len(images):
        what = f"{len(images)} images, but {len(matches)} matched_text_indices"
        raise bad(sample, "foreign-layout", what)
    medium = MEDIA[Modality.IMAGE.label]
    placed = [
        (media_entry(sample, medium, image), at)
        for image, at in zip(images, matches, strict=True)
        if image is not None
    ]
    return _document(sample, _placed(sample, texts, placed), ("json",))


def parse_mmc4(sample: Sample) -> Document:
    """Each image before the text at its ``matched_text_index``; missing images are ``unused``."""
    fields = json_fields(sample)
    texts = _list(sample, fields, "text_list")
    placed: list[tuple[Segment, Any]] = []
    absent: list[tuple[str, str]] = []
    for place, info in enumerate(_list(sample, fields, "image_info")):
        if not isinstance(info, dict):
            raise bad(sample, "foreign-layout", "an entry of image_info is not an object")
        encoded, name = info.get("image_base64"), info.get("image_name")
        member = find_member(sample, name)
        if encoded and not is_missing(encoded):
            image = Segment(Modality.IMAGE, decoded_base64(sample, encoded), f"image_info[{place}]")
        elif member is not None:
            image = Segment(Modality.IMAGE, sample.members[member], member)
        elif sample.root is not None and isinstance(name, str) and not is_missing(name):
            try:
                image = Segment(Modality.IMAGE, row_file(sample, name), name)
            except BadSample as error:
                if error.cause != "missing-file":
                    raise
                absent.append((_IMAGE_WITHOUT_BYTES, f"{sample.key} {shown(name)}"))
                continue
        else:
            where = f"{sample.key}.json image_info[{place}] {shown(name)}"
            absent.append((_IMAGE_WITHOUT_BYTES, where))
            continue
        placed.append((image, info.get("matched_text_index")))
    return _document(sample, _placed(sample, texts, placed), ("json",), absent)


def parse_text(sample: Sample) -> Document:
    """One text segment, unchanged."""
    if "txt" in sample.members:
        text, origin = decoded_text(sample, "txt"), "txt"
    elif "json" in sample.members:
        fields, origin = json_fields(sample), "json"
        name = "text" if sample.root is None else next(iter(row_texts(fields, ())), ("text",))[0]
        if name not in fields:
            what = f"json has no field 'text', its fields are {listed(fields)}"
            raise bad(sample, "foreign-layout", what)
        value = fields[name]
        text = "" if is_missing(value) else _text(sample, "json field 'text'", value)
    else:
        what = f"neither txt nor json among {listed(sample.members)}"
        raise bad(sample, "missing-member", what)
    empty = not text.strip() or is_missing(text)
    return _document(sample, [] if empty else [Segment(Modality.TEXT, text, origin)])


def _placed(sample: Sample, texts: list[Any], placed: list[tuple[Segment, Any]]) -> list[Segment]:
    """Texts in order, each image before the text at its index."""
    before: dict[int, list[Segment]] = {}
    for image, index in placed:
        if type(index) is not int or not 0 <= index < len(texts):
            what = f"an image is matched to text {shown(index)} of {len(texts)}"
            raise bad(sample, "foreign-layout", what)
        before.setdefault(index, []).append(image)
    segments: list[Segment] = []
    for index, text in enumerate(texts):
        segments += [*before.get(index, ()), *_text_entry(sample, text)]
    return segments


def _text_entry(sample: Sample, text: object) -> list[Segment]:
    """The segment of an entry in a list of texts, if it is not empty."""
    if text in (None, ""):
        return []
    return [Segment(Modality.TEXT, _text(sample, "an entry of the texts", text), "json")]


def _document(
    sample: Sample,
    segments: list[Segment],
    read: Iterable[str] = (),
    absent: Iterable[tuple[str, str]] = (),
) -> Document:
    """``read``: members used besides those of the segments; ``absent``: listed, missing images."""
    if not segments:
        raise bad(sample, "empty-text", f"no text and no media in {listed(sample.members)}")
    used = {*read, *(segment.origin for segment in segments)}
    return Document(sample.key, tuple(segments), (*unused_members(sample, used), *absent))


def _video(sample: Sample, medium: Medium, names: object) -> list[Segment]:
    """The members ``names``, in order, as the frames of one video."""
    if not isinstance(names, list) or not names:
        what = f"{medium.video_list} holds {shown(names)}, not a list of the members of one video"
        raise bad(sample, "foreign-layout", f"{what}, or null")
    frames = [media_entry(sample, medium, name) for name in names]
    return [frames[0], *(replace(frame, continues=True) for frame in frames[1:])]


def _list(sample: Sample, fields: dict[str, Any], name: str) -> list[Any]:
    """The list ``name``, with null for missing values."""
    if not isinstance(fields.get(name), list):
        what = f"json field {name!r} must be a list; the fields are {listed(fields)}"
        raise bad(sample, "foreign-layout", what)
    return _optional(fields, name)


def _optional(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    return [None if is_missing(item) else item for item in value] if isinstance(value, list) else []


def _text(sample: Sample, what: str, value: object) -> str:
    if not isinstance(value, str):
        raise bad(sample, "foreign-layout", f"{what} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise bad(sample, "not-utf8", f"{what} has no UTF-8 form ({error})") from error
    return value
