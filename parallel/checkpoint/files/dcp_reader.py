"""Reads DCP checkpoints without running code in them; every load of one goes through here.

torch's reader and planner unpickle ``.metadata`` and all values that are not tensors. Here they and
the tensors are parsed as data (``dcp_metadata``, ``torch_archive``).
"""

import errno
import io
import warnings
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from earlyfuse.data.console import printable
from earlyfuse.data.json_files import shown
from earlyfuse.parallel.checkpoint.files.dcp_metadata import read_metadata
from earlyfuse.parallel.checkpoint.files.torch_archive import read_tensor, read_value

_MOST_VALUE = 64 << 20  # bytes of a value that is not a tensor
_REMEDY = "the checkpoint is damaged or not this project's; copy it again"


class DcpReader(dcp.FileSystemReader):
    """DCP's reader for files that may be damaged or hostile: ``ValueError`` for those."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder
        self._metadata: Metadata | None = None

    # takes no rank, for which DCP would look for another pickle
    def read_metadata(self) -> Metadata:
        """Returns the tensors and values and their places; reads the file once."""
        if self._metadata is None:
            self._metadata = read_metadata(self.folder)
            self.storage_data = self._metadata.storage_data
        return self._metadata

    def reset(self, checkpoint_id: Any = None) -> None:
        """Does nothing: a reader reads one folder."""

    def value(self, name: str) -> Any:
        """Returns the value ``name``, which is not a tensor; ``ValueError`` if there is none."""
        entry = self.read_metadata().state_dict_metadata.get(name)
        if not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{self.folder} has no value {name}; {_REMEDY}")
        info = self.storage_data[MetadataIndex(name)]
        try:
            with open(self.folder / info.relative_path, "rb") as file:
                return self._value(name, _part(file, info))
        except OSError as error:
            raise self._unreadable(name, error) from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the items of ``plan``, file by file."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            with open(self.folder / name, "rb") as file:
                for item in items:
                    part = _part(file, self.storage_data[item.storage_index])
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, self._value(item.storage_index.fqn, part))
                    else:
                        self._load_tensor(item, part, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _value(self, name: str, part: IO[bytes]) -> Any:
        try:
            content = part.read(_MOST_VALUE + 1)
            if len(content) > _MOST_VALUE:
                raise ValueError(f"it is larger than {_MOST_VALUE:,} bytes")
            return read_value(io.BytesIO(content))
        except ValueError as error:
            raise self._unreadable(name, error) from error

    def _load_tensor(self, item: ReadItem, part: IO[bytes], planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        try:
            tensor = read_tensor(part)
            tensor = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
        except (ValueError, RuntimeError, IndexError) as error:
            raise self._unreadable(name, error) from error
        target = planner.resolve_tensor(item).detach()
        if target.size() != tensor.size():
            sizes = f"its shape is {tuple(tensor.size())} instead of {tuple(target.size())}"
            raise self._unreadable(name, ValueError(sizes))
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    def _unreadable(self, name: str, error: Exception) -> ValueError:
        return ValueError(
            f"{self.folder}: {printable(name)} cannot be read ({printable(str(error))}); {_REMEDY}"
        )


class _Slice(io.RawIOBase):
    """A region of a file, as a file. torch's own seeks wrongly from the end."""

    def __init__(self, file: IO[bytes], begin: int, length: int):
        self.file, self.begin, self.length, self.place = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "seek before the beginning")
        self.place = start + offset
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self.length - self.place))
        self.file.seek(self.begin + self.place)
        content = self.file.read(count)
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def _part(file: IO[bytes], info: _StorageInfo) -> IO[bytes]:
    return io.BufferedReader(_Slice(file, info.offset, info.length), 1 << 18)


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner for ``DcpReader``, which passes it plain values instead of pickles. A value
    replaces one of its own type only.
    """

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Puts ``value`` into the state being loaded."""
        name = read_item.dest_index.fqn
        if not _same_kind(self.state_dict[name], value):
            raise ValueError(
                f"{printable(name)} ({shown(value)}) of the checkpoint must be a "
                f"{type(self.state_dict[name]).__name__}; {_REMEDY}"
            )
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], value)
        else:
            self.state_dict[name] = value


def _same_kind(here: Any, loaded: Any) -> bool:
    numbers = (int, float)
    if type(here) in numbers and type(loaded) in numbers:
        return True
    return here is None or loaded is None or type(here) is type(loaded)


def load_dcp(
    state_dict: dict[str, Any],
    reader: DcpReader,
    *,
    planner: SafeLoadPlanner | None = None,
    alone: bool = False,
) -> None:
    """Loads into ``state_dict``, as ``dcp.load``; ``ValueError`` if it cannot be read.

    Collective, each rank for its shards; with ``alone`` without communication.
    """
    reader.read_metadata()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose
            dcp.load(
                state_dict,
                storage_reader=reader,
                planner=planner or SafeLoadPlanner(),
                no_dist=alone or not dist.is_initialized(),
            )
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        text = str(cause) if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"
        raise ValueError(f"rank {rank} cannot load {reader.folder}: {text}") from cause
