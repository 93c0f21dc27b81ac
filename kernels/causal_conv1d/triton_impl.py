"""The causal convolution for CUDA: a program walks some tokens of a block of channels.

The last four inputs stay in registers, so that each input is read once and each token's SiLU is
computed once, forward and backward; what a program reads twice are the three tokens before its
chunk (and, backward, the three after it). Backward makes the pre-activations again. A token's
``dpre`` adds to the gradients of four inputs, which are summed in registers too: once the third
token after an input has added its part, that gradient is complete.

Parameter gradients are one partial sum per program, added up in a second, ordered step: no atomics.

All widths run as four taps, the farthest with weight 0.

B rows, L tokens, D channels, W taps, V = W - 1, C chunks of tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from earlyfuse.kernels.ahead_of_time import Variant
from earlyfuse.kernels.triton_support import pointer_type, tuned

FORWARD_TOKENS = 64  # of a chunk
BACKWARD_TOKENS = 128  # each chunk leaves W + 1 partial sums per channel
UNROLLED = 4  # tokens whose loads may be on their way together


def _configs(channels_per_thread: int) -> list[triton.Config]:
    return [
        triton.Config({"CHANNELS": 32 * warps * channels_per_thread}, num_warps=warps)
        for warps in (1, 2, 4)
    ]


# backward holds 25 values per channel: with four channels a thread takes 220 registers
FORWARD_CONFIGS, BACKWARD_CONFIGS = _configs(4), _configs(2)
TUNED_OVER = ["B", "L", "D"]


@triton.jit
def _silu_gradient(pre, dy):
    gate = 1.0 / (1.0 + tl.exp(-pre))
    return dy * gate * (1.0 + pre * (1.0 - gate))


@triton.jit
def _input_before(x, state, row, token, x_row_stride, x_token_stride, channel, D, V, inside,
                  HAS_STATE: tl.constexpr):  # fmt: skip
    """Input ``token`` of a row, from the state where it lies before the segment; fp32."""
    value = tl.load(
        x + row * x_row_stride + token * x_token_stride + channel,
        mask=inside & (token >= 0),
        other=0.0,
    ).to(tl.float32)
    if HAS_STATE:
        slot = token + V
        value += tl.load(
            state + (row * V + slot) * D + channel,
            mask=inside & (token < 0) & (slot >= 0),
            other=0.0,
        ).to(tl.float32)
    return value


@triton.jit
def _inputs_before(x, state, row, start, x_row_stride, x_token_stride, channel, D, V, inside,
                   HAS_STATE: tl.constexpr):  # fmt: skip
    x1 = _input_before(x, state, row, start - 1, x_row_stride, x_token_stride, channel, D, V,
                       inside, HAS_STATE)  # fmt: skip
    x2 = _input_before(x, state, row, start - 2, x_row_stride, x_token_stride, channel, D, V,
                       inside, HAS_STATE)  # fmt: skip
    x3 = _input_before(x, state, row, start - 3, x_row_stride, x_token_stride, channel, D, V,
                       inside, HAS_STATE)  # fmt: skip
    return x1, x2, x3


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
@triton.jit
def _forward(
    x, weight, bias, positions, state, y, final,
    B, L, D, x_row_stride, x_token_stride,
    W: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    V: tl.constexpr = W - 1
    row = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * TOKENS
    stop = tl.minimum(start + TOKENS, L)
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    w0, w1, w2, w3, added = _parameters(weight, bias, channel, inside, W, HAS_BIAS)
    x1, x2, x3 = _inputs_before(x, state, row, start, x_row_stride, x_token_stride, channel, D, V,
                                inside, HAS_STATE)  # fmt: skip
    for token in tl.range(start, stop, loop_unroll_factor=STEPS):
        x0 = tl.load(x + row * x_row_stride + token * x_token_stride + channel, mask=inside,
                     other=0.0).to(tl.float32)  # fmt: skip
        position = 0
        if HAS_POSITIONS:
            position = tl.load(positions + row * L + token).to(tl.int32)
        out = _pre_activation(x0, x1, x2, x3, w0, w1, w2, w3, added, position, HAS_POSITIONS)
        if SILU:
            out = out / (1.0 + tl.exp(-out))
        tl.store(y + (row * L + token) * D + channel, out.to(y.dtype.element_ty), mask=inside)
        x3, x2, x1 = x2, x1, x0
    if stop == L:  # the last inputs are still here: x1 is the very last
        last = final + (row * V + V) * D + channel
        tl.store(last - D, x1.to(final.dtype.element_ty), mask=inside)
        tl.store(last - 2 * D, x2.to(final.dtype.element_ty), mask=inside & (W > 2))
        tl.store(last - 3 * D, x3.to(final.dtype.element_ty), mask=inside & (W > 3))


@tuned(BACKWARD_CONFIGS, TUNED_OVER)
@triton.jit
def _backward(
    dy, dfinal, x, weight, bias, positions, state, dx, dstate, partial,
    B, L, D, dy_row_stride, dy_token_stride, x_row_stride, x_token_stride,
    W: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    V: tl.constexpr = W - 1
    row = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    start = chunk * TOKENS
    stop = tl.minimum(start + TOKENS, L)
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    w0, w1, w2, w3, added = _parameters(weight, bias, channel, inside, W, HAS_BIAS)
    x1, x2, x3 = _inputs_before(x, state, row, start, x_row_stride, x_token_stride, channel, D, V,
                                inside, HAS_STATE)  # fmt: skip
    # sums for the inputs one, two and three tokens back
    d1 = tl.zeros([CHANNELS], tl.float32)
    d2 = tl.zeros([CHANNELS], tl.float32)
    d3 = tl.zeros([CHANNELS], tl.float32)
    dw0 = tl.zeros([CHANNELS], tl.float32)
    dw1 = tl.zeros([CHANNELS], tl.float32)
    dw2 = tl.zeros([CHANNELS], tl.float32)
    dw3 = tl.zeros([CHANNELS], tl.float32)
    dbias = tl.zeros([CHANNELS], tl.float32)
    for token in tl.range(start, stop + 3, loop_unroll_factor=STEPS):
        reads = inside & (token < L)
        x0 = tl.load(x + row * x_row_stride + token * x_token_stride + channel, mask=reads,
                     other=0.0).to(tl.float32)  # fmt: skip
        dpre = tl.load(dy + row * dy_row_stride + token * dy_token_stride + channel, mask=reads,
                       other=0.0).to(tl.float32)  # fmt: skip
        position = 0
        if HAS_POSITIONS:
            position = tl.load(positions + row * L + token, mask=token < L, other=0).to(tl.int32)
        if SILU:
            pre = _pre_activation(x0, x1, x2, x3, w0, w1, w2, w3, added, position, HAS_POSITIONS)
            dpre = _silu_gradient(pre, dpre)
        dpre1, dpre2, dpre3 = dpre, dpre, dpre
        if HAS_POSITIONS:
            dpre1 = tl.where(position >= 1, dpre, 0.0)
            dpre2 = tl.where(position >= 2, dpre, 0.0)
            dpre3 = tl.where(position >= 3, dpre, 0.0)
        # the input three tokens back is complete; before the segment it belongs to the state
        done = token - 3
        dx3 = d3 + dpre3 * w3
        slot = done - L + V  # of the final state, whose gradient it has too
        last = inside & (slot >= 0) & (slot < V)
        dx3 += tl.load(dfinal + (row * V + slot) * D + channel, mask=last, other=0.0).to(tl.float32)
        tl.store(dx + (row * L + done) * D + channel, dx3.to(dx.dtype.element_ty),
                 mask=inside & (done >= start) & (done < stop))  # fmt: skip
        if HAS_STATE:
            slot = done + V  # of the initial state
            tl.store(dstate + (row * V + slot) * D + channel, dx3.to(dstate.dtype.element_ty),
                     mask=inside & (start == 0) & (slot >= 0) & (slot < V))  # fmt: skip
        d3, d2, d1 = d2 + dpre2 * w2, d1 + dpre1 * w1, dpre * w0
        own = tl.where(token < stop, 1.0, 0.0)  # later tokens add to their own chunk's parameters
        dw0 += own * dpre * x0
        dw1 += own * dpre1 * x1
        dw2 += own * dpre2 * x2
        dw3 += own * dpre3 * x3
        dbias += own * dpre
        x3, x2, x1 = x2, x1, x0
    sums = partial + (row * tl.num_programs(1) + chunk) * (W + 1) * D + channel
    tl.store(sums + V * D, dw0, mask=inside)
    tl.store(sums + (V - 1) * D, dw1, mask=inside)
    tl.store(sums + (V - 2) * D, dw2, mask=inside & (W > 2))
    tl.store(sums + (V - 3) * D, dw3, mask=inside & (W > 3))
    tl.store(sums + W * D, dbias, mask=inside)


def forward(
    x_BLD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None,
    positions_BL: torch.Tensor | None,
    state_BVD: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, D) and the final state (B, V, D)."""
    B, L, D = x_BLD.shape
    W = weight_DW.shape[1]
    y_BLD = x_BLD.new_empty(B, L, D)
    if y_BLD.numel() == 0:
        final_BVD = x_BLD.new_zeros(B, W - 1, D)
        return y_BLD, final_BVD if state_BVD is None else final_BVD.copy_(state_BVD)
    final_BVD = x_BLD.new_empty(B, W - 1, D)
    chunks = triton.cdiv(L, FORWARD_TOKENS)
    _forward[lambda meta: (triton.cdiv(D, meta["CHANNELS"]), chunks, B)](
        x_BLD,
        weight_DW.contiguous(),
        _contiguous(bias_D),
        _contiguous(positions_BL),
        _contiguous(state_BVD),
        y_BLD,
        final_BVD,
        B,
        L,
        D,
        x_BLD.stride(0),
        x_BLD.stride(1),
        W=W,
        TOKENS=FORWARD_TOKENS,
        STEPS=UNROLLED,
        **_flags(bias_D, positions_BL, state_BVD, silu),
    )
    return y_BLD, final_BVD


