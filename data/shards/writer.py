"""Tokenised data sets on disk: what ``prepare`` writes and the stream reads.

One folder is one source::

    manifest.json            written last: a folder without it is not a data set
    shard-000000.tar         members 000000.npy, 000001.npy, …: 1-D token arrays of about 1 MiB,
                             documents end to end
    shard-000000.index.npy   int64 (documents, 2 + M): byte offset of the first token in the tar,
                             tokens, then tokens of each of the M modalities in the order of
                             ``Vocabulary.modalities``
    shard-000000.crc.npy     uint32 (documents,): CRC-32 of each document's bytes in the tar, which
                             its reader compares; a shard need not be read whole to be trusted
    shard-000000.json        how the shard came about; it says that the files above are complete

Format 2, of sources with a continuous medium, adds::

    shard-000000.vectors.npy float16 or float32 (N, P): the vectors of all documents end to end, one
                             for each position of a continuous medium

and to the index a last column, the number of the document's first vector; a document's CRC-32
continues over its vectors. Other sources are written in format 1.

The manifest holds the SHA-256 of the rest of it. Older ones without are compared with the records
of their shards; repeating the prepare command brings them up to date without tokenising.

A tar of few large members costs nothing to skip through and remains an ordinary WebDataset tar;
with the index a document is one ``pread``. Nothing here depends on time, host or user: equal
documents give equal bytes.
"""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from earlyfuse.data.atomic import atomic_write, atomic_write_bytes, atomic_write_json, sha256_file
from earlyfuse.data.documents import Tally
from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.media import MEDIA, Vectors
from earlyfuse.data.vocabulary import read_vocabulary
from earlyfuse.models.vocabulary import Modality, Vocabulary

FORMAT, VECTOR_FORMAT = "earlyfuse-tokens/1", "earlyfuse-tokens/2"
MANIFEST = "manifest.json"
MEMBER_BYTES = 1 << 20
SHARD_SUFFIXES = (".tar", ".index.npy", ".crc.npy", ".json")
VECTOR_SUFFIX = ".vectors.npy"
_IF_ANY = {"unused", "examples", "vectors_bytes", "vectors_sha256"}  # of a record: if not empty
_MAPPINGS = {"tokens": int, "drops": int, "unused": int, "examples": str}  # of a record
_MOST_BYTES = 1 << 30  # of a manifest: two million shards
_REMEDY = (
    f"copy it again, or remove {MANIFEST} and run the same prepare command again, which keeps the "
    "shards"
)


