"""Launches ``triton_kernels``, the selective scan on CUDA. No (B, L, D, N) tensor exists.

Sequences are split into segments where channels alone would leave processors idle. A first pass
finds each segment's end state from a zero start, and the decay exp(A Σ dt) over it; the main pass
combines those of earlier segments into the start of its own. Backward mirrors this. The same steps
over ranks are sequence parallelism.

Backward reads the state before each chunk, recomputes the states inside, and walks back. Sums over
channels (of B and C), over tokens and sequences (of A, skip and bias) leave a program as fp32
partial sums and are added in a fixed order: no atomics, so the same bits come out on every run.

S segments, I chunks; the other letters as in the package.
"""

from collections.abc import Sequence

import torch
import triton

from earlyfuse.kernels.selective_scan.chunks import CHUNK, count_chunks
from earlyfuse.kernels.selective_scan.op import Scan
from earlyfuse.kernels.selective_scan.triton_kernels import (
    adjoints_kernel,
    backward_kernel,
    ends_kernel,
    forward_kernel,
)
from earlyfuse.kernels.triton_support import INTERPRETED, on_its_device

# N → tokens of a tile, channels of a block, warps, most registers of a thread. Chosen from the
# compiled code (registers, loads, shuffles), one each instead of an autotuner's choice: the shape
# of a tile decides the order of sums, and the same run would get other bits after a restart. With
# all options given forward would take 141 registers, and a processor have three blocks, not four.
Sizes = tuple[int, int, int, int | None]
FORWARD: dict[int, Sizes] = {16: (8, 32, 4, 128), 32: (8, 32, 8, None), 64: (4, 16, 8, None)}
BACKWARD: dict[int, Sizes] = {16: (8, 32, 4, None), 32: (8, 32, 8, None), 64: (8, 8, 8, None)}
if INTERPRETED:  # which combines scans element by element
    FORWARD = BACKWARD = dict.fromkeys((4, *FORWARD), (8, 2, 1, None))
WIDENED = 16  # states for which forward gets B and C in fp32
PROGRAMS = 512  # about four per processor of a large GPU: below that, sequences are split
SHORTEST = 8  # chunks of a segment: the passes over segments cost about one more forward


# ---------------------------------------------------------------- launchers


