"""The local shard of a DTensor parameter."""

import torch
from torch.distributed.tensor import DTensor


def to_local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter that tensor or expert parallelism has split; else all of it.

    Layers compute with what they hold: their sizes follow from it, not from their config.
    """
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
