"""Kernels of the selective scan on CUDA; ``triton_impl`` launches them.

A program owns one segment of one sequence, a block of W channels and all their N states, and walks
over tiles of T tokens. A tile is loaded at once, as rows of W channels; its T·N·W decays are
exponentials without a dependence between them. Tiles are laid out (T, N, W) with channels fastest,
so that a warp's lanes are channels and every thread holds all T tokens of its states: the scan over
T is then a chain of multiply-adds inside each thread, with no shuffles.

Base 2: log2(e) is folded into A, so that a decay is one ``ex2``. Addresses: 64 bits to the start of
a tile, 32 inside it. T tokens of a tile, W channels of a block, S segments, I chunks; the other
letters as in the package.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# no code depends on these: without this, kernels are compiled anew for lengths of 1, of multiples
# of 16 and others
SIZES = ("length", "segment", "segments", "chunks")


# ---------------------------------------------------------------- pieces of a tile


@triton.jit
def _carry(decay_l, h_l, decay_r, h_r):
    return decay_l * decay_r, h_l * decay_r + h_r


@triton.jit
def _carry_apart(decay_l, h_l, old_l, decay_r, h_r, old_r):
    # old: what is left of the state before the last token, which h less its input would cancel to
    return decay_l * decay_r, h_l * decay_r + h_r, h_l * decay_r + old_r


@triton.jit
def _carry_back(decay_l, out_l, rest_l, dh_l, decay_r, out_r, rest_r, dh_r):
    # left is later. dh: gradient of the state at the first token, out: of the state before it,
    # rest: the decays of all tokens but the first
    return (
        decay_l * decay_r,
        out_l * decay_r + out_r,
        decay_l * rest_r,
        out_l * rest_r + dh_r,
    )


@triton.jit
def _rows(start, stride, t, d, length, channels):
    """A (T, W) tile in fp32 of the rows from ``start``, of which ``length`` remain; 0 outside."""
    inside = (t < length)[:, None] & (d < channels)[None, :]
    return tl.load(start + t[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _states(start, stride, t, n, length):
    """A (T, N) tile of B or C in fp32; 0 outside."""
    inside = (t < length)[:, None]
    return tl.load(start + t[:, None] * stride + n[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _steps(delta, stride, bias, group, t, d, length, channels):
    """dt (T, W) = softplus(delta + bias); 0 outside, so that such a token changes nothing."""
    v = _rows(delta, stride, t, d, length, channels)
    if group is not None:
        inside = (t < length)[:, None] & (d < channels)[None, :]
        g = tl.load(group + t, mask=t < length, other=0).to(tl.int32)
        v += tl.load(bias + g[:, None] * channels + d[None, :], mask=inside, other=0.0)
    elif bias is not None:
        v += tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
    # not tl.minimum: of NaN and 20 it makes 20
    e = tl.exp2(tl.where(v > 20.0, 20.0, v) * LOG2E)
    w = 1.0 + e
    # log(1 + e) loses e's low bits; e / (w - 1) puts them back (Kahan)
    soft = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    soft = tl.where(v > 20.0, v, soft)
    return tl.where((t < length)[:, None], soft, 0.0)


@triton.jit
def _cuts(reset, t, length):
    """Terms added to the exponents (T,), which exp2 turns into exactly 0. Backward never divides by
    a decay nor multiplies by an exponent, so nothing becomes inf · 0."""
    if reset is None:
        cut = tl.zeros(t.shape, tl.float32)
    else:  # not a return above: the compiler would go on to what follows it
        cut = tl.where(tl.load(reset + t, mask=t < length, other=0) != 0, -1e30, 0.0)
    return cut


@triton.jit
def _silu(z):
    gate = 1.0 / (1.0 + tl.exp2(z * -LOG2E))
    return z * gate, gate


@triton.jit
def _exponents(dt, A2, cut, reset):
    exponent = dt[:, None, :] * A2[None, :, :]
    if reset is not None:
        exponent += cut[:, None, None]
    return exponent


@triton.jit
def _row_of(tile, token, t):
    """One token's (N, W) of a (T, N, W) tile."""
    return tl.sum(tl.where((t == token)[:, None, None], tile, 0.0), axis=0)


@triton.jit
def _advance(h, u, u_l, delta, delta_l, B, B_l, A2, bias, group, reset, t, d, n, length, channels):
    """Through one tile from the state ``h`` before it: the last state; dt and cuts."""
    dt = _steps(delta, delta_l, bias, group, t, d, length, channels)
    x = dt * _rows(u, u_l, t, d, length, channels)
    source = x[:, None, :] * _states(B, B_l, t, n, length)[:, :, None]
    cut = _cuts(reset, t, length)
    decay = tl.exp2(_exponents(dt, A2, cut, reset))
    source = tl.where((t == 0)[:, None, None], source + decay * h[None], source)
    _, states = tl.associative_scan((decay, source), 0, _carry)
    return _row_of(states, t.shape[0] - 1, t), dt, cut


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def ends_kernel(
    u, delta, A, B, bias, group, reset, end, left,
    length, channels, segment, segments,
    u_b, u_l, delta_b, delta_l, B_b, B_l,
    N: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Segment s < S - 1: its end state from a zero start, and its decay, both (B, S, N, D)."""
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, n, t = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, N), tl.arange(0, TOKENS)
    here = (d < channels)[None, :]
    A2 = tl.load(A + d[None, :] * N + n[:, None], mask=here, other=0.0) * LOG2E
    h = tl.zeros([N, WIDTH], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    cuts = tl.zeros([TOKENS], tl.float32)
    for start in range(part * segment, tl.minimum((part + 1) * segment, length), TOKENS):
        token = batch * length + start
        h, dt, cut = _advance(
            h, u + batch * u_b + start * u_l, u_l, delta + batch * delta_b + start * delta_l,
            delta_l, B + batch * B_b + start * B_l, B_l, A2, bias,
            None if group is None else group + token, None if reset is None else reset + token,
            t, d, n, (length - start).to(tl.int32), channels,
        )  # fmt: skip
        total += tl.sum(dt, axis=0)
        cuts += cut
    at = (batch * segments + part) * N * channels + n[:, None] * channels + d[None, :]
    tl.store(end + at, h, mask=here)
    exponent = total[None, :] * A2 + tl.sum(cuts, axis=0)
    tl.store(left + at, tl.exp2(exponent), mask=here)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    u, delta, A, B, C, skip, z, bias, group, reset, first, end, left, y, final, starts,
    length, channels, segment, segments, chunks,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    N: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, n, t = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, N), tl.arange(0, TOKENS)
    here = (d < channels)[None, :]
    A2 = tl.load(A + d[None, :] * N + n[:, None], mask=here, other=0.0) * LOG2E
    outer = batch * channels * N + d[None, :] * N + n[:, None]
    inner = n[:, None] * channels + d[None, :]
    if first is not None:
        h = tl.load(first + outer, mask=here, other=0.0)
    else:
        h = tl.zeros([N, WIDTH], tl.float32)
    for earlier in range(part):
        at = (batch * segments + earlier) * N * channels + inner
        h = tl.load(left + at, mask=here, other=0.0) * h
        h += tl.load(end + at, mask=here, other=0.0)
    stop = tl.minimum((part + 1) * segment, length)
    for start in range(part * segment, stop, TOKENS):
        if starts is not None:  # noqa: SIM102  decided when compiling, the inner one when running
            if start % CHUNK == 0:
                at = (batch * chunks + start // CHUNK) * N * channels + inner
                tl.store(starts + at, h, mask=here)
        token, rest = batch * length + start, (length - start).to(tl.int32)
        dt = _steps(
            delta + batch * delta_b + start * delta_l, delta_l, bias,
            None if group is None else group + token, t, d, rest, channels,
        )  # fmt: skip
        u_TW = _rows(u + batch * u_b + start * u_l, u_l, t, d, rest, channels)
        B_TN = _states(B + batch * B_b + start * B_l, B_l, t, n, rest)
        C_TN = _states(C + batch * C_b + start * C_l, C_l, t, n, rest)
        cut = _cuts(None if reset is None else reset + token, t, rest)
        decay = tl.exp2(_exponents(dt, A2, cut, reset))
        source = (dt * u_TW)[:, None, :] * B_TN[:, :, None]
        source = tl.where((t == 0)[:, None, None], source + decay * h[None], source)
        _, states = tl.associative_scan((decay, source), 0, _carry)
        h = _row_of(states, TOKENS - 1, t)
        y_TW = tl.sum(states * C_TN[:, :, None], axis=1)
        if skip is not None:
            y_TW += tl.load(skip + d, mask=d < channels, other=0.0)[None, :] * u_TW
        if z is not None:
            silu, _ = _silu(_rows(z + batch * z_b + start * z_l, z_l, t, d, rest, channels))
            y_TW *= silu
        at_y = y + token * channels + t[:, None] * channels + d[None, :]
        tl.store(at_y, y_TW, mask=(t < rest)[:, None] & here)
    if stop == length:
        tl.store(final + outer, h, mask=here)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=SIZES)
def adjoints_kernel(
    dy, delta, A, C, z, bias, group, reset, into, left,
    length, channels, segment, segments,
    delta_b, delta_l, C_b, C_l, z_b, z_l,
    N: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Segment s: the gradient of the state before it from its own outputs alone, and its decay."""
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, n, t = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, N), tl.arange(0, TOKENS)
    here = (d < channels)[None, :]
    A2 = tl.load(A + d[None, :] * N + n[:, None], mask=here, other=0.0) * LOG2E
    dh = tl.zeros([N, WIDTH], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    cuts = tl.zeros([TOKENS], tl.float32)
    tiles = segment // TOKENS
    for i in range(tiles):
        start = part * segment + (tiles - 1 - i) * TOKENS
        token, rest = batch * length + start, (length - start).to(tl.int32)
        dt = _steps(
            delta + batch * delta_b + start * delta_l, delta_l, bias,
            None if group is None else group + token, t, d, rest, channels,
        )  # fmt: skip
        dy_TW = _rows(dy + token * channels, channels, t, d, rest, channels)
        if z is not None:
            silu, _ = _silu(_rows(z + batch * z_b + start * z_l, z_l, t, d, rest, channels))
            dy_TW *= silu
        C_TN = _states(C + batch * C_b + start * C_l, C_l, t, n, rest)
        cut = _cuts(None if reset is None else reset + token, t, rest)
        decay = tl.exp2(_exponents(dt, A2, cut, reset))
        _, dh = _retreat(decay, dy_TW, C_TN, dh, t)
        total += tl.sum(dt, axis=0)
        cuts += cut
    at = (batch * segments + part) * N * channels + n[:, None] * channels + d[None, :]
    tl.store(into + at, dh, mask=here)
    exponent = total[None, :] * A2 + tl.sum(cuts, axis=0)
    tl.store(left + at, tl.exp2(exponent), mask=here)


@triton.jit
def _retreat(decay, dy_TW, C_TN, dh, t):
    """Gradients (T, N, W) of a tile's states from that after it, and of the state before it."""
    T: tl.constexpr = t.shape[0]
    seed = dy_TW[:, None, :] * C_TN[:, :, None]
    seed = tl.where((t == T - 1)[:, None, None], seed + dh[None], seed)
    # a scan with reverse=True shuffles between lanes; a flip within each thread costs nothing
    decay, seed = tl.flip(decay, 0), tl.flip(seed, 0)
    ones = tl.full(seed.shape, 1.0, tl.float32)
    _, out, _, dh_TNW = tl.associative_scan((decay, decay * seed, ones, seed), 0, _carry_back)
    return tl.flip(dh_TNW, 0), _row_of(out, T - 1, t)


@triton.jit
def _over_channels(tile, DOT: tl.constexpr):
    """(T, N, W) → (T, N) summed over W; by tensor cores if DOT, for lanes would shuffle a lot."""
    T: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    W: tl.constexpr = tile.shape[2]
    if DOT:
        one = (tl.arange(0, 16)[None, :] + tl.zeros([W, 16], tl.int32)) == 0
        found = tl.dot(tl.reshape(tile, [T * N, W]), one.to(tl.float32), input_precision="tf32")
        over = tl.reshape(tl.sum(found, axis=1), [T, N])  # all is in the first column
    else:
        over = tl.sum(tile, axis=2)
    return over


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy, dfinal, u, delta, A, B, C, skip, z, bias, group, reset, starts, into, left,
    du, ddelta, dz, dA, dB, dC, dskip, dbias, dfirst,
    length, channels, segment, segments, chunks,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    N: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, n, t = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, N), tl.arange(0, TOKENS)
    here = (d < channels)[None, :]
    outer = batch * channels * N + d[None, :] * N + n[:, None]
    inner = n[:, None] * channels + d[None, :]
    if dfinal is not None:
        dh = tl.load(dfinal + outer, mask=here, other=0.0)
    else:
        dh = tl.zeros([N, WIDTH], tl.float32)
    for i in range(segments - 1 - part):
        at = (batch * segments + segments - 1 - i) * N * channels + inner
        dh = tl.load(left + at, mask=here, other=0.0) * dh
        dh += tl.load(into + at, mask=here, other=0.0)
    dA_NW = tl.zeros([N, WIDTH], tl.float32)
    dskip_W = tl.zeros([WIDTH], tl.float32)
    rows = tl.arange(0, GROUPS)
    dbias_GW = tl.zeros([GROUPS, WIDTH], tl.float32)
    tiles = segment // TOKENS
    for i in range(tiles):
        start = part * segment + (tiles - 1 - i) * TOKENS
        chunk = start // CHUNK
        at = (batch * chunks + chunk) * N * channels + inner
        h = tl.load(starts + at, mask=here & (chunk < chunks), other=0.0)
        if TOKENS < CHUNK:  # noqa: SIM102  decided when compiling
            if start % CHUNK != 0:  # the second half of a chunk
                earlier = start - TOKENS
                token = batch * length + earlier
                A2 = tl.load(A + d[None, :] * N + n[:, None], mask=here, other=0.0) * LOG2E
                h, _, _ = _advance(
                    h, u + batch * u_b + earlier * u_l, u_l,
                    delta + batch * delta_b + earlier * delta_l, delta_l,
                    B + batch * B_b + earlier * B_l, B_l, A2, bias,
                    None if group is None else group + token,
                    None if reset is None else reset + token,
                    t, d, n, (length - earlier).to(tl.int32), channels,
                )  # fmt: skip
        A2 = tl.load(A + d[None, :] * N + n[:, None], mask=here, other=0.0) * LOG2E
        token, rest = batch * length + start, (length - start).to(tl.int32)
        inside = (t < rest)[:, None] & here
        dt = _steps(
            delta + batch * delta_b + start * delta_l, delta_l, bias,
            None if group is None else group + token, t, d, rest, channels,
        )  # fmt: skip
        u_TW = _rows(u + batch * u_b + start * u_l, u_l, t, d, rest, channels)
        B_TN = _states(B + batch * B_b + start * B_l, B_l, t, n, rest)
        C_TN = _states(C + batch * C_b + start * C_l, C_l, t, n, rest)
        dy_TW = _rows(dy + token * channels, channels, t, d, rest, channels)
        cut = _cuts(None if reset is None else reset + token, t, rest)
        decay = tl.exp2(_exponents(dt, A2, cut, reset))
        source = (dt * u_TW)[:, None, :] * B_TN[:, :, None]
        old = tl.where((t == 0)[:, None, None], decay * h[None], 0.0)
        _, states, old = tl.associative_scan((decay, source + old, old), 0, _carry_apart)
        at_y = token * channels + t[:, None] * channels + d[None, :]
        if z is not None:
            y_TW = tl.sum(states * C_TN[:, :, None], axis=1)
            if skip is not None:
                y_TW += tl.load(skip + d, mask=d < channels, other=0.0)[None, :] * u_TW
            z_TW = _rows(z + batch * z_b + start * z_l, z_l, t, d, rest, channels)
            silu, gate = _silu(z_TW)
            dz_TW = dy_TW * y_TW * gate * (1.0 + z_TW * (1.0 - gate))
            tl.store(dz + at_y, dz_TW, mask=inside)
            dy_TW *= silu
        block = batch * tl.num_programs(0) + tl.program_id(0)
        at_B = (block * length + start) * N + t[:, None] * N + n[None, :]
        dC_TN = _over_channels(states * dy_TW[:, None, :], DOT)
        tl.store(dC + at_B, dC_TN, mask=(t < rest)[:, None])
        # B, C and u are read again rather than held in registers meanwhile
        C_TN = _states(C + batch * C_b + start * C_l, C_l, t, n, rest)
        dh_TNW, dh = _retreat(decay, dy_TW, C_TN, dh, t)
        old *= dh_TNW  # now the gradient of dt A
        dA_NW += tl.sum(old * dt[:, None, :], axis=0)
        ddt_TW = tl.sum(old * A2[None], axis=1) * LN2
        u_TW = _rows(u + batch * u_b + start * u_l, u_l, t, d, rest, channels)
        B_TN = _states(B + batch * B_b + start * B_l, B_l, t, n, rest)
        dB_TN = _over_channels(dh_TNW * (dt * u_TW)[:, None, :], DOT)
        tl.store(dB + at_B, dB_TN, mask=(t < rest)[:, None])
        dx_TW = tl.sum(dh_TNW * B_TN[:, :, None], axis=1)
        ddt_TW += dx_TW * u_TW
        du_TW = dx_TW * dt
        if skip is not None:
            du_TW += tl.load(skip + d, mask=d < channels, other=0.0)[None, :] * dy_TW
            dskip_W += tl.sum(dy_TW * u_TW, axis=0)
        tl.store(du + at_y, du_TW, mask=inside)
        # softplus has the derivative sigmoid(v) = 1 - exp(-dt); a series where that cancels
        near = dt * (1.0 - dt * (0.5 - dt * (1.0 / 6.0 - dt * (1.0 / 24.0))))
        dv_TW = ddt_TW * tl.where(dt < 0.06, near, 1.0 - tl.exp2(dt * -LOG2E))
        tl.store(ddelta + at_y, dv_TW, mask=inside)
        if group is not None:
            g = tl.load(group + token + t, mask=t < rest, other=0).to(tl.int32)
            picked = (g[:, None] == rows[None, :])[:, :, None]
            dbias_GW += tl.sum(tl.where(picked, dv_TW[:, None, :], 0.0), axis=0)
        elif bias is not None:
            dbias_GW += tl.sum(dv_TW, axis=0)[None, :]
    partial = batch * segments + part
    tl.store(dA + partial * N * channels + inner, dA_NW, mask=here)
    if skip is not None:
        tl.store(dskip + partial * channels + d, dskip_W, mask=d < channels)
    if bias is not None:
        at_bias = partial * GROUPS * channels + rows[:, None] * channels + d[None, :]
        tl.store(dbias + at_bias, dbias_GW, mask=here)
    if part == 0:
        tl.store(dfirst + outer, dh, mask=here)
