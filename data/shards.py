"""Random access to the documents of a prepared source (format: ``data/tokenised.py``).

Shard and index are mapped, a document is a view at the offset the index gives: no tar walk, no
copy, no decoding. Nothing is fed that was not prepared so: the size of every shard is checked when
the source is opened, the hashes of its index and checksums when its first document is read, and
each document against its checksum (``verify`` reads everything and checks the hash of the tar too).
A file that shrinks while it is mapped ends the process (SIGBUS): prepare replaces files, it never
rewrites them.
"""

import hashlib
import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.tokenised import MANIFEST, read_manifest
from earlyfuse.models.modality import Vocabulary


class TokenSource:
    """The documents of one prepared folder, by number in stored order.

    =================  =========================================================================
    ``name``           the folder's name; with the seed it decides the order of the documents
    ``vocabulary``     layout of the ids
    ``tokenizers``     kind → SHA-256 of the tokenizer's file
    ``tokens``         modality label → number of tokens in all documents
    ``longest``        label of a medium whose blocks vary in length → codes of the longest one
    ``identity``       SHA-256 over all that decides the tokens; independent of where the folder is
    =================  =========================================================================

    Raises ``FileNotFoundError`` when the folder is not a complete data set, ``ValueError`` when a
    shard or its index is missing, truncated or not as the manifest says, or the source holds no
    token.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        manifest = read_manifest(self.folder)
        try:
            self._take(manifest)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{self.folder / MANIFEST} is damaged ({error!r}); copy it again, or remove it and "
                "run the same prepare command again, which keeps the shards"
            ) from error
        for number in range(len(self._shards)):
            self._check_size(number)
        if not sum(self.tokens.values()):
            raise ValueError(
                f"{self.folder} holds no token; prepare it from documents or leave it out"
            )

    def _take(self, manifest: dict[str, Any]) -> None:
        self.vocabulary = Vocabulary.from_dict(manifest["vocabulary"])
        self.tokenizers: dict[str, str] = manifest["tokenizers"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._itemsize = self.dtype.itemsize
        self.tokens = {
            m.label: int(manifest["tokens"][m.label]) for m in self.vocabulary.modalities
        }
        self.longest: dict[str, int] = manifest.get("longest", {})
        self._shards = manifest["shards"]
        # first document of each shard, and the number of all documents at the end
        self._first = [0, *accumulate(shard["documents"] for shard in self._shards)]
        if self._first[-1] != manifest["documents"]:
            raise ValueError(f"{self._first[-1]} documents in shards, not {manifest['documents']}")
        self._opened: dict[int, _Opened] = {}
        self.identity = _digest(
            [manifest["format"], manifest["vocabulary"], manifest["tokenizers"], manifest["dtype"]]
            + [[shard["name"], shard["documents"], shard["sha256"]] for shard in self._shards]
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
        data, index, checksums = self._opened.get(shard) or self._open(shard)
        place = number - self._first[shard]
        offset, count, *per_modality = index[place].tolist()
        start = offset // self._itemsize
        tokens = data[start : start + count]
        if checksums is not None and zlib.crc32(tokens.data) != checksums[place]:
            raise ValueError(
                f"{self._tar(shard)}: document {place} is not the one that was prepared, by its "
                "checksum; the file was damaged or exchanged, copy the shard again or prepare the "
                "source again"
            )
        return tokens, per_modality

    def token_counts(self) -> np.ndarray:
        """int64 (documents, M): tokens of each document per modality; reads every index."""
        parts = [
            (self._opened.get(shard) or self._open(shard)).entries[:, 2:]
            for shard in range(len(self._shards))
        ]
        return np.concatenate(parts)

    @property
    def media_fraction(self) -> float:
        """Share of the tokens that are media codes (image, speech …), over all documents."""
        total = sum(self.tokens.values())
        return 1.0 - self.tokens[self.vocabulary.modalities[0].label] / total

    def verify(self) -> None:
        """Read every shard; ``ValueError`` names one whose SHA-256 is not the manifest's."""
        for number, shard in enumerate(self._shards):
            self._check_hash(self._tar(number), sha256_file(self._tar(number)), shard["sha256"])
            self._open(number)

    def _tar(self, number: int) -> Path:
        return self.folder / self._shards[number]["name"]

    def _index(self, number: int) -> Path:
        return self._tar(number).with_suffix(".index.npy")

    def _checksums(self, number: int) -> Path:
        return self._tar(number).with_suffix(".crc.npy")

    def _check_size(self, number: int) -> None:
        tar, expected = self._tar(number), self._shards[number]["bytes"]
        if not tar.is_file():
            raise ValueError(
                f"{tar} is missing: the manifest expects {expected} bytes there, found none; "
                "copy the shard again or prepare the source again"
            )
        found = tar.stat().st_size
        if found != expected:
            raise ValueError(
                f"{tar} is {'truncated' if found < expected else 'too long'}: the manifest expects "
                f"{expected} bytes, found {found}; copy the shard again or prepare the source again"
            )
        if not self._index(number).is_file():
            raise ValueError(
                f"{self._index(number)} is missing, so documents of {tar.name} cannot be found; "
                "copy it again or prepare the source again"
            )
        if "crc_sha256" in self._shards[number] and not self._checksums(number).is_file():
            raise ValueError(
                f"{self._checksums(number)} is missing, so documents of {tar.name} cannot be "
                "checked; copy it again or prepare the source again"
            )

    def _open(self, number: int) -> "_Opened":
        """Map shard ``number`` and check that index and checksums are those of the manifest."""
        self._check_size(number)  # the files may be others than when the source was opened
        shard, path = self._shards[number], self._index(number)
        columns = 2 + len(self.vocabulary.modalities)
        index, found = _mapped_array(path, (shard["documents"], columns), "<i8")
        data = _mapped(self._tar(number)).view(self.dtype)
        stops = index[:, 0] + index[:, 1] * self._itemsize
        if (stops > data.nbytes).any() or (index[:, 0] % self._itemsize).any():
            raise ValueError(
                f"{path} points past the {data.nbytes} bytes of its shard, or between two tokens; "
                "copy both again or prepare the source again"
            )
        if "index_sha256" in shard:
            self._check_hash(path, found, shard["index_sha256"])
        checksums = None
        if "crc_sha256" in shard:  # absent where it was prepared before there were any
            path = self._checksums(number)
            checksums, found = _mapped_array(path, (shard["documents"],), "<u4")
            self._check_hash(path, found, shard["crc_sha256"])
        # Threads that arrive here together map twice and keep one: harmless.
        self._opened[number] = opened = _Opened(data, index, checksums)
        return opened

    def _check_hash(self, path: Path, found: str, expected: str) -> None:
        if found != expected:
            raise ValueError(
                f"{path}: SHA-256 {found} must be {expected} by the manifest; "
                "the file was changed, prepare or copy it again"
            )


