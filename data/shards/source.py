"""Random access to the documents of a prepared source (format: ``data/shards/writer.py``).

Shard and index are mapped, a document is a view at the offset the index gives: no tar walk, no
copy, no decoding. Nothing is fed that was not prepared so: the size of every shard is checked when
the source is opened, the hashes of its index and checksums when its first document is read, and
each document against its checksum (``verify`` reads everything and checks the hash of the tar too).
A file that shrinks while it is mapped ends the process (SIGBUS): prepare replaces files, it never
rewrites them.

A process may map 65,530 things (Linux, vm.max_map_count), and a shard is three files. So the
``MOST_OPEN`` shards opened last stay mapped, of all sources together, and others are mapped again
when one of their documents is read. No file descriptor is kept.
"""

import hashlib
import io
import json
import math
import os
import threading
import weakref
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.console import printable
from earlyfuse.data.media import Vectors
from earlyfuse.data.shards.writer import MANIFEST, VECTOR_SUFFIX, read_manifest
from earlyfuse.models.vocabulary import Vocabulary

MOST_OPEN = 8192  # shards; what lanes are reading stays mapped besides
_LONGEST_HEADER = 1 << 10  # of an array file
_SUFFIXES = (".tar", ".index.npy", ".crc.npy")
_SIZES = {".tar": "bytes", VECTOR_SUFFIX: "vectors_bytes"}  # suffix → field of the manifest
_IDENTITY = ("name", "documents", "sha256", "vectors_sha256")  # of a shard


