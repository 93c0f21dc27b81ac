"""Initial values of every parameter, in one place.

=====================================  ==========================================================
parameter                              initial value
=====================================  ==========================================================
embedding                              normal(0, 1), cut at ±3: with a small one, Adam's steps
                                       are as large as the rows themselves and learning is slow
head, wq, wk, wv, w1, w3               normal(0, std), cut at ±3 std
wo, w2 (write into the residual)       normal(0, std / sqrt(branches)), cut likewise; branches:
                                       all those of the model, two for each transformer layer
in_proj, x_proj, dt_proj, conv         uniform in ±1 / sqrt(inputs of an output), the bias of conv
                                       too (Mamba, arXiv 2312.00752, and its code)
out_proj (writes into the residual)    the same / sqrt(branches)
dt_bias                                of step sizes log-uniform in [0.001, 0.1], at least 1e-4, for
                                       each modality its own: softplus turns it into them
A_log                                  log(1 … N), the same for each channel
D                                      1
router                                 normal(0, gain · std), cut likewise; ``init`` "centred": less
                                       the mean over experts, so that their directions are those
                                       of a simplex and they choose tokens apart from each other
w_hidden, w_score (causal router)      normal(0, std), cut likewise
norm weights                           1
norm biases                            0
=====================================  ==========================================================

Values are drawn in blocks of rows, each from a generator of its own, seeded by the model's seed,
the parameter's name and the block's place: they do not depend on the order of construction, on
other parameters, or on how many ranks there are, and a rank draws only the blocks it holds.
"""

import math
import zlib
from collections.abc import Callable, Container
from functools import partial
from itertools import product

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from earlyfuse.models.blocks.mamba import Conv
from earlyfuse.models.routing.expert_choice import ExpertChoice

RESIDUAL_WRITERS = ("wo", "w2", "out_proj")
UNIFORM = ("in_proj", "x_proj", "dt_proj", "conv", "out_proj")
SHORTEST_STEP, LONGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4
BLOCK_ROWS = 256

# (rows, columns) of a block and its generator → fp32 values
Draw = Callable[[tuple[int, int], torch.Generator], torch.Tensor]


@torch.no_grad()
def init_weights(
    model: nn.Module, *, std: float, branches: int, seed: int, only: Container[str] | None = None
) -> None:
    """Fill all parameters of ``model``, or ``only`` those of these names, in place, whole or
    sharded, by the table above.
    """
    routers = {m.weight: m.config for m in model.modules() if isinstance(m, ExpertChoice)}
    taps = {conv.bias: conv.weight.shape[1] for conv in model.modules() if isinstance(conv, Conv)}
    for name, parameter in model.named_parameters():
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
            name = name.replace(wrapper, "")
        if only is not None and name not in only:
            continue
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        block_seed = f"{seed}:{name}"
        if parameter in taps:
            _fill_vector(parameter, partial(_uniform, bound=taps[parameter] ** -0.5), block_seed)
        elif leaf == "bias":
            parameter.zero_()
        elif leaf == "D" or leaf.endswith("norm"):
            parameter.fill_(1.0)
        elif leaf == "A_log":
            _fill_rates(parameter)
        elif leaf == "dt_bias":
            _fill_vector(parameter, _step_bias, block_seed)
        elif leaf in UNIFORM:
            bound = parameter.shape[-1] ** -0.5
            if leaf in RESIDUAL_WRITERS:
                bound /= branches**0.5
            _fill(parameter, partial(_uniform, bound=bound), block_seed)
        else:
            scale, centred = std, False
            if leaf == "tok_embeddings":
                scale = 1.0
            elif leaf in RESIDUAL_WRITERS:
                scale = std / branches**0.5
            elif router := routers.get(parameter):
                scale, centred = std * router.init_gain, router.init == "centred"
            _fill(parameter, partial(_normal, std=scale, centred=centred), block_seed)


def _normal(
    shape: tuple[int, int], generator: torch.Generator, std: float, centred: bool
) -> torch.Tensor:
    """``centred``: each column less its mean over the rows of a block."""
    values = torch.empty(shape, dtype=torch.float32)
    nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
    return values - values.mean(0) if centred else values


def _uniform(shape: tuple[int, int], generator: torch.Generator, bound: float) -> torch.Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def _step_bias(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """softplus⁻¹ of step sizes."""
    low, high = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
    step = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
    step.clamp_(min=STEP_FLOOR)
    return step + torch.log(-torch.expm1(-step))


def _fill_rates(parameter: torch.Tensor) -> None:
    local, (*_, first) = _held(parameter)
    local.copy_(torch.arange(first + 1, first + 1 + local.shape[-1]).log())


def _fill(parameter: torch.Tensor, draw: Draw, seed: str) -> None:
    """The last two dimensions of ``parameter`` in blocks of rows."""
    _fill_blocks(*_held(parameter), tuple(parameter.shape), draw, seed)


def _fill_vector(parameter: torch.Tensor, draw: Draw, seed: str) -> None:
    """The last dimension of ``parameter`` as rows of one column."""
    local, offset = _held(parameter)
    _fill_blocks(local.unsqueeze(-1), (*offset, 0), (*parameter.shape, 1), draw, seed)


def _fill_blocks(
    local: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...], draw: Draw, seed: str
) -> None:
    """``local``: the part at ``offset`` of a parameter of ``shape``."""
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
            values = draw((stop - start, columns), torch.Generator().manual_seed(zlib.crc32(name)))
            first, last = max(start, row_offset), min(stop, end)
            target[first - row_offset : last - row_offset].copy_(
                values[first - start : last - start, wanted]
            )


def _held(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The part of a parameter that this rank holds, and where it begins in each dimension."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset
