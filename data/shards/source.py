"""Random access to the documents of a prepared source (format: ``data/shards/writer.py``).

Shard and index are mapped, and a document is a view at the offset that the index gives: no tar
walk, no copy, no decoding. Tokens that were not prepared are never returned: sizes of all shards
are checked when the source is opened, the hashes of a shard's index and checksums when its first
document is read, and each document against its checksum. ``verify`` also hashes whole shards.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.shards.manifest import MANIFEST, read_manifest, vectors_of
from earlyfuse.data.shards.mapped_files import (
    REMEDY,
    MappedShard,
    Shards,
    Stamp,
    array_in,
    keep_open,
    map_file,
    stamp,
    unreadable,
)
from earlyfuse.data.shards.writer import VECTOR_SUFFIX
from earlyfuse.models.vocabulary import Vocabulary

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
    ``vectors``        type and statistics of the vectors of its media, None without any
    ``identity``       SHA-256 over everything that decides the tokens, not over the path
    =================  =========================================================================

    Raises ``FileNotFoundError`` when the folder is not a complete data set, ``ValueError`` when a
    shard or its index is missing, truncated or contradicts the manifest, or the source is empty.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self._take(read_manifest(self.folder))
        try:
            self._check_files()
        except OSError as error:
            raise unreadable(self.folder, error.strerror) from error

    def _take(self, manifest: dict[str, Any]) -> None:
        self.vocabulary = Vocabulary.from_dict(manifest["vocabulary"])
        self.tokenizers: dict[str, str] = manifest["tokenizers"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._itemsize = self.dtype.itemsize
        self._labels = [modality.label for modality in self.vocabulary.modalities]
        self.tokens: dict[str, int] = {label: manifest["tokens"][label] for label in self._labels}
        self.longest: dict[str, int] = manifest.get("longest", {})
        self.vectors = vectors_of(manifest)
        self._suffixes = (*_SUFFIXES, VECTOR_SUFFIX) if self.vectors else _SUFFIXES
        # columns of the index that count a document's vectors
        continuous = self.vectors.media if self.vectors else ()
        self._continuous = [2 + self._labels.index(label) for label in continuous]
        self._shards = manifest["shards"]
        # number of the first document of each shard; last the number of all documents
        self._first = [0, *accumulate(shard["documents"] for shard in self._shards)]
        self._opened = Shards()
        self._checked: dict[int, list[Stamp | None]] = {}  # files whose hashes were right
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
        """Tokens (n,) uint16 or uint32, a read-only view, and the number of each modality in
        ``vocabulary.modalities`` order. ``ValueError`` names a file that is missing or differs from
        the prepared one.
        """
        shard = bisect_right(self._first, number) - 1
        if not 0 <= number < self._first[-1]:
            raise IndexError(f"document {number} of {self.folder}, which has {len(self)}")
        mapped = self._opened.get(shard) or self._open(shard)
        place = number - self._first[shard]
        offset, count, *per_modality = mapped.entries[place].tolist()
        start = offset // self._itemsize
        tokens = mapped.tokens[start : start + count]
        checksum = zlib.crc32(tokens.data)
        if self.vectors:
            *per_modality, _ = per_modality
            checksum = zlib.crc32(self._vectors(mapped, place).data, checksum)
        if checksum != mapped.checksums[place]:
            path = self._path(shard, ".tar")
            vectors = f" or {path.with_suffix(VECTOR_SUFFIX).name}" if self.vectors else ""
            raise ValueError(
                f"{path}{vectors}: document {place} differs from its checksum, the file was "
                f"damaged or exchanged; {REMEDY}"
            )
        return tokens, per_modality

    def document_vectors(self, number: int) -> np.ndarray:
        """Vectors (n, P) of a document, one for each position of a continuous medium; a read-only
        view, which ``document`` has checked.
        """
        shard = bisect_right(self._first, number) - 1
        mapped = self._opened.get(shard) or self._open(shard)
        return self._vectors(mapped, number - self._first[shard])

    def _vectors(self, mapped: MappedShard, place: int) -> np.ndarray:
        entry = mapped.entries[place]
        return mapped.vectors[entry[-1] : entry[-1] + entry[self._continuous].sum()]

    def runs(self) -> Iterator[np.ndarray]:
        """Tokens of all documents in long contiguous views, without checksums."""
        for shard in range(len(self._shards)):
            mapped = self._opened.get(shard) or self._open(shard)
            starts = mapped.entries[:, 0] // self._itemsize
            stops = starts + mapped.entries[:, 1]
            first = np.flatnonzero(np.append(True, starts[1:] != stops[:-1]))[: len(starts)]
            last = np.append(first[1:], len(starts)) - 1
            for begin, end in zip(starts[first].tolist(), stops[last].tolist(), strict=True):
                yield mapped.tokens[begin:end]

    def verify(self) -> None:
        """Read every shard; ``ValueError`` names a file whose SHA-256 is not the manifest's."""
        for number, shard in enumerate(self._shards):
            for suffix, field in ((".tar", "sha256"), (VECTOR_SUFFIX, "vectors_sha256")):
                if suffix in self._suffixes:
                    path = self._path(number, suffix)
                    _check_hash(path, sha256_file(path), shard[field])
            self._open(number)

    def _path(self, number: int, suffix: str) -> Path:
        return (self.folder / self._shards[number]["name"]).with_suffix(suffix)

    def _check_files(self) -> None:
        """Check presence and size of all files of the source, in one pass over the folder."""
        with os.scandir(self.folder) as entries:
            found = {entry.name: entry for entry in entries}
        for number, shard in enumerate(self._shards):
            for suffix in self._suffixes:
                entry = found.get(shard["name"].removesuffix(".tar") + suffix)
                # the other files are hashed when they are opened
                size = entry.stat().st_size if entry and suffix in _SIZES else None
                self._check_file(number, suffix, entry is not None, size)

    def _check_file(self, number: int, suffix: str, exists: bool, size: int | None) -> None:
        """``ValueError`` for a missing file, or a ``size`` that differs from the manifest's."""
        path, expected = self._path(number, suffix), self._shards[number].get(_SIZES.get(suffix))
        if not exists:
            raise ValueError(f"{path} is missing; {REMEDY}")
        if size is not None and expected is not None and size != expected:
            raise ValueError(
                f"{path} is {'truncated' if size < expected else 'too long'}: the manifest expects "
                f"{expected} bytes, found {size}; {REMEDY}"
            )

    def _open(self, number: int) -> MappedShard:
        """Map shard ``number`` after checking its index and checksums by the manifest's hashes,
        unless the same files passed before.
        """
        paths = [self._path(number, suffix) for suffix in self._suffixes]
        stamps = [stamp(path) for path in paths]
        contents = []
        for suffix, path, found in zip(self._suffixes, paths, stamps, strict=True):
            self._check_file(number, suffix, found is not None, found and found.size)
            contents.append(map_file(path, found.size if found else 0))
        tar, index, checksums, *_ = contents
        check = self._checked.get(number) != stamps
        documents = self._shards[number]["documents"]
        columns = 2 + len(self._labels) + (self.vectors is not None)
        entries = array_in(paths[1], index, (documents, columns), "<i8")
        crc = array_in(paths[2], checksums, (documents,), "<u4")
        if check:
            for path, content, field in (
                (paths[1], index, "index_sha256"),
                (paths[2], checksums, "crc_sha256"),
            ):
                found_hash = hashlib.sha256(content.data).hexdigest()
                _check_hash(path, found_hash, self._shards[number][field])
            self._check_entries(number, entries, tar.nbytes)
        vectors = np.empty((0, 0), np.float32)
        if self.vectors:
            shape = (int(entries[:, self._continuous].sum()), self.vectors.width)
            dtype = np.dtype(self.vectors.dtype).newbyteorder("<").str
            vectors = array_in(paths[3], contents[3], shape, dtype)
        self._checked[number] = stamps
        mapped = MappedShard(tar.view(self.dtype), entries, crc, vectors)
        keep_open(self._opened, number, mapped)
        return mapped

    def _check_entries(self, number: int, entries: np.ndarray, tar_bytes: int) -> None:
        """``ValueError`` unless the index points into its shard and agrees with the manifest."""
        path, shard = self._path(number, ".index.npy"), self._shards[number]
        start, count = entries[:, 0], entries[:, 1]
        wrong = (start < 0) | (count < 0) | (start % self._itemsize != 0)
        wrong |= start + count * self._itemsize > tar_bytes
        if self.vectors:
            vectors = entries[:, self._continuous].sum(1)
            wrong |= entries[:, -1] != vectors.cumsum() - vectors
        if wrong.any():
            raise ValueError(f"{path} points outside the documents of its shard; {REMEDY}")
        totals = entries[:, 2 : 2 + len(self._labels)].sum(0).tolist()
        counted = dict(zip(self._labels, totals, strict=True))
        if counted != shard["tokens"]:
            raise ValueError(
                f"{path} counts {counted} tokens, {self.folder / MANIFEST} {shard['tokens']}; "
                f"{REMEDY}"
            )


def check_same_vocabulary(sources: Sequence[TokenSource]) -> None:
    """``ValueError`` unless all sources have distinct names and the same tokenizers and vocabulary.

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
        made_by = [
            (f"{kind} tokenizer", first.tokenizers.get(kind), source.tokenizers.get(kind))
            for kind in sorted(first.tokenizers.keys() | source.tokenizers.keys())
        ]
        for what, left, right in (*made_by, ("vocabulary", first.vocabulary, source.vocabulary)):
            if left != right:
                raise ValueError(
                    f"{what} of {first.folder} ({left}) and of {source.folder} ({right}) must be "
                    "the same; prepare both sources with one set of tokenizers"
                )


def _check_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{path}: SHA-256 {found} must be {expected} by the manifest; the file was changed, "
            f"{REMEDY}"
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
