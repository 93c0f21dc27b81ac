"""Warm start: begins a run with the parameters, and the data position, of another model.

The model is a folder in any format that ``open_checkpoint`` reads. Models may differ: upcycling and
second stages map parameters by ``models/upcycle.py``; ids of the data that the model lacks get new
rows (``models/vocabulary_growth.py``). Where it is a run's checkpoint, lanes keep their position,
so that no document is read twice, and every rank reads its own shards, from any layout; of other
formats every rank reads whole tensors, one by one. Optimizer, schedule, step, skip rule and the
counters of tokens and FLOPs start at zero.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torchtitan.components.checkpointer import DATALOADER
from torchtitan.config import Configurable

from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.init_weights import local_shard
from earlyfuse.models.upcycle import Inherited, Shape, inherit
from earlyfuse.models.vocabulary_growth import GrownRows
from earlyfuse.parallel.checkpoint.file_layout import checkpoints_of, is_run, latest_checkpoint
from earlyfuse.parallel.checkpoint.files.dcp import averages
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader, SafeLoadPlanner, load_dcp
from earlyfuse.parallel.checkpoint.folder import CheckpointFolder
from earlyfuse.parallel.checkpoint.identity import refuse_other_data
from earlyfuse.parallel.checkpoint.inherited_ids import InheritedIds, inherited_ids
from earlyfuse.parallel.checkpoint.manifest import EVERYTHING, MANIFEST, read_manifest
from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel, Weights, open_model
from earlyfuse.parallel.checkpoint.resume_point import damage_seen_by_all


class WarmStart(Configurable):
    """Loads parameters and data position of another model; no effect if ``model`` is empty."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        model: str = ""
        """Folder of the model to start from: a run, a checkpoint, an export, or one of Hugging
        Face's, Meta's or mamba_ssm's (docs/conversion.md)."""

        upcycle: str = ""
        """Form to give it: none (as it is), 1t1i, mot, 8x, 4t4i … or mixture_of_mamba. Default: the
        form of the config, in the sizes of the model."""

        step: int = -1
        """Of a run, the step of its checkpoint; -1: the latest complete one."""

        data: bool = True
        """Of a run, continue in the data where it stopped, instead of at their beginning."""

        weights: Weights = "trained"
        """Of a run, its weights as trained, or the averages that it kept (ema.decay)."""

    def __init__(self, config: Config):
        self.config = config

    def open(self) -> OpenModel:
        """Opens the model; ``ValueError`` if there is none. Reads no tensors."""
        folder = self._folder()
        is_checkpoint = (folder / MANIFEST).is_file()
        asked: Weights | None = self.config.weights
        if asked == "trained" and not is_checkpoint:
            asked = None  # an export has one kind of weights
        try:
            return open_model(folder, asked)
        except ValueError as error:
            raise ValueError(f"start.model: {error}") from error

    def _folder(self) -> Path:
        """Folder of the model, of a run that of its checkpoint; ``ValueError`` without one."""
        folder, step = Path(self.config.model).expanduser(), self.config.step
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise ValueError(
                f"start.model ({self.config.model}) must be the folder of a model, run or "
                f"checkpoint, and {found}; correct the path"
            )
        if is_run(folder):
            checkpoints = CheckpointFolder(checkpoints_of(folder))
            if step != -1 and step not in checkpoints.steps():
                raise ValueError(
                    f"start.step ({step}) must be a step with a checkpoint in {checkpoints.root}: "
                    f"{checkpoints.steps() or 'there is none'}"
                )
            folder = (
                latest_checkpoint(checkpoints.root) if step == -1 else checkpoints.complete(step)
            )
        elif step != -1:
            raise ValueError(f"start.step ({step}) needs a run, and {folder} is none; leave it out")
        return folder

    def find(self, child: Decoder.Config, data: Path) -> "Parent | None":
        """The model to start from, or None; ``ValueError`` if it cannot become ``child``, whose ids
        are those of the prepared folder ``data``.

        Reads no tensors. All ranks call it.
        """
        if not self.config.model:
            return None
        folder = self._folder()
        has_manifest = (folder / MANIFEST).is_file()
        if has_manifest and (found := damage_seen_by_all(folder)):
            raise ValueError(
                f"checkpoint {folder} is damaged: {found}. Restore the files, or choose another "
                "with --start.step"
            )
        opened = self.open()
        whole = has_manifest and read_manifest(folder).holds == EVERYTHING
        if self.config.data and not whole and is_run(Path(self.config.model).expanduser()):
            raise ValueError(
                f"checkpoint {folder} holds only weights (checkpoint.last_save_model_only), "
                "no data position; choose an earlier one with --start.step, or start at the "
                "beginning of the data with --start.no-data"
            )
        ids = inherited_ids(opened, data)
        shapes = {name: entry.shape for name, entry in opened.tensors.entries.items()}
        origins = inherit(shapes, opened.config.to_dict(), child, ids.row_V)
        return Parent(opened, origins, ids, self.config.data and whole)

    def take_over(self, parent: "Parent", parts: list[Any], loader: LaneLoader) -> str:
        """Fill the parameters of ``parts`` in place and set the loader; returns a line about it.

        ``ValueError`` if the data are not those of the parent. All ranks call it.
        """
        folder = parent.opened.folder
        if parent.continues_data:
            reader = DcpReader(folder)
            try:
                refuse_other_data(loader, reader)
            except ValueError as error:
                raise ValueError(f"{error}; or set --start.no-data") from error
            load_dcp({DATALOADER: loader}, reader)
        for part in parts:
            load_inherited(part, parent.origins, parent.opened)
        return parent.describe()