class _Opened(NamedTuple):
    """A mapped shard: its bytes as tokens, its index int64 (documents, 2 + M), checksums uint32."""

    data: np.ndarray
    entries: np.ndarray
    checksums: np.ndarray | None


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


def _mapped_array(path: Path, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, str]:
    """The array of a .npy file, mapped, and the file's SHA-256. ``ValueError`` if it is another."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            found, _, kind = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
    except Exception as error:  # damaged headers make numpy raise nearly anything
        raise ValueError(
            f"{path} is no array file ({error}); copy it again or prepare the source again"
        ) from error
    size, expected = path.stat().st_size, header + math.prod(shape) * np.dtype(dtype).itemsize
    if found != shape or kind != dtype or size != expected:
        raise ValueError(
            f"{path} holds {found} {kind} in {size} bytes, but the manifest expects {shape} "
            f"{np.dtype(dtype).name} in {expected}; copy it again or prepare the source again"
        )
    content = _mapped(path)
    return content[header:].view(dtype).reshape(shape), hashlib.sha256(content.data).hexdigest()


def _mapped(path: Path) -> np.ndarray:
    """The bytes of a file, read-only, uint8.

    torch's mapping keeps no file descriptor, so thousands of shards do not meet the limit on open
    files.
    """
    size = path.stat().st_size
    view = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    view.flags.writeable = False
    return view


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
