"""Draws initial values of parameters.

Each module with parameters names them in ``draws()``: (name in the module) → draw; a parameter that
no module names raises. Values are drawn in blocks of rows, each from a generator seeded by the
model's seed, the parameter's name and the block's place: they depend neither on the order of
construction, nor on other parameters, nor on the number of ranks, and a rank draws only the blocks
of its shard.
"""

import zlib
from collections.abc import Callable, Container
from itertools import product
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

BLOCK_ROWS = 256


class Scales(NamedTuple):
    """``std`` of a matrix; ``branches`` of the model, the square root of which divides the matrices
    that write into the residual.
    """

    std: float
    branches: int


# fills a parameter, whole or sharded, from a seed
Draw = Callable[[torch.Tensor, str, Scales], None]
# (rows, columns) of a block and its generator → fp32 values
Values = Callable[[tuple[int, int], torch.Generator], torch.Tensor]


@torch.no_grad()
def init_weights(
    model: nn.Module, *, std: float, branches: int, seed: int, only: Container[str] | None = None
) -> None:
    """Fills all parameters of ``model``, or ``only`` these, in place.

    ``branches``: see ``Scales``. ``ValueError`` names a parameter that has no draw.
    """
    draws: dict[str, Draw] = {}
    for prefix, module in model.named_modules():
        for name, draw in getattr(module, "draws", dict)().items():
            draws[f"{prefix}.{name}"] = draw
    for name, parameter in model.named_parameters():
        draw = draws.get(name)
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
            name = name.replace(wrapper, "")
        if only is not None and name not in only:
            continue
        if draw is None:
            raise ValueError(f"{name} has no initial value; name it in draws() of its module")
        draw(parameter, f"{seed}:{name}", Scales(std, branches))


def constant(value: float) -> Draw:
    """The same value everywhere: 1 of a norm's weight, 0 of a bias."""

    def draw(parameter: torch.Tensor, seed: str, scales: Scales) -> None:
        parameter.fill_(value)

    return draw


def normal(
    gain: float = 1.0, *, std: float | None = None, residual: bool = False, centred: bool = False
) -> Draw:
    """Normal(0, gain · std), truncated at ±3 of these; ``std`` None: the model's.

    ``residual``: divided by sqrt(branches). ``centred``: each column less its mean over the rows
    of a block.
    """

    def draw(parameter: torch.Tensor, seed: str, scales: Scales) -> None:
        width = gain * (scales.std if std is None else std)
        width /= scales.branches**0.5 if residual else 1

        def values(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
            drawn = torch.empty(shape, dtype=torch.float32)
            nn.init.trunc_normal_(drawn, std=width, a=-3 * width, b=3 * width, generator=generator)
            return drawn - drawn.mean(0) if centred else drawn

        fill(parameter, values, seed)

    return draw


def uniform(inputs: int | None = None, *, residual: bool = False) -> Draw:
    """Uniform in ±1 / sqrt(inputs), by default the last dimension; ``residual``: see ``normal``."""

    def draw(parameter: torch.Tensor, seed: str, scales: Scales) -> None:
        bound = (inputs or parameter.shape[-1]) ** -0.5
        bound /= scales.branches**0.5 if residual else 1

        def values(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
            return (2 * torch.rand(shape, generator=generator) - 1) * bound

        fill(parameter, values, seed, vector=parameter.ndim == 1)

    return draw


def fill(parameter: torch.Tensor, values: Values, seed: str, *, vector: bool = False) -> None:
    """Fills matrices (the last two dimensions) in blocks of rows; a ``vector`` is a column."""
    local, offset = local_shard(parameter)
    shape = tuple(parameter.shape)
    if vector:
        local, offset, shape = local.unsqueeze(-1), (*offset, 0), (*shape, 1)
    *_, rows, columns = shape
    *lead_offset, row_offset, column_offset = offset
    wanted = slice(column_offset, column_offset + local.shape[-1])
    for index in product(*map(range, local.shape[:-2])):
        place = [start + i for start, i in zip(lead_offset, index, strict=True)]
        target = local[index]
        end = row_offset + len(target)
        for start in range(row_offset - row_offset % BLOCK_ROWS, end, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, rows)
            name = f"{seed}:{place}:{start}".encode()
            drawn = values((stop - start, columns), torch.Generator().manual_seed(zlib.crc32(name)))
            first, last = max(start, row_offset), min(stop, end)
            target[first - row_offset : last - row_offset].copy_(
                drawn[first - start : last - start, wanted]
            )


def local_shard(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's shard of a parameter, and its offset in each dimension."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset
