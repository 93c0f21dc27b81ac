"""The Triton kernels of the grouped ops; ``triton_impl.py`` launches them.

All are persistent: a fixed number of programs walks over the tiles of all groups, whose sizes are
read on the device. Tiles go in bands of ``BAND`` row blocks, column by column, so that the rows of
a band and the columns of a weight stay in L2. Rows are gathered where they are loaded. Sums are
fp32.

N columns of the result, K inner dimension, R routed rows. A tile is BLOCK_M × BLOCK_N.
"""

import torch
import triton
import triton.language as tl

from earlyfuse.kernels.triton_support import tuned

BAND = 8


def _config(m: int, n: int, k: int, warps: int, stages: int, per_sm: int = 1) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PER_SM": per_sm}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# tensor cores: half precision
HALF = (
    _config(128, 128, 64, 8, 3),
    _config(128, 256, 64, 8, 3),
    _config(64, 128, 64, 4, 4, 2),
)
# two accumulators, or an epilogue that reads as much
HALF_WIDE = (
    _config(128, 128, 64, 8, 3),
    _config(128, 64, 64, 4, 4, 2),
    _config(64, 128, 64, 8, 3, 2),
)
SINGLE = (_config(64, 64, 32, 8, 2, 2), _config(32, 64, 32, 4, 3, 2))


def _for_dtype(configs: list[triton.Config], arguments: dict, **_: object) -> list[triton.Config]:
    """Configurations that suit the first tensor's dtype."""
    first = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    single = first.dtype == torch.float32
    return [config for config in configs if (config in SINGLE) == single]


def _tuned(half: tuple[triton.Config, ...], key: list[str]) -> object:
    return tuned(
        [*half, *SINGLE], key=key, prune_configs_by={"early_config_prune": _for_dtype}
    )


