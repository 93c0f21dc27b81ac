"""Kernels of the causal convolution on CUDA; ``triton_impl`` launches them.

A program walks some tokens of a block of channels.

The last four inputs stay in registers, so that each input is read once and each token's SiLU is
computed once, forward and backward; what a program reads twice are the three tokens before its
chunk (and, backward, the three after it). Backward makes the pre-activations again. A token's
``dpre`` adds to the gradients of four inputs, which are summed in registers too: once the third
token after an input has added its part, that gradient is complete.

Parameter gradients are one partial sum per program, added up in a second, ordered step: no atomics.

All widths run as four taps, the farthest with weight 0.

B rows, L tokens, D channels, W taps, V = W - 1, C chunks of tokens.
"""

import triton
import triton.language as tl

from earlyfuse.kernels.triton_support import tuned

FORWARD_TOKENS = 64  # of a chunk
BACKWARD_TOKENS = 128  # each chunk leaves W + 1 partial sums per channel
UNROLLED = 4
LOG2E = tl.constexpr(1.4426950408889634)


def _configs(channels_per_thread: int) -> list[triton.Config]:
    return [
        triton.Config({"CHANNELS": 32 * warps * channels_per_thread}, num_warps=warps)
        for warps in (1, 2, 4)
    ]


# backward: four channels of a thread take 128 registers and a fifth less instructions than two
FORWARD_CONFIGS, BACKWARD_CONFIGS = _configs(4), [*_configs(2)[1:], *_configs(4)[:2]]
TUNED_OVER = ["D"]  # not over B and L: every new length would be measured anew


@triton.jit
def _silu_gradient(pre, dy):
    gate = 1.0 / (1.0 + tl.exp2(pre * -LOG2E))
    return dy * gate * (1.0 + pre * (1.0 - gate))


@triton.jit
def _input_before(x, state, start, x_token_stride, channel, D, inside, BACK: tl.constexpr,
                  V: tl.constexpr, HAS_STATE: tl.constexpr):  # fmt: skip
    """The input ``BACK`` tokens before a chunk, from the state where it lies before the segment."""
    value = tl.load(
        x + (channel - BACK * x_token_stride), mask=inside & (start >= BACK), other=0.0
    ).to(tl.float32)
    if HAS_STATE and V >= BACK:
        value += tl.load(
            state + (V - BACK) * D + channel, mask=inside & (start == 0), other=0.0
        ).to(tl.float32)
    return value


@triton.jit
def _inputs_before(x, state, start, x_token_stride, channel, D, inside, V: tl.constexpr,
                   HAS_STATE: tl.constexpr):  # fmt: skip
    x1 = _input_before(x, state, start, x_token_stride, channel, D, inside, 1, V, HAS_STATE)
    x2 = _input_before(x, state, start, x_token_stride, channel, D, inside, 2, V, HAS_STATE)
    x3 = _input_before(x, state, start, x_token_stride, channel, D, inside, 3, V, HAS_STATE)
    return x1, x2, x3


@triton.jit
def _token(x, i, stride, channel, mask):
    return tl.load(x + (i * stride + channel), mask=mask, other=0.0)


@triton.jit
def _position(positions, i, count, HAS_POSITIONS: tl.constexpr):
    position = 0
    if HAS_POSITIONS:
        position = tl.load(positions + i, mask=i < count, other=0).to(tl.int32)
    return position


