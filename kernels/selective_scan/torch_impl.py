"""The selective scan in plain PyTorch, for CPUs: a hand-written backward, no (B, L, D, N) tensor.

The recurrence runs token by token, because on a CPU a scan that is parallel over L only adds work.
It is fast by locality: one sequence and one block of channels at a time, so that the buffers of a
chunk of Q tokens stay in the L2 cache, laid out (token, state, channel), so that every operation
runs along contiguous channels. Exponentials, outer products and reductions run on a whole chunk at
once; only one in-place ``addcmul_`` per token is sequential. Forward saves only the state before
each chunk; backward recomputes a chunk's states from it and walks back.

Resets are read on the host: on CUDA that is one synchronisation per call.

Q tokens of a chunk, I chunks, W channels of a block; the other letters as in the package.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from earlyfuse.kernels.selective_scan.chunks import CHUNK, count_chunks
from earlyfuse.kernels.selective_scan.op import Scan
from earlyfuse.kernels.selective_scan.reference import step_sizes

STEP = 8192  # states of one token handled together: 16 tokens of 4 buffers are 2 MiB of fp32

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Lane:
    """One sequence and one block of channels, in the dtype of the computation."""

    row: int
    channels: slice
    u_LW: torch.Tensor
    dt_LW: torch.Tensor
    A_NW: torch.Tensor
    B_LN: torch.Tensor
    C_LN: torch.Tensor
    skip_W: torch.Tensor | None
    z_LW: torch.Tensor | None
    resets: Sequence[int]  # token numbers, ascending

    def chunks(self, backwards: bool = False) -> Iterator[tuple[int, slice, list[int]]]:
        """Number, tokens, and resets relative to the first token, of each chunk."""
        length = self.u_LW.shape[0]
        numbers = range(count_chunks(length))
        for i in reversed(numbers) if backwards else numbers:
            tokens = slice(i * CHUNK, min((i + 1) * CHUNK, length))
            inside = [t - tokens.start for t in self.resets if tokens.start <= t < tokens.stop]
            yield i, tokens, inside


class _Buffers:
    """Buffers of one chunk, reused for every chunk; ``h[0]`` is the state before it."""

    def __init__(self, like_NW: torch.Tensor, backward: bool) -> None:
        self.decay = like_NW.new_empty(CHUNK, *like_NW.shape)
        self.h = like_NW.new_empty(CHUNK + 1, *like_NW.shape)
        self.decays, self.hs = self.decay.unbind(0), self.h.unbind(0)
        if backward:
            self.dh = like_NW.new_empty(CHUNK, *like_NW.shape)
            self.product = like_NW.new_empty(CHUNK, *like_NW.shape)
            self.dhs = self.dh.unbind(0)


def selective_scan(scan: Scan, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the final state, and the states before each chunk (B, I, N, D), empty unless ``keep``."""
    u_BLD, A_DN, state_BDN = scan.u_BLD, scan.A_DN, scan.state_BDN
    batch, length, _ = u_BLD.shape
    wide = A_DN.dtype
    y_BLD = u_BLD.new_empty(u_BLD.shape)
    final_BDN = A_DN.new_empty(batch, *A_DN.shape)
    shape = (batch, count_chunks(length), *A_DN.shape[::-1]) if keep else (0,)
    starts = A_DN.new_empty(shape)
    for lane in _lanes(scan):
        at = lane.row, slice(None), lane.channels
        buffers = _Buffers(lane.A_NW, backward=False)
        last_NW = buffers.hs[0]
        if state_BDN is None:
            last_NW.zero_()
        else:
            last_NW.copy_(state_BDN[lane.row, lane.channels].t())
        y_LW = lane.u_LW.new_empty(lane.u_LW.shape)
        x_LW = lane.dt_LW * lane.u_LW
        for i, tokens, resets in lane.chunks():
            if last_NW is not buffers.hs[0]:
                buffers.hs[0].copy_(last_NW)
            if keep:
                starts[lane.row, i, :, lane.channels].copy_(buffers.hs[0])
            _advance(lane, buffers, x_LW, tokens, resets)
            count = tokens.stop - tokens.start
            last_NW = buffers.hs[count]
            torch.bmm(lane.C_LN[tokens, None], buffers.h[1 : count + 1], out=y_LW[tokens, None])
        final_BDN[lane.row, lane.channels] = last_NW.t()
        if lane.skip_W is not None:
            y_LW.addcmul_(lane.skip_W, lane.u_LW)
        if lane.z_LW is not None:
            y_LW.mul_(F.silu(lane.z_LW))
        y_BLD[at] = y_LW
    assert y_BLD.dtype == u_BLD.dtype and final_BDN.dtype == wide
    return y_BLD, final_BDN, starts


