"""Raw shards to documents: tars and the other kinds of file that people have.

``read_documents`` is the whole interface. The parts: ``kinds`` (files to shards and their readers,
which yield samples), ``archive`` (tar members to complete samples), ``layouts`` (samples to
documents), ``members`` (contents of a sample), ``safety`` (what is refused unread).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from earlyfuse.data.documents import BadSample, Document
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.kinds import read_shard, shards_of
from earlyfuse.data.raw.layouts import (
    media_lists,
    media_members,
    parse_interleaved,
    parse_mmc4,
    parse_pair,
    parse_text,
    parse_turns,
    payloads,
)
from earlyfuse.data.raw.members import bad, json_fields
from earlyfuse.data.raw.rows import TEXT_FIELDS, row_media, row_turns
from earlyfuse.data.raw.safety import checked_shard
from earlyfuse.data.raw.shard import LAYOUTS, RawShard, ReadOptions

_RICHEST_FIRST = ("mmc4", "turns", "interleaved", "pairs", "text")
_LOOKAHEAD = 16  # samples of a shard that decide its usual layout

Parser = Callable[[Sample], Document]


def read_documents(
    shard: RawShard | Path | str, options: ReadOptions | None = None
) -> Iterator[Document | BadSample]:
    """Documents of a shard, or of a file of any kind, in order, a ``BadSample`` for each unusable
    one.

    A sample without a layout is a bad sample of the layout of the shard's first samples, and so is
    a text alone where these are pairs: a caption that lost its image.

    A truncated file yields the documents known to be complete, then one ``BadSample("truncated")``.
    Raises at the call ``ValueError`` (a URL or ``pipe:`` command) and ``FileNotFoundError``.
    """
    options = options or ReadOptions()
    if isinstance(shard, RawShard):
        return _documents(shard, options)
    shards = shards_of([checked_shard(shard)], options)
    return chain.from_iterable(_documents(part, options) for part in shards)


def _documents(shard: RawShard, options: ReadOptions) -> Iterator[Document | BadSample]:
    parsers: dict[str, Parser] = {
        "pairs": partial(parse_pair, image_first=options.image_first),
        "interleaved": parse_interleaved,
        "mmc4": parse_mmc4,
        "turns": parse_turns,
        "text": parse_text,
    }
    samples = read_shard(shard, options)
    parse = parsers.get(options.layout)
    if parse is None:
        first = list(islice(samples, _LOOKAHEAD))
        parse = _recognising(first, parsers)
        samples = chain(first, samples)
    for sample in samples:
        if isinstance(sample, BadSample):
            yield sample
        elif sample.problem is not None:
            yield sample.problem
        else:
            try:
                document: Document | BadSample = parse(sample)
            except BadSample as error:
                document = BadSample(error.cause, f"{shard}: {error.message}")
            if sample.absent and isinstance(document, Document):
                document = replace(document, unused=(*document.unused, *sample.absent))
            yield document


def _recognising(first: list[Sample | BadSample], parsers: dict[str, Parser]) -> Parser:
    """A parser that recognises the layout of each sample; ``first``: the shard's first samples."""
    usable = [s for s in first if isinstance(s, Sample) and s.problem is None]
    found = {_layout_of(sample) for sample in usable}
    usual = next((layout for layout in _RICHEST_FIRST if layout in found), None)
    shard_members = _some(chain.from_iterable(sample.members for sample in usable))
    shard_fields = _some(chain.from_iterable(map(_fields_of, usable)))

    def parse(sample: Sample) -> Document:
        layout = _layout_of(sample) or (usual if sample.root is None else None)
        if layout == "text" and usual == "pairs" and sample.root is None:
            what = f"no {payloads()} among {_some(sample.members)}: in a shard of pairs, a text "
            what += "alone is a caption that lost its medium; put texts into shards of their own"
            raise bad(sample, "missing-member", what)
        if layout is not None:
            return parsers[layout](sample)
        if sample.root is not None:
            json_fields(sample)  # raises for what is no object
            what = f"its fields are {_some(_fields_of(sample))}; docs/data.md lists those that"
            raise bad(sample, "foreign-layout", f"{what} are read")
        raise bad(
            sample,
            "foreign-layout",
            f"its members are {_some(sample.members)}, none of the layouts {', '.join(LAYOUTS)}; "
            "a pair is KEY.jpg and KEY.txt, adjacent, and KEY ends at the first dot. The shard "
            f"begins with members {shard_members}, json fields {shard_fields}",
        )

    return parse


def _fields_of(sample: Sample) -> dict[str, Any]:
    """The fields of the ``json`` member, empty if it cannot be read."""
    try:
        return json_fields(sample)
    except BadSample:
        return {}


def _layout_of(sample: Sample) -> str | None:
    members, fields = sample.members, _fields_of(sample)
    lists = {name for name, value in fields.items() if isinstance(value, list)}
    if lists >= {"text_list", "image_info"}:
        return "mmc4"
    if row_turns(fields) is not None:
        return "turns"
    if "texts" in lists and lists & media_lists().keys():
        return "interleaved"
    if sample.root is not None:
        if row_media(fields):
            return "pairs"
        return "text" if any(isinstance(fields.get(n), str) for n in TEXT_FIELDS) else None
    if media_members(sample):
        return "pairs" if "txt" in members or "json" in members else None
    if members.keys() <= {"txt", "json"} and (
        "txt" in members or isinstance(fields.get("text"), str)
    ):
        return "text"
    return None


def _some(names: Iterable[str], limit: int = 12) -> str:
    """The first distinct names in order of appearance."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(distinct[:limit]) + more or "none"