@dataclass(frozen=True)
class Parent:
    """An open model, and the origins in it of a child's parameters."""

    opened: OpenModel
    origins: dict[str, Inherited | None]
    ids: InheritedIds
    continues_data: bool

    def shapes(self) -> dict[str, Shape]:
        """Name → shape of the model's tensors."""
        return {name: entry.shape for name, entry in self.opened.tensors.entries.items()}

    def describe(self) -> str:
        """A summary of the load: tensors read, grown, new and ignored, and why."""
        opened, origins = self.opened, self.origins
        new = [name for name, origin in origins.items() if origin is None]
        averaged = "averaged " if opened.weights == "ema" else ""
        line = f"started from {opened.folder} ({opened.format}): "
        line += f"{len(origins) - len(new)} of its {averaged}tensors, {len(new)} new"
        line += f" ({', '.join(sorted({_kind(name) for name in new}))})" if new else ""
        row_V = self.ids.row_V
        if row_V is not None:
            new_ids = sum(row is None for row in row_V)
            line += (
                f"; {len(row_V) - new_ids:,} of its {opened.vocabulary.size:,} token ids, "
                f"{new_ids:,} new (mean of its rows, with their spread in the embedding)"
            )
        ignored = {"image tokenizer": len(opened.vq.entries) if opened.vq else 0}
        used = {origin.name for origin in origins.values() if origin is not None}
        ignored["routers of another shape"] = len(self.shapes().keys() - used)
        for what, count in ignored.items():
            line += f"; {count} ignored ({what})" if count else ""
        line += f"; {self.ids.remark}" if self.ids.remark else ""
        return f"{line}; data {'continue' if self.continues_data else 'start at their beginning'}"


def _kind(name: str) -> str:
    """The part of the model that a new parameter belongs to."""
    return "routers" if "router" in name or ".depth" in name else name


@torch.no_grad()
def load_inherited(
    model: nn.Module, origins: dict[str, Inherited | None], opened: OpenModel
) -> None:
    """Fill the parameters of ``model``, whole or sharded, from an open model; no collectives.

    Of a DCP checkpoint only the regions of this rank are read, except where ids are new.
    """
    regions = _Regions()
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    in_regions = opened.format == "checkpoint"
    averaged = in_regions and opened.weights == "ema"
    key_of = (
        averages(DcpReader(opened.folder).read_metadata().state_dict_metadata) if averaged else {}
    )
    for name, parameter in model.state_dict().items():
        origin = origins.get(name)  # router biases start at zero
        if origin is None:
            continue
        local, offset = local_shard(parameter)
        if not local.numel():
            continue
        if not in_regions or isinstance(origin, GrownRows):
            ends = (start + length for start, length in zip(offset, local.shape, strict=True))
            whole = origin.make(opened.tensors.read(origin.name))
            local.copy_(whole[tuple(map(slice, offset, ends))])
            continue
        key = key_of.get(origin.name, origin.name)
        if origin.parts is None:
            regions.want(key, offset, local)
            continue
        for place, target in enumerate(local):
            part = origin.parts[offset[0] + place]
            start = offset[1:] if part is None else (part, *offset[1:])
            copies.append((target, regions.read(key, start, target)))
    if regions.chunks:
        reader = DcpReader(opened.folder)
        load_dcp(dict.fromkeys(regions.chunks), reader, planner=regions, alone=True)
    for target, source in copies:
        target.copy_(source.view_as(target))


class _Regions(SafeLoadPlanner):
    """Reads regions of stored tensors into given tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: dict[str, list[tuple[ChunkStorageMetadata, torch.Tensor]]] = defaultdict(list)

    def want(self, name: str, offset: tuple[int, ...], target: torch.Tensor) -> None:
        """Read the region of ``name`` at ``offset`` into ``target``."""
        chunk = ChunkStorageMetadata(torch.Size(offset), target.shape)
        self.chunks[name].append((chunk, target))

    def read(self, name: str, offset: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A host tensor for the region of the size of ``like``, shared by equal requests."""
        size = torch.Size((1,) * (len(offset) - like.ndim) + tuple(like.shape))
        wanted = ChunkStorageMetadata(torch.Size(offset), size)
        for chunk, target in self.chunks[name]:
            if chunk == wanted:
                return target
        self.want(name, offset, torch.empty(size, dtype=like.dtype))
        return self.chunks[name][-1][1]

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Ignore the state dict: regions are known."""
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Read items of all regions."""
        assert self.metadata is not None
        items = []
        for name, wanted in self.chunks.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            chunks = [chunk for chunk, _ in wanted]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The target of a region."""
        assert index.index is not None
        return self.chunks[index.fqn][index.index][1].detach()