def selective_scan_backward(
    dy_BLD: torch.Tensor | None,
    dfinal_BDN: torch.Tensor | None,
    starts_BIND: torch.Tensor,
    scan: Scan,
    need: Sequence[bool],
) -> dict[str, torch.Tensor]:
    """The needed gradients."""
    A_DN, group_BL = scan.A_DN, scan.group_BL
    # sums over tokens or channels accumulate in the wide dtype and are rounded once
    gradients = {
        name: torch.zeros_like(of, dtype=A_DN.dtype, memory_format=torch.contiguous_format)
        for name, of, needed in zip(Scan._fields, scan, need, strict=True)
        if of is not None and needed
    }
    du, ddelta, dA, dB, dC, dskip, dz, dbias, _, _, dstate = map(gradients.get, Scan._fields)
    only_state = not any(need[:-1])
    for lane in _lanes(scan):
        at = lane.row, slice(None), lane.channels
        dh_NW = torch.zeros_like(lane.A_NW)  # of the state after the lane's current chunk
        if dfinal_BDN is not None:
            dh_NW.copy_(dfinal_BDN[lane.row, lane.channels].t())
        dout_LW = torch.zeros_like(lane.u_LW) if dy_BLD is None else dy_BLD[at].to(A_DN.dtype)
        dy_LW = dout_LW if lane.z_LW is None else dout_LW * F.silu(lane.z_LW)
        if only_state:
            _walk_back_state(lane, dy_LW, dh_NW)
        else:
            found = _walk_back(lane, dy_LW, dh_NW, starts_BIND[lane.row], need)
            y_LW, dx_LW, decay_LW, dA_NW, dB_LN, dC_LN = found
        if du is not None:
            du[at] = torch.mul(dx_LW, lane.dt_LW)
            if lane.skip_W is not None:
                du[at].addcmul_(dy_LW, lane.skip_W)
        if ddelta is not None or dbias is not None:
            ddt_LW = decay_LW.addcmul_(dx_LW, lane.u_LW)
            # dt = softplus(v) has the derivative sigmoid(v) = 1 - exp(-dt)
            dv_LW = ddt_LW.mul_(torch.expm1(-lane.dt_LW).neg_())
            if ddelta is not None:
                ddelta[at] = dv_LW
            if dbias is not None:
                group_L = None if group_BL is None else group_BL[lane.row].long()
                _add_by_group(dbias[:, lane.channels], dv_LW, group_L)
        if dA is not None:
            dA[lane.channels] += dA_NW.t()
        if dB is not None:
            dB[lane.row] += dB_LN
        if dC is not None:
            dC[lane.row] += dC_LN
        if dskip is not None:
            dskip[lane.channels] += (dy_LW * lane.u_LW).sum(0)
        if dz is not None:
            if lane.skip_W is not None:
                y_LW.addcmul_(lane.skip_W, lane.u_LW)
            dz[at] = _aten.silu_backward(dout_LW * y_LW, lane.z_LW)
        if dstate is not None:
            dstate[lane.row, lane.channels] = dh_NW.t()
    return gradients


def _add_by_group(
    sums_GW: torch.Tensor, values_LW: torch.Tensor, group_L: torch.Tensor | None
) -> None:
    if group_L is None:
        sums_GW += values_LW.sum(0)
    else:
        sums_GW.index_add_(0, group_L, values_LW)