@triton.jit
def _tiles_before(offset_ptr, groups, columns, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Where the tiles of each group end, (GROUPS,)."""
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
def _add_product(
    total, a_ptr, source, valid, b_ptr, column, N, K,
    TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + a[source] @ b, where b is (N, K) if TRANSPOSED, else (K, N)."""
    inner = tl.arange(0, BLOCK_K)
    a_rows = a_ptr + source.to(tl.int64)[:, None] * K
    inside = (column < N)[None, :]
    for start in range(0, K, BLOCK_K):
        k = start + inner
        if TRANSPOSED:
            b_at = b_ptr + column.to(tl.int64)[None, :] * K + k[:, None]
        else:
            b_at = b_ptr + k.to(tl.int64)[:, None] * N + column[None, :]
        if EVEN_K:
            a = tl.load(a_rows + k[None, :], mask=valid[:, None], other=0.0)
            b = tl.load(b_at, mask=inside, other=0.0)
        else:
            a = tl.load(a_rows + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0)
            b = tl.load(b_at, mask=inside & (k < K)[:, None], other=0.0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)
    return total


_EVEN_K = {"EVEN_K": lambda arguments: arguments["K"] % arguments["BLOCK_K"] == 0}


@_tuned(HALF, ["N", "K", "TRANSPOSED", "TWO"])
@triton.heuristics(_EVEN_K)
@triton.jit
def rows_kernel(
    a_ptr, b_ptr, a2_ptr, b2_ptr, row_ptr, offset_ptr, weight_ptr, out_ptr, groups, N, K,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, TWO: tl.constexpr, SCATTER: tl.constexpr,
    WEIGHTED: tl.constexpr, GROUPS: tl.constexpr, BAND: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """out[r] = weight · (a[r] @ b[g] (+ a2[r] @ b2[g])).

    GATHER reads row row[r] of a instead of r; SCATTER writes row row[r] of out.
    """
    columns = tl.cdiv(N, BLOCK_N)
    ends = _tiles_before(offset_ptr, groups, columns, BLOCK_M, GROUPS)
    for tile in range(tl.program_id(0), tl.max(ends), tl.num_programs(0)):
        group, first, end, block = _place(tile, ends, offset_ptr, columns, BLOCK_M, BAND)
        routed = first + tl.arange(0, BLOCK_M)
        valid = routed < end
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        token = routed
        if GATHER or SCATTER:
            token = tl.load(row_ptr + routed, mask=valid, other=0).to(tl.int32)
        source = token if GATHER else routed
        matrix = group.to(tl.int64) * N * K
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = _add_product(
            total, a_ptr, source, valid, b_ptr + matrix, column, N, K,
            TRANSPOSED, EVEN_K, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
        if TWO:
            total = _add_product(
                total, a2_ptr, source, valid, b2_ptr + matrix, column, N, K,
                TRANSPOSED, EVEN_K, BLOCK_K, DOT, PRECISION,
            )  # fmt: skip
        if WEIGHTED:
            weight = tl.load(weight_ptr + routed, mask=valid, other=0.0).to(tl.float32)
            total *= weight[:, None]
        target = token if SCATTER else routed
        out_at = out_ptr + target.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(out_at, total, mask=valid[:, None] & (column < N)[None, :])


@_tuned(HALF_WIDE, ["N", "K", "KEEP"])
@triton.heuristics(_EVEN_K)
@triton.jit
def gate_up_kernel(
    x_ptr, w1_ptr, w3_ptr, row_ptr, offset_ptr, gate_ptr, up_ptr, h_ptr, groups, N, K,
    KEEP: tl.constexpr, GROUPS: tl.constexpr, BAND: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """h[r] = silu(x[row[r]] @ w1[g].T) · (x[row[r]] @ w3[g].T); KEEP stores both factors' inputs."""
    columns = tl.cdiv(N, BLOCK_N)
    ends = _tiles_before(offset_ptr, groups, columns, BLOCK_M, GROUPS)
    inner = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tl.max(ends), tl.num_programs(0)):
        group, first, end, block = _place(tile, ends, offset_ptr, columns, BLOCK_M, BAND)
        routed = first + tl.arange(0, BLOCK_M)
        valid = routed < end
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (column < N)[None, :]
        token = tl.load(row_ptr + routed, mask=valid, other=0).to(tl.int64)
        x_rows = x_ptr + token[:, None] * K
        w_at = group.to(tl.int64) * N * K + column.to(tl.int64)[None, :] * K
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + inner
            x_mask, w_mask = valid[:, None], inside
            if not EVEN_K:
                x_mask, w_mask = x_mask & (k < K)[None, :], w_mask & (k < K)[:, None]
            x = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0).to(DOT)
            w1 = tl.load(w1_ptr + w_at + k[:, None], mask=w_mask, other=0.0).to(DOT)
            w3 = tl.load(w3_ptr + w_at + k[:, None], mask=w_mask, other=0.0).to(DOT)
            gate = tl.dot(x, w1, gate, input_precision=PRECISION)
            up = tl.dot(x, w3, up, input_precision=PRECISION)
        at = routed.to(tl.int64)[:, None] * N + column[None, :]
        mask = valid[:, None] & inside
        if KEEP:
            tl.store(gate_ptr + at, gate, mask=mask)
            tl.store(up_ptr + at, up, mask=mask)
        tl.store(h_ptr + at, gate * tl.sigmoid(gate) * up, mask=mask)


@_tuned(HALF_WIDE, ["N", "K"])
@triton.heuristics(_EVEN_K)
@triton.jit
def activation_backward_kernel(
    dy_ptr, w2_ptr, gate_ptr, up_ptr, row_ptr, offset_ptr, weight_ptr,
    dgate_ptr, dup_ptr, h_ptr, partial_ptr, rows, groups, N, K,
    WEIGHTED: tl.constexpr, NEED_WEIGHT: tl.constexpr, GROUPS: tl.constexpr, BAND: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """From dh = dy[row[r]] @ w2[g] to weighted dgate, dup and h, and <dh, h> of each column block.

    ``partial`` (column blocks, R): a row's weight gradient is their sum.
    """
    columns = tl.cdiv(N, BLOCK_N)
    ends = _tiles_before(offset_ptr, groups, columns, BLOCK_M, GROUPS)
    for tile in range(tl.program_id(0), tl.max(ends), tl.num_programs(0)):
        group, first, end, block = _place(tile, ends, offset_ptr, columns, BLOCK_M, BAND)
        routed = first + tl.arange(0, BLOCK_M)
        valid = routed < end
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(row_ptr + routed, mask=valid, other=0).to(tl.int32)
        dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dh = _add_product(
            dh, dy_ptr, token, valid, w2_ptr + group.to(tl.int64) * N * K, column, N, K,
            False, EVEN_K, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
        at = routed.to(tl.int64)[:, None] * N + column[None, :]
        mask = valid[:, None] & (column < N)[None, :]
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        h = silu * up
        if NEED_WEIGHT:
            partial = partial_ptr + block.to(tl.int64) * rows + routed
            tl.store(partial, tl.sum(dh * h, axis=1), mask=valid)
        if WEIGHTED:
            weight = tl.load(weight_ptr + routed, mask=valid, other=0.0).to(tl.float32)
            dh *= weight[:, None]
            h *= weight[:, None]
        tl.store(h_ptr + at, h, mask=mask)
        tl.store(dup_ptr + at, dh * silu, mask=mask)
        tl.store(dgate_ptr + at, dh * up * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)


@_tuned(HALF, ["M", "N", "GATHER_P", "GATHER_Q"])
@triton.jit
def weight_gradient_kernel(
    p_ptr, q_ptr, row_ptr, offset_ptr, weight_ptr, out_ptr, groups, M, N,
    GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr, WEIGHTED: tl.constexpr, BAND: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PER_SM: tl.constexpr,
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
        m = (band * BAND + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
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
            p_mask = (m < M)[:, None] & valid[None, :]
            p = tl.load(p_ptr + p_row[None, :] * M + m[:, None], mask=p_mask, other=0.0)
            q_mask = valid[:, None] & (n < N)[None, :]
            q = tl.load(q_ptr + q_row[:, None] * N + n[None, :], mask=q_mask, other=0.0)
            if WEIGHTED:
                weight = tl.load(weight_ptr + routed, mask=valid, other=0.0).to(tl.float32)
                q = (q.to(tl.float32) * weight[:, None]).to(q.dtype)
            total = tl.dot(p.to(DOT), q.to(DOT), total, input_precision=PRECISION)
        matrix = out_ptr + group.to(tl.int64) * M * N
        out_at = matrix + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_at, total, mask=(m < M)[:, None] & (n < N)[None, :])
