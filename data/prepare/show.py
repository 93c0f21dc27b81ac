"""Shows one document of a prepared source: decoded text with its media marked, and a picture of
originals beside reconstructions.

Tokenised shards have neither keys nor originals; both come from the raw shards, where these are
given.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from earlyfuse.data.atomic import atomic_write
from earlyfuse.data.console import printable
from earlyfuse.data.documents import Document
from earlyfuse.data.media import MEDIA, medium_of
from earlyfuse.data.prepare.frames import FrameRule
from earlyfuse.data.prepare.spec import PrepareSpec, Source
from earlyfuse.data.prepare.tokenise import ShardJob, good_documents
from earlyfuse.data.raw import read_documents
from earlyfuse.data.raw.shard import RawShard, ReadOptions
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.shards.writer import ShardRecord
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.animation import MOST_FRAMES
from earlyfuse.models.vocabulary import Modality

_SHOWN_BAD = 20
_SHOWN_ITEMS = 16
_SIDE, _GAP = 160, 8  # of an image in the picture, in pixels


@dataclass(frozen=True)
class _Item:
    """A media item of a document: its label, and codes or vectors."""

    label: str
    encoded: np.ndarray


@dataclass(frozen=True)
class _Original:
    """A document in its raw shard: its ``key``, and the media items as the tokenizer
    reads them.
    """

    key: str
    features: list[np.ndarray]


def show(
    out: Path,
    source: str = "",
    number: int = 0,
    key: str = "",
    raw: tuple[RawShard, ...] = (),
    reading: ReadOptions | None = None,
    picture: Path | None = None,
) -> Iterator[str]:
    """Yields lines about document ``number`` of ``source`` (``train/pairs`` or ``pairs``; the first
    by default), or about the sample ``key`` of its ``raw`` shards, and writes ``picture``;
    ``reading``: how the shards were read.

    ``ValueError`` naming what there is for a source, document or key that there is not.
    """
    folder = _folder(out, source)
    tokens, tokenizers = TokenSource(folder), Tokenizers.load(out / "tokenizers")
    records = [
        r
        for n in range(len(list(folder.glob("shard-*.tar"))))
        if (r := ShardRecord.read(folder, n))
    ]
    original, originals = None, _Raw(raw, reading or ReadOptions(), tokenizers)
    if key:
        number, original = _find(key, folder, records, originals)
    if not 0 <= number < len(tokens):
        raise ValueError(
            f"--sample ({number}) must lie in [0, {len(tokens)}), as {folder} has so "
            "many documents; change it"
        )
    record, place = _shard_of(number, records)
    if raw and original is None:
        original = _at(place, record, originals)
    ids, counts = tokens.document(number)
    vectors = tokens.document_vectors(number) if tokens.vectors else None
    text, items = _decoded(ids, vectors, tokenizers)
    labels = [modality.label for modality in tokenizers.vocabulary.modalities]
    named = f", sample {original.key!r}" if original else ""
    tokens_of = ", ".join(f"{c} {label} tokens" for label, c in zip(labels, counts, strict=True))
    where = f"{folder.parent.name}/{folder.name}, document {number} of {len(tokens)}{named}"
    yield printable(f"{where}, of {record.raw}: {tokens_of}")
    yield from text.splitlines()
    path = picture or Path(f"{folder.name}-{number}.png")
    yield from _draw(items, original, tokenizers, path)
    yield from _bad_lines(records)


def _folder(out: Path, source: str) -> Path:
    """The source's folder: ``split/name``, or its name in the first split that has it."""
    found = {
        f"{p.parent.parent.name}/{p.parent.name}": p.parent
        for split in ("train", "validation")
        for p in sorted((out / split).glob("*/manifest.json"))
    }
    for label, folder in found.items():
        if source in ("", label, folder.name):
            return folder
    raise ValueError(
        f"--source ({source}) must be a finished source of {out}: "
        f"{', '.join(found) or 'there is none; prepare one with build'}"
    )


def _shard_of(number: int, records: list[ShardRecord]) -> tuple[ShardRecord, int]:
    """The shard of a document, and the document's place in it."""
    for record in records:
        if number < record.documents:
            return record, number
        number -= record.documents
    raise ValueError(
        "the records of the shards (shard-*.json) are not those of the manifest; "
        "repeat the prepare command"
    )


# ---------------------------------------------------------------- raw shards


class _Raw(NamedTuple):
    """Raw shards, and how they are read and tokenised."""

    shards: tuple[RawShard, ...]
    reading: ReadOptions
    tokenizers: Tokenizers


def _raw_of(record: ShardRecord, shards: tuple[RawShard, ...]) -> RawShard:
    names = Source("", "", shards).raw_names
    found = [one for one, name in zip(shards, names, strict=True) if name == record.raw]
    found = found or [one for one in shards if one.name == Path(record.raw).name]
    for one in found:
        if one.sha256() == record.raw_sha256:
            return one
    problem = "have no such file" if not found else "have another one of that name"
    raise ValueError(
        f"--raw must name the shards that the source was prepared from: the document comes from "
        f"{printable(record.raw)}, and the given ones {problem}"
    )


def _documents(record: ShardRecord, raw: _Raw) -> Iterator[tuple[Document, list[np.ndarray]]]:
    """Documents of a raw shard as they were tokenised, with the features of their media."""
    shard, tokenizers = _raw_of(record, raw.shards), raw.tokenizers
    folder = shard.path.parent
    spec = PrepareSpec(folder, {"shown": shard.path})
    frames = tokenizers.vocabulary.media and any(m.separator for m in tokenizers.vocabulary.media)
    job = ShardJob(
        raw=shard,
        raw_name=record.raw,
        number=0,
        folder=folder,
        tokenizers=folder,
        recipe="",
        reading=raw.reading,
        limits={label: MEDIA[label].module().limits(spec) for label in tokenizers.media},
        frames=FrameRule(MOST_FRAMES if frames else 0, 1, "even"),
        on_bad="skip-shards",
        expected_size=1.0,
    )
    unused = ShardRecord(record.name, "", record.raw, 0, "")
    for document, parts in good_documents(
        read_documents(shard, raw.reading), tokenizers, job, unused
    ):
        yield document, [part.features for part in parts if not isinstance(part, list)]


