"""Documents of rows whose fields name their media: captions, placeholders in text, turns of a
conversation. docs/data.md lists the fields.

A row is a line of JSON or of a table (``Sample.root`` is the folder of its files), or the ``json``
of a tar's sample, whose files are members.
"""

import re
from collections.abc import Iterator
from typing import Any

from earlyfuse.data.documents import BadSample, Segment
from earlyfuse.data.json_files import shown
from earlyfuse.data.media import MEDIA, Medium
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.media_files import is_url, read_file
from earlyfuse.data.raw.members import bad, decoded_base64, find_member, is_missing, listed
from earlyfuse.models.vocabulary import Modality

_TURNS = ("conversations", "messages", "texts")
# value of a turn: LLaVA, chat templates; a question and its answer as FineVision has them
_TURN_TEXTS = (("value",), ("content",), ("user", "assistant"))
_ANY_MEDIUM = ("file_name", "filename", "file", "path", "filepath")
TEXT_FIELDS = ("text", "sentence", "transcription", "transcript", "content")
_ENDS = ("_path", "_filepath", "_file", "_base64")  # image_path …
_LONGEST_NAME = 1024  # characters; what is longer is base64
_UNREAD = "video"


def row_turns(fields: dict[str, Any]) -> list[Any] | None:
    """The turns of a conversation, none if the row holds no list of objects where they would be."""
    for name in _TURNS:
        turns = fields.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return turns
    return None


def row_media(fields: dict[str, Any]) -> list[tuple[Medium, list[Any]]]:
    """(medium, entries) of each medium that a field of the row names, missing values left out."""
    found = []
    for medium in MEDIA.values():
        known = (medium.list_name, *(f"{medium.payload}{end}" for end in ("", *_ENDS)))
        values = [fields[name] for name in known if not _empty(fields.get(name))]
        endings = tuple(f".{suffix}" for suffix in medium.suffixes)
        if not values:
            names = [fields.get(name) for name in _ANY_MEDIUM]
            values = [n for n in names if isinstance(n, str) and n.lower().endswith(endings)]
        if values:
            entries = values[0] if isinstance(values[0], list) else [values[0]]
            found.append((medium, [entry for entry in entries if not _empty(entry)]))
    return found


def _empty(value: object) -> bool:
    return value is None or value in ("", [], {}) or is_missing(value)


def row_segments(sample: Sample, fields: dict[str, Any], text: str) -> tuple[list[Segment], bool]:
    """``text`` with the row's media at its placeholders (``<image>``, ``<audio>``), and whether it
    has any; without, all media come before the text.
    """
    return _placed(sample, row_media(fields), text)


def turn_segments(sample: Sample, fields: dict[str, Any]) -> list[Segment]:
    """The turns of a conversation, a line break between them; roles are not written."""
    media = row_media(fields)
    inline: dict[str, list[Any]] = {}
    texts: list[str] = []
    for turn in row_turns(fields) or ():
        names = next((n for n in _TURN_TEXTS if isinstance(turn, dict) and n[0] in turn), None)
        if names is None:
            known = " or ".join("/".join(names) for names in _TURN_TEXTS)
            raise bad(sample, "foreign-layout", f"a turn is {shown(turn)}, without {known}")
        for name in names:
            texts.append(_turn_text(sample, turn.get(name), inline))
    if not media:
        media = [(MEDIA[label], entries) for label, entries in inline.items()]
    elif inline:
        raise bad(sample, "foreign-layout", "media are named by turns and by fields of the row")
    return _placed(sample, media, "\n".join(text for text in texts if text))[0]


