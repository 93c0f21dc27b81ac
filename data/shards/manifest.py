"""The manifest of a prepared source: its vocabulary, tokenizers and shards, and what was dropped.

It ends with the SHA-256 of all its other fields. Older manifests without one are compared with the
records of their shards; repeating the prepare command adds it without tokenising.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.documents import Tally
from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.media import MEDIA, Vectors
from earlyfuse.data.shards.writer import (
    FORMAT,
    VECTOR_FORMAT,
    ShardRecord,
    shard_name,
    token_dtype,
)
from earlyfuse.data.vocabulary import read_vocabulary
from earlyfuse.models.vocabulary import Modality, Vocabulary

MANIFEST = "manifest.json"
_COUNTS, _HASHES = ("bytes", "documents"), ("sha256", "index_sha256", "crc_sha256")
_RAW = ("raw", "raw_sha256")
_OF_SHARD = ("name", "tokens", *_COUNTS, *_HASHES, *_RAW)
_OF_VECTORS = ("vectors_bytes", "vectors_sha256")
_MOST_BYTES = 1 << 30  # of a manifest: two million shards
_REMEDY = (
    f"copy it again, or remove {MANIFEST} and run the same prepare command again, which keeps the "
    "shards"
)


def write_manifest(
    folder: Path,
    vocabulary: Vocabulary,
    tokenizers: dict[str, str],
    records: list[ShardRecord],
    vectors: Vectors | None = None,
) -> dict[str, Any]:
    """Declare ``folder`` a data set. ``tokenizers``: kind → SHA-256. Returns the manifest."""
    content = _manifest_of(vocabulary.to_dict(), tokenizers, records, vectors)
    manifest = {**content, "sha256": manifest_hash(content)}
    atomic_write_json(folder / MANIFEST, manifest)
    return manifest


def _manifest_of(
    vocabulary: dict[str, Any],
    tokenizers: dict[str, str],
    records: Sequence[ShardRecord],
    vectors: Vectors | None,
) -> dict[str, Any]:
    """A manifest without its own hash."""
    labels = [Modality.TEXT.label, *(medium["modality"] for medium in vocabulary["media"])]
    of_shard = (*_OF_SHARD, *_OF_VECTORS) if vectors else _OF_SHARD
    dropped, unused = _dropped_and_unused(records)
    manifest: dict[str, Any] = {
        "format": VECTOR_FORMAT if vectors else FORMAT,
        "vocabulary": vocabulary,
        "tokenizers": tokenizers,
        "dtype": token_dtype(vocabulary["size"]),
        "documents": sum(record.documents for record in records),
        "tokens": {label: sum(r.tokens.get(label, 0) for r in records) for label in labels},
        "shards": [{name: getattr(record, name) for name in of_shard} for record in records],
        "drops": dropped.counts,
        "drops_by_shard": {record.raw: record.drops for record in records if record.drops},
    }
    longest = {}
    for label in MEDIA:
        measured = [record.media[label] for record in records if label in record.media]
        if values := sum(one.values for one in measured):
            manifest[f"{label}_squared_error"] = sum(one.error for one in measured) / values
        if most := max((one.longest for one in measured), default=0):
            longest[label] = most
    optional = {
        "unused": unused.counts,
        "examples": dropped.examples | unused.examples,
        "longest": longest,
        "vectors": vectors and _counted(vectors, records),
    }
    return manifest | {name: value for name, value in optional.items() if value}


def _counted(vectors: Vectors, records: Sequence[ShardRecord]) -> dict[str, Any]:
    """Type and media of the vectors, mean and standard deviation of each channel."""
    positions = sum(r.tokens.get(label, 0) for r in records for label in vectors.media)
    count = max(1, positions * vectors.width // vectors.channels)
    sums = zip(*(r.channel_sums for r in records), strict=True)
    squares = zip(*(r.channel_squares for r in records), strict=True)
    # fsum rounds once, so that the order of shards decides nothing
    mean = [math.fsum(one) / count for one in sums]
    square = [math.fsum(one) / count for one in squares]
    std = [math.sqrt(max(0.0, s - m * m)) for s, m in zip(square, mean, strict=True)]
    return {**vectors._asdict(), "media": list(vectors.media), "mean": mean, "std": std}


def vectors_of(manifest: dict[str, Any]) -> Vectors | None:
    """Type, media and statistics of the vectors in a manifest of format 2; else None."""
    fields = manifest.get("vectors")
    lists = ("media", "mean", "std")
    return fields and Vectors(**{**fields, **{name: tuple(fields[name]) for name in lists}})


def _dropped_and_unused(records: Iterable[ShardRecord]) -> tuple[Tally, Tally]:
    """Bad samples by cause, and unused parts of good samples by kind, over all shards."""
    dropped, unused = Tally(), Tally()
    for record in records:
        for counts, tally in ((record.drops, dropped), (record.unused, unused)):
            for kind, count in counts.items():
                example = record.examples.get(kind, "")
                tally.add(kind, f"{record.raw}: {example}" if example else record.raw, count)
    return dropped, unused


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared source, every field checked.

    Raises ``FileNotFoundError`` when ``folder`` is not a complete data set, ``ValueError`` naming
    file and field on another format or a damaged file.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: prepare did not finish there; "
            "run the same prepare command again"
        )
    manifest = read_json(path, _REMEDY, _MOST_BYTES)
    manifest.field("format", str, choices=(FORMAT, VECTOR_FORMAT))
    _check_fields(manifest)
    content = {name: value for name, value in manifest.values.items() if name != "sha256"}
    if "sha256" not in manifest:
        _check_records(folder, content)
    elif manifest.field("sha256", str) != manifest_hash(content):
        raise manifest.wrong("sha256", "must be that of all other fields, which were changed")
    return manifest.values


def _check_fields(manifest: JsonObject) -> None:
    """``ValueError`` for a field of another type, and for numbers that contradict one another."""
    vocabulary = read_vocabulary(manifest.object("vocabulary"))
    if not all(map(str.isprintable, manifest.mapping("tokenizers", str).values())):
        raise manifest.wrong("tokenizers", "must be hashes by kind")
    manifest.field("dtype", str, choices=(token_dtype(vocabulary.size),))
    labels = [modality.label for modality in vocabulary.modalities]
    with_vectors = manifest.values["format"] == VECTOR_FORMAT
    if with_vectors:
        vectors = manifest.object("vectors")
        vectors.check_names(Vectors._fields)
        width = vectors.field("width", int, least=1)
        vectors.field("dtype", str, choices=("float16", "float32"))
        channels = vectors.field("channels", int, least=1, most=width)
        if width % channels:
            raise vectors.wrong("channels", f"must divide width ({width})")
        for name in ("mean", "std"):
            if len(vectors.items(name, float)) != channels:
                raise vectors.wrong(name, f"must have {channels} numbers, one for each channel")
        if not set(vectors.items("media", str)) <= set(labels[1:]):
            raise vectors.wrong("media", f"must be some of {', '.join(labels[1:])}")
    documents, tokens = 0, dict.fromkeys(labels, 0)
    for number, shard in enumerate(manifest.objects("shards")):
        _check_shard(shard, number, labels, with_vectors)
        documents += shard.values["documents"]
        for label, count in shard.values["tokens"].items():
            tokens[label] += count
    if manifest.field("documents", int) != documents:
        raise manifest.wrong("documents", f"must be the sum over the shards ({documents})")
    if manifest.mapping("tokens", int) != tokens:
        raise manifest.wrong("tokens", f"must be the sum over the shards ({tokens})")
    manifest.mapping("drops", int, least=0)
    for name, kind in (("unused", int), ("examples", str), ("longest", int)):
        if name in manifest:
            manifest.mapping(name, kind, least=0)
    by_shard = manifest.object("drops_by_shard")
    for raw in by_shard.values:
        by_shard.mapping(raw, int, least=0)
    for label in labels:
        manifest.field(f"{label}_squared_error", float, default=0.0, least=0)


def _check_shard(shard: JsonObject, number: int, labels: list[str], with_vectors: bool) -> None:
    shard.field("name", str, choices=(f"{shard_name(number)}.tar",))
    counts = (*_COUNTS, "vectors_bytes") if with_vectors else _COUNTS
    hashes = (*_HASHES, "vectors_sha256") if with_vectors else _HASHES
    for name in counts:
        shard.field(name, int, least=0)
    for name in hashes:
        if not re.fullmatch("[0-9a-f]{64}", shard.field(name, str)):
            raise shard.wrong(name, "must be 64 hexadecimal digits")
    for name in _RAW:
        shard.field(name, str)
    if shard.mapping("tokens", int, least=0).keys() != set(labels):
        raise shard.wrong("tokens", f"must have a number for each of {', '.join(labels)}")


def _check_records(folder: Path, content: dict[str, Any]) -> None:
    """``ValueError`` unless the manifest follows from the records of its shards."""
    found = [ShardRecord.read(folder, number) for number in range(len(content["shards"]))]
    records = [record for record in found if record is not None]
    about = (content["vocabulary"], content["tokenizers"], records, vectors_of(content))
    if len(records) < len(found) or _manifest_of(*about) != content:
        raise ValueError(
            f"{folder / MANIFEST} has no sha256 of its own and differs from the records beside it "
            f"({shard_name(0)}.json …); {_REMEDY}"
        )


def manifest_hash(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's fields, without the field ``sha256``."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