class TokenSource:
    """The documents of one prepared folder, by number in stored order.

    =================  =========================================================================
    ``name``           the folder's name; with the seed it decides the order of the documents
    ``vocabulary``     layout of the ids
    ``tokenizers``     kind → SHA-256 of the tokenizer's file
    ``tokens``         modality label → number of tokens in all documents
    ``longest``        label of a medium whose blocks vary in length → codes of the longest one
    ``vectors``        of its continuous media, None without any
    ``identity``       SHA-256 over all that decides the tokens; independent of where the folder is
    =================  =========================================================================

    Raises ``FileNotFoundError`` when the folder is not a complete data set, ``ValueError`` when a
    shard or its index is missing, truncated or not as the manifest says, or the source holds no
    token.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self._take(read_manifest(self.folder))
        try:
            self._check_files()
        except OSError as error:
            raise _unreadable(self.folder, error) from error

    def _take(self, manifest: dict[str, Any]) -> None:
        self.vocabulary = Vocabulary.from_dict(manifest["vocabulary"])
        self.tokenizers: dict[str, str] = manifest["tokenizers"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._itemsize = self.dtype.itemsize
        self.tokens: dict[str, int] = {
            m.label: manifest["tokens"][m.label] for m in self.vocabulary.modalities
        }
        self.longest: dict[str, int] = manifest.get("longest", {})
        vectors = manifest.get("vectors")
        self.vectors = vectors and Vectors(**{**vectors, "media": tuple(vectors["media"])})
        self._suffixes = (*_SUFFIXES, VECTOR_SUFFIX) if self.vectors else _SUFFIXES
        # of the index, by which a document's vectors are counted
        self._continuous = [
            2 + place
            for place, modality in enumerate(self.vocabulary.modalities)
            if self.vectors and modality.label in self.vectors.media
        ]
        self._shards = manifest["shards"]
        # first document of each shard, and the number of all documents at the end
        self._first = [0, *accumulate(shard["documents"] for shard in self._shards)]
        self._opened: _Opened = {}
        self._checked: dict[int, list[_Stamp | None]] = {}  # files whose hashes were right
        self.identity = _digest(
            [manifest["format"], manifest["vocabulary"], manifest["tokenizers"], manifest["dtype"]]
            + [[shard[key] for key in _IDENTITY if key in shard] for shard in self._shards]
        )
        if not sum(self.tokens.values()):
            raise ValueError(
                f"{self.folder} holds no token; prepare it from documents or leave it out"
            )

    def __len__(self) -> int:
        return self._first[-1]

    def document(self, number: int) -> tuple[np.ndarray, list[int]]:
        """Tokens (n,) uint16 or uint32, a read-only view, and how many belong to each modality.

        Modalities stand in ``vocabulary.modalities`` order. ``ValueError`` names a file that is
        missing or not the one that was prepared.
        """
        shard = bisect_right(self._first, number) - 1
        if not 0 <= number < self._first[-1]:
            raise IndexError(f"document {number} of {self.folder}, which has {len(self)}")
        mapped = self._opened.get(shard) or self._open(shard)
        place = number - self._first[shard]
        offset, count, *per_modality = mapped.entries[place].tolist()
        start = offset // self._itemsize
        tokens = mapped.data[start : start + count]
        checksum = zlib.crc32(tokens.data)
        if self.vectors:
            *per_modality, _ = per_modality
            checksum = zlib.crc32(self._vectors(mapped, place).data, checksum)
        if checksum != mapped.checksums[place]:
            raise ValueError(
                f"{self._tar(shard)}: document {place} is not the one that was prepared, by its "
                "checksum; the file was damaged or exchanged, copy the shard again or prepare the "
                "source again"
            )
        return tokens, per_modality

    def document_vectors(self, number: int) -> np.ndarray:
        """Vectors (n, P) of a document, one for each position of a continuous medium; a read-only
        view, which ``document`` has checked.
        """
        shard = bisect_right(self._first, number) - 1
        mapped = self._opened.get(shard) or self._open(shard)
        return self._vectors(mapped, number - self._first[shard])

    def _vectors(self, mapped: "_Mapped", place: int) -> np.ndarray:
        entry = mapped.entries[place]
        return mapped.vectors[entry[-1] : entry[-1] + entry[self._continuous].sum()]

    def runs(self) -> Iterator[np.ndarray]:
        """Tokens of all documents, as many at a time as lie end to end, without their checksums."""
        for shard in range(len(self._shards)):
            data, entries, *_ = self._opened.get(shard) or self._open(shard)
            starts = entries[:, 0] // self._itemsize
            stops = starts + entries[:, 1]
            first = np.flatnonzero(np.append(True, starts[1:] != stops[:-1]))[: len(entries)]
            last = np.append(first[1:], len(entries)) - 1
            for begin, end in zip(starts[first].tolist(), stops[last].tolist(), strict=True):
                yield data[begin:end]

    @property
    def media_fraction(self) -> float:
        """Share of the tokens that are media codes (image, speech …), over all documents."""
        total = sum(self.tokens.values())
        return 1.0 - self.tokens[self.vocabulary.modalities[0].label] / total

    def verify(self) -> None:
        """Read every shard; ``ValueError`` names one whose SHA-256 is not the manifest's."""
        for number, shard in enumerate(self._shards):
            self._check_hash(self._tar(number), sha256_file(self._tar(number)), shard["sha256"])
            if self.vectors:
                path = self._path(number, VECTOR_SUFFIX)
                self._check_hash(path, sha256_file(path), shard["vectors_sha256"])
            self._open(number)

    def _tar(self, number: int) -> Path:
        return self.folder / self._shards[number]["name"]

    def _path(self, number: int, suffix: str) -> Path:
        return self._tar(number).with_suffix(suffix)

    def _check_files(self) -> None:
        """Look at all files of the source, in one pass over the folder."""
        with os.scandir(self.folder) as entries:
            found = {entry.name: entry for entry in entries}
        for number, shard in enumerate(self._shards):
            for suffix in self._suffixes:
                entry = found.get(shard["name"].removesuffix(".tar") + suffix)
                if entry is None:
                    self._check_file(number, suffix, None)
                elif suffix in _SIZES:  # of the others, the hash is compared when they are opened
                    self._check_file(number, suffix, entry.stat().st_size)

    def _check_file(self, number: int, suffix: str, size: int | None) -> None:
        """``ValueError`` for a file that is not there, or not of the size that the manifest has."""
        path, expected = self._path(number, suffix), self._shards[number].get(_SIZES.get(suffix))
        if size is None and expected is not None:
            raise ValueError(
                f"{path} is missing: the manifest expects {expected} bytes there, found none; "
                "copy the shard again or prepare the source again"
            )
        if size is None:
            raise ValueError(
                f"{path} is missing, so documents of {self._tar(number).name} cannot be "
                f"{'found' if suffix == '.index.npy' else 'checked'}; copy it again or prepare the "
                "source again"
            )
        if size is not None and expected is not None and size != expected:
            raise ValueError(
                f"{path} is {'truncated' if size < expected else 'too long'}: the manifest expects "
                f"{expected} bytes, found {size}; copy the shard again or prepare the source again"
            )

    def _open(self, number: int) -> "_Mapped":
        """Map shard ``number``; check that index and checksums are those of the manifest, unless
        they were already and are the same files still.
        """
        stamps = [_stamp(self._path(number, suffix)) for suffix in self._suffixes]
        for suffix, stamp in zip(self._suffixes, stamps, strict=True):
            self._check_file(number, suffix, stamp and stamp.size)
        tar, index, checksums, *vectors = (
            _mapped(self._path(number, suffix), stamp.size)
            for suffix, stamp in zip(self._suffixes, stamps, strict=True)
            if stamp is not None
        )
        if self._checked.get(number) != stamps:
            self._check_contents(number, tar, index, checksums)
            for content in vectors:
                self._check_vectors(number, content, index)
            self._checked[number] = stamps
        documents = self._shards[number]["documents"]
        mapped = _Mapped(
            tar.view(self.dtype),
            _array(index, self._index_shape(number), "<i8"),
            _array(checksums, (documents,), "<u4"),
            *(self._vector_array(number, content, index) for content in vectors),
        )
        _OPEN.add(self, self._opened, number, mapped)
        return mapped

    def _check_contents(
        self, number: int, tar: np.ndarray, index: np.ndarray, checksums: np.ndarray
    ) -> None:
        """The bytes of the three files against the manifest, all but the tokens themselves."""
        shard, path = self._shards[number], self._path(number, ".index.npy")
        shape = self._index_shape(number)
        _check_array(path, index, shape, "<i8")
        _check_array(self._path(number, ".crc.npy"), checksums, shape[:1], "<u4")
        entries = _array(index, shape, "<i8")
        stops = entries[:, 0] + entries[:, 1] * self._itemsize
        if (entries[:, 0] < 0).any() or (entries[:, 1] < 0).any() or (stops > tar.nbytes).any():
            raise ValueError(
                f"{path} points past the {tar.nbytes} bytes of its shard; copy both again or "
                "prepare the source again"
            )
        if (entries[:, 0] % self._itemsize).any():
            raise ValueError(
                f"{path} points between two tokens of its shard; copy both again or prepare the "
                "source again"
            )
        self._check_hash(path, _sha256(index), shard["index_sha256"])
        self._check_hash(self._path(number, ".crc.npy"), _sha256(checksums), shard["crc_sha256"])
        labels = [modality.label for modality in self.vocabulary.modalities]
        counted = dict(zip(labels, entries[:, 2 : 2 + len(labels)].sum(0).tolist(), strict=True))
        if counted != shard["tokens"]:
            raise ValueError(
                f"{path} counts {counted} tokens, {self.folder / MANIFEST} {shard['tokens']}; "
                "copy both again or prepare the source again"
            )

    def _index_shape(self, number: int) -> tuple[int, int]:
        columns = 2 + len(self.vocabulary.modalities) + (self.vectors is not None)
        return self._shards[number]["documents"], columns

    def _vector_array(self, number: int, content: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The vectors of a shard (N, P); the index counts them."""
        assert self.vectors is not None, "there is a file of them"
        entries = _array(index, self._index_shape(number), "<i8")
        shape = (int(entries[:, self._continuous].sum()), self.vectors.width)
        return _array(content, shape, np.dtype(self.vectors.dtype).newbyteorder("<").str)

    def _check_vectors(self, number: int, content: np.ndarray, index: np.ndarray) -> None:
        """The file of vectors against the index, which was checked."""
        assert self.vectors is not None, "there is a file of them"
        path, entries = (
            self._path(number, VECTOR_SUFFIX),
            _array(index, self._index_shape(number), "<i8"),
        )
        counts = entries[:, self._continuous].sum(1)
        dtype = np.dtype(self.vectors.dtype).newbyteorder("<").str
        _check_array(path, content, (int(counts.sum()), self.vectors.width), dtype)
        if (entries[:, -1] != counts.cumsum() - counts).any():
            raise ValueError(
                f"{self._path(number, '.index.npy')} does not point to the vectors of its "
                "documents; copy both again or prepare the source again"
            )

    def _check_hash(self, path: Path, found: str, expected: str) -> None:
        if found != expected:
            raise ValueError(
                f"{path}: SHA-256 {found} must be {expected} by the manifest; "
                "the file was changed, prepare or copy it again"
            )


class _Mapped(NamedTuple):
    """A mapped shard: its bytes as tokens, its index int64 (documents, 2 + M or 3 + M), checksums
    uint32, vectors (N, P).
    """

    data: np.ndarray
    entries: np.ndarray
    checksums: np.ndarray
    vectors: np.ndarray = np.empty((0, 0), np.float32)


_Opened = dict[int, _Mapped]  # the mapped shards of one source


class _Stamp(NamedTuple):
    """By which a file is known to be the one that was checked."""

    inode: int
    size: int
    changed: int


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    return _Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


class _OpenShards:
    """Bounds what is mapped: the shard that was opened first leaves first.

    Reading a document of an open shard costs nothing here, whatever the number of shards.
    """

    def __init__(self) -> None:
        self._order: deque[tuple[weakref.ref[TokenSource], int]] = deque()
        self._lock = threading.Lock()

    def add(self, source: TokenSource, opened: _Opened, number: int, mapped: _Mapped) -> None:
        """Keep a shard of ``source``. Threads that open one together map twice and keep one."""
        with self._lock:
            if number not in opened:
                self._order.append((weakref.ref(source), number))
            opened[number] = mapped
            while len(self._order) > MOST_OPEN:
                reference, first = self._order.popleft()
                if (owner := reference()) is not None:
                    del owner._opened[first]


_OPEN = _OpenShards()


def check_same_vocabulary(sources: Sequence[TokenSource]) -> None:
    """``ValueError`` unless all sources have distinct names and were made by the same tokenizers.

    Ids of different tokenizers mean different things, so such sources must never meet in one batch.
    """
    names: dict[str, Path] = {}
    for source in sources:
        if source.name in names:
            raise ValueError(
                f"sources {names[source.name]} and {source.folder} are both named {source.name!r}; "
                "names decide the order of documents, rename one folder"
            )
        names[source.name] = source.folder
    first = sources[0]
    for source in sources[1:]:
        for kind in sorted(first.tokenizers.keys() | source.tokenizers.keys()):
            left, right = first.tokenizers.get(kind), source.tokenizers.get(kind)
            if left != right:
                raise ValueError(
                    f"{kind} tokenizer of {first.folder} ({left}) and of {source.folder} ({right}) "
                    "must be the same file; prepare both sources with one set of tokenizers"
                )
        if source.vocabulary != first.vocabulary:
            raise ValueError(
                f"vocabulary of {first.folder} ({first.vocabulary}) and of {source.folder} "
                f"({source.vocabulary}) must be equal; prepare both with one set of tokenizers"
            )


def _check_array(path: Path, content: np.ndarray, shape: tuple[int, ...], dtype: str) -> None:
    """``ValueError`` unless ``content``, the bytes of a .npy file, is of such an array."""
    try:
        file = io.BytesIO(content[:_LONGEST_HEADER].tobytes())
        np.lib.format.read_magic(file)
        found, _, kind = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # damaged headers make numpy raise nearly anything
        raise ValueError(
            f"{path} is no array file ({printable(str(error))}); copy it again or prepare the "
            "source again"
        ) from error
    expected = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
    if found != shape or kind != dtype or len(content) != expected:
        raise ValueError(
            f"{path} holds {found} {kind} in {len(content)} bytes, but the manifest expects "
            f"{shape} {np.dtype(dtype).name} in {expected}; copy it again or prepare the source "
            "again"
        )


def _array(content: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array at the end of a .npy file, whose header was checked once."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return content[len(content) - size :].view(dtype).reshape(shape)


def _sha256(content: np.ndarray) -> str:
    return hashlib.sha256(content.data).hexdigest()


def _mapped(path: Path, size: int) -> np.ndarray:
    """The bytes of a file, read-only, uint8.

    torch's mapping keeps no file descriptor, so thousands of shards do not meet the limit on open
    files.
    """
    if not size:
        return np.empty(0, np.uint8)
    try:
        view = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); copy it again or prepare the source again"
        ) from error
    view.flags.writeable = False
    return view


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({error.strerror}); copy it again or prepare the source again"
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
