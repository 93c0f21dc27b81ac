"""The Triton kernels of the grouped ops; ``triton_impl.py`` launches them.

All are persistent: a fixed number of programs walks over the tiles of all groups, whose sizes are
read on the device. Tiles go in bands of ``BAND`` row blocks, column by column, so that the rows of
a band and the columns of a weight stay in L2. Rows are gathered where they are loaded. Sums are
fp32.

N columns of the result, K inner dimension, R routed rows. A tile is BLOCK_M × BLOCK_N. Matrices
begin at int64 addresses; offsets inside one are 32 bits wide, which saves registers, and INDEX is
the type of offsets into all tokens: int64 where they need it.

With TMA, operands that are dense arrive as ``TensorDescriptor`` and their tiles are fetched by the
tensor memory accelerator; what is gathered is read through pointers all the same. A matrix tile is
(1, rows, columns) of a descriptor (G, rows, columns): the device itself reads zeros past the end of
a group's matrix in either direction, so no tile has anything of the next group.
"""

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

from earlyfuse.kernels.grouped_gemm.triton_configurations import (
    FROM_SM_90,
    HALF,
    HALF_BACKWARD,
    HALF_GATE_UP,
    HALF_SUMS,
    tuned_for,
)


@triton.jit
def _tiles_before(offset_ptr, groups, columns, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """End of each group's tiles, (GROUPS,)."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(offset_ptr + group, mask=group < groups, other=0)
    end = tl.load(offset_ptr + group + 1, mask=group < groups, other=0)
    return tl.cumsum(tl.cdiv(end - begin, BLOCK_M).to(tl.int32) * columns)


@triton.jit
def _place(
    tile, ends, offset_ptr, columns, BLOCK_M: tl.constexpr, BAND: tl.constexpr
):  # fmt: skip
    """Group, first row, end of the group's rows, and column block of a tile."""
    group = tl.sum((ends <= tile).to(tl.int32))
    local = tile - tl.max(tl.where(ends <= tile, ends, 0))
    begin = tl.load(offset_ptr + group).to(tl.int32)
    end = tl.load(offset_ptr + group + 1).to(tl.int32)
    band = local // (BAND * columns)
    height = tl.minimum(tl.cdiv(end - begin, BLOCK_M) - band * BAND, BAND)
    inside = local % (BAND * columns)
    return group, begin + (band * BAND + inside % height) * BLOCK_M, end, inside // height


@triton.jit
def _matrix_tile(b_ptr, group, row, column, TRANSPOSED: tl.constexpr):
    """By TMA: the (K, N) tile of a group's matrix from ``row`` of K and ``column`` of N on."""
    if TRANSPOSED:
        tile = b_ptr.load([group, column, row])
        tile = tl.trans(tl.reshape(tile, (tile.shape[1], tile.shape[2])))
    else:
        tile = b_ptr.load([group, row, column])
        tile = tl.reshape(tile, (tile.shape[1], tile.shape[2]))
    return tile


@triton.jit
def _add_product(
    total, a_ptr, a_row, first, valid, b_ptr, group, block, N, K,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + a @ b[group], where b[group] is (N, K) if TRANSPOSED, else (K, N).

    ``a_row``: where the rows of a begin, seen from row ``first`` or, with GATHER, from row 0.
    """
    inner = tl.arange(0, BLOCK_K)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows of their own begin at a scalar; rows of tokens are anywhere
    if GATHER:
        a_begin = a_ptr
    elif not TMA:
        a_begin = a_ptr + first.to(tl.int64) * K
    if not TMA:
        b_begin = b_ptr + group.to(tl.int64) * N * K
    a_at = a_row[:, None] + inner[None, :]
    if TRANSPOSED:
        b_at = column[None, :] * K + inner[:, None]
    else:
        b_at = inner[:, None] * N + column[None, :]
    inside = (column < N)[None, :]
    for start in range(0, K, BLOCK_K):
        a_mask, b_mask = valid[:, None], inside
        if not EVEN_K:
            within = start + inner < K
            a_mask, b_mask = a_mask & within[None, :], b_mask & within[:, None]
        # without TMA only two scalars move: the offsets of a tile stay in registers
        if TMA and not GATHER:
            a = a_ptr.load([first, start])  # rows past the group's end are not stored
        else:
            a = tl.load(a_begin + start + a_at, mask=a_mask, other=0.0)
        if TMA:
            b = _matrix_tile(b_ptr, group, start, block * BLOCK_N, TRANSPOSED)
        else:
            b_here = b_begin + (start if TRANSPOSED else start * N)
            b = tl.load(b_here + b_at, mask=b_mask, other=0.0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)
    return total


_EVEN_K = {"EVEN_K": lambda arguments: arguments["K"] % arguments["BLOCK_K"] == 0}


@tuned_for(HALF, ["N", "K", "TRANSPOSED", "TWO", "TMA"])
@triton.heuristics(_EVEN_K)
@triton.jit
def rows_kernel(
    a_ptr, b_ptr, a2_ptr, b2_ptr, row_ptr, offset_ptr, weight_ptr, out_ptr, groups, N, K,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, TWO: tl.constexpr, SCATTER: tl.constexpr,
    WEIGHTED: tl.constexpr, TMA: tl.constexpr, GROUPS: tl.constexpr, BAND: tl.constexpr,
    INDEX: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """out[r] = weight · (a[r] @ b[g] (+ a2[r] @ b2[g])).

    GATHER reads row row[r] of a instead of r; SCATTER writes row row[r] of out.
    """
    columns = tl.cdiv(N, BLOCK_N)
    ends = _tiles_before(offset_ptr, groups, columns, BLOCK_M, GROUPS)
    lane = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), tl.max(ends), tl.num_programs(0)):
        group, first, end, block = _place(tile, ends, offset_ptr, columns, BLOCK_M, BAND)
        valid = first + lane < end
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        if GATHER or SCATTER:
            token = tl.load(row_ptr + first + lane, mask=valid, other=0).to(INDEX)
        a_row = token * K if GATHER else lane * K
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = _add_product(
            total, a_ptr, a_row, first, valid, b_ptr, group, block, N, K,
            GATHER, TRANSPOSED, TMA, EVEN_K, BLOCK_N, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
        if TWO:
            total = _add_product(
                total, a2_ptr, a_row, first, valid, b2_ptr, group, block, N, K,
                GATHER, TRANSPOSED, TMA, EVEN_K, BLOCK_N, BLOCK_K, DOT, PRECISION,
            )  # fmt: skip
        if WEIGHTED:
            weight = tl.load(weight_ptr + first + lane, mask=valid, other=0.0).to(tl.float32)
            total *= weight[:, None]
        out_row = token * N if SCATTER else lane * N
        out_here = out_ptr if SCATTER else out_ptr + first.to(tl.int64) * N
        out_at = out_row[:, None] + column[None, :]
        tl.store(out_here + out_at, total, mask=valid[:, None] & (column < N)[None, :])


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right columns of a tile: what follows a product needs registers for one only."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _parts(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Its columns from left to right in two or, of 128, in four parts, as few as do not spill."""
    left, right = _halves(tile, BLOCK_M, BLOCK_N)
    if BLOCK_N == 128:
        parts = _halves(left, BLOCK_M, 64) + _halves(right, BLOCK_M, 64)
    else:
        parts = (left, right)
    return parts


@triton.jit
def _activate(gate, up, tensors, lane, column, valid, N, KEEP: tl.constexpr):
    """Stores h = silu(gate) · up of a tile, and gate and up if KEEP."""
    gate_ptr, up_ptr, h_ptr = tensors
    at = lane[:, None] * N + column[None, :]
    mask = valid[:, None] & (column < N)[None, :]
    if KEEP:
        tl.store(gate_ptr + at, gate, mask=mask)
        tl.store(up_ptr + at, up, mask=mask)
    tl.store(h_ptr + at, gate * tl.sigmoid(gate) * up, mask=mask)


@tuned_for((*HALF_GATE_UP, *FROM_SM_90), ["N", "K", "KEEP", "TMA"])
@triton.heuristics(_EVEN_K)
@triton.jit
def gate_up_kernel(
    x_ptr, w1_ptr, w3_ptr, row_ptr, offset_ptr, gate_ptr, up_ptr, h_ptr, groups, N, K,
    KEEP: tl.constexpr, TMA: tl.constexpr, GROUPS: tl.constexpr, BAND: tl.constexpr,
    INDEX: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """h[r] = silu(x[row[r]] @ w1[g].T) · (x[row[r]] @ w3[g].T); KEEP stores both products."""
    columns = tl.cdiv(N, BLOCK_N)
    ends = _tiles_before(offset_ptr, groups, columns, BLOCK_M, GROUPS)
    lane, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tl.max(ends), tl.num_programs(0)):
        group, first, end, block = _place(tile, ends, offset_ptr, columns, BLOCK_M, BAND)
        valid = first + lane < end
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (column < N)[None, :]
        token = tl.load(row_ptr + first + lane, mask=valid, other=0).to(INDEX)
        x_at = (token * K)[:, None] + inner[None, :]
        w_at = column[None, :] * K + inner[:, None]
        matrix = group.to(tl.int64) * N * K
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            x_mask, w_mask = valid[:, None], inside
            if not EVEN_K:
                within = start + inner < K
                x_mask, w_mask = x_mask & within[None, :], w_mask & within[:, None]
            x = tl.load(x_ptr + start + x_at, mask=x_mask, other=0.0).to(DOT)
            if TMA:
                w1 = _matrix_tile(w1_ptr, group, start, block * BLOCK_N, True)
                w3 = _matrix_tile(w3_ptr, group, start, block * BLOCK_N, True)
            else:
                w1 = tl.load(w1_ptr + matrix + start + w_at, mask=w_mask, other=0.0)
                w3 = tl.load(w3_ptr + matrix + start + w_at, mask=w_mask, other=0.0)
            gate = tl.dot(x, w1.to(DOT), gate, input_precision=PRECISION)
            up = tl.dot(x, w3.to(DOT), up, input_precision=PRECISION)
        gate_left, gate_right = _halves(gate, BLOCK_M, BLOCK_N)
        up_left, up_right = _halves(up, BLOCK_M, BLOCK_N)
        half = block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        skip = first.to(tl.int64) * N
        tensors = (gate_ptr + skip, up_ptr + skip, h_ptr + skip)
        _activate(gate_left, up_left, tensors, lane, half, valid, N, KEEP)
        _activate(gate_right, up_right, tensors, lane, half + BLOCK_N // 2, valid, N, KEEP)


@triton.jit
def _activation_backward(dh, tensors, lane, column, valid, weight, N):
    """Stores weighted h, dgate and dup of a tile; returns <dh, h> of each row."""
    gate_ptr, up_ptr, h_ptr, dgate_ptr, dup_ptr = tensors
    at = lane[:, None] * N + column[None, :]
    mask = valid[:, None] & (column < N)[None, :]
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    h = silu * up
    dots = tl.sum(dh * h, axis=1)
    dh *= weight[:, None]
    tl.store(h_ptr + at, h * weight[:, None], mask=mask)
    tl.store(dup_ptr + at, dh * silu, mask=mask)
    tl.store(dgate_ptr + at, dh * up * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)
    return dots


# blocks of columns differ between configurations: what one that is tried writes, another may not
@tuned_for(HALF_BACKWARD, ["N", "K", "TMA"], reset_to_zero=["partial_ptr"])
@triton.heuristics(_EVEN_K)
@triton.jit
def activation_backward_kernel(
    dy_ptr, w2_ptr, gate_ptr, up_ptr, row_ptr, offset_ptr, weight_ptr,
    dgate_ptr, dup_ptr, h_ptr, partial_ptr, rows, groups, N, K,
    WEIGHTED: tl.constexpr, NEED_WEIGHT: tl.constexpr, TMA: tl.constexpr, GROUPS: tl.constexpr,
    BAND: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_SM: tl.constexpr,
):  # fmt: skip
    """From dh = dy[row[r]] @ w2[g] to weighted dgate, dup and h, and <dh, h> of each column block.

    ``partial`` (column blocks, R): a row's weight gradient is their sum.
    """
    columns = tl.cdiv(N, BLOCK_N)
    ends = _tiles_before(offset_ptr, groups, columns, BLOCK_M, GROUPS)
    lane = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), tl.max(ends), tl.num_programs(0)):
        group, first, end, block = _place(tile, ends, offset_ptr, columns, BLOCK_M, BAND)
        valid = first + lane < end
        token = tl.load(row_ptr + first + lane, mask=valid, other=0).to(INDEX)
        dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dh = _add_product(
            dh, dy_ptr, token * K, first, valid, w2_ptr, group, block, N, K,
            True, False, TMA, EVEN_K, BLOCK_N, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
        weight = tl.zeros((BLOCK_M,), tl.float32) + 1.0
        if WEIGHTED:
            weight = tl.load(weight_ptr + first + lane, mask=valid, other=0.0).to(tl.float32)
        skip = first.to(tl.int64) * N
        tensors = (gate_ptr + skip, up_ptr + skip, h_ptr + skip, dgate_ptr + skip, dup_ptr + skip)
        parts = _parts(dh, BLOCK_M, BLOCK_N)
        width: tl.constexpr = BLOCK_N // len(parts)
        dots = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(len(parts)):
            column = block * BLOCK_N + part * width + tl.arange(0, width)
            dots += _activation_backward(parts[part], tensors, lane, column, valid, weight, N)
        if NEED_WEIGHT:
            partial = partial_ptr + block.to(tl.int64) * rows + first
            tl.store(partial + lane, dots, mask=valid)


@tuned_for(HALF_SUMS, ["M", "N", "GATHER_P", "GATHER_Q", "TMA"])
@triton.jit
def weight_gradient_kernel(
    p_ptr, q_ptr, row_ptr, offset_ptr, weight_ptr, out_ptr, groups, M, N,
    GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr, WEIGHTED: tl.constexpr, TMA: tl.constexpr,
    BAND: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """out[g] (M, N) = Σ over the rows of g of weight · p[r]ᵀ q[r]; zero where it has none.

    GATHER_P and GATHER_Q read row row[r] instead of r.
    """
    heights, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), groups * heights * columns, tl.num_programs(0)):
        group, local = tile // (heights * columns), tile % (heights * columns)
        band = local // (BAND * columns)
        height = tl.minimum(heights - band * BAND, BAND)
        inside = local % (BAND * columns)
        m_first, n_first = (band * BAND + inside % height) * BLOCK_M, (inside // height) * BLOCK_N
        m, n = m_first + tl.arange(0, BLOCK_M), n_first + tl.arange(0, BLOCK_N)
        begin = tl.load(offset_ptr + group).to(tl.int32)
        end = tl.load(offset_ptr + group + 1).to(tl.int32)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(begin, end, BLOCK_K):
            routed = start + inner
            valid = routed < end
            token = routed
            if GATHER_P or GATHER_Q:
                token = tl.load(row_ptr + routed, mask=valid, other=0).to(tl.int32)
            p_row = (token if GATHER_P else routed).to(tl.int64)
            q_row = (token if GATHER_Q else routed).to(tl.int64)
            if TMA and not GATHER_P:
                p = tl.trans(load_ragged(p_ptr, begin, end - begin, [start - begin, m_first]))
            else:
                p_mask = (m < M)[:, None] & valid[None, :]
                p = tl.load(p_ptr + p_row[None, :] * M + m[:, None], mask=p_mask, other=0.0)
            if TMA and not GATHER_Q:
                q = load_ragged(q_ptr, begin, end - begin, [start - begin, n_first])
            else:
                q_mask = valid[:, None] & (n < N)[None, :]
                q = tl.load(q_ptr + q_row[:, None] * N + n[None, :], mask=q_mask, other=0.0)
            if WEIGHTED:
                weight = tl.load(weight_ptr + routed, mask=valid, other=0.0).to(tl.float32)
                q = (q.to(tl.float32) * weight[:, None]).to(q.dtype)
            total = tl.dot(p.to(DOT), q.to(DOT), total, input_precision=PRECISION)
        matrix = out_ptr + group.to(tl.int64) * M * N
        out_at = matrix + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_at, total, mask=(m < M)[:, None] & (n < N)[None, :])