def token_dtype(vocabulary_size: int) -> str:
    """``uint16`` while every id fits, else ``uint32``; the arrays are little-endian."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def shard_name(number: int) -> str:
    """``shard-000007``: tar, index and record add their suffix."""
    return f"shard-{number:06d}"


class Tokenised(NamedTuple):
    """A document: integer ids (n,), how many of them belong to each modality, and its vectors."""

    tokens: np.ndarray
    per_modality: list[int]
    vectors: np.ndarray | None = None


class VectorFile:
    """Streams vectors into one ``.npy`` file, whose header gets their number at the end."""

    def __init__(self, file: BinaryIO, vectors: Vectors) -> None:
        self.file, self.width, self.rows = file, vectors.width, 0
        self.dtype = np.dtype(vectors.dtype).newbyteorder("<")
        self._write_header()
        self._header = file.tell()

    def add(self, vectors: np.ndarray) -> bytes:
        """Append (n, P); the bytes written. ``ValueError`` where they are not finite vectors."""
        stored = vectors.astype(self.dtype)
        if stored.ndim != 2 or stored.shape[1] != self.width or not np.isfinite(stored).all():
            raise ValueError(
                f"vectors {vectors.shape} must be (n, {self.width}) and finite in {self.dtype.name}"
            )
        self.rows += len(stored)
        self.file.write(stored.tobytes())
        return stored.tobytes()

    def close(self) -> None:
        """Write the number of vectors; ``file`` stays open."""
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self._header, "numpy pads headers so that arrays may grow"

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self.dtype)
        shape = (self.rows, self.width)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)


class TokenShardWriter:
    """Writes documents end to end into the members of one tar, and remembers where each begins.

    ``file``: binary, open for writing, at its start; ``vectors``: open likewise, for documents with
    continuous media. ``add`` documents, then ``close`` and take ``index`` and ``checksums``.
    """

    def __init__(self, file: BinaryIO, dtype: str, vectors: VectorFile | None = None) -> None:
        self.vectors = vectors
        self.tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.rows: list[list[int]] = []
        self.checksums: list[int] = []  # CRC-32 of each document
        self._waiting: list[np.ndarray] = []
        self._waiting_bytes = 0
        self._unplaced = 0
        self._members = 0

    def add(
        self,
        tokens: np.ndarray,
        tokens_per_modality: list[int],
        vectors: np.ndarray | None = None,
    ) -> None:
        """One document, as ``Tokenised`` describes it.

        Raises ``ValueError`` when an id does not fit the shard's dtype: it would wrap around
        silently.
        """
        if len(tokens) and (tokens.min() < 0 or tokens.max() > np.iinfo(self.dtype).max):
            raise ValueError(
                f"token ids {tokens.min()} … {tokens.max()} do not fit {self.dtype.name}; "
                "choose the dtype with token_dtype(vocabulary size)"
            )
        # the offset inside the waiting member, made absolute when the member is written
        first_vector = [] if self.vectors is None else [self.vectors.rows]
        row = [self._waiting_bytes, len(tokens), *tokens_per_modality, *first_vector]
        self.rows.append(row)
        self._waiting.append(tokens.astype(self.dtype))
        checksum = zlib.crc32(self._waiting[-1].data)
        if vectors is not None:
            assert self.vectors is not None, "a source with vectors has a file for them"
            checksum = zlib.crc32(self.vectors.add(vectors), checksum)
        self.checksums.append(checksum)
        self._waiting_bytes += self._waiting[-1].nbytes
        if self._waiting_bytes >= MEMBER_BYTES:
            self._write_member()

    def close(self) -> None:
        """Write what waits and the end of the tar; ``file`` stays open."""
        if self._waiting:
            self._write_member()
        self.tar.close()
        if self.vectors is not None:
            self.vectors.close()

    def index(self, modalities: int) -> np.ndarray:
        """int64 (documents, 2 + modalities), with vectors a column more; valid after ``close``."""
        columns = 2 + modalities + (self.vectors is not None)
        return np.array(self.rows, dtype=np.int64).reshape(-1, columns)

    def _write_member(self) -> None:
        content = io.BytesIO()
        tokens = np.concatenate(self._waiting)
        np.lib.format.write_array(content, tokens, version=(1, 0), allow_pickle=False)
        member = tarfile.TarInfo(f"{self._members:06d}.npy")
        member.size = content.tell()
        content.seek(0)
        first_token = self.tar.offset + tarfile.BLOCKSIZE + member.size - tokens.nbytes
        self.tar.addfile(member, content)
        for row in self.rows[self._unplaced :]:
            row[0] += first_token
        self._unplaced = len(self.rows)
        self._waiting, self._waiting_bytes = [], 0
        self._members += 1


@dataclass
class Measured:
    """A tokenizer's squared ``error`` over so many ``values``, and the ``longest`` block."""

    error: int = 0
    values: int = 0
    longest: int = 0


def _measured_keys(label: str) -> tuple[str, ...]:
    """Fields of a record for a medium's ``Measured``; those of images are older than the rule."""
    if label == Modality.IMAGE.label:
        return ("squared_error", "pixels")
    return (f"{label}_error", f"{label}_values", f"longest_{label}")


@dataclass
class ShardRecord:
    """What became of one raw shard: the content of ``shard-NNNNNN.json``.

    ``recipe`` is a hash of everything besides the raw shard that decides the tokens (tokenizers,
    layout, format). ``media``: label → how well its tokenizer did on (some of) the shard.
    ``unused`` counts what good samples held and their documents do not use, by kind (``.cls``);
    ``examples`` has the first of each cause in ``drops`` and of each kind in ``unused``.
    """

    name: str
    recipe: str
    raw: str
    raw_bytes: int
    raw_sha256: str
    bytes: int = 0
    sha256: str = ""
    index_sha256: str = ""
    crc_sha256: str = ""
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    media: dict[str, Measured] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    vectors_bytes: int = 0
    vectors_sha256: str = ""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the shard's files, the record's last."""
        vectors = (VECTOR_SUFFIX,) if self.vectors_sha256 else ()
        return (*SHARD_SUFFIXES[:-1], *vectors, SHARD_SUFFIXES[-1])

    def save(self, folder: Path) -> None:
        """Mark the shard complete; its other files are on the disk already."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "media":
                for label in MEDIA:
                    found = self.media.get(label, Measured())
                    if label == Modality.IMAGE.label or found != Measured():
                        values |= zip(_measured_keys(label), asdict(found).values(), strict=False)
            elif value or name not in _IF_ANY:
                values[name] = value
        atomic_write_json(folder / f"{Path(self.name).stem}.json", values)

    @classmethod
    def read(cls, folder: Path, number: int) -> "ShardRecord | None":
        """The record of a shard; none if it is absent, damaged, or written by another version."""
        names = {field.name for field in fields(cls)} - {"media"}
        measured = {key for label in MEDIA for key in _measured_keys(label)}
        required = names - _IF_ANY | set(_measured_keys(Modality.IMAGE.label))
        try:
            values = read_json(folder / f"{shard_name(number)}.json", "make it again")
            if not required <= values.values.keys() <= names | measured:
                return None
            found: dict[str, Any] = {
                name: values.mapping(name, _MAPPINGS[name], least=0)
                if name in _MAPPINGS
                else values.field(name, type(value), least=0 if type(value) is int else -inf)
                for name, value in asdict(cls("", "", "", 0, "")).items()
                if name in values
            }
            media = {
                label: Measured(
                    *(values.field(key, int, default=0, least=0) for key in _measured_keys(label))
                )
                for label in MEDIA
            }
        except ValueError:
            return None
        known = {label: one for label, one in media.items() if one != Measured()}
        record = cls(**found, media=known)
        return record if record.name == f"{shard_name(number)}.tar" else None

    @classmethod
    def load(cls, folder: Path, number: int) -> "ShardRecord | None":
        """The record of a complete shard, or none: as in ``read``, or its files are not as it
        says.
        """
        record = cls.read(folder, number)
        if record is None:
            return None
        stem = folder / shard_name(number)
        try:
            found = [sha256_file(stem.with_suffix(suffix)) for suffix in record.suffixes[:-1]]
        except FileNotFoundError:
            return None
        expected = [record.sha256, record.index_sha256, record.crc_sha256, record.vectors_sha256]
        return record if found == [sha for sha in expected if sha] else None


