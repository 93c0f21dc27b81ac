"""Where ``checkpoint.initial_load_path`` leads: any folder with a model begins a new run.

A DCP checkpoint is loaded like one of the run itself. Of every other format that ``load_model``
knows (our export, Hugging Face's, Meta's, ``mamba_ssm``'s) each rank reads the tensors whole, one
by one, and keeps its part of them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from earlyfuse.models.state_dicts.tensor_map import Tensors
from earlyfuse.parallel.checkpoint.files.dcp_metadata import METADATA
from earlyfuse.parallel.checkpoint.manifest import latest_checkpoint
from earlyfuse.parallel.checkpoint.open_checkpoint import Opened, open_model
from earlyfuse.parallel.reporting.run_folder import DESCRIPTION, read_config


def find(path: Path) -> Path | Opened:
    """The DCP folder to begin with, or an opened model; ``ValueError`` if there is neither."""
    if not path.is_dir():
        there = "is a file" if path.exists() else "is not there"
        raise ValueError(
            f"checkpoint.initial_load_path ({path}) must be the folder of a model or checkpoint, "
            f"and {there}; correct it"
        )
    if (path / DESCRIPTION).is_file():
        path = latest_checkpoint(path / read_config(path).object("checkpoint").field("folder", str))
    if (path / METADATA).exists():
        return path
    try:
        return open_model(path)
    except ValueError as error:
        raise ValueError(f"checkpoint.initial_load_path: {error}") from error


@torch.no_grad()
def load_whole(parameters: Mapping[str, torch.Tensor], tensors: Tensors) -> None:
    """Fill ``parameters``, whole or sharded, from the whole ``tensors`` of the same names."""
    for name, parameter in parameters.items():
        local, offset = held_region(parameter)
        region = tuple(
            slice(start, start + length) for start, length in zip(offset, local.shape, strict=True)
        )
        local.copy_(tensors.read(name)[region])


def held_region(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The part of a parameter that this rank holds, and where in the whole it begins."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), tuple(offset)
