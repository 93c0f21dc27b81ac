"""Tensors in files that ``torch.save`` has written: Meta's ``.pth``, ``pytorch_model.bin``.

Read with ``weights_only`` (no code of the file runs) and mapped, opened anew after some megabytes,
since pages of a mapped file count as memory of the process until it is closed. Written in two
passes: torch leaves room for the values, which then come in one by one.
"""

import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from earlyfuse.models.state_dicts.tensor_map import Entry, Tensors
from earlyfuse.parallel.checkpoint.files.plain_pickle import ForeignName
from earlyfuse.parallel.checkpoint.files.safetensors import write_values
from earlyfuse.parallel.checkpoint.files.torch_archive import check_tensors_only

_MAPPED_AT_ONCE = 64 << 20  # bytes read before files are opened anew


class TorchFiles:
    """The tensors of several files: ``files`` by what stands before the names of each one's own.

    Those named in ``ignored`` are left out. Raises ``ValueError`` for a file that is truncated, was
    not written by ``torch.save``, or holds more than tensors.
    """

    def __init__(self, files: Mapping[str, Path], ignored: Collection[str] = ()):
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, dict[str, torch.Tensor]] = {}
        self._read = 0
        for prefix, path in files.items():
            for name, tensor in _mapped(path).items():
                if name not in ignored:
                    self.entries[prefix + name] = Entry(tuple(tensor.shape), tensor.dtype)
                    self._places[prefix + name] = (path, name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, a view of the mapped file."""
        path, theirs = self._places[name]
        if path not in self._open:
            self._open[path] = _mapped(path)
        tensor = self._open[path][theirs]
        self._read += self.entries[name].bytes
        if self._read >= _MAPPED_AT_ONCE:
            self._open.clear()
            self._read = 0
        return tensor


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    try:
        with open(path, "rb") as file:
            check_tensors_only(file)
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (ForeignName, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} holds more than tensors: reading it would run code of its own, which is never "
            f"done ({_first_line(error)}). Take the file from another source"
        ) from error
    except Exception as error:  # damage makes the unpickler raise anything
        raise ValueError(
            f"{path} is truncated or was not written by torch.save as a zip archive "
            f"({_first_line(error)}); copy it again"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in loaded.items()
    ):
        raise ValueError(f"{path} must hold tensors by name, and nothing else; it holds others")
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def write_torch_file(path: Path, tensors: Tensors, same: Mapping[str, str] | None = None) -> None:
    """Write ``tensors``, each read when its turn comes. ``same``: further names for some of them,
    whose values are in the file once.
    """
    entries = tensors.entries
    with FakeTensorMode():
        empty = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in entries.items()}
    named = empty | {name: empty[first] for name, first in (same or {}).items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(named, path)
    except RuntimeError as error:  # torch's writer does not say why
        raise OSError(
            f"{path} could not be written ({_first_line(error)}): is the disk full?"
        ) from error
    reader: Any = torch._C.PyTorchFileReader(str(path))
    offsets = {name: reader.get_record_offset(f"data/{n}") for n, name in enumerate(entries)}
    with open(path, "r+b") as file:
        for name, offset in offsets.items():
            file.seek(offset)
            write_values(file, tensors.read(name))
        file.flush()
        os.fsync(file.fileno())
