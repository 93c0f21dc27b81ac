"""Gather, scatter and top-k for CUDA, without atomics: one program writes each output.

A scatter runs over tokens instead of rows. ``inverse_of`` sorts the rows by token once, so that a
program finds the rows of its token side by side and sums them in fp32, in the order of the route.
Top-k finds the k-th key of each group by radix selection and writes the scores above it in order of
index, then ties at the k-th key by lower index.

T tokens, R routed rows, G groups, D model.
"""

import torch
import triton
import triton.language as tl

from earlyfuse.kernels.triton_support import launcher

WIDTHS = (128, 1024)  # of a program's part of a row: narrow and wide models
# one program per group waits at each step: few large steps. Per 4096 tokens this takes 78 barriers
# on sm_90 instead of 624 with steps of 512 and 8 warps, and three quarters of the instructions
SELECT_BLOCK, SELECT_WARPS = 4096, 16
RADIX_BITS = 8


# ---------------------------------------------------------------- kernels


@triton.jit
def _gather_kernel(x_ptr, row_ptr, out_ptr, width, BLOCK: tl.constexpr):
    routed = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(row_ptr + routed).to(tl.int64)
    values = tl.load(x_ptr + token * width + column, mask=column < width)
    tl.store(out_ptr + routed * width + column, values, mask=column < width)


@triton.jit
def _combine_kernel(
    y_ptr, order_ptr, begin_ptr, weight_ptr, out_ptr, width,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(tl.load(begin_ptr + token), tl.load(begin_ptr + token + 1)):
        routed = tl.load(order_ptr + place).to(tl.int64)
        values = tl.load(y_ptr + routed * width + column, mask=column < width, other=0.0)
        values = values.to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weight_ptr + routed).to(tl.float32)
        total += values
    tl.store(out_ptr + token * width + column, total, mask=column < width)