@triton.jit
def _parameters(weight, bias, channel, inside, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The weights of inputs 0, 1, 2 and 3 tokens back, and the bias; fp32."""
    nearest = weight + channel * W + W - 1
    w0 = tl.load(nearest, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(nearest - 1, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(nearest - 2, mask=inside & (W > 2), other=0.0).to(tl.float32)
    w3 = tl.load(nearest - 3, mask=inside & (W > 3), other=0.0).to(tl.float32)
    added = tl.zeros_like(w0)
    if HAS_BIAS:
        added = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, added


@triton.jit
def _pre_activation(x0, x1, x2, x3, w0, w1, w2, w3, bias, position, HAS_POSITIONS: tl.constexpr):
    """Bias and taps; x1 is the input before x0, w1 its weight. Early tokens see fewer."""
    if HAS_POSITIONS:
        x1 = tl.where(position >= 1, x1, 0.0)
        x2 = tl.where(position >= 2, x2, 0.0)
        x3 = tl.where(position >= 3, x3, 0.0)
    return bias + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3


@tuned(FORWARD_CONFIGS, TUNED_OVER)
@triton.jit(do_not_specialize=["B", "L"])
def forward_kernel(
    x, weight, bias, positions, state, y, final,
    B, L, D, x_row_stride, x_token_stride,
    W: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    V: tl.constexpr = W - 1
    row = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    first = row * L + start
    count = tl.minimum(L - start, TOKENS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    w0, w1, w2, w3, added = _parameters(weight, bias, channel, inside, W, HAS_BIAS)
    x += row * x_row_stride + start.to(tl.int64) * x_token_stride
    y += first * D
    if HAS_POSITIONS:
        positions += first
    if HAS_STATE:
        state += row * V * D
    x1, x2, x3 = _inputs_before(x, state, start, x_token_stride, channel, D, inside, V, HAS_STATE)
    x0 = _token(x, 0, x_token_stride, channel, inside)
    position = _position(positions, 0, count, HAS_POSITIONS)
    for i in tl.range(0, count, loop_unroll_factor=STEPS):
        # asked for before this token's output is stored: a load does not pass a store
        x_next = _token(x, i + 1, x_token_stride, channel, inside & (i + 1 < count))
        position_next = _position(positions, i + 1, count, HAS_POSITIONS)
        x0 = x0.to(tl.float32)
        out = _pre_activation(x0, x1, x2, x3, w0, w1, w2, w3, added, position, HAS_POSITIONS)
        if SILU:
            out = out / (1.0 + tl.exp2(out * -LOG2E))
        tl.store(y + (i * D + channel), out.to(y.dtype.element_ty), mask=inside)
        x3, x2, x1, x0, position = x2, x1, x0, x_next, position_next
    if start + count == L:  # the last inputs are still here: x1 is the very last
        last = final + (row * V + V) * D + channel
        tl.store(last - D, x1.to(final.dtype.element_ty), mask=inside)
        tl.store(last - 2 * D, x2.to(final.dtype.element_ty), mask=inside & (W > 2))
        tl.store(last - 3 * D, x3.to(final.dtype.element_ty), mask=inside & (W > 3))


@triton.jit
def _tap_gradients(x0, x1, x2, x3, w0, w1, w2, w3, bias, dy, position, SILU: tl.constexpr,
                   HAS_POSITIONS: tl.constexpr):  # fmt: skip
    """The gradient of a token's pre-activation, as the inputs 0, 1, 2 and 3 tokens back see it."""
    dpre = dy.to(tl.float32)
    if SILU:
        pre = _pre_activation(x0, x1, x2, x3, w0, w1, w2, w3, bias, position, HAS_POSITIONS)
        dpre = _silu_gradient(pre, dpre)
    dpre1, dpre2, dpre3 = dpre, dpre, dpre
    if HAS_POSITIONS:
        dpre1 = tl.where(position >= 1, dpre, 0.0)
        dpre2 = tl.where(position >= 2, dpre, 0.0)
        dpre3 = tl.where(position >= 3, dpre, 0.0)
    return dpre, dpre1, dpre2, dpre3


@triton.jit
def _store_dx(dx, dstate, value, i, start, channel, D, inside, V: tl.constexpr,
              HAS_STATE: tl.constexpr):  # fmt: skip
    """The gradient of the input three tokens before token ``i`` of a chunk, if it is the chunk's,
    or the state's in front of the first."""
    at = (i - 3) * D + channel
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside & (i >= 3))
    if HAS_STATE:
        of_state = (start == 0) & (i < 3) & (i + V >= 3)
        tl.store(dstate + (at + V * D), value.to(dstate.dtype.element_ty), mask=inside & of_state)


