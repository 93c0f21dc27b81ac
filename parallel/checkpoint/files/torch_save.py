"""Tensors in files of ``torch.save``: Meta's ``consolidated.NN.pth``, and ``pytorch_model.bin``.

Files are checked, mapped and read with ``weights_only`` (no code in them runs), and reopened after
some megabytes, since pages of a mapped file count as memory of the process until it is closed.
Writing takes two passes: torch reserves room for the values, which are then filled in one by one.
"""

import os
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from earlyfuse.models.state_dicts.meta import PARAMS, ROPE, shard_name
from earlyfuse.models.state_dicts.tensor_map import Entry, Mapped, Tensors, renamed
from earlyfuse.parallel.checkpoint.files.plain_pickle import ForeignName
from earlyfuse.parallel.checkpoint.files.safetensors import write_values
from earlyfuse.parallel.checkpoint.files.torch_archive import check_tensors_only

PYTORCH_MODEL = "pytorch_model.bin"
_MAPPED_AT_ONCE = 64 << 20  # bytes read before files are reopened
_MOST_SHARDS = 1000  # the largest released model has 4


class TorchFiles:
    """The tensors of several files, by the prefix that their names get, without ``ignored`` names.

    ``ValueError`` for a file that is truncated, not written by ``torch.save``, or holds more than
    tensors.
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
        """Returns the tensor, a view of the mapped file."""
        path, theirs = self._places[name]
        if path not in self._open:
            self._open[path] = _mapped(path)
        tensor = self._open[path][theirs]
        self._read += self.entries[name].bytes
        if self._read >= _MAPPED_AT_ONCE:
            self._open.clear()
            self._read = 0
        return tensor


class MetaShards(TorchFiles):
    """The tensors of Meta's ``count`` shards; tensor ``name`` of shard i is ``0i/name``."""

    def __init__(self, folder: Path):
        files = _shard_files(folder)
        self.count = len(files)
        super().__init__({shard_name(i, ""): path for i, path in enumerate(files)}, (ROPE,))


def _shard_files(folder: Path) -> list[Path]:
    """Lists the shards in order; ``ValueError`` if one is missing."""
    if (single := folder / "consolidated.pth").is_file():
        return [single]
    found = {
        int(match[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    if not found:
        raise ValueError(f"{folder} has {PARAMS}, but no consolidated.*.pth")
    if max(found) >= _MOST_SHARDS:
        raise ValueError(
            f"{folder} holds {found[max(found)].name}, but shard numbers must be below "
            f"{_MOST_SHARDS}; rename or remove it"
        )
    missing = [f"consolidated.{n:02d}.pth" for n in range(max(found)) if n not in found]
    if missing:
        raise ValueError(f"{folder} lacks {missing} of its {max(found) + 1} shards; copy them")
    return [found[number] for number in sorted(found)]


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    try:
        with open(path, "rb") as file:
            check_tensors_only(file)
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (ForeignName, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} must hold tensors only: reading it would run code in it, which is never done "
            f"({_first_line(error)}); take the file from another source"
        ) from error
    except Exception as error:  # damage makes the unpickler raise anything
        raise ValueError(
            f"{path} is truncated or was not written by torch.save as a zip archive "
            f"({_first_line(error)}); copy it again"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in loaded.items()
    ):
        raise ValueError(f"{path} must hold tensors by name, and nothing else; copy it again")
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def write_torch_file(path: Path, tensors: Tensors, aliases: Mapping[str, str]) -> None:
    """Writes ``tensors``, reading one at a time. ``aliases``: second name → name of a tensor, whose
    values are stored once.
    """
    entries = tensors.entries
    with FakeTensorMode():
        empty = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in entries.items()}
    named = empty | {alias: empty[name] for alias, name in aliases.items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(named, path)
    except RuntimeError as error:  # torch's writer hides the cause
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


def write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    """Writes ``consolidated.00.pth`` … from tensors named as in ``MetaShards``."""
    for shard in range(shards):
        prefix = shard_name(shard, "")
        own = {
            name.removeprefix(prefix): renamed(name, entry.shape)
            for name, entry in tensors.entries.items()
            if name.startswith(prefix)
        }
        write_torch_file(folder / f"consolidated.{shard:02d}.pth", Mapped(own, tensors), {})