def write_shard(
    folder: Path,
    record: ShardRecord,
    documents: Iterable[Tokenised | tuple[np.ndarray, list[int]]],
    vocabulary: Vocabulary,
    vectors: Vectors | None = None,
) -> None:
    """Write tar, index, checksums and, last, ``record`` with sizes, hashes and counts filled in.

    ``vectors``: of documents with continuous media. ``record.drops`` and the like may change until
    the last document has been taken.
    """
    tar_path = folder / record.name
    vector_path = tar_path.with_suffix(VECTOR_SUFFIX)
    with ExitStack() as files:
        vector_file = None
        if vectors is not None:
            vector_file = VectorFile(files.enter_context(atomic_write(vector_path)), vectors)
        file = files.enter_context(atomic_write(tar_path))
        writer = TokenShardWriter(file, token_dtype(vocabulary.size), vector_file)
        for document in documents:
            writer.add(*document)
        writer.close()
    index = writer.index(len(vocabulary.modalities))
    record.bytes, record.sha256 = tar_path.stat().st_size, sha256_file(tar_path)
    if vectors is not None:
        record.vectors_bytes = vector_path.stat().st_size
        record.vectors_sha256 = sha256_file(vector_path)
    record.index_sha256 = _write_array(tar_path.with_suffix(".index.npy"), index.astype("<i8"))
    checksums = np.array(writer.checksums, dtype="<u4")
    record.crc_sha256 = _write_array(tar_path.with_suffix(".crc.npy"), checksums)
    record.documents = len(index)
    totals = index[:, 2 : 2 + len(vocabulary.modalities)].sum(0)
    record.tokens = {m.label: int(n) for m, n in zip(vocabulary.modalities, totals, strict=True)}
    record.save(folder)