@tuned(BACKWARD_CONFIGS, TUNED_OVER)
@triton.jit(do_not_specialize=["B", "L"])
def backward_kernel(
    dy, dfinal, x, weight, bias, positions, state, dx, dstate, partial,
    B, L, D, dy_row_stride, dy_token_stride, x_row_stride, x_token_stride,
    W: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    V: tl.constexpr = W - 1
    row = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    first = row * L + start
    rest = L - start
    count = tl.minimum(rest, TOKENS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    w0, w1, w2, w3, added = _parameters(weight, bias, channel, inside, W, HAS_BIAS)
    x += row * x_row_stride + start.to(tl.int64) * x_token_stride
    dy += row * dy_row_stride + start.to(tl.int64) * dy_token_stride
    dx += first * D
    dfinal += row * V * D
    dstate += row * V * D
    if HAS_POSITIONS:
        positions += first
    if HAS_STATE:
        state += row * V * D
    x1, x2, x3 = _inputs_before(x, state, start, x_token_stride, channel, D, inside, V, HAS_STATE)
    # sums for the inputs one, two and three tokens back
    d1 = tl.zeros([CHANNELS], tl.float32)
    d2 = tl.zeros([CHANNELS], tl.float32)
    d3 = tl.zeros([CHANNELS], tl.float32)
    dw0 = tl.zeros([CHANNELS], tl.float32)
    dw1 = tl.zeros([CHANNELS], tl.float32)
    dw2 = tl.zeros([CHANNELS], tl.float32)
    dw3 = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    x0 = _token(x, 0, x_token_stride, channel, inside)
    dy0 = _token(dy, 0, dy_token_stride, channel, inside)
    position = _position(positions, 0, rest, HAS_POSITIONS)
    for i in tl.range(0, count, loop_unroll_factor=STEPS):
        # asked for before this token's gradient is stored: a load does not pass a store
        reads = inside & (i + 1 < rest)
        x_next = _token(x, i + 1, x_token_stride, channel, reads)
        dy_next = _token(dy, i + 1, dy_token_stride, channel, reads)
        position_next = _position(positions, i + 1, rest, HAS_POSITIONS)
        x0 = x0.to(tl.float32)
        dpre, dpre1, dpre2, dpre3 = _tap_gradients(
            x0, x1, x2, x3, w0, w1, w2, w3, added, dy0, position, SILU, HAS_POSITIONS
        )
        # the input three tokens back is complete
        _store_dx(dx, dstate, d3 + dpre3 * w3, i, start, channel, D, inside, V, HAS_STATE)
        d3, d2, d1 = d2 + dpre2 * w2, d1 + dpre1 * w1, dpre * w0
        dw0 += dpre * x0
        dw1 += dpre1 * x1
        dw2 += dpre2 * x2
        dw3 += dpre3 * x3
        dbias += dpre
        x3, x2, x1, x0 = x2, x1, x0, x_next
        dy0, position = dy_next, position_next
    # the next chunk's first tokens add to the last inputs here; parameters are its own concern
    for later in tl.static_range(3):
        i = count + later
        x0 = x0.to(tl.float32)
        dpre, dpre1, dpre2, dpre3 = _tap_gradients(
            x0, x1, x2, x3, w0, w1, w2, w3, added, dy0, position, SILU, HAS_POSITIONS
        )
        dx3 = d3 + dpre3 * w3
        slot = i - 3 - rest + V  # of the final state, whose gradient it has too
        dx3 += tl.load(dfinal + (slot * D + channel), mask=inside & (slot >= 0), other=0.0).to(
            tl.float32
        )
        _store_dx(dx, dstate, dx3, i, start, channel, D, inside, V, HAS_STATE)
        d3, d2, d1 = d2 + dpre2 * w2, d1 + dpre1 * w1, dpre * w0
        x3, x2, x1 = x2, x1, x0
        if later < 2:
            reads = inside & (i + 1 < rest)
            x0 = _token(x, i + 1, x_token_stride, channel, reads)
            dy0 = _token(dy, i + 1, dy_token_stride, channel, reads)
            position = _position(positions, i + 1, rest, HAS_POSITIONS)
    chunk = row * tl.num_programs(1) + tl.program_id(1)
    sums = partial + chunk * (W + 1) * D + channel
    tl.store(sums + V * D, dw0, mask=inside)
    tl.store(sums + (V - 1) * D, dw1, mask=inside)
    tl.store(sums + (V - 2) * D, dw2, mask=inside & (W > 2))
    tl.store(sums + (V - 3) * D, dw3, mask=inside & (W > 3))
    tl.store(sums + W * D, dbias, mask=inside)