@on_its_device
def selective_scan(scan: Scan, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the final state, and the states before each chunk (B, I, N, D), empty unless ``keep``."""
    u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, skip_D, z_BLD, bias_GD, group_BL, reset_BL, state_BDN = (
        scan
    )
    batch, length, channels = u_BLD.shape
    states, chunks = A_DN.shape[1], count_chunks(length)
    y_BLD = torch.empty(u_BLD.shape, dtype=u_BLD.dtype, device=u_BLD.device)
    starts = A_DN.new_empty((batch, chunks, states, channels) if keep else (0,))
    if u_BLD.numel() == 0:
        final = A_DN.new_zeros(batch, channels, states) if state_BDN is None else state_BDN.clone()
        return y_BLD, final, starts
    final_BDN = A_DN.new_empty(batch, channels, states)
    u, delta, B, C = _rows_of(u_BLD, delta_BLD, *_widened(B_BLN, C_BLN))
    z, A = None if z_BLD is None else _rows_of(z_BLD)[0], A_DN.contiguous()
    skip, bias, group, reset, state = _dense(skip_D, bias_GD, group_BL, reset_BL, state_BDN)
    config, blocks, segment, segments = _plan(FORWARD[states], u_BLD.shape, states)
    end, left = A_DN.new_empty(2, batch, segments, states, channels).unbind(0)
    if segments > 1:  # nobody reads the last one's
        ends_kernel[(blocks, segments - 1, batch)](
            *(u, delta, A, B, bias, group, reset, end, left),
            *(length, channels, segment, segments),
            *(*_strides(u), *_strides(delta), *_strides(B)),
            **config,
        )
    forward_kernel[(blocks, segments, batch)](
        *(u, delta, A, B, C, skip, z, bias, group, reset, state, end, left),
        *(y_BLD, final_BDN, starts if keep else None),
        *(length, channels, segment, segments, chunks),
        *(*_strides(u), *_strides(delta), *_strides(B), *_strides(C), *_strides(z)),
        CHUNK=CHUNK,
        **config,
    )
    return y_BLD, final_BDN, starts


@on_its_device
def selective_scan_backward(
    dy_BLD: torch.Tensor | None,
    dfinal_BDN: torch.Tensor | None,
    starts_BIND: torch.Tensor,
    scan: Scan,
    need: Sequence[bool],
) -> dict[str, torch.Tensor]:
    """Gradients of the floating-point arguments given; all are computed."""
    u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, skip_D, z_BLD, bias_GD, group_BL, reset_BL, _ = scan
    batch, length, channels = u_BLD.shape
    states, chunks = A_DN.shape[1], count_chunks(length)
    if u_BLD.numel() == 0:
        found = {
            name: torch.zeros_like(of)
            for name, of in zip(Scan._fields, scan, strict=True)
            if of is not None
        }
        return found if dfinal_BDN is None else found | {"state_BDN": dfinal_BDN.clone()}
    u, delta, B, C = _rows_of(u_BLD, delta_BLD, B_BLN, C_BLN)
    z, A = None if z_BLD is None else _rows_of(z_BLD)[0], A_DN.contiguous()
    skip, bias, group, reset, dfinal = _dense(skip_D, bias_GD, group_BL, reset_BL, dfinal_BDN)
    dy = torch.zeros(u.shape, dtype=u.dtype, device=u.device) if dy_BLD is None else dy_BLD
    dy = dy.contiguous()
    config, blocks, segment, segments = _plan(BACKWARD[states], u_BLD.shape, states)
    only_state = not any(need[:8])
    into, left = A.new_empty(2, batch, segments, states, channels).unbind(0)
    if segments > 1 or only_state:
        adjoints_kernel[(blocks, segments, batch)](
            *(dy, delta, A, C, z, bias, group, reset, into, left),
            *(length, channels, segment, segments),
            *(*_strides(delta), *_strides(C), *_strides(z)),
            **config,
        )
    if only_state:
        dh_BND = torch.zeros_like(into[:, 0]) if dfinal is None else dfinal.mT
        for part in reversed(range(segments)):
            dh_BND = torch.addcmul(into[:, part], left[:, part], dh_BND)
        return {"state_BDN": dh_BND.mT}
    groups = 1 if bias is None else triton.next_power_of_2(bias.shape[0])
    du, ddelta = (torch.empty_like(dy) for _ in range(2))
    dz = None if z is None else torch.empty_like(dy)
    dB, dC = (A.new_empty(batch, blocks, length, states) for _ in range(2))
    dA = A.new_empty(batch, segments, states, channels)
    dskip = None if skip is None else A.new_empty(batch, segments, channels)
    dbias = None if bias is None else A.new_empty(batch, segments, groups, channels)
    dfirst = A.new_empty(batch, channels, states)
    backward_kernel[(blocks, segments, batch)](
        *(dy, dfinal, u, delta, A, B, C, skip, z, bias, group, reset, starts_BIND, into, left),
        *(du, ddelta, dz, dA, dB, dC, dskip, dbias, dfirst),
        *(length, channels, segment, segments, chunks),
        *(*_strides(u), *_strides(delta), *_strides(B), *_strides(C), *_strides(z)),
        CHUNK=CHUNK,
        GROUPS=groups,
        DOT=_by_tensor_cores(u.dtype, BACKWARD[states][1]),
        **config,
    )
    found = {"u_BLD": du, "delta_BLD": ddelta, "A_DN": dA.sum((0, 1)).t(), "state_BDN": dfirst}
    found |= {"B_BLN": dB.sum(1), "C_BLN": dC.sum(1)}
    if dz is not None:
        found["z_BLD"] = dz
    if dskip is not None:
        found["skip_D"] = dskip.sum((0, 1))
    if dbias is not None and bias is not None:
        found["bias_GD"] = dbias.sum((0, 1))[: bias.shape[0]]
    return found


def _rows_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors with a dense last dimension, such as slices of a projection's output, in place."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _widened(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """B and C for forward, in fp32 if N is 16. Otherwise every thread converts all its states of
    them in every tile, one instruction per exponential; copies are small. Backward, and forward of
    32 states, would spill.
    """
    return [t.to(torch.float32) if t.shape[-1] == WIDENED else t for t in tensors]


def _dense(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _strides(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Between sequences, and between tokens."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _plan(
    sizes: Sizes, shape: torch.Size, states: int
) -> tuple[dict[str, int | None], int, int, int]:
    """Options of a launch, blocks of channels, tokens of a segment (whole chunks), and segments."""
    tokens, width, warps, registers = sizes
    batch, length, channels = shape
    blocks, chunks = triton.cdiv(channels, width), count_chunks(length)
    wanted = max(1, min(PROGRAMS // (batch * blocks), chunks // SHORTEST, 16))
    segment = -(-chunks // wanted) * CHUNK
    config: dict[str, int | None] = {"N": states, "TOKENS": tokens, "WIDTH": width}
    config |= {"num_warps": warps, "num_stages": 1, "maxnreg": registers}
    return config, blocks, segment, -(-length // segment)


def _by_tensor_cores(dtype: torch.dtype, width: int) -> bool:
    """True if sums over channels are products with ones, in tf32: not in fp32, nor below 16."""
    return dtype != torch.float32 and width >= 16
