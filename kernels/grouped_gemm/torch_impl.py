"""Grouped ops in plain PyTorch at about the cost of dense ones, with hand-written gradients.

The obvious loop is slow in backward: the gradient of ``w[g]`` is a zero tensor of all G groups, per
group. Here each group's weight gradient is written straight into its slot. A group is processed
from gather to scatter before the next one starts, in buffers of one group's size, so that its
activations are still in cache when they are read again. Only the gate and up pre-activations, which
backward cannot cheaply recompute, are saved for all rows.

Where a group's rows are long runs of tokens, as text and images are, each run is read and written
in place, and no row moves.

Weights of rows never touch the wide activations: these are of unweighted rows, and the factor goes
on tensors of width D (x, dy and dx). The router-weight gradient needs no down-projection
output: ∂L/∂weight = <dy, w2 h> = <dy w2, h>, and dy w2 is computed anyway (SonicMoE, arXiv
2512.14080).

Offsets are read on the host: on CUDA that is one synchronisation per call.

T tokens, R routed rows, N rows of one group, G groups, D model, F hidden.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from earlyfuse.kernels.grouped_gemm.op import Linear, Swiglu
from earlyfuse.kernels.permute.torch_impl import put_rows, sums

_aten = torch.ops.aten

LONG_RUN = 128  # tokens: for shorter ones, moving rows costs less than so many products


def grouped_linear(arguments: Linear) -> torch.Tensor:
    """y[row] += weight · (x[row] @ w[g].T); see ``grouped_gemm`` for shapes."""
    x_TD, w_GFD, row_R, offset_G1, weight_R, unique = arguments
    pieces, largest = _pieces(row_R, offset_G1)
    x_buffer = x_TD.new_empty(largest, x_TD.shape[1])
    y_buffer = x_TD.new_empty(largest, w_GFD.shape[1])
    y_TF = sums(x_TD, x_TD.shape[0], w_GFD.shape[1], unique, row_R.shape[0])
    in_place = unique and y_TF.dtype == x_TD.dtype
    w = w_GFD.unbind(0)
    for piece in pieces:
        rows_N = row_R[piece.rows]
        x_ND = _take(x_TD, rows_N, piece.run, x_buffer)
        direct = piece.run is not None and in_place
        out_NF = y_TF[piece.run] if direct else y_buffer[: len(rows_N)]
        y_NF = torch.mm(x_ND, w[piece.group].t(), out=out_NF)
        if weight_R is not None:
            y_NF.mul_(weight_R[piece.rows, None])
        if not direct:
            put_rows(y_TF, rows_N, y_NF, unique)
    return y_TF.to(x_TD.dtype)


def grouped_linear_backward(
    dy_TF: torch.Tensor, arguments: Linear, need: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """Gradients of x, w and the weights."""
    x_TD, w_GFD, row_R, offset_G1, weight_R, unique = arguments
    need_x, need_w, _, _, need_weight = need
    dy_TF = dy_TF.contiguous()
    pieces, largest = _pieces(row_R, offset_G1)
    x_buffer, dx_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
    dy_buffer = x_TD.new_empty(largest, w_GFD.shape[1])
    dx_TD = x_TD.new_empty(0)
    if need_x:
        dx_TD = sums(x_TD, x_TD.shape[0], x_TD.shape[1], unique, row_R.shape[0])
    in_place = unique and dx_TD.dtype == x_TD.dtype
    dw_GFD, dw = _gradient(w_GFD, need_w, pieces)
    dweight_R = _gradient_by_row(weight_R, need_weight, x_TD)
    w = w_GFD.unbind(0)
    for piece in pieces:
        rows_N, group = row_R[piece.rows], piece.group
        # with weights, the rows taken are scaled in place: they must be a copy
        run = piece.run if weight_R is None else None
        direct = run is not None and need_x and in_place
        dx_ND = dx_TD[run] if direct else dx_buffer[: len(rows_N)]
        dy_NF = _take(dy_TF, rows_N, run, dy_buffer)
        if need_w or need_weight:
            x_ND = _take(x_TD, rows_N, run, x_buffer)
        if need_x or need_weight:
            torch.mm(dy_NF, w[group], out=dx_ND)
        if need_w:
            if weight_R is not None:
                dy_NF.mul_(weight_R[piece.rows, None])
            _add_product(dw[group], dy_NF.t(), x_ND, piece.first)
        if weight_R is not None and need_weight:
            dweight_N = dweight_R[piece.rows]
            torch.sum(x_ND.mul_(dx_ND), 1, out=dweight_N, dtype=dweight_N.dtype)
        if need_x and not direct:
            if weight_R is not None:
                dx_ND.mul_(weight_R[piece.rows, None])
            put_rows(dx_TD, rows_N, dx_ND, unique)
    return {"x_TD": dx_TD, "w_GFD": dw_GFD, "weight_R": dweight_R}


def grouped_swiglu(arguments: Swiglu, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """y[row] += weight · w2[g] (silu(w1[g] x[row]) ⊙ w3[g] x[row]), and both pre-activations."""
    x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, offset_G1, weight_R, unique = arguments
    pieces, largest = _pieces(row_R, offset_G1)
    rows, hidden = row_R.shape[0], w1_GFD.shape[1]
    gate_up_2RF = x_TD.new_empty(2, rows if keep else largest, hidden)
    gate_RF, up_RF = gate_up_2RF.unbind(0)
    x_buffer, y_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
    h_buffer = x_TD.new_empty(largest, hidden)
    y_TD = sums(x_TD, x_TD.shape[0], x_TD.shape[1], unique, rows)
    in_place = unique and y_TD.dtype == x_TD.dtype
    w1, w3, w2 = w1_GFD.unbind(0), w3_GFD.unbind(0), w2_GDF.unbind(0)
    for piece in pieces:
        rows_N, group = row_R[piece.rows], piece.group
        n = len(rows_N)
        at = piece.rows if keep else slice(0, n)
        gate_NF, up_NF = gate_RF[at], up_RF[at]
        x_ND = _take(x_TD, rows_N, piece.run, x_buffer)
        torch.mm(x_ND, w1[group].t(), out=gate_NF)
        torch.mm(x_ND, w3[group].t(), out=up_NF)
        h_NF = _aten.silu.out(gate_NF, out=h_buffer[:n]).mul_(up_NF)
        direct = piece.run is not None and in_place
        out_ND = y_TD[piece.run] if direct else y_buffer[:n]
        y_ND = torch.mm(h_NF, w2[group].t(), out=out_ND)
        if weight_R is not None:
            y_ND.mul_(weight_R[piece.rows, None])
        if not direct:
            put_rows(y_TD, rows_N, y_ND, unique)
    return y_TD.to(x_TD.dtype), gate_up_2RF if keep else x_TD.new_empty(0)


def grouped_swiglu_backward(
    dy_TD: torch.Tensor, gate_up_2RF: torch.Tensor, arguments: Swiglu, need: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """Gradients of x, w1, w3, w2 and the weights."""
    x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, offset_G1, weight_R, unique = arguments
    need_x, need_w1, need_w3, need_w2, _, _, need_weight = need
    dy_TD = dy_TD.contiguous()
    pieces, largest = _pieces(row_R, offset_G1)
    x_buffer, dy_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
    h_buffer, dup_buffer, dgate_buffer = x_TD.new_empty(3, largest, w1_GFD.shape[1]).unbind(0)
    dx_TD = x_TD.new_empty(0)
    if need_x:
        dx_TD = sums(x_TD, x_TD.shape[0], x_TD.shape[1], unique, row_R.shape[0])
    in_place = unique and dx_TD.dtype == x_TD.dtype
    dw1_GFD, dw1 = _gradient(w1_GFD, need_w1, pieces)
    dw3_GFD, dw3 = _gradient(w3_GFD, need_w3, pieces)
    dw2_GDF, dw2 = _gradient(w2_GDF, need_w2, pieces)
    dweight_R = _gradient_by_row(weight_R, need_weight, x_TD)
    w1, w3, w2 = w1_GFD.unbind(0), w3_GFD.unbind(0), w2_GDF.unbind(0)
    for piece in pieces:
        rows_N, group = row_R[piece.rows], piece.group
        n = len(rows_N)
        gate_NF, up_NF = gate_up_2RF[0, piece.rows], gate_up_2RF[1, piece.rows]
        weight_N1 = None if weight_R is None else weight_R[piece.rows, None]
        run = piece.run if weight_R is None else None  # as in linear_backward
        h_NF, dup_NF, dgate_NF = h_buffer[:n], dup_buffer[:n], dgate_buffer[:n]
        dy_ND = _take(dy_TD, rows_N, run, dy_buffer)
        torch.mm(dy_ND, w2[group], out=dgate_NF)  # of h, turned in place into that of gate
        silu_NF = _aten.silu.out(gate_NF, out=dup_NF)
        torch.mul(silu_NF, up_NF, out=h_NF)
        if need_w2:
            if weight_N1 is not None:
                dy_ND.mul_(weight_N1)
            _add_product(dw2[group], dy_ND.t(), h_NF, piece.first)
        if weight_N1 is not None and need_weight:
            dweight_N = dweight_R[piece.rows]
            torch.sum(h_NF.mul_(dgate_NF), 1, out=dweight_N, dtype=dweight_N.dtype)
        silu_NF.mul_(dgate_NF)  # now the gradient of up
        dgate_NF.mul_(up_NF)
        _aten.silu_backward.grad_input(dgate_NF, gate_NF, grad_input=dgate_NF)
        if need_w1 or need_w3:
            x_ND = _take(x_TD, rows_N, run, x_buffer)
            if weight_N1 is not None:
                x_ND.mul_(weight_N1)
        if need_w1:
            _add_product(dw1[group], dgate_NF.t(), x_ND, piece.first)
        if need_w3:
            _add_product(dw3[group], dup_NF.t(), x_ND, piece.first)
        if need_x:
            direct = run is not None and in_place
            dx_ND = dx_TD[run] if direct else dy_buffer[:n]
            torch.mm(dgate_NF, w1[group], out=dx_ND)
            torch.addmm(dx_ND, dup_NF, w3[group], out=dx_ND)
            if weight_N1 is not None:
                dx_ND.mul_(weight_N1)
            if not direct:
                put_rows(dx_TD, rows_N, dx_ND, unique)
    gradients = {"w1_GFD": dw1_GFD, "w3_GFD": dw3_GFD, "w2_GDF": dw2_GDF}
    return {"x_TD": dx_TD, **gradients, "weight_R": dweight_R}


class _Piece(NamedTuple):
    """Routed rows of one group that are multiplied together: all, or a run."""

    group: int
    rows: slice
    """Range of the routed rows."""
    run: slice | None
    """Range of their tokens, if consecutive."""
    first: bool
    """True for the first piece of its group."""


def _pieces(row_R: torch.Tensor, offset_G1: torch.Tensor) -> tuple[list[_Piece], int]:
    """Pieces of all groups that have rows, and the number of rows of the largest."""
    pieces = []
    for group, (begin, end) in enumerate(pairwise(offset_G1.tolist())):
        if begin == end:
            continue
        starts = _run_starts(row_R[begin:end])
        if starts is None:
            pieces.append(_Piece(group, slice(begin, end), None, True))
            continue
        for start, stop in pairwise([*starts, end - begin]):
            token = int(row_R[begin + start])
            run = slice(token, token + stop - start)
            pieces.append(_Piece(group, slice(begin + start, begin + stop), run, start == 0))
    return pieces, max((piece.rows.stop - piece.rows.start for piece in pieces), default=0)


def _run_starts(row_N: torch.Tensor) -> list[int] | None:
    """Starts of runs of tokens among a group's rows; None if runs are short on average."""
    if row_N.device.type != "cpu":
        return None
    starts = np.flatnonzero(np.diff(row_N.numpy()) != 1) + 1
    if len(starts) and len(row_N) < LONG_RUN * (len(starts) + 1):
        return None
    return [0, *starts.tolist()]


