"""Random access to the documents of a prepared source (format: ``data/tokenised.py``).

Shard and index are mapped, a document is a view at the offset the index gives: no tar walk, no
copy, no decoding. The index is trusted because the manifest states every shard's size and hash, and
the size of each is checked when the source is opened; ``verify`` reads everything and checks the
hashes too. A file that shrinks while it is mapped ends the process (SIGBUS): prepare replaces
files, it never rewrites them.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from earlyfuse.data.tokenised import read_manifest
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
        self._opened: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.identity = _digest(
            [manifest["format"], manifest["vocabulary"], manifest["tokenizers"], manifest["dtype"]]
            + [[shard["name"], shard["documents"], shard["sha256"]] for shard in self._shards]
        )
        for number in range(len(self._shards)):
            self._check_size(number)
        if not sum(self.tokens.values()):
            raise ValueError(
                f"{self.folder} holds no token; prepare it from documents or leave it out"
            )

    def __len__(self) -> int:
        return self._first[-1]

    def document(self, number: int) -> tuple[np.ndarray, list[int]]:
        """Tokens (n,) uint16 or uint32, a read-only view, and how many belong to each modality.

        Modalities stand in ``vocabulary.modalities`` order.
        """
        shard = bisect_right(self._first, number) - 1
        if not 0 <= number < self._first[-1]:
            raise IndexError(f"document {number} of {self.folder}, which has {len(self)}")
        data, index = self._opened.get(shard) or self._open(shard)
        offset, count, *per_modality = index[number - self._first[shard]].tolist()
        start = offset // self._itemsize
        return data[start : start + count], per_modality

    def token_counts(self) -> np.ndarray:
        """int64 (documents, M): tokens of each document per modality; reads every index."""
        parts = [
            (self._opened.get(shard) or self._open(shard))[1][:, 2:]
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
            for path, key in ((self._tar(number), "sha256"), (self._index(number), "index_sha256")):
                if key not in shard:
                    continue
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != shard[key]:
                    raise ValueError(
                        f"{path}: SHA-256 {found} must be {shard[key]} by the manifest; "
                        "the file was changed, prepare or copy it again"
                    )

    def _tar(self, number: int) -> Path:
        return self.folder / self._shards[number]["name"]

    def _index(self, number: int) -> Path:
        return self._tar(number).with_suffix(".index.npy")

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

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Map shard ``number``: its bytes as tokens and its index (int64, (documents, 2 + M))."""
        path, documents = self._index(number), self._shards[number]["documents"]
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
        columns = 2 + len(self.vocabulary.modalities)
        expected = header + documents * columns * 8
        if shape != (documents, columns) or dtype != "<i8" or path.stat().st_size != expected:
            raise ValueError(
                f"{path} holds {shape} {dtype} in {path.stat().st_size} bytes, but the manifest "
                f"expects ({documents}, {columns}) int64 in {expected}; copy it again or prepare "
                "the source again"
            )
        data = _mapped(self._tar(number)).view(self.dtype)
        index = _mapped(path)[header:].view("<i8").reshape(documents, columns)
        stops = index[:, 0] + index[:, 1] * self._itemsize
        if (stops > data.nbytes).any() or (index[:, 0] % self._itemsize).any():
            raise ValueError(
                f"{path} points past the {data.nbytes} bytes of its shard, or between two tokens; "
                "copy both again or prepare the source again"
            )
        # Threads that arrive here together map twice and keep one: harmless.
        self._opened[number] = (data, index)
        return data, index


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
