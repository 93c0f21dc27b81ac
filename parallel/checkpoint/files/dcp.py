"""Our training checkpoints (DCP folders) as tensors by name, without a process group.

Of a training checkpoint only the model is read, not the optimizer.
"""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from earlyfuse.data.atomic import sha256_file
from earlyfuse.models.state_dicts.tensor_map import Entry, Tensors
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader, SafeLoadPlanner
from earlyfuse.parallel.checkpoint.manifest import MANIFEST, read_manifest

_OF_THE_MODEL = ("layers", "tok_embeddings", "norm", "lm_head")


class DcpFolder:
    """The model's tensors in a checkpoint folder, each put together from its parts when it is read.

    Raises ``ValueError`` if DCP's notes or files are missing, damaged or foreign.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        _check_sizes(folder)
        self._reader = DcpReader(folder)
        self._notes = self._reader.read_metadata()
        self.entries = {
            name: Entry(tuple(stored.size), stored.properties.dtype)
            for name, stored in self._notes.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and name.partition(".")[0] in _OF_THE_MODEL
        }
        if not self.entries:
            raise ValueError(f"{folder} is a DCP checkpoint without a model of ours in it")

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        entry = self.entries[name]
        state = {name: torch.empty(entry.shape, dtype=entry.dtype)}
        planner = SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, self._notes, True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return state[name]


def _check_sizes(folder: Path) -> None:
    """``ValueError`` if a file is not there or not as long as the manifest says, or a small one is
    another than when it was written; quick.
    """
    if not (folder / MANIFEST).is_file():
        return
    for name, record in read_manifest(folder).files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != record.bytes:
            has = "is missing" if found is None else f"has {found} bytes instead of {record.bytes}"
            raise ValueError(f"{folder}: {name} {has}; copy the checkpoint again")
        # values have checksums of their own; what says where and what they are has none
        if path.suffix != ".distcp" and sha256_file(path) != record.sha256:
            raise ValueError(f"{folder}: {name} has another SHA-256; copy the checkpoint again")


class _OneByOne(DefaultSavePlanner):
    """Gives DCP's writer each tensor when its turn comes."""

    def __init__(self, tensors: Tensors):
        super().__init__(flatten_state_dict=False)
        self.tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.tensors.read(index.fqn).contiguous()


def write_dcp(writer: dcp.FileSystemWriter, tensors: Tensors) -> None:
    """Write all ``tensors`` through ``writer``, alone and one by one."""
    empty = {  # shapes and types are all that planning looks at
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in tensors.entries.items()
    }
    state = cast(dict[str, Any], empty)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single")
        try:
            dcp.save(state, storage_writer=writer, planner=_OneByOne(tensors), no_dist=True)
        except CheckpointException as error:  # of one rank: what it met
            raise next(iter(error.failures.values()))[0] from error