def _take(
    x_TD: torch.Tensor, rows_N: torch.Tensor, run: slice | None, buffer: torch.Tensor
) -> torch.Tensor:
    """The rows (N, D): a view of ``x`` where they are a run, else in ``buffer``."""
    if run is not None:
        return x_TD[run]
    return torch.index_select(x_TD, 0, rows_N, out=buffer[: len(rows_N)])


def _add_product(sum_FD: torch.Tensor, a_FN: torch.Tensor, b_ND: torch.Tensor, first: bool) -> None:
    if first:
        torch.mm(a_FN, b_ND, out=sum_FD)
    else:
        sum_FD.addmm_(a_FN, b_ND)


def _gradient(
    w: torch.Tensor, needed: bool, pieces: Sequence[_Piece]
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Uninitialised gradient of ``w`` and each group's part of it, zero for groups without rows;
    empty if not needed.
    """
    if not needed:
        return w.new_empty(0), []
    gradient = torch.empty_like(w, memory_format=torch.contiguous_format)
    parts = gradient.unbind(0)
    for group in set(range(len(parts))) - {piece.group for piece in pieces}:
        parts[group].zero_()
    return gradient, parts


def _gradient_by_row(
    weight_R: torch.Tensor | None, needed: bool, x_TD: torch.Tensor
) -> torch.Tensor:
    """Uninitialised gradient of the weights; empty if not needed."""
    if weight_R is None or not needed:
        return x_TD.new_empty(0)
    return torch.empty_like(weight_R, memory_format=torch.contiguous_format)