def _at(place: int, record: ShardRecord, raw: _Raw) -> _Original:
    """The document at ``place`` among the good ones of its raw shard."""
    for document, features in islice(_documents(record, raw), place, None):
        return _Original(document.key, features)
    raise ValueError(
        f"{printable(record.raw)} has fewer good samples than when it was prepared; give the "
        "options of reading that build had"
    )


def _find(key: str, folder: Path, records: list[ShardRecord], raw: _Raw) -> tuple[int, _Original]:
    """The number of the document of the sample ``key``, and its original."""
    if not raw.shards:
        raise ValueError(
            f"--key ({key}) needs --raw with the raw shards of {folder}, as tokenised "
            "shards hold no keys; or give --sample N"
        )
    first = 0
    for record in records:
        for place, (document, features) in enumerate(_documents(record, raw)):
            if document.key == key:
                return first + place, _Original(document.key, features)
        for message, cause in record.bad.items():
            if repr(key) in message:
                raise ValueError(f"--key ({key}) is a bad sample, {cause}: {message}")
        first += record.documents
    raise ValueError(f"--key ({key}) must be a sample of the raw shards of {folder}; correct it")


# ---------------------------------------------------------------- decoding


def _decoded(
    ids: np.ndarray, vectors: np.ndarray | None, tokenizers: Tokenizers
) -> tuple[str, list[_Item]]:
    """Text with media as ``[image 0: 16 codes]``, and the media items."""
    vocabulary = tokenizers.vocabulary
    tokens = [token for token in ids.tolist() if token not in (vocabulary.bos, vocabulary.eos)]
    modality_T = vocabulary.modality_of(torch.tensor(tokens, dtype=torch.int64)).tolist()
    separators = {medium.separator for medium in vocabulary.media}
    text, items, used = "", list[_Item](), 0
    for modality, run in groupby(zip(modality_T, tokens, strict=True), key=lambda pair: pair[0]):
        own = [token for _, token in run]
        if modality == Modality.TEXT:
            text += tokenizers.text.decode([token for token in own if token not in separators])
            continue
        codes = vocabulary.medium(Modality(modality))
        encoded, what = np.array(own) - codes.start, "codes"
        if codes.continuous and vectors is not None:
            encoded, what = vectors[used : used + len(own)].astype(np.float32), "vectors"
            used += len(own)
        label = medium_of(modality).label
        text += f"[{label} {len(items)}: {len(own)} {what}]"
        items.append(_Item(label, encoded))
    return printable(text, keep="\n\t"), items


def _draw(
    items: list[_Item], original: _Original | None, tokenizers: Tokenizers, path: Path
) -> Iterator[str]:
    """Writes images, originals at the left, into one picture, other media into files beside it."""
    features: list[np.ndarray | None] = [None] * len(items)
    if original and len(original.features) == len(items):
        features = list(original.features)
    elif original:
        yield (
            f"originals are left out: the sample has {len(original.features)} media items, "
            f"the document {len(items)}"
        )
    rows = []
    for place, (item, given) in enumerate(zip(items[:_SHOWN_ITEMS], features, strict=False)):
        tokenizer, medium = tokenizers.media[item.label], MEDIA[item.label]
        made = tokenizer.to_file(item.encoded) if tokenizer.decodes else None
        if item.label == Modality.IMAGE.label:
            pictures = [] if given is None else [Image.fromarray(given)]
            pictures += [] if made is None else [Image.open(io.BytesIO(made))]
            rows += [pictures] if pictures else []
        elif made is not None:
            beside = path.with_name(f"{path.stem}-{place}.{medium.written}")
            with atomic_write(beside) as file:
                file.write(made)
            yield f"{item.label} {place}, from its codes: {beside}"
        if made is None:
            yield f"{item.label} {place} has no reconstruction: its tokenizer has no decoder"
    if rows:
        with atomic_write(path) as file:
            _grid(rows).save(file, "PNG")
        what = (
            "originals, at the left, beside reconstructions"
            if features[0] is not None
            else "reconstructions alone; --raw SHARDS puts the originals beside them"
        )
        yield f"images: {path}: {what}"


def _grid(rows: list[list[Image.Image]]) -> Image.Image:
    columns = max(map(len, rows))
    size = ((_SIDE + _GAP) * columns + _GAP, (_SIDE + _GAP) * len(rows) + _GAP)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            shown = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            sheet.paste(shown, (_GAP + x * (_SIDE + _GAP), _GAP + y * (_SIDE + _GAP)))
    return sheet


def _bad_lines(records: list[ShardRecord]) -> Iterator[str]:
    """The bad samples of a source, each with its key and cause."""
    dropped = sum(sum(record.drops.values()) for record in records)
    if not dropped:
        yield "bad samples: none"
        return
    yield f"bad samples: {dropped}"
    listed = [(r.raw, message, cause) for r in records for message, cause in r.bad.items()]
    for name, message, cause in listed[:_SHOWN_BAD]:
        yield printable(f"  {cause}  {name}: {message}")
    if dropped > len(listed[:_SHOWN_BAD]):
        yield f"  and {dropped - len(listed[:_SHOWN_BAD])} more; inspect counts all by cause"
