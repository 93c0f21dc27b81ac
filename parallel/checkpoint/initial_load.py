"""``checkpoint.initial_load_path``: starts a run from the weights of a model in any format.

A DCP checkpoint is loaded as one of the run itself. Of other formats each rank reads whole tensors,
one by one, and copies its shard.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from earlyfuse.models.state_dicts.tensor_map import Tensors
from earlyfuse.parallel.checkpoint.file_layout import checkpoints_of, is_run, latest_checkpoint
from earlyfuse.parallel.checkpoint.files.dcp_metadata import METADATA
from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel, open_model


def find(path: Path) -> Path | OpenModel:
    """Returns the DCP folder to start from, or an opened model; ``ValueError`` if there is none."""
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ValueError(
            f"checkpoint.initial_load_path ({path}) must be the folder of a model or checkpoint, "
            f"and {found}; correct it"
        )
    if is_run(path):
        path = latest_checkpoint(checkpoints_of(path))
    if (path / METADATA).exists():
        return path
    try:
        return open_model(path)
    except ValueError as error:
        raise ValueError(f"checkpoint.initial_load_path: {error}") from error


@torch.no_grad()
def load_whole(parameters: Mapping[str, torch.Tensor], tensors: Tensors) -> None:
    """Fills ``parameters``, whole or sharded, from the whole ``tensors`` of the same names."""
    for name, parameter in parameters.items():
        local, offset = local_region(parameter)
        ends = (start + length for start, length in zip(offset, local.shape, strict=True))
        region = tuple(map(slice, offset, ends))
        local.copy_(tensors.read(name)[region])


def local_region(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Returns this rank's shard of a parameter, and its offset in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), tuple(offset)
