"""Reads the model in a DCP checkpoint as tensors by name, without a process group; writes both."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from earlyfuse.models.state_dicts.tensor_map import Entry, Tensors
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader, SafeLoadPlanner
from earlyfuse.parallel.checkpoint.manifest import MANIFEST, damage, read_manifest

_OF_THE_MODEL = (
    "layers", "tok_embeddings", "vector_input", "depth_projection", "norm", "lm_head",
    "vector_output",
)  # fmt: skip


def is_parameter(key: str) -> bool:
    """True if a key of a checkpoint is a parameter of the model."""
    return key.partition(".")[0] in _OF_THE_MODEL


EMA = "ema"  # the state of ``training/ema.py``: averages as ema.<parameter>
LOSS_MEAN = "loss_mean"  # in the state of the trainer: ``training/step_metrics.py``


def averages(keys: Iterable[str]) -> dict[str, str]:
    """Parameter → key of its average, among the ``keys`` of a checkpoint."""
    named = {key.removeprefix(f"{EMA}."): key for key in keys if key.startswith(f"{EMA}.")}
    return {name: key for name, key in named.items() if is_parameter(name)}


class DcpFolder:
    """The model's tensors in a checkpoint, each assembled from its chunks when it is read.

    ``averaged``: read the averages of parameters that the checkpoint has, ``averages``, instead of
    the parameters themselves. ``ValueError`` if DCP's metadata or files are missing, damaged or
    foreign.
    """

    def __init__(self, folder: Path, averaged: bool = False):
        self.folder = folder
        if (folder / MANIFEST).is_file():
            # tensors have own checksums, verified when they are read; metadata has none
            files = read_manifest(folder).files
            if found := damage(folder, files, lambda name: not name.endswith(".distcp")):
                raise ValueError(f"{folder}: {found[0]}; copy the checkpoint again")
        self._reader = DcpReader(folder)
        self._metadata = self._reader.read_metadata()
        metadata = self._metadata.state_dict_metadata
        self.averages = averages(metadata)
        self._keys = {name: name for name in metadata if is_parameter(name)}
        self._keys |= self.averages if averaged else {}
        self.entries = {
            name: Entry(tuple(stored.size), stored.properties.dtype)
            for name, key in self._keys.items()
            if isinstance(stored := metadata[key], TensorStorageMetadata)
        }
        if not self.entries:
            raise ValueError(f"{folder} is a DCP checkpoint without earlyfuse model weights")

    def read(self, name: str) -> torch.Tensor:
        """Returns the whole tensor."""
        entry, name = self.entries[name], self._keys[name]
        state = {name: torch.empty(entry.shape, dtype=entry.dtype)}
        planner = SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, self._metadata, True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return state[name]


class Writer(dcp.FileSystemWriter):
    """DCP's writer, deterministic, with errors that name the cause.

    DCP would write a random id and the folder's path to ``.metadata``, and hide the disk's error
    behind that of the interrupted serialiser.
    """

    def storage_meta(self) -> StorageMeta | None:
        """Returns None: neither id nor path."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's shards; raises the ``OSError`` at the root of a failure, if any."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            root: BaseException | None = error
            while root is not None and not isinstance(root, OSError):
                root = root.__cause__ or root.__context__
            if root is None or root is error:
                raise
            raise OSError(root.errno, root.strerror, str(self.path)) from error


class _OneByOne(DefaultSavePlanner):
    """Reads each tensor when DCP's writer asks for it."""

    def __init__(self, tensors: Tensors):
        super().__init__(flatten_state_dict=False)
        self.tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.tensors.read(index.fqn).contiguous()


def write_dcp(folder: Path, tensors: Tensors) -> None:
    """Writes ``tensors`` one by one, without a process group."""
    # DCP keeps the tensors of a file in memory until it is complete, so each gets its own file
    writer = Writer(folder, single_file_per_rank=False)
    empty = {  # planning uses shapes and dtypes only
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in tensors.entries.items()
    }
    state = cast(dict[str, Any], empty)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single")
        try:
            dcp.save(state, storage_writer=writer, planner=_OneByOne(tensors), no_dist=True)
        except CheckpointException as error:  # of the only rank
            raise next(iter(error.failures.values()))[0] from error