def _turn_text(sample: Sample, content: object, inline: dict[str, list[Any]]) -> str:
    """Text of a turn, with placeholders; entries of its media are added to ``inline``."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise bad(sample, "foreign-layout", f"a turn holds {shown(content)}, no text or parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        medium = next((m for m in MEDIA.values() if kind in (m.payload, f"{m.payload}_url")), None)
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif medium is not None:
            texts.append(f"<{medium.payload}>")
            names = (kind, medium.payload, "path", "url")
            entry = next((part[name] for name in names if not _empty(part.get(name))), None)
            if isinstance(entry, dict) and "url" in entry:
                entry = entry["url"]
            if entry is not None:
                inline.setdefault(medium.label, []).append(entry)
        else:
            what = f"a part of a turn is {shown(part)}, neither text nor a medium that is read"
            raise bad(sample, "foreign-layout", what)
    return "\n".join(texts)


def _placed(
    sample: Sample, media: list[tuple[Medium, list[Any]]], text: str
) -> tuple[list[Segment], bool]:
    check_utf8(sample, text)
    names = {name: m for m in MEDIA.values() for name in (m.payload, m.label)}
    pattern = re.compile(rf"\n?<({'|'.join((*names, _UNREAD))})>\n?")
    pieces = pattern.split(text)  # text, name, text, name, …, text
    marks = [names.get(name) for name in pieces[1::2]]
    given = {medium.label: entries for medium, entries in media}
    wanted = {medium.label for medium in marks if medium}
    if None in marks:
        raise bad(sample, "unsupported-media", f"<{_UNREAD}> in its text: videos are not read here")
    for label in given.keys() | wanted:
        count, held = sum(m is MEDIA[label] for m in marks), len(given.get(label, ()))
        if count != held and (count or marks):
            what = f"{count} placeholders <{MEDIA[label].payload}> in its text, but {held} named"
            raise bad(sample, "foreign-layout", f"{what} {MEDIA[label].payload} files")
    queues = {label: iter(entries) for label, entries in given.items()}
    if not marks:
        items = [media_entry(sample, m, entry) for m, entries in media for entry in entries]
        return [*items, *_text_segments(text)], False
    segments = _text_segments(pieces[0])
    for mark, piece in zip(marks, pieces[2::2], strict=True):
        assert mark is not None, "checked above"
        segments.append(media_entry(sample, mark, next(queues[mark.label])))
        segments += _text_segments(piece)
    return segments, True


def check_utf8(sample: Sample, text: str) -> None:
    """Raise ``BadSample`` for half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad(sample, "not-utf8", f"its text has no UTF-8 form ({error})") from error


def _text_segments(text: str) -> list[Segment]:
    return [Segment(Modality.TEXT, text, "json")] if text.strip() else []


def media_entry(sample: Sample, medium: Medium, entry: object) -> Segment:
    """The target of an entry: a member or file by its name, base64, or ``{"bytes", "path"}``."""
    if isinstance(entry, dict):
        entry = entry.get("bytes") or entry.get("path")
    if not isinstance(entry, str):
        what = f"{medium.list_name} holds {shown(entry)}, not a name or null"
        if isinstance(entry, list) and medium.video_list:
            what += f"; the frames of a video are a list in {medium.video_list!r}"
        raise bad(sample, "foreign-layout", what)
    if sample.root is not None and _is_base64(entry):
        return Segment(medium.modality, decoded_base64(sample, entry), f"{medium.payload} base64")
    known = entry.lower().endswith(tuple(f".{suffix}" for suffix in medium.suffixes))
    if not known and not is_url(entry):
        what = f"{shown(entry)} is no {medium.payload} that is read; known are"
        raise bad(sample, "unsupported-media", f"{what} {listed(medium.suffixes)}")
    member = find_member(sample, entry)
    if member is not None:
        return Segment(medium.modality, sample.members[member], member)
    if sample.root is None:
        what = f"json names {medium.payload} {shown(entry)}, there is {listed(sample.members)}"
        raise bad(sample, "missing-member", what)
    return Segment(medium.modality, row_file(sample, entry), entry)


def row_file(sample: Sample, name: str) -> bytes:
    """A file that a row names."""
    assert sample.root is not None, "of rows"
    try:
        return read_file(sample.root, name)
    except BadSample as error:
        raise bad(sample, error.cause, error.message) from error


def _is_base64(entry: str) -> bool:
    return entry[:5].lower() == "data:" or (len(entry) > _LONGEST_NAME and not is_url(entry))


def row_texts(fields: dict[str, Any], first: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields that may hold the text of a row, those of a medium first."""
    for name in dict.fromkeys((*first, *TEXT_FIELDS)):
        if not _empty(fields.get(name)):
            yield name, fields[name]
