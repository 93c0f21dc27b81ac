"""Tensors in safetensors files: one, or several with an index.

The library reads; a file is opened for each tensor, since pages of a mapped file count as memory of
the process until it is closed. Writing is ours, since the library needs all tensors of a file in
memory at once; files are byte for byte those of the library: a header, then the values
(https://huggingface.co/docs/safetensors).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from earlyfuse.data.json_files import read_json, shown
from earlyfuse.models.state_dicts.tensor_map import Entry, Tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_NAME = 200  # characters of a file name
# the library writes tensors of the last of these dtypes first, for alignment
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = list(_DTYPES)


class SafetensorsFiles:
    """The tensors of several files; ``places``: name → file.

    ``ValueError`` for a file that is absent, truncated or no safetensors file.
    """

    def __init__(self, files: Sequence[Path]):
        self.places: dict[str, Path] = {}
        self.entries: dict[str, Entry] = {}
        for path in files:
            for name, entry in _read_header(path).items():
                if name in self.places:
                    raise ValueError(f"{path} and {self.places[name]} both hold {name}")
                self.places[name], self.entries[name] = path, entry

    def read(self, name: str) -> torch.Tensor:
        """Returns a copy of the tensor."""
        with safe_open(self.places[name], "pt") as file:
            return file.get_tensor(name)


def open_folder(folder: Path) -> SafetensorsFiles:
    """Opens the model's files in ``folder``: those of its index, or the single one.

    ``ValueError`` if there are none, or files and index disagree.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        if single.is_file():
            return SafetensorsFiles([single])
        pickled = [path.name for path in sorted(folder.glob("*.bin"))]
        found = f"only {pickled[0]}, a pickle that may run code when it is read" if pickled else ""
        raise ValueError(
            f"{folder} must hold {SINGLE} or {INDEX}, but has {found or 'neither'}"
            + ("; save it as safetensors" if pickled else "")
        )
    weight_map = read_json(index, "copy it again").object("weight_map")
    places = {name: weight_map.field(name, str) for name in weight_map.values}
    names = sorted(set(places.values()))
    if single.is_file() and names != [SINGLE]:  # transformers reads the first, others the index
        raise ValueError(
            f"{folder} holds {SINGLE} and {INDEX}, which names other files: two models; remove one"
        )
    outside = [name for name in names if Path(name).name != name or len(name) > _LONGEST_NAME]
    absent = [] if outside else [name for name in names if not (folder / name).is_file()]
    if outside or absent:
        wrong = "lie outside" if outside else "are not in"
        raise ValueError(
            f"{index} names {shown((outside or absent)[:4])}, which {wrong} its folder; copy them "
            "again"
        )
    files = SafetensorsFiles([folder / name for name in names])
    misplaced = [name for name, file in places.items() if files.places.get(name) != folder / file]
    misplaced += sorted(set(files.entries) - set(places))
    if misplaced:
        raise ValueError(
            f"{index} and its files disagree on {len(misplaced)} tensors: {shown(misplaced)}; "
            "copy them again"
        )
    return files


def _read_header(path: Path) -> dict[str, Entry]:
    entries = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise ValueError(f"{path}: {name} has the unknown type {part.get_dtype()}")
                entries[name] = Entry(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}); copy it again"
        ) from error
    return entries


def assign_files(entries: Mapping[str, Entry], max_bytes: int) -> dict[str, list[str]]:
    """Assigns tensors to files in order, up to ``max_bytes`` each; a larger tensor has its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, entry in entries.items():
        if groups[-1] and used + entry.bytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += entry.bytes
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def write_folder(folder: Path, tensors: Tensors, files: Mapping[str, list[str]]) -> None:
    """Writes ``files`` (file → tensors) and their index into ``folder``."""
    for name, members in files.items():
        write_file(folder / name, tensors, members)
    total = sum(entry.bytes for entry in tensors.entries.values())
    places = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Tensors, names: Sequence[str]) -> None:
    """Writes one file of the tensors ``names``, reading one at a time; verifies the header."""
    entries = {name: tensors.entries[name] for name in names}
    ordered = sorted(names, key=lambda n: (-_ORDER.index(_NAMES[entries[n].dtype]), n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        entry = entries[name]
        end = offset + entry.bytes
        shape, kind = list(entry.shape), _NAMES[entry.dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            write_values(file, tensors.read(name))
        file.flush()
        os.fsync(file.fileno())
    assert _read_header(path) == entries, f"{path} does not read back as written"


def write_values(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Writes the values of a tensor in row-major order, little endian."""
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