def _walk_back(
    lane: _Lane,
    dy_LW: torch.Tensor,
    dh_NW: torch.Tensor,
    starts_IND: torch.Tensor,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """Walks the chunks from last to first, recomputing states from their starts.

    Returns y before skip and gate, the gradient of x = dt u, that of dt through the decay, and
    those of A, B and C from this lane. Turns ``dh_NW`` in place from the final state's gradient
    into the initial state's.
    """
    buffers = _Buffers(lane.A_NW, backward=True)
    x_LW = lane.dt_LW * lane.u_LW
    y_LW, dx_LW, ddt_LW = torch.empty_like(lane.u_LW).expand(3, -1, -1).clone()
    dA_NW = torch.zeros_like(lane.A_NW)
    dB_LN, dC_LN = torch.empty_like(lane.B_LN), torch.empty_like(lane.C_LN)
    ones_1Q = dA_NW.new_ones(1, CHUNK)  # sums over tokens as a product: faster than sum
    need_dt = need[1] or need[7]
    for i, tokens, resets in lane.chunks(backwards=True):
        count = tokens.stop - tokens.start
        buffers.hs[0].copy_(starts_IND[i, :, lane.channels])
        _advance(lane, buffers, x_LW, tokens, resets)
        decay, dh, product = (t[:count] for t in (buffers.decay, buffers.dh, buffers.product))
        h, before = buffers.h[1 : count + 1], buffers.h[:count]
        if need[6]:
            torch.bmm(lane.C_LN[tokens, None], h, out=y_LW[tokens, None])
        if need[4]:
            torch.bmm(dy_LW[tokens, None], h.mT, out=dC_LN[tokens, None])
        _retreat(lane, buffers, dy_LW, dh_NW, tokens)
        torch.bmm(lane.B_LN[tokens, None], dh, out=dx_LW[tokens, None])
        if need[3]:
            torch.bmm(x_LW[tokens, None], dh.mT, out=dB_LN[tokens, None])
        if not (need[2] or need_dt):
            continue
        decay.mul_(before).mul_(dh)  # gradient of dt A; the decayed state itself, since h - x B
        if need_dt:  # would cancel where the decay is strong
            torch.mul(decay, lane.A_NW, out=product)
            torch.sum(product, 1, out=ddt_LW[tokens])
        if need[2]:
            torch.mul(decay, lane.dt_LW[tokens, None], out=product)
            dA_NW.view(1, -1).addmm_(ones_1Q[:, :count], product.view(count, -1))
    return y_LW, dx_LW, ddt_LW, dA_NW, dB_LN, dC_LN


def _walk_back_state(lane: _Lane, dy_LW: torch.Tensor, dh_NW: torch.Tensor) -> None:
    """Turns ``dh_NW`` from the final state's gradient into the initial one's; needs no states."""
    buffers = _Buffers(lane.A_NW, backward=True)
    for _, tokens, resets in lane.chunks(backwards=True):
        _decays(lane, buffers, tokens, resets)
        _retreat(lane, buffers, dy_LW, dh_NW, tokens)


def _decays(lane: _Lane, buffers: _Buffers, tokens: slice, resets: list[int]) -> None:
    decay = buffers.decay[: tokens.stop - tokens.start]
    torch.mul(lane.dt_LW[tokens, None], lane.A_NW, out=decay).exp_()
    for t in resets:
        buffers.decays[t].zero_()


def _advance(
    lane: _Lane, buffers: _Buffers, x_LW: torch.Tensor, tokens: slice, resets: list[int]
) -> None:
    """Computes decays and states of a chunk from ``buffers.h[0]``."""
    count = tokens.stop - tokens.start
    _decays(lane, buffers, tokens, resets)
    torch.mul(x_LW[tokens, None], lane.B_LN[tokens, :, None], out=buffers.h[1 : count + 1])
    h_NW = buffers.hs[0]
    for decay_NW, next_NW in zip(buffers.decays[:count], buffers.hs[1 : count + 1], strict=True):
        h_NW = next_NW.addcmul_(decay_NW, h_NW)


def _retreat(
    lane: _Lane, buffers: _Buffers, dy_LW: torch.Tensor, dh_NW: torch.Tensor, tokens: slice
) -> None:
    """Computes gradients of a chunk's states; moves ``dh_NW`` from its last state to before it."""
    count = tokens.stop - tokens.start
    torch.mul(dy_LW[tokens, None], lane.C_LN[tokens, :, None], out=buffers.dh[:count])
    later_NW = buffers.dhs[count - 1].add_(dh_NW)
    for t in range(count - 2, -1, -1):
        later_NW = buffers.dhs[t].addcmul_(buffers.decays[t + 1], later_NW)
    torch.mul(buffers.decays[0], later_NW, out=dh_NW)


def _lanes(scan: Scan) -> Iterator[_Lane]:
    u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, skip_D, z_BLD, bias_GD, group_BL, reset_BL, _ = scan
    wide = A_DN.dtype
    channels, states = A_DN.shape
    width = max(1, STEP // states)
    for row in range(u_BLD.shape[0]):
        resets = [] if reset_BL is None else reset_BL[row].nonzero().flatten().tolist()
        B_LN, C_LN = (t[row].to(wide).contiguous() for t in (B_BLN, C_BLN))
        for start in range(0, channels, width):
            part = slice(start, start + width)
            at = row, slice(None), part
            bias_GW = None if bias_GD is None else bias_GD[:, part]
            group_L = None if group_BL is None else group_BL[row]
            yield _Lane(
                row=row,
                channels=part,
                u_LW=u_BLD[at].to(wide),
                dt_LW=step_sizes(delta_BLD[at].to(wide), bias_GW, group_L),
                A_NW=A_DN[part].t().contiguous(),
                B_LN=B_LN,
                C_LN=C_LN,
                skip_W=None if skip_D is None else skip_D[part],
                z_LW=None if z_BLD is None else z_BLD[at].to(wide),
                resets=resets,
            )