def _write_array(path: Path, array: np.ndarray) -> str:
    """Put ``array`` at ``path`` as .npy; SHA-256 of the file."""
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
    atomic_write_bytes(path, content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def write_manifest(
    folder: Path,
    vocabulary: Vocabulary,
    tokenizers: dict[str, str],
    records: list[ShardRecord],
    vectors: Vectors | None = None,
) -> dict[str, Any]:
    """Declare ``folder`` a data set. ``tokenizers``: kind → SHA-256. Returns the manifest."""
    stored = vectors and {**vectors._asdict(), "media": list(vectors.media)}
    content = _manifest_of(vocabulary.to_dict(), tokenizers, records, stored)
    manifest = {**content, "sha256": _digest(content)}
    atomic_write_json(folder / MANIFEST, manifest)
    return manifest


def _manifest_of(
    vocabulary: dict[str, Any],
    tokenizers: dict[str, str],
    records: Sequence[ShardRecord],
    vectors: dict[str, Any] | None,
) -> dict[str, Any]:
    """A manifest without its own hash."""
    labels = [Modality.TEXT.label, *(medium["modality"] for medium in vocabulary["media"])]
    shards = [
        {
            "name": record.name,
            "bytes": record.bytes,
            "sha256": record.sha256,
            "index_sha256": record.index_sha256,
            "crc_sha256": record.crc_sha256,
            "documents": record.documents,
            "tokens": record.tokens,
            "raw": record.raw,
            "raw_sha256": record.raw_sha256,
        }
        for record in records
    ]
    if vectors:
        for shard, record in zip(shards, records, strict=True):
            shard |= {name: getattr(record, name) for name in ("vectors_bytes", "vectors_sha256")}
    dropped, unused = dropped_and_unused(records)
    manifest: dict[str, Any] = {
        "format": VECTOR_FORMAT if vectors else FORMAT,
        "vocabulary": vocabulary,
        "tokenizers": tokenizers,
        "dtype": token_dtype(vocabulary["size"]),
        "documents": sum(record.documents for record in records),
        "tokens": {label: sum(r.tokens.get(label, 0) for r in records) for label in labels},
        "shards": shards,
        "drops": dropped.counts,
        "drops_by_shard": {record.raw: record.drops for record in records if record.drops},
    }
    if unused.counts:
        manifest["unused"] = unused.counts
    if examples := dropped.examples | unused.examples:
        manifest["examples"] = examples
    longest = {}
    for label in MEDIA:
        measured = [record.media[label] for record in records if label in record.media]
        if values := sum(one.values for one in measured):
            manifest[f"{label}_squared_error"] = sum(one.error for one in measured) / values
        if most := max((one.longest for one in measured), default=0):
            longest[label] = most
    if longest:
        manifest["longest"] = longest
    if vectors:
        manifest["vectors"] = vectors
    return manifest


def dropped_and_unused(records: Iterable[ShardRecord]) -> tuple[Tally, Tally]:
    """Bad samples by cause, and what good samples held and do not use by kind, of all shards."""
    dropped, unused = Tally(), Tally()
    for record in records:
        for counts, tally in ((record.drops, dropped), (record.unused, unused)):
            for kind, count in counts.items():
                example = record.examples.get(kind, "")
                tally.add(kind, f"{record.raw}: {example}" if example else record.raw, count)
    return dropped, unused


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared source: every field of its type, and as it was written.

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
    elif manifest.field("sha256", str) != _digest(content):
        raise manifest.wrong("sha256", "must be that of all else in the file, which was changed")
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
        vectors.field("width", int, least=1)
        vectors.field("dtype", str, choices=("float16", "float32"))
        if not set(vectors.items("media", str)) <= set(labels[1:]):
            raise vectors.wrong("media", f"must be some of {', '.join(labels[1:])}")
    hashes = ["sha256", "index_sha256", "crc_sha256"] + ["vectors_sha256"] * with_vectors
    documents, tokens = 0, dict.fromkeys(labels, 0)
    for number, shard in enumerate(manifest.objects("shards")):
        shard.field("name", str, choices=(f"{shard_name(number)}.tar",))
        for name in hashes:
            if not re.fullmatch("[0-9a-f]{64}", shard.field(name, str)):
                raise shard.wrong(name, "must be 64 hexadecimal digits")
        for name in ("raw", "raw_sha256"):
            shard.field(name, str)
        shard.field("bytes", int, least=0)
        if with_vectors:
            shard.field("vectors_bytes", int, least=0)
        documents += shard.field("documents", int, least=0)
        counts = shard.mapping("tokens", int, least=0)
        if counts.keys() != tokens.keys():
            raise shard.wrong("tokens", f"must have a number for each of {', '.join(labels)}")
        for label, count in counts.items():
            tokens[label] += count
    if manifest.field("documents", int) != documents:
        raise manifest.wrong("documents", f"must be those of the shards together ({documents})")
    if manifest.mapping("tokens", int) != tokens:
        raise manifest.wrong("tokens", f"must be those of the shards together ({tokens})")
    manifest.mapping("drops", int, least=0)
    for name, kind in (("unused", int), ("examples", str)):
        if name in manifest:
            manifest.mapping(name, kind)
    by_shard = manifest.object("drops_by_shard")
    for raw in by_shard.values:
        by_shard.mapping(raw, int, least=0)
    for label in labels:
        manifest.field(f"{label}_squared_error", float, default=0.0, least=0)
    if "longest" in manifest:
        manifest.mapping("longest", int, least=0)


def _check_records(folder: Path, content: dict[str, Any]) -> None:
    """``ValueError`` unless the manifest follows from the records of its shards."""
    read = [ShardRecord.read(folder, number) for number in range(len(content["shards"]))]
    records = [record for record in read if record is not None]
    if (
        len(records) < len(read)
        or _manifest_of(
            content["vocabulary"], content["tokenizers"], records, content.get("vectors")
        )
        != content
    ):
        raise ValueError(
            f"{folder / MANIFEST} has no sha256 of its own and is not what the records beside it "
            f"({shard_name(0)}.json …) say; {_REMEDY}"
        )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
