"""DCP's ``.metadata``, parsed as data, checked, and turned into DCP's classes.

It says in which file, and where in it, each chunk of each tensor is. DCP trusts it; here it must be
complete and fit the files that are there.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from earlyfuse.data.console import printable
from earlyfuse.data.json_files import shown
from earlyfuse.parallel.checkpoint.files.plain_pickle import Made, Named, parse

METADATA = ".metadata"
_MOST_BYTES = 1 << 30  # a checkpoint of 5 million chunks
_CLASSES = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem"
_LARGEST = 1 << 62
_KNOWN = {
    *(Named(_CLASSES, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *(Named(_CLASSES, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    *(Named(_CLASSES, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    Named(_STORAGE, "_StorageInfo"),
    Named("torch.serialization", "_get_layout"),
    Named("torch", "Size"),
    Named("pathlib", "PosixPath"),
}


def read_metadata(folder: Path) -> Metadata:
    """``.metadata`` of the checkpoint ``folder``; ``ValueError`` if it is damaged or foreign."""
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES:,} bytes")
        return _Converter(folder).metadata(parse(content, _is_known))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or not of a DCP checkpoint ({printable(str(error))}); copy the "
            "checkpoint again"
        ) from error


class _Converter:
    """Turns parsed metadata of ``folder`` into DCP's classes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lengths: dict[str, int] = {}  # of the files that have chunks

    def metadata(self, raw: Any) -> Metadata:
        fields = _state(raw, _CLASSES, "Metadata")
        places = {
            self.index(key): self.place(info)
            for key, info in _dict(fields.get("storage_data"), "storage_data").items()
        }
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, entry in _dict(fields.get("state_dict_metadata"), "state_dict_metadata").items():
            if type(name) is not str:
                raise ValueError("an entry has no name")
            if isinstance(entry, Made) and entry.of == Named(_CLASSES, "BytesStorageMetadata"):
                entries[name], parts = BytesStorageMetadata(), [MetadataIndex(name)]
            else:
                tensor = self.tensor(name, entry)
                entries[name] = tensor
                parts = [MetadataIndex(name, chunk.offsets) for chunk in tensor.chunks]
            if not all(part in places for part in parts):
                raise ValueError(f"{name} has a part that is in no file")
        version = fields.get("version")
        return Metadata(
            entries,
            storage_data=places,
            storage_meta=StorageMeta(),
            version=version if isinstance(version, str) else None,
        )

    def index(self, raw: Any) -> MetadataIndex:
        fields = _state(raw, _CLASSES, "MetadataIndex")
        name, offset = fields.get("fqn"), fields.get("offset")
        if type(name) is not str:
            raise ValueError("a part has no name")
        return MetadataIndex(name, None if offset is None else _sizes(offset))

    def place(self, raw: Any) -> _StorageInfo:
        fields = _state(raw, _STORAGE, "_StorageInfo")
        name, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
        if fields.get("transform_descriptors"):
            raise ValueError("its parts are compressed, which this project never does")
        if type(name) is not str or type(offset) is not int or type(length) is not int:
            raise ValueError("a part has no place in a file")
        if name not in self.lengths:
            if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
                raise ValueError(f"a part lies in {shown(name)}, outside its folder")
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"a part lies in {shown(name)}, which is no file here")
            self.lengths[name] = path.stat().st_size
        if min(offset, length) < 0 or offset + length > self.lengths[name]:
            raise ValueError(f"a part lies beyond the end of {name}")
        return _StorageInfo(name, offset, length)

    def tensor(self, name: str, raw: Any) -> TensorStorageMetadata:
        fields = _state(raw, _CLASSES, "TensorStorageMetadata")
        size = _sizes(fields.get("size"))
        raw_chunks = fields.get("chunks")
        if not isinstance(raw_chunks, list):
            raise ValueError(f"{name} has no parts")
        chunks, values = [], 0
        for raw_chunk in raw_chunks:
            chunk = _state(raw_chunk, _CLASSES, "ChunkStorageMetadata")
            offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
            fits = len(offsets) == len(sizes) == len(size) and all(
                begin + extent <= end
                for begin, extent, end in zip(offsets, sizes, size, strict=True)
            )
            values += math.prod(sizes)
            if not fits or values > math.prod(size):
                raise ValueError(f"parts of {name} lie outside it, or twice in it")
            chunks.append(ChunkStorageMetadata(offsets, sizes))
        if values != math.prod(size):
            raise ValueError(f"parts of {name} are missing")
        return TensorStorageMetadata(_properties(fields.get("properties")), size, chunks)


def _properties(raw: Any) -> TensorProperties:
    """Only the type of values matters; DCP documents that it uses no other property."""
    state = _made(raw, _CLASSES, "TensorProperties").state
    named = state[0] if isinstance(state, tuple) and state else None
    dtype = _dtype(named) if isinstance(named, Named) else None
    if dtype is None:
        raise ValueError("a tensor has no type of values")
    return TensorProperties(dtype=dtype)


def _is_known(named: Named) -> bool:
    return named in _KNOWN or _dtype(named) is not None


def _dtype(named: Named) -> torch.dtype | None:
    found = vars(torch).get(named.name) if named.module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _made(raw: Any, module: str, name: str) -> Made:
    if not isinstance(raw, Made) or raw.of != Named(module, name):
        found = raw.of if isinstance(raw, Made) else raw
        has = f"{found.module}.{found.name}" if isinstance(found, Named) else type(found).__name__
        raise ValueError(f"it names {has} where {name} belongs")
    return raw


def _state(raw: Any, module: str, name: str) -> dict[Any, Any]:
    return _dict(_made(raw, module, name).state, name)


def _dict(raw: Any, name: str) -> dict[Any, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{name} in it is no table")
    return raw


def _sizes(raw: Any) -> torch.Size:
    """A shape or a place in a tensor."""
    made = _made(raw, "torch", "Size")
    numbers = made.arguments[0] if len(made.arguments) == 1 else None
    if not isinstance(numbers, tuple) or len(numbers) > 16:
        raise ValueError("a size in it is none")
    if not all(type(n) is int and 0 <= n < _LARGEST for n in numbers):
        raise ValueError("a size in it is no whole number in bounds")
    return torch.Size(numbers)