def backward(
    dy_BLD: torch.Tensor,
    dfinal_BVD: torch.Tensor,
    x_BLD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None,
    positions_BL: torch.Tensor | None,
    state_BVD: torch.Tensor | None,
    silu: bool,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias and initial state; all are made, what is not needed dropped."""
    B, L, D = x_BLD.shape
    W = weight_DW.shape[1]
    need_inputs, need_parameters = need
    dx_BLD = x_BLD.new_empty(B, L, D)
    dstate_BVD = dfinal_BVD.clone(memory_format=torch.contiguous_format)  # as it stays when L is 0
    chunks = triton.cdiv(L, BACKWARD_TOKENS)
    partial_NXD = x_BLD.new_empty(B * chunks, W + 1, D, dtype=torch.float32)
    if dx_BLD.numel():
        dy_BLD = dy_BLD if dy_BLD.stride(2) == 1 else dy_BLD.contiguous()
        _backward[lambda meta: (triton.cdiv(D, meta["CHANNELS"]), chunks, B)](
            dy_BLD,
            dfinal_BVD.contiguous(),
            x_BLD,
            weight_DW.contiguous(),
            _contiguous(bias_D),
            _contiguous(positions_BL),
            _contiguous(state_BVD),
            dx_BLD,
            dstate_BVD,
            partial_NXD,
            B,
            L,
            D,
            dy_BLD.stride(0),
            dy_BLD.stride(1),
            x_BLD.stride(0),
            x_BLD.stride(1),
            W=W,
            TOKENS=BACKWARD_TOKENS,
            STEPS=UNROLLED,
            **_flags(bias_D, positions_BL, state_BVD, silu),
        )
    sums_XD = partial_NXD.sum(0)
    need_bias = need_parameters and bias_D is not None
    need_state = need_inputs and state_BVD is not None
    return (
        dx_BLD if need_inputs else x_BLD.new_empty(0),
        sums_XD[:W].t().to(weight_DW.dtype).contiguous() if need_parameters else x_BLD.new_empty(0),
        sums_XD[W].to(weight_DW.dtype, copy=True) if need_bias else x_BLD.new_empty(0),
        dstate_BVD if need_state else x_BLD.new_empty(0),
    )


def variants() -> Iterator[Variant]:
    """Every configuration in bf16, one in fp32, and one without anything that may be missing."""
    for config in FORWARD_CONFIGS:
        yield _forward_variant(config, torch.bfloat16, True)
    yield _forward_variant(FORWARD_CONFIGS[0], torch.float32, True)
    yield _forward_variant(FORWARD_CONFIGS[0], torch.bfloat16, False)
    for config in BACKWARD_CONFIGS:
        yield _backward_variant(config, torch.bfloat16, True)
    yield _backward_variant(BACKWARD_CONFIGS[0], torch.float32, True)
    yield _backward_variant(BACKWARD_CONFIGS[0], torch.bfloat16, False)


def _forward_variant(config: triton.Config, dtype: torch.dtype, full: bool) -> Variant:
    return _variant("forward", _forward, config, dtype, full, ("x", "weight", "y", "final"), ("x",))


def _backward_variant(config: triton.Config, dtype: torch.dtype, full: bool) -> Variant:
    tensors = ("dy", "dfinal", "x", "weight", "dx", "dstate")
    return _variant("backward", _backward, config, dtype, full, tensors, ("dy", "x"))


def _variant(
    pass_name: str,
    kernel: Any,
    config: triton.Config,
    dtype: torch.dtype,
    full: bool,
    tensors: tuple[str, ...],
    strided: tuple[str, ...],
) -> Variant:
    """``full``: with bias, positions and state; ``strided``: the tensors that have strides."""
    pointer, backward = pointer_type(dtype), kernel is _backward
    optional = {"bias": pointer, "positions": "*i64", "state": pointer}
    strides = [f"{name}_{which}_stride" for name in strided for which in ("row", "token")]
    return Variant(
        name=f"causal_conv1d {pass_name} {pointer[1:]} {config.kwargs['CHANNELS']} channels"
        f"{'' if full else ', bare'}",
        kernel=kernel,
        types={
            **dict.fromkeys(tensors, pointer),
            **({"partial": "*fp32"} if backward else {}),
            **(optional if full else {}),
            **dict.fromkeys(("B", "L", "D", *strides), "i32"),
        },
        constants={
            "W": 4,
            "TOKENS": BACKWARD_TOKENS if backward else FORWARD_TOKENS,
            "STEPS": UNROLLED,
            "SILU": True,
            **{f"HAS_{name.upper()}": full for name in optional},
            **({} if full else dict.fromkeys(optional)),
            **config.kwargs,
        },
        aligned=("D", *strides),
        warps=config.num_warps,
    )


def _flags(
    bias_D: torch.Tensor | None,
    positions_BL: torch.Tensor | None,
    state_BVD: torch.Tensor | None,
    silu: bool,
) -> dict[str, bool]:
    return {
        "SILU": silu,
        "HAS_BIAS": bias_D is not None,
        "HAS_POSITIONS": positions_BL is not None,
        "HAS_STATE": state_BVD is not None,
    }


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
