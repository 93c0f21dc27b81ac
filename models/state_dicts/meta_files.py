"""Meta's ``consolidated.NN.pth``: shards that ``torch.save`` has written, tensor by tensor.

Read with ``weights_only`` (no code of the file runs) and mapped, opened anew after some megabytes,
since pages of a mapped file count as memory of the process until it is closed. Written in two
passes: torch leaves room for the values, which then come in one by one.
"""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from earlyfuse.models.state_dicts.meta import ROPE, shard_name
from earlyfuse.models.state_dicts.recipes import Entry, Tensors
from earlyfuse.models.state_dicts.safetensors_files import write_values

_MAPPED_AT_ONCE = 64 << 20  # bytes read before a file is opened anew


def shard_files(folder: Path) -> list[Path]:
    """The shards in order; ``ValueError`` if one is missing. [] if there are none."""
    if (single := folder / "consolidated.pth").is_file():
        return [single]
    found = {
        int(match[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    missing = [f"consolidated.{n:02d}.pth" for n in range(max(found, default=-1)) if n not in found]
    if missing:
        raise ValueError(f"{folder} lacks {missing} of its {max(found) + 1} shards; copy them")
    return [found[number] for number in sorted(found)]


class MetaShards:
    """The tensors of all shards; tensor ``name`` of shard i is ``0i/name``.

    Raises ``ValueError`` for a file that is truncated, was not written by ``torch.save``, or holds
    more than tensors.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.entries: dict[str, Entry] = {}
        self._open: dict[int, dict[str, torch.Tensor]] = {}
        self._read = 0
        for shard, path in enumerate(files):
            for name, tensor in _mapped(path).items():
                if name != ROPE:
                    entry = Entry(tuple(tensor.shape), tensor.dtype)
                    self.entries[shard_name(shard, name)] = entry

    def read(self, name: str) -> torch.Tensor:
        """The tensor, a view of the mapped file."""
        shard, _, theirs = name.partition("/")
        number = int(shard)
        if number not in self._open:
            self._open[number] = _mapped(self.files[number])
        tensor = self._open[number][theirs]
        self._read += self.entries[name].bytes
        if self._read >= _MAPPED_AT_ONCE:
            self._open.clear()
            self._read = 0
        return tensor


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors: reading it would run code of its own, which is never "
            f"done ({str(error).splitlines()[0]}). Take the file from another source"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is truncated or was not written by torch.save as a zip archive "
            f"({str(error).splitlines()[0]}); copy it again"
        ) from error
    if not isinstance(loaded, dict) or not all(map(torch.is_tensor, loaded.values())):
        raise ValueError(f"{path} must hold tensors by name, as Meta's files do; it holds others")
    return loaded


def write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    """Write ``consolidated.00.pth`` …, from tensors that are named as those of ``MetaShards``."""
    for shard in range(shards):
        prefix = shard_name(shard, "")
        entries = {
            name.removeprefix(prefix): entry
            for name, entry in tensors.entries.items()
            if name.startswith(prefix)
        }
        path = folder / f"consolidated.{shard:02d}.pth"
        offsets = _write_without_values(path, entries)
        with open(path, "r+b") as file:
            for name, offset in offsets.items():
                file.seek(offset)
                write_values(file, tensors.read(prefix + name))
            file.flush()
            os.fsync(file.fileno())


def _write_without_values(path: Path, entries: Mapping[str, Entry]) -> dict[str, int]:
    """A file with room for the values of ``entries``; where those of each begin."""
    with FakeTensorMode():
        empty = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in entries.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(empty, path)
    reader: Any = torch._C.PyTorchFileReader(str(path))
    return {name: reader.get_record_offset(f"data/{n}") for n, name in enumerate(entries)}
