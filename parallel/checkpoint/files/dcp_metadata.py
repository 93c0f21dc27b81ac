"""DCP's ``.metadata``, parsed as data, checked, and converted to DCP's classes.

It maps each chunk of each tensor to a region of a file. DCP trusts it; here it must be complete and
fit the files of the checkpoint.
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
from earlyfuse.parallel.checkpoint.files.torch_archive import dtype_named

METADATA = ".metadata"
_MOST_BYTES = 1 << 30  # a checkpoint of 5 million chunks
_LARGEST = 1 << 62
_KNOWN = {
    name: Named(f"torch.distributed.checkpoint.{module}", name)
    for module, names in {
        "metadata": (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        ),
        "filesystem": ("_StorageInfo",),
    }.items()
    for name in names
} | {
    "Size": Named("torch", "Size"),
    "_get_layout": Named("torch.serialization", "_get_layout"),
    "PosixPath": Named("pathlib", "PosixPath"),
}


def read_metadata(folder: Path) -> Metadata:
    """Reads ``.metadata`` of a checkpoint; ``ValueError`` if it is damaged or foreign."""
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES:,} bytes")
        known = set(_KNOWN.values())
        raw = parse(content, lambda named: named in known or dtype_named(named) is not None)
        return _metadata(folder, raw)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or not of a DCP checkpoint ({printable(str(error))}); copy the "
            "checkpoint again"
        ) from error


def _metadata(folder: Path, raw: Any) -> Metadata:
    fields = _state(raw, "Metadata")
    lengths: dict[str, int] = {}
    places = {
        _index(key): _place(folder, info, lengths)
        for key, info in _dict(fields.get("storage_data"), "storage_data").items()
    }
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in _dict(fields.get("state_dict_metadata"), "state_dict_metadata").items():
        if type(name) is not str:
            raise ValueError("an entry has no name")
        if isinstance(entry, Made) and entry.of == _KNOWN["BytesStorageMetadata"]:
            entries[name], chunks = BytesStorageMetadata(), [MetadataIndex(name)]
        else:
            entries[name] = tensor = _tensor(name, entry)
            chunks = [MetadataIndex(name, chunk.offsets) for chunk in tensor.chunks]
        if not all(chunk in places for chunk in chunks):
            raise ValueError(f"{name} has a chunk that is in no file")
    version = fields.get("version")
    return Metadata(
        entries,
        storage_data=places,
        storage_meta=StorageMeta(),
        version=version if isinstance(version, str) else None,
    )


def _index(raw: Any) -> MetadataIndex:
    fields = _state(raw, "MetadataIndex")
    name, offset = fields.get("fqn"), fields.get("offset")
    if type(name) is not str:
        raise ValueError("a chunk has no name")
    return MetadataIndex(name, None if offset is None else _sizes(offset))


def _place(folder: Path, raw: Any, lengths: dict[str, int]) -> _StorageInfo:
    """Converts a region of a file; ``lengths`` caches the files' sizes."""
    fields = _state(raw, "_StorageInfo")
    name, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if fields.get("transform_descriptors"):
        raise ValueError("its chunks are compressed, which this project never does")
    if type(name) is not str or type(offset) is not int or type(length) is not int:
        raise ValueError("a chunk has no place in a file")
    if name not in lengths:
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise ValueError(f"a chunk is in {shown(name)}, outside its folder")
        if not (folder / name).is_file():
            raise ValueError(f"a chunk is in {shown(name)}, which is no file here")
        lengths[name] = (folder / name).stat().st_size
    if min(offset, length) < 0 or offset + length > lengths[name]:
        raise ValueError(f"a chunk is beyond the end of {name}")
    return _StorageInfo(name, offset, length)


def _tensor(name: str, raw: Any) -> TensorStorageMetadata:
    """Converts a tensor; its chunks must cover it exactly."""
    fields = _state(raw, "TensorStorageMetadata")
    size, raw_chunks = _sizes(fields.get("size")), fields.get("chunks")
    if not isinstance(raw_chunks, list):
        raise ValueError(f"{name} has no chunks")
    chunks, values = [], 0
    for raw_chunk in raw_chunks:
        chunk = _state(raw_chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
        fits = len(offsets) == len(sizes) == len(size) and all(
            begin + extent <= end for begin, extent, end in zip(offsets, sizes, size, strict=True)
        )
        values += math.prod(sizes)
        if not fits or values > math.prod(size):
            raise ValueError(f"chunks of {name} lie outside it, or twice in it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if values != math.prod(size):
        raise ValueError(f"chunks of {name} are missing")
    # DCP documents that it uses no other property than the dtype
    state = _made(fields.get("properties"), "TensorProperties").state
    named = state[0] if isinstance(state, tuple) and state else None
    dtype = dtype_named(named) if isinstance(named, Named) else None
    if dtype is None:
        raise ValueError("a tensor has no dtype")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _made(raw: Any, name: str) -> Made:
    if not isinstance(raw, Made) or raw.of != _KNOWN[name]:
        found = raw.of if isinstance(raw, Made) else raw
        has = f"{found.module}.{found.name}" if isinstance(found, Named) else type(found).__name__
        raise ValueError(f"it has {has} in place of {name}")
    return raw


def _state(raw: Any, name: str) -> dict[Any, Any]:
    return _dict(_made(raw, name).state, name)


def _dict(raw: Any, name: str) -> dict[Any, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"its {name} is no table")
    return raw


def _sizes(raw: Any) -> torch.Size:
    """Converts a shape or an offset."""
    arguments = _made(raw, "Size").arguments
    numbers = arguments[0] if len(arguments) == 1 else None
    if not isinstance(numbers, tuple) or len(numbers) > 16:
        raise ValueError("a size is no tuple")
    if not all(type(n) is int and 0 <= n < _LARGEST for n in numbers):
        raise ValueError("a size is no whole number in bounds")
    return torch.Size(numbers)