@triton.jit
def _combine_backward_kernel(
    dout_ptr, y_ptr, row_ptr, weight_ptr, dy_ptr, dweight_ptr, width,
    WEIGHTED: tl.constexpr, NEED_Y: tl.constexpr, NEED_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    routed = tl.program_id(0).to(tl.int64)
    token = tl.load(row_ptr + routed).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_ptr + routed).to(tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        dout = tl.load(dout_ptr + token * width + column, mask=column < width, other=0.0)
        dout = dout.to(tl.float32)
        if NEED_WEIGHT:
            y = tl.load(y_ptr + routed * width + column, mask=column < width, other=0.0)
            product += dout * y.to(tl.float32)
        if NEED_Y:
            tl.store(dy_ptr + routed * width + column, dout * weight, mask=column < width)
    if NEED_WEIGHT:
        tl.store(dweight_ptr + routed, tl.sum(product))


@triton.jit
def _ordered_key(score):
    """An unsigned integer of the score's order: equal for equal scores, -0.0 and 0.0 included."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _select_kernel(
    score_ptr, out_ptr, tokens, k, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One program per group: 32 / BITS counting passes, then one that writes."""
    group = tl.program_id(0).to(tl.int64)
    digits: tl.constexpr = 1 << BITS
    digit = tl.arange(0, digits)
    found = tl.zeros((), tl.uint32)  # the leading bits of the k-th key
    wanted = k  # how many are still to be taken among keys that begin like it
    for step in tl.static_range(32 // BITS):
        shift = 32 - BITS * (step + 1)
        count = tl.zeros((digits,), tl.int32)
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            score = tl.load(score_ptr + group * tokens + token, mask=token < tokens, other=0.0)
            key = _ordered_key(score)
            candidate = token < tokens
            if step > 0:
                candidate = candidate & ((key >> (shift + BITS)) == found)
            value = ((key >> shift) & (digits - 1)).to(tl.int32)
            # those that are no candidates are counted at digit 0 and taken off again
            count += tl.histogram(tl.where(candidate, value, 0), digits)
            count -= tl.where(digit == 0, tl.sum((~candidate).to(tl.int32)), 0)
        above = tl.sum(count) - tl.cumsum(count)  # keys of a higher digit
        chosen = tl.min(tl.where(above < wanted, digit, digits))
        chosen = tl.minimum(chosen, digits - 1)
        wanted -= tl.sum(tl.where(digit == chosen, above, 0))
        found = (found << BITS) | chosen.to(tl.uint32)
    written = tl.zeros((), tl.int32)
    tied = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + group * tokens + token, mask=token < tokens, other=0.0)
        key = _ordered_key(score)
        tie = ((key == found) & (token < tokens)).to(tl.int32)
        tie_rank = tied + tl.cumsum(tie) - tie
        taken = ((key > found) & (token < tokens)) | ((tie == 1) & (tie_rank < wanted))
        place = written + tl.cumsum(taken.to(tl.int32)) - 1
        tl.store(out_ptr + group * k + place, token.to(tl.int64), mask=taken)
        written += tl.sum(taken.to(tl.int32))
        tied += tl.sum(tie)


# ---------------------------------------------------------------- launchers


@launcher
def gather_rows(x_TD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
    """x[row] → (R, D)."""
    rows, width = row_R.shape[0], x_TD.shape[1]
    out_RD = x_TD.new_empty(rows, width)
    if out_RD.numel():
        block = block_of(width)
        _gather_kernel[rows, triton.cdiv(width, block)](x_TD, row_R, out_RD, width, BLOCK=block)
    return out_RD


@launcher
def scatter_add_rows(
    y_RD: torch.Tensor, row_R: torch.Tensor, tokens: int, weight_R: torch.Tensor | None
) -> torch.Tensor:
    """out[row] += weight · y over all rows → (tokens, D)."""
    return combine(y_RD, *inverse_of(row_R, tokens), weight_R)


def inverse_of(row_R: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by token: their numbers (R,), and the first of each token (tokens + 1,).

    The sort is stable. No host synchronisation.
    """
    sorted_R, order_R = row_R.int().sort(stable=True)
    begin_T1 = torch.searchsorted(
        sorted_R, torch.arange(tokens + 1, device=row_R.device, dtype=torch.int32), out_int32=True
    )
    return order_R.int(), begin_T1


def combine(
    y_RD: torch.Tensor,
    order_R: torch.Tensor,
    begin_T1: torch.Tensor,
    weight_R: torch.Tensor | None,
) -> torch.Tensor:
    """out[t] = Σ weight · y over the rows of t, in their order → (T, D)."""
    tokens, width = begin_T1.shape[0] - 1, y_RD.shape[1]
    out_TD = y_RD.new_empty(tokens, width)
    if out_TD.numel():
        block = block_of(width)
        _combine_kernel[tokens, triton.cdiv(width, block)](
            y_RD, order_R, begin_T1, weight_R, out_TD, width,
            WEIGHTED=weight_R is not None, BLOCK=block,
        )  # fmt: skip
    return out_TD


@launcher
def scatter_add_rows_backward(
    dout_TD: torch.Tensor,
    y_RD: torch.Tensor | None,
    row_R: torch.Tensor,
    weight_R: torch.Tensor | None,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and of the weights; empty where not needed."""
    row_R, weight_R = row_R.contiguous(), None if weight_R is None else weight_R.contiguous()
    rows, width = row_R.shape[0], dout_TD.shape[1]
    need_weight = y_RD is not None and weight_R is not None and need[1]
    dy_RD = dout_TD.new_empty((rows, width) if need[0] else 0)
    dweight_R = dout_TD.new_empty(0) if weight_R is None else torch.zeros_like(weight_R)
    if rows and width:
        _combine_backward_kernel[rows,](
            dout_TD, y_RD, row_R, weight_R,
            dy_RD, dweight_R, width,
            WEIGHTED=weight_R is not None, NEED_Y=need[0], NEED_WEIGHT=need_weight,
            BLOCK=block_of(width),
        )  # fmt: skip
    return dy_RD, dweight_R if need_weight else dout_TD.new_empty(0)


@launcher
def select_top_k(scores_GT: torch.Tensor, k: int) -> torch.Tensor:
    """The k best tokens of each group, best first."""
    groups, tokens = scores_GT.shape
    chosen_Gk = torch.empty(groups, k, dtype=torch.int64, device=scores_GT.device)
    if not chosen_Gk.numel():
        return chosen_Gk
    _select_kernel[groups,](
        scores_GT, chosen_Gk, tokens, k,
        BLOCK=SELECT_BLOCK, BITS=RADIX_BITS, num_warps=SELECT_WARPS,
    )  # fmt: skip
    # in order of index so far: a stable sort by score leaves ties there
    order_Gk = scores_GT.gather(1, chosen_Gk).sort(dim=1, descending=True, stable=True).indices
    return chosen_Gk.gather(1, order_Gk)


def block_of(width: int) -> int:
    """Columns of a row that one program takes."""
    return WIDTHS[0] if width <= WIDTHS[0] else WIDTHS[1]
