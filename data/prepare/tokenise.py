"""Documents → token ids: ``[bos] segments [eos]``, an image or utterance as begin, codes, end.

The work on one raw shard, the unit that ``prepare`` hands to a process and restarts.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.console import printable
from earlyfuse.data.documents import BadSample, Document, Segment, decoding
from earlyfuse.data.prepare.bad_samples import count_bad, without_path
from earlyfuse.data.raw import read_documents
from earlyfuse.data.shards.writer import FORMAT, ShardRecord, shard_name, write_shard
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.speech_kmeans import SpeechTokenizer
from earlyfuse.models.vocabulary import Modality

# images encoded at a time, and the documents of a shard that may wait for them
_IMAGE_BATCH = 256
_IMAGE_BYTES = 1 << 26
_WAITING_DOCUMENTS = 1024
# images of each shard that are decoded again to measure the tokenizer
_MEASURED_IMAGES = 64


@dataclass(frozen=True)
class ShardJob:
    """One raw shard to tokenise: ``raw`` is its path, ``raw_name`` what manifests call it."""

    raw: Path
    raw_name: str
    number: int
    folder: Path
    tokenizers: Path
    recipe: str
    layout: str
    image_first: float
    speech_seconds: float
    on_bad: str
    expected_size: float  # see ``Source.expected_sizes``


@dataclass(frozen=True)
class _Utterance:
    """Codes of one, (n,) int64; its squared error in levels, of how many values."""

    codes: np.ndarray
    squared_error: int
    values: int


# text ids, pixels that wait to be encoded with others, or an utterance
_Part = list[int] | np.ndarray | _Utterance


def recipe_of(
    tokenizers: Tokenizers, layout: str, image_first: float, speech_seconds: float
) -> str:
    """Hash of everything besides the raw shard that decides its tokens."""
    parts = [
        FORMAT,
        *(f"{kind}={sha}" for kind, sha in sorted(tokenizers.hashes.items())),
        json.dumps(tokenizers.vocabulary.to_dict(), sort_keys=True),
        layout,
        str(image_first),
    ]
    if tokenizers.speech is not None:
        parts.append(str(speech_seconds))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tokenise_shard(job: ShardJob) -> ShardRecord:
    """Read, tokenise and write one shard. Its record, written last, says that it is complete.

    Raises ``ValueError`` naming shard and cause where the policy ``on_bad`` says to end.
    """
    tokenizers = _loaded(job.tokenizers, job.recipe)
    record = ShardRecord(
        name=f"{shard_name(job.number)}.tar",
        recipe=job.recipe,
        raw=job.raw_name,
        raw_bytes=job.raw.stat().st_size,
        raw_sha256=sha256_file(job.raw),
    )
    documents = read_documents(job.raw, job.layout, image_first=job.image_first)
    tokenised = tokenise(_judged(documents, job, record), tokenizers, job, record)
    write_shard(job.folder, record, tokenised, tokenizers.vocabulary)
    return record


def tokenise(
    documents: Iterable[Document], tokenizers: Tokenizers, job: ShardJob, record: ShardRecord
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(int64 ids, tokens per modality) of each good document; ``record`` counts the others."""
    size = tokenizers.image.image_size if tokenizers.image is not None else 1
    image_batch = max(1, min(_IMAGE_BATCH, _IMAGE_BYTES // (3 * size**2)))
    waiting: list[list[_Part]] = []
    images = 0
    for document in documents:
        try:
            parts = _parts(document, tokenizers, job.speech_seconds)
        except BadSample as bad:
            _drop(bad, job, record)
            continue
        for kind, name in document.unused:
            record.unused[kind] = record.unused.get(kind, 0) + 1
            record.examples.setdefault(kind, printable(name))
        waiting.append(parts)
        images += sum(isinstance(part, np.ndarray) for part in parts)
        if images >= image_batch or len(waiting) >= _WAITING_DOCUMENTS:
            yield from _finish(waiting, tokenizers, record)
            waiting, images = [], 0
    yield from _finish(waiting, tokenizers, record)


def _judged(
    documents: Iterable[Document | BadSample], job: ShardJob, record: ShardRecord
) -> Iterator[Document]:
    for document in documents:
        if isinstance(document, BadSample):
            _drop(document, job, record)
        else:
            yield document


def _drop(bad: BadSample, job: ShardJob, record: ShardRecord) -> None:
    count = count_bad(bad, job.on_bad, job.raw, job.raw_name, job.expected_size)
    record.drops[bad.cause] = record.drops.get(bad.cause, 0) + count
    record.examples.setdefault(bad.cause, without_path(bad, job.raw))


def _parts(document: Document, tokenizers: Tokenizers, speech_seconds: float) -> list[_Part]:
    """Segments as text ids, pixels to encode and utterances. ``BadSample`` where one cannot be
    used.
    """
    parts: list[_Part] = []
    for segment in document.segments:
        try:
            parts.append(_part(segment, tokenizers, speech_seconds))
        except BadSample as bad:
            where = f"sample {document.key!r}: {segment.origin or segment.modality.label}"
            raise BadSample(bad.cause, f"{where}: {bad.message}") from bad
    return parts


def _part(segment: Segment, tokenizers: Tokenizers, speech_seconds: float) -> _Part:
    modality, payload = segment.modality, segment.payload
    if isinstance(payload, str):
        with decoding("unencodable-text", "text"):
            try:
                return tokenizers.text.encode(payload)
            except ValueError as error:
                raise BadSample("reserved-token", str(error)) from error
    if modality == Modality.IMAGE and tokenizers.image is not None:
        with decoding("corrupt-image", "image"):
            return tokenizers.image.pixels(payload)
    if modality == Modality.SPEECH and tokenizers.speech is not None:
        with decoding("corrupt-audio", "audio"):
            return _utterance(payload, tokenizers.speech, speech_seconds)
    raise BadSample(f"no-{modality.label}-tokenizer", f"{modality.label} has no tokenizer")


def _utterance(encoded: bytes, tokenizer: SpeechTokenizer, longest: float) -> _Utterance:
    features = tokenizer.features(encoded, longest)
    codes = tokenizer.encode(features)
    return _Utterance(codes, tokenizer.squared_error(features, codes), features.size)


def _finish(
    waiting: list[list[_Part]], tokenizers: Tokenizers, record: ShardRecord
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Encode all waiting images in one call and put the documents together."""
    vocabulary = tokenizers.vocabulary
    codes = _encode_images(
        [part for parts in waiting for part in parts if isinstance(part, np.ndarray)],
        tokenizers,
        record,
    )
    for parts in waiting:
        ids = [vocabulary.bos]
        counts = dict.fromkeys(vocabulary.modalities, 0)
        for part in parts:
            if isinstance(part, list):
                ids += part
                continue
            modality = Modality.SPEECH if isinstance(part, _Utterance) else Modality.IMAGE
            block = part.codes if isinstance(part, _Utterance) else next(codes)
            medium = vocabulary.medium(modality)
            ids += [medium.begin, *(block + medium.start).tolist(), medium.end]
            counts[modality] += len(block)
            if isinstance(part, _Utterance):
                record.speech_error += part.squared_error
                record.speech_values += part.values
                record.longest_speech = max(record.longest_speech, len(block))
        ids.append(vocabulary.eos)
        counts[Modality.TEXT] = len(ids) - sum(counts.values())
        yield np.array(ids, dtype=np.int64), [counts[m] for m in vocabulary.modalities]


def _encode_images(
    pixels: list[np.ndarray], tokenizers: Tokenizers, record: ShardRecord
) -> Iterator[np.ndarray]:
    """Codes of each image; the first images of a shard measure the tokenizer into ``record``."""
    if not pixels or tokenizers.image is None:
        return iter(())
    images = np.stack(pixels)
    codes = tokenizers.image.encode(images)
    if record.pixels == 0 and tokenizers.image.decodes:
        measured = images[:_MEASURED_IMAGES]
        error = tokenizers.image.decode(codes[:_MEASURED_IMAGES]).astype(np.int64) - measured
        record.squared_error, record.pixels = int((error**2).sum()), measured.size
    return iter(codes)


@lru_cache(maxsize=2)
def _loaded(folder: Path, recipe: str) -> Tokenizers:
    """Once a process; ``recipe`` tells new tokenizers at an old place apart."""
    return Tokenizers.load(folder)
