"""Our training checkpoints (DCP folders) as tensors by name, without a process group.

DCP notes in a pickle where each part of each tensor lies. It is read by an unpickler that knows
only the classes of such notes, so that no code of the file runs. Of a training checkpoint only the
model is read, not the optimizer.
"""

import hashlib
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from earlyfuse.models.state_dicts.recipes import Entry, Tensors

METADATA, MANIFEST = ".metadata", "manifest.json"
_OF_THE_MODEL = ("layers", "tok_embeddings", "norm", "lm_head")
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *((_METADATA_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA_MODULE, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    *((_METADATA_MODULE, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class _Notes(pickle.Unpickler):
    """Reads the classes of DCP's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _KNOWN and not is_type:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata = _Notes(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class DcpFolder:
    """The model's tensors in a checkpoint folder, each put together from its parts when it is read.

    Raises ``ValueError`` if DCP's notes or files are missing, damaged or foreign.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        _check_sizes(folder)
        self._reader = _Reader(folder)
        try:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, True)
            self.entries = {
                name: Entry(tuple(stored.size), stored.properties.dtype)
                for name, stored in self._metadata.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
                and name.partition(".")[0] in _OF_THE_MODEL
            }
            if not all(isinstance(entry.dtype, torch.dtype) for entry in self.entries.values()):
                raise TypeError("a type of values is none")
        except Exception as error:  # damage makes the unpickler raise anything
            raise ValueError(
                f"{folder / METADATA} is damaged or no note of a DCP checkpoint "
                f"({type(error).__name__}: {error}); copy the checkpoint again"
            ) from error
        if not self.entries:
            raise ValueError(f"{folder} is a DCP checkpoint without a model of ours in it")

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        entry = self.entries[name]
        state = {name: torch.empty(entry.shape, dtype=entry.dtype)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(state, self._metadata, True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # DCP believes its notes, and they may be damaged
            raise ValueError(
                f"{self.folder}: {name} cannot be read ({type(error).__name__}: {error}); the "
                "checkpoint is damaged: copy it again"
            ) from error
        return state[name]


def _check_sizes(folder: Path) -> None:
    """``ValueError`` if a file is not there or not as long as the manifest says, or the notes are
    others; quick.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        files = json.loads(path.read_bytes())["files"]
        sizes = {name: record["bytes"] for name, record in files.items()}
        digest = files.get(METADATA, {}).get("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); copy the checkpoint again") from error
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            has = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{folder}: {name} {has}; copy the checkpoint again")
    # says where each tensor lies, so that one wrong bit of it gives another's values
    if digest and hashlib.sha256((folder / METADATA).read_bytes()).hexdigest() != digest:
        raise ValueError(f"{folder}: {METADATA} has another SHA-256; copy the checkpoint again")


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
