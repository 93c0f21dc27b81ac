"""Documents → token ids: ``[bos] segments [eos]``, a media item as begin, codes, end, a video as
one such block with a separator between its frames.

``tokenise_shard`` is the unit of work that ``prepare`` gives to a process, and repeats after an
interruption.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from earlyfuse.data.console import printable
from earlyfuse.data.documents import BadSample, Document, Segment, decoding
from earlyfuse.data.media import Medium, medium_of
from earlyfuse.data.prepare.bad_samples import count_bad, without_path
from earlyfuse.data.prepare.frames import FrameRule, chosen_frames
from earlyfuse.data.raw import read_documents
from earlyfuse.data.raw.shard import RawShard, ReadOptions
from earlyfuse.data.shards.writer import (
    FORMAT,
    Measured,
    ShardRecord,
    Tokenised,
    shard_name,
    write_shard,
)
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.models.vocabulary import Modality

_BATCH_DOCUMENTS = 1024  # whose media are encoded together
_BAD_LISTED = 100  # bad samples of a shard that its record names


@dataclass(frozen=True)
class ShardJob:
    """One raw shard to tokenise: ``raw_name`` is its name in manifests."""

    raw: RawShard
    raw_name: str
    number: int
    folder: Path
    tokenizers: Path
    recipe: str
    reading: ReadOptions
    limits: dict[str, dict[str, Any]]  # label → arguments of its tokenizer's ``features``
    frames: FrameRule
    on_bad: str
    expected_size: float  # see ``Source.expected_sizes``


@dataclass
class _Item:
    """A media item: its features, then its codes or vectors too. ``continues``: see ``Segment``."""

    medium: Medium
    features: np.ndarray
    continues: bool
    encoded: np.ndarray | None = None


_Part = list[int] | _Item  # text ids, or an item to be encoded with others


def recipe_of(
    tokenizers: Tokenizers,
    reading: ReadOptions,
    limits: dict[str, dict[str, Any]],
    frames: FrameRule,
) -> str:
    """Hash of everything that decides the tokens besides the raw shard."""
    parts = [
        FORMAT,
        *(f"{kind}={sha}" for kind, sha in sorted(tokenizers.hashes.items())),
        json.dumps(tokenizers.vocabulary.to_dict(), sort_keys=True),
        *reading.recipe(),
        *(str(value) for label in tokenizers.media for value in limits[label].values()),
        *([str(frames)] if frames.most else []),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tokenise_shard(job: ShardJob) -> ShardRecord:
    """Read, tokenise and write one shard; its record, written last, marks it complete.

    Raises ``ValueError`` naming shard and cause where the policy ``on_bad`` is to stop.
    """
    tokenizers = _loaded(job.tokenizers, job.recipe)
    record = ShardRecord(
        name=f"{shard_name(job.number)}.tar",
        recipe=job.recipe,
        raw=job.raw_name,
        raw_bytes=job.raw.size,
        raw_sha256=job.raw.sha256(),
    )
    documents = read_documents(job.raw, job.reading)
    tokenised = tokenise(documents, tokenizers, job, record)
    write_shard(job.folder, record, tokenised, tokenizers.vocabulary, tokenizers.vectors)
    return record


def tokenise(
    documents: Iterable[Document | BadSample],
    tokenizers: Tokenizers,
    job: ShardJob,
    record: ShardRecord,
) -> Iterator[Tokenised]:
    """Yield each good document; ``record`` counts the others."""
    batch: list[list[_Part]] = []
    items: dict[str, int] = defaultdict(int)
    for document, parts in good_documents(documents, tokenizers, job, record):
        for kind, name in document.unused:
            record.unused[kind] = record.unused.get(kind, 0) + 1
            record.examples.setdefault(kind, printable(name))
        batch.append(parts)
        for part in parts:
            if isinstance(part, _Item):
                items[part.medium.label] += 1
        full = any(items[label] >= tokenizers.media[label].batch for label in items)
        if full or len(batch) >= _BATCH_DOCUMENTS:
            yield from _encode_batch(batch, tokenizers, record)
            batch = []
            items.clear()
    yield from _encode_batch(batch, tokenizers, record)


def good_documents(
    documents: Iterable[Document | BadSample],
    tokenizers: Tokenizers,
    job: ShardJob,
    record: ShardRecord,
) -> Iterator[tuple[Document, list[_Part]]]:
    """Yield each good document with its text ids and its items, not encoded yet; ``record`` counts
    the others.
    """
    for document in documents:
        try:
            if isinstance(document, BadSample):
                raise document
            yield document, _parts(document, tokenizers, job)
        except BadSample as bad:
            _drop(bad, job, record)


def _drop(bad: BadSample, job: ShardJob, record: ShardRecord) -> None:
    count = count_bad(bad, job.on_bad, job.raw, job.raw_name, job.expected_size)
    record.drops[bad.cause] = record.drops.get(bad.cause, 0) + count
    message = without_path(bad, job.raw)
    record.examples.setdefault(bad.cause, message)
    if len(record.bad) < _BAD_LISTED:
        record.bad[message] = bad.cause


def _parts(document: Document, tokenizers: Tokenizers, job: ShardJob) -> list[_Part]:
    """Segments as text ids and items to encode. ``BadSample`` where one cannot be used."""
    parts: list[_Part] = []
    try:
        segments = chosen_frames(document, job.frames)
    except BadSample as bad:
        raise BadSample(bad.cause, f"sample {document.key!r}: {bad.message}") from bad
    for segment in segments:
        try:
            parts.append(_part(segment, tokenizers, job.limits))
        except BadSample as bad:
            where = f"sample {document.key!r}: {segment.origin or segment.modality.label}"
            raise BadSample(bad.cause, f"{where}: {bad.message}") from bad
    return parts


def _part(segment: Segment, tokenizers: Tokenizers, limits: dict[str, dict[str, Any]]) -> _Part:
    if isinstance(segment.payload, str):
        with decoding("unencodable-text", "text"):
            try:
                return tokenizers.text.encode(segment.payload)
            except ValueError as error:
                raise BadSample("reserved-token", str(error)) from error
    medium = medium_of(segment.modality)
    label, tokenizer = medium.label, tokenizers.media.get(medium.label)
    if tokenizer is None:
        raise BadSample(f"no-{label}-tokenizer", f"{label} has no tokenizer")
    with decoding(f"corrupt-{medium.payload}", medium.payload):
        features = tokenizer.features(segment.payload, **limits[label])
        return _Item(medium, features, segment.continues)


def _encode_batch(
    batch: list[list[_Part]], tokenizers: Tokenizers, record: ShardRecord
) -> Iterator[Tokenised]:
    """Encode all items of a batch, each medium in one call, and assemble the documents."""
    vocabulary = tokenizers.vocabulary
    items = [part for parts in batch for part in parts if isinstance(part, _Item)]
    for label in tokenizers.media:
        _encode([item for item in items if item.medium.label == label], tokenizers, record)
    for parts in batch:
        ids = [vocabulary.bos]
        counts = dict.fromkeys(vocabulary.modalities, 0)
        vectors: list[np.ndarray] = []
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            if isinstance(part, list):
                ids += part
                continue
            assert part.encoded is not None, "all items are encoded above"
            medium = vocabulary.medium(part.medium.modality)
            codes = part.encoded
            if codes.ndim == 2:  # vectors, at repetitions of the placeholder
                vectors.append(codes)
                codes = np.zeros(len(codes), np.int64)
            before = medium.separator if part.continues else medium.begin
            assert before is not None, "videos are refused without a separator"
            ids += [before, *(codes + medium.start).tolist()]
            if not (isinstance(following, _Item) and following.continues):
                ids.append(medium.end)
            counts[medium.modality] += len(codes)
        ids.append(vocabulary.eos)
        counts[Modality.TEXT] = len(ids) - sum(counts.values())
        yield Tokenised(
            np.array(ids, dtype=np.int64),
            [counts[m] for m in vocabulary.modalities],
            np.concatenate(vectors) if vectors else None,
        )


def _encode(items: list[_Item], tokenizers: Tokenizers, record: ShardRecord) -> None:
    """Encode items of one medium in place; ``record`` gets the tokenizer's error."""
    if not items:
        return
    label = items[0].medium.label
    tokenizer, features = tokenizers.media[label], [item.features for item in items]
    encoded = tokenizer.encode_items(features)
    for item, codes in zip(items, encoded, strict=True):
        item.encoded = codes
    found = record.media.setdefault(label, Measured())
    error, values = tokenizer.error(features, encoded, found.values)
    found.error, found.values = found.error + error, found.values + values
    if not tokenizer.block:
        found.longest = max(found.longest, *map(len, encoded))


@lru_cache(maxsize=2)
def _loaded(folder: Path, recipe: str) -> Tokenizers:
    """Cached per process; ``recipe`` distinguishes new tokenizers in the same folder."""
    return Tokenizers.load(folder)
