"""Warm start: begins a run with parameters and data position of another run's checkpoint.

Models may differ: upcycling and second stages map parameters by ``models/upcycle.py``. Lanes keep
their position, so that no document is read twice. Optimizer, schedule, step, skip rule and the
counters of tokens and FLOPs start at zero. Every rank reads its own shards, from any layout.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from earlyfuse.models.upcycle import Inherited, Shape, inherit
from earlyfuse.parallel.checkpoint.file_layout import checkpoints_of, latest_checkpoint
from earlyfuse.parallel.checkpoint.files.dcp import averages, is_parameter
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader, SafeLoadPlanner, load_dcp
from earlyfuse.parallel.checkpoint.folder import CheckpointFolder
from earlyfuse.parallel.checkpoint.identity import refuse_other_data
from earlyfuse.parallel.checkpoint.initial_load import local_region
from earlyfuse.parallel.checkpoint.manifest import EVERYTHING, read_manifest
from earlyfuse.parallel.checkpoint.resume_point import damage_seen_by_all
from earlyfuse.parallel.reporting.run_folder import DESCRIPTION, read_config


class WarmStart(Configurable):
    """Loads parameters and data position of another run; no effect if ``run`` is empty."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        run: str = ""
        """Folder of the run to start from; its model may be a parent of this one (docs/moma.md)."""

        step: int = -1
        """Step of its checkpoint; -1: the latest complete one."""

        data: bool = True
        """Continue in the data where that run stopped, instead of at their beginning."""

        weights: Literal["trained", "ema"] = "trained"
        """Its weights as trained, or the averages that it kept (ema.decay)."""

    def __init__(self, config: Config):
        self.config = config

    def find(self, child: Decoder.Config) -> "ParentCheckpoint | None":
        """The checkpoint to start from, or None; ``ValueError`` if it cannot become ``child``.

        Reads no tensors. All ranks call it.
        """
        if not self.config.run:
            return None
        run = Path(self.config.run)
        if not (run / DESCRIPTION).is_file():
            raise ValueError(
                f"start.run ({run}) must be the folder of a run, with a {DESCRIPTION} that "
                "describes its model; correct the path"
            )
        described = read_config(run)
        folder = CheckpointFolder(checkpoints_of(run))
        step = self.config.step
        if step != -1 and step not in folder.steps():
            raise ValueError(
                f"start.step ({step}) must be a step with a checkpoint in {folder.root}: "
                f"{folder.steps() or 'there is none'}"
            )
        chosen = latest_checkpoint(folder.root) if step == -1 else folder.complete(step)
        parent = ParentCheckpoint(chosen, described.object("model_spec").field("model", dict))
        if found := damage_seen_by_all(parent.folder):
            raise ValueError(
                f"checkpoint {parent.folder} is damaged: {found}. Restore the files, or choose "
                "another with --start.step"
            )
        if self.config.data and read_manifest(parent.folder).holds != EVERYTHING:
            raise ValueError(
                f"checkpoint {parent.folder} holds only weights (checkpoint.last_save_model_only), "
                "no data position; choose an earlier one with --start.step, or start at the "
                "beginning of the data with --start.no-data"
            )
        try:
            origins = inherit(parent.shapes(), parent.model, child)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{run / DESCRIPTION}: config.model_spec.model is invalid ({error!r}); "
                "restore the file, or start from another run"
            ) from error
        named = {origin.name for origin in origins.values() if origin is not None}
        if self.config.weights == "ema" and (missing := sorted(named - parent.averages().keys())):
            raise ValueError(
                f"start.weights (ema) needs averaged weights, and checkpoint {parent.folder} has "
                f"none of {missing[0]}; choose trained, or a run with ema.decay"
            )
        return parent

    def take_over(
        self,
        parent: "ParentCheckpoint",
        child: Decoder.Config,
        parts: list[Any],
        loader: LaneLoader,
    ) -> str:
        """Fill the parameters of ``parts`` in place and set the loader; returns a line about it.

        ``ValueError`` if the data are not those of the parent. All ranks call it.
        """
        if self.config.data:
            reader = DcpReader(parent.folder)
            try:
                refuse_other_data(loader, reader)
            except ValueError as error:
                raise ValueError(f"{error}; or set --start.no-data") from error
            load_dcp({DATALOADER: loader}, reader)
        origins = inherit(parent.shapes(), parent.model, child)
        averaged = self.config.weights == "ema"
        for part in parts:
            load_inherited(part, origins, parent.folder, parent.averages() if averaged else None)
        fresh = sum(origin is None for origin in origins.values())
        return (
            f"started from {parent.folder}: {len(origins) - fresh} of its "
            f"{'averaged ' if averaged else ''}tensors, {fresh} new; "
            f"data {'continue' if self.config.data else 'start at their beginning'}"
        )


@dataclass(frozen=True)
class ParentCheckpoint:
    """A checkpoint of another run; ``model`` is the ``Decoder.Config.to_dict`` of its model."""

    folder: Path
    model: dict[str, Any]

    def shapes(self) -> dict[str, Shape]:
        """Name → shape of the parameters in the checkpoint."""
        metadata = DcpReader(self.folder).read_metadata().state_dict_metadata
        return {
            name: tuple(stored.size)
            for name, stored in metadata.items()
            if is_parameter(name) and isinstance(stored, TensorStorageMetadata)
        }

    def averages(self) -> dict[str, str]:
        """Parameter → key of its average in the checkpoint."""
        return averages(DcpReader(self.folder).read_metadata().state_dict_metadata)


@torch.no_grad()
def load_inherited(
    model: nn.Module,
    origins: dict[str, Inherited | None],
    folder: Path,
    averages: Mapping[str, str] | None = None,
) -> None:
    """Fill the parameters of ``model``, whole or sharded, from a checkpoint, or from its
    ``averages``; no collectives.
    """
    regions = _Regions()
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, parameter in model.state_dict().items():
        origin = origins.get(name)  # router biases start at zero
        if origin is None:
            continue
        local, offset = local_region(parameter)
        if not local.numel():
            continue
        key = (averages or {}).get(origin.name, origin.name)
        if origin.parts is None:
            regions.want(key, offset, local)
            continue
        for place, target in enumerate(local):
            part = origin.parts[offset[0] + place]
            start = offset[1:] if part is None else (part, *offset[1:])
            copies.append((target, regions.read(key, start, target)))
    load_dcp(dict.fromkeys(regions.chunks), DcpReader(folder), planner=regions, alone=True)
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
