"""Initial values of every parameter, in one place.

=====================================  ==========================================================
parameter                              initial value
=====================================  ==========================================================
embedding                              normal(0, 1), cut at ±3: with a small one, Adam's steps
                                       are as large as the rows themselves and learning is slow
head, wq, wk, wv, w1, w3               normal(0, std), cut at ±3 std
wo, w2 (write into the residual)       normal(0, std / sqrt(2 · layers)), cut likewise
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

import zlib
from collections.abc import Container
from itertools import product

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from earlyfuse.models.routing.expert_choice import ExpertChoice

RESIDUAL_WRITERS = ("wo", "w2")
BLOCK_ROWS = 256


@torch.no_grad()
def initialise(
    model: nn.Module, *, std: float, layers: int, seed: int, only: Container[str] | None = None
) -> None:
    """Fill all parameters of ``model``, or ``only`` those of these names, in place, whole or
    sharded, by the table above.
    """
    routers = {m.weight: m.config for m in model.modules() if isinstance(m, ExpertChoice)}
    for name, parameter in model.named_parameters():
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
            name = name.replace(wrapper, "")
        if only is not None and name not in only:
            continue
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf == "bias":
            parameter.zero_()
        elif leaf.endswith("norm"):
            parameter.fill_(1.0)
        else:
            scale, centred = std, False
            if leaf == "tok_embeddings":
                scale = 1.0
            elif leaf in RESIDUAL_WRITERS:
                scale = std / (2 * layers) ** 0.5
            elif router := routers.get(parameter):
                scale, centred = std * router.init_gain, router.init == "centred"
            _fill_normal(parameter, scale, f"{seed}:{name}", centred)


def _fill_normal(parameter: torch.Tensor, std: float, seed: str, centred: bool) -> None:
    """``centred``: each column less its mean over the rows of a block."""
    local, offset = _held(parameter)
    *_, rows, columns = parameter.shape
    *lead_offset, row_offset, column_offset = offset
    wanted = slice(column_offset, column_offset + local.shape[-1])
    for index in product(*map(range, local.shape[:-2])):
        place = [start + i for start, i in zip(lead_offset, index, strict=True)]
        target = local[index]
        end = row_offset + len(target)
        for start in range(row_offset - row_offset % BLOCK_ROWS, end, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, rows)
            name = f"{seed}:{place}:{start}".encode()
            generator = torch.Generator().manual_seed(zlib.crc32(name))
            values = torch.empty(stop - start, columns, dtype=torch.float32)
            nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
            if centred:
                values -= values.mean(0)
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
