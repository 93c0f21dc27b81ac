"""Turns logits into losses and gradients on CUDA: one program per token, two passes.

The first pass finds the largest logit and the sum of exponentials together, the second writes the
gradient over the logits, which were read a moment ago and are likely still in the L2 cache. With a
shard of the vocabulary the passes are two launches, with an exchange between ranks in between.
Matrix products are cuBLAS's.

V vocabulary, C tokens of a chunk.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from earlyfuse.kernels.linear_cross_entropy import chunked
from earlyfuse.kernels.linear_cross_entropy.chunked import UNCOUNTED, Combine
from earlyfuse.kernels.triton_support import on_its_device

# One block instead of an autotuner's choice: it decides the order of sums, so a restart would give
# different bits. A large one, so that few rows are in flight: four of 128 KiB per processor nearly
# fit into the L2 cache.
BLOCK, WARPS = 8192, 16
_UNCOUNTED = tl.constexpr(UNCOUNTED)


@triton.jit
def _turn_rows(
    logits, rows, statistics, log_z, z_weight, V,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    line = logits + token * V
    row = tl.load(rows + token)
    offsets = tl.arange(0, BLOCK)
    if STATISTICS:
        # before the reductions, behind which the second pass may write over it
        label = tl.load(line + row, mask=row >= 0, other=0.0).to(tl.float32)
        largest = -float("inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            column = start + offsets
            value = tl.load(line + column, mask=column < V, other=-float("inf")).to(tl.float32)
            new = tl.maximum(largest, tl.max(value, 0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(value - new), 0)
            largest = new
        tokens = tl.num_programs(0)
        tl.store(statistics + token, largest)
        tl.store(statistics + tokens + token, total)
        tl.store(statistics + 2 * tokens + token, label)
        normaliser = largest + tl.log(total)
    else:
        normaliser = tl.load(log_z + token)
    if GRADIENT:
        factor = 1.0 + 2.0 * z_weight * normaliser
        factor = tl.where(row == _UNCOUNTED, 0.0, factor)
        # its log Z was not asked for and is given as 0: exponentials would overflow
        normaliser = tl.where(row == _UNCOUNTED, float("inf"), normaliser)
        for start in range(0, V, BLOCK):
            column = start + offsets
            value = tl.load(line + column, mask=column < V, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(value - normaliser) * factor - tl.where(column == row, 1.0, 0.0)
            tl.store(line + column, gradient.to(logits.dtype.element_ty), mask=column < V)


def _turn(
    logits_CV: torch.Tensor,
    rows_C: torch.Tensor,
    z_weight: float,
    combine: Combine | None,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and log Z (C,); logits become their gradient. See ``chunked.forward``."""
    C, V = logits_CV.shape
    statistics_3C = logits_CV.new_empty(3, C, dtype=torch.float32)

    def launch(log_z_C: torch.Tensor | None, statistics: bool, gradient: bool) -> None:
        _turn_rows[(C,)](
            logits_CV,
            rows_C,
            statistics_3C if statistics else None,
            log_z_C,
            z_weight,
            V,
            STATISTICS=statistics,
            GRADIENT=gradient,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )

    launch(None, True, gradient and combine is None)
    if combine is not None:
        statistics_3C = combine(statistics_3C)
    largest_C, sum_C, label_C = statistics_3C.unbind(0)
    counted_C = rows_C != UNCOUNTED
    log_z_C = torch.where(counted_C, largest_C + sum_C.log(), 0.0)
    if gradient and combine is not None:
        launch(log_z_C, False, True)
    return torch.where(counted_C, log_z_C - label_C, 0.0), log_z_C


forward = on_its_device(partial(chunked.forward, turn=_turn))
