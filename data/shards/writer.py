"""Writes tokenised shards. One folder is one source::

    manifest.json            written last (``manifest.py``): a folder without it is not a data set
    shard-000000.tar         members 000000.npy, 000001.npy, …: 1-D token arrays of about 1 MiB,
                             documents end to end
    shard-000000.index.npy   int64 (documents, 2 + M): byte offset of the first token in the tar,
                             number of tokens, then tokens of each of the M modalities in the order
                             of ``Vocabulary.modalities``
    shard-000000.crc.npy     uint32 (documents,): CRC-32 of each document's bytes in the tar
    shard-000000.json        ``ShardRecord``; written after the files above, which are then complete

Format 2, of sources with a continuous medium, adds::

    shard-000000.vectors.npy float16 or float32 (N, P): the vectors of all documents end to end, one
                             for each position of a continuous medium

and to the index a last column, the number of the document's first vector; a document's CRC-32
continues over its vectors. The record has sums by channel, for the manifest's statistics, and its
own SHA-256. Other sources are written in format 1.

A tar of few large members is quick to skip through and remains an ordinary WebDataset tar. Nothing
here depends on time, host or user: equal documents give equal bytes.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args, get_origin

import numpy as np

from earlyfuse.data.atomic import atomic_write, atomic_write_bytes, atomic_write_json, sha256_file
from earlyfuse.data.json_files import read_json
from earlyfuse.data.media import MEDIA, Vectors
from earlyfuse.models.vocabulary import Modality, Vocabulary

FORMAT, VECTOR_FORMAT = "earlyfuse-tokens/1", "earlyfuse-tokens/2"
MEMBER_BYTES = 1 << 20
SHARD_SUFFIXES = (".tar", ".index.npy", ".crc.npy", ".json")
VECTOR_SUFFIX = ".vectors.npy"
_ARRAY_HEADER = 128  # bytes before the data of a 1-D .npy file, which numpy pads
_OF_VECTORS = {"vectors_bytes", "vectors_sha256", "channel_sums", "channel_squares"}
_IF_ANY = {"unused", "examples", "bad", *_OF_VECTORS}  # omitted when empty
_OWN_HASH = "record_sha256"  # of format 2


def token_dtype(vocabulary_size: int) -> str:
    """``uint16`` while every id fits, else ``uint32``; the arrays are little-endian."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def shard_name(number: int) -> str:
    """``shard-000007``: tar, index and record add their suffix."""
    return f"shard-{number:06d}"


class Tokenised(NamedTuple):
    """A document: integer ids (n,), number of ids of each modality, vectors (m, P) if any."""

    tokens: np.ndarray
    per_modality: list[int]
    vectors: np.ndarray | None = None


class _TokenTar:
    """Packs documents end to end into the members of a tar. ``file``: at its start."""

    def __init__(self, file: BinaryIO, dtype: str) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        self._waiting: list[np.ndarray] = []
        self._waiting_bytes = 0
        self._members = 0

    def add(self, tokens: np.ndarray) -> tuple[int, np.ndarray]:
        """Byte offset of the document in the tar, and its tokens as stored.

        Raises ``ValueError`` when an id does not fit the dtype: it would wrap around silently.
        """
        if len(tokens) and (tokens.min() < 0 or tokens.max() > np.iinfo(self.dtype).max):
            raise ValueError(
                f"token ids {tokens.min()} … {tokens.max()} do not fit {self.dtype.name}; "
                "choose the dtype with token_dtype(vocabulary size)"
            )
        member_start = self._tar.offset + tarfile.BLOCKSIZE + _ARRAY_HEADER
        offset, stored = member_start + self._waiting_bytes, tokens.astype(self.dtype)
        self._waiting.append(stored)
        self._waiting_bytes += stored.nbytes
        if self._waiting_bytes >= MEMBER_BYTES:
            self._write_member()
        return offset, stored

    def close(self) -> None:
        """Write pending documents and the end of the tar; ``file`` stays open."""
        if self._waiting:
            self._write_member()
        self._tar.close()

    def _write_member(self) -> None:
        content = _array_bytes(np.concatenate(self._waiting))
        assert len(content) == _ARRAY_HEADER + self._waiting_bytes, "offsets assume this header"
        member = tarfile.TarInfo(f"{self._members:06d}.npy")
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        self._waiting, self._waiting_bytes = [], 0
        self._members += 1


class _VectorFile:
    """Streams vectors into one ``.npy`` file, whose header gets their number at the end."""

    def __init__(self, file: BinaryIO, vectors: Vectors) -> None:
        self.file, self.width, self.rows = file, vectors.width, 0
        self.dtype = np.dtype(vectors.dtype).newbyteorder("<")
        # of each channel over all vectors: sum of the values, and of their squares
        self.sums_2C = np.zeros((2, vectors.channels))
        self._write_header()
        self._header = file.tell()

    def add(self, vectors: np.ndarray) -> bytes:
        """Append (n, P); returns the bytes written. ``ValueError`` unless finite and of width P."""
        with np.errstate(over="ignore"):  # refused below
            stored = vectors.astype(self.dtype)
        if stored.ndim != 2 or stored.shape[1] != self.width or not np.isfinite(stored).all():
            raise ValueError(
                f"vectors {vectors.shape} must be (n, {self.width}) and finite in "
                f"{self.dtype.name}; prepare with another tokenizer"
            )
        self.rows += len(stored)
        values_NC = stored.reshape(-1, self.sums_2C.shape[1]).astype(np.float64)
        self.sums_2C += values_NC.sum(0), np.square(values_NC).sum(0)
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


@dataclass
class Measured:
    """A tokenizer's squared ``error`` over ``values`` values, and the ``longest`` block."""

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
    """Result of tokenising one raw shard: the content of ``shard-NNNNNN.json``.

    ``recipe``: hash of everything besides the raw shard that decides the tokens (tokenizers,
    layout, format). ``media``: label → reconstruction error of its tokenizer on (some of) the
    shard. ``unused``: counts by kind (``.cls``) of parts of good samples that no document uses.
    ``examples``: the first of each cause in ``drops`` and of each kind in ``unused``. ``bad``: the
    first bad samples, message → cause.
    ``channel_sums``, ``channel_squares``: sums over the values of each channel of the vectors, and
    over their squares. A record with vectors also has the SHA-256 of its other fields.
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
    bad: dict[str, str] = field(default_factory=dict)
    vectors_bytes: int = 0
    vectors_sha256: str = ""
    channel_sums: list[float] = field(default_factory=list)
    channel_squares: list[float] = field(default_factory=list)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the shard's files, the record's last."""
        vectors = (VECTOR_SUFFIX,) if self.vectors_sha256 else ()
        return (*SHARD_SUFFIXES[:-1], *vectors, SHARD_SUFFIXES[-1])

    def save(self, folder: Path) -> None:
        """Mark the shard complete; its other files are on the disk already."""
        values = asdict(self)
        media = values.pop("media")
        values = {key: value for key, value in values.items() if value or key not in _IF_ANY}
        for label in MEDIA:
            if label in media or label == Modality.IMAGE.label:
                found = media.get(label, asdict(Measured()))
                values |= zip(_measured_keys(label), found.values(), strict=False)
        if self.vectors_sha256:
            values[_OWN_HASH] = _digest(values)
        atomic_write_json(folder / f"{Path(self.name).stem}.json", values)

    @classmethod
    def read(cls, folder: Path, number: int) -> "ShardRecord | None":
        """The record of a shard; None if it is absent, damaged, or written by another version."""
        own = {field.name: field.type for field in fields(cls) if field.name != "media"}
        measured = {label: _measured_keys(label) for label in MEDIA}
        required = own.keys() - _IF_ANY | {*measured[Modality.IMAGE.label]}
        try:
            values = read_json(folder / f"{shard_name(number)}.json", "make it again")
            own_hash = values.values.pop(_OWN_HASH, None)
            if not required <= values.values.keys() <= own.keys() | {*sum(measured.values(), ())}:
                return None
            if own_hash != (_digest(values.values) if "vectors_sha256" in values else None):
                return None
            found: dict[str, Any] = {}
            for name, kind in own.items():
                if name in values and kind in (int, str):
                    found[name] = values.field(name, kind, least=0)
                elif name in values and get_origin(kind) is list:
                    found[name] = values.items(name, float)
                elif name in values:  # dict[str, item]
                    _, item = get_args(kind)
                    found[name] = values.mapping(name, item, least=0)
            media = {
                label: Measured(*(values.field(key, int, default=0, least=0) for key in keys))
                for label, keys in measured.items()
            }
        except ValueError:
            return None
        known = {label: one for label, one in media.items() if one != Measured()}
        record = cls(**found, media=known)
        return record if record.name == f"{shard_name(number)}.tar" else None

    @classmethod
    def load(cls, folder: Path, number: int) -> "ShardRecord | None":
        """The record as in ``read``; None also if the hashes of its files differ."""
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

    ``vectors``: their type, for documents with continuous media. ``record.drops`` and the like may
    change until the last document has been taken.
    """
    tar_path = folder / record.name
    vector_path = tar_path.with_suffix(VECTOR_SUFFIX)
    rows: list[list[int]] = []
    checksums: list[int] = []
    with ExitStack() as files:
        vector_file = None
        if vectors is not None:
            vector_file = _VectorFile(files.enter_context(atomic_write(vector_path)), vectors)
        tar = _TokenTar(files.enter_context(atomic_write(tar_path)), token_dtype(vocabulary.size))
        for document in (Tokenised(*fields) for fields in documents):
            offset, stored = tar.add(document.tokens)
            first_vector = [] if vector_file is None else [vector_file.rows]
            rows.append([offset, len(stored), *document.per_modality, *first_vector])
            checksum = zlib.crc32(stored.data)
            if document.vectors is not None:
                assert vector_file is not None, "a source with vectors has a file for them"
                checksum = zlib.crc32(vector_file.add(document.vectors), checksum)
            checksums.append(checksum)
        tar.close()
        if vector_file is not None:
            vector_file.close()
    record.bytes, record.sha256 = tar_path.stat().st_size, sha256_file(tar_path)
    if vector_file is not None:
        record.channel_sums, record.channel_squares = vector_file.sums_2C.tolist()
        record.vectors_bytes = vector_path.stat().st_size
        record.vectors_sha256 = sha256_file(vector_path)
    labels = [modality.label for modality in vocabulary.modalities]
    index = np.array(rows, "<i8").reshape(-1, 2 + len(labels) + (vectors is not None))
    record.index_sha256 = _write_array(tar_path.with_suffix(".index.npy"), index)
    record.crc_sha256 = _write_array(tar_path.with_suffix(".crc.npy"), np.array(checksums, "<u4"))
    record.documents = len(index)
    totals = index[:, 2 : 2 + len(labels)].sum(0).tolist()
    record.tokens = dict(zip(labels, totals, strict=True))
    record.save(folder)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _array_bytes(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
    return content.getvalue()


def _write_array(path: Path, array: np.ndarray) -> str:
    """Write ``array`` to ``path`` as .npy; returns the SHA-256 of the file."""
    content = _array_bytes(array)
    atomic_write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()
