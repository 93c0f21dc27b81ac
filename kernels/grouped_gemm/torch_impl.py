"""Grouped ops in plain PyTorch at about the cost of dense ones, with hand-written gradients.

What makes the obvious loop slow is its backward: the gradient of ``w[g]`` is a zero tensor of all G
groups, once per group. Here each group's weight gradient is written straight into its slot. A group
is handled from gather to scatter before the next one starts, in buffers of one group's size, so
that its activations are still in cache when they are read again. Only the gate and up
pre-activations, which backward cannot cheaply recompute, are kept for all rows.

Weights of rows never touch the wide activations: those below are of an unweighted row, and the
factor goes on what is D wide (x, dy and dx). The router-weight gradient needs no down-projection
output: ∂L/∂weight = <dy, w2 h> = <dy w2, h>, and dy w2 is computed anyway (SonicMoE, arXiv
2512.14080).

Offsets are read on the host: on CUDA that is one synchronisation per call.

T tokens, R routed rows, N rows of one group, G groups, D model, F hidden.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from earlyfuse.kernels.permute.torch_impl import put_rows, sums

_aten = torch.ops.aten


def linear(
    x_TD: torch.Tensor,
    w_GFD: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    once: bool,
) -> torch.Tensor:
    """y[row] += weight · (x[row] @ w[g].T); see ``grouped_gemm`` for shapes."""
    sizes = _sizes(offset_G1)
    largest = max(sizes, default=0)
    x_buffer = x_TD.new_empty(largest, x_TD.shape[1])
    y_buffer = x_TD.new_empty(largest, w_GFD.shape[1])
    y_TF = sums(x_TD, x_TD.shape[0], w_GFD.shape[1], once, row_R.shape[0])
    for n, rows_N, weight_N1, w_FD in zip(
        sizes, row_R.split(sizes), _columns(weight_R, sizes), w_GFD.unbind(0), strict=True
    ):
        if n == 0:
            continue
        x_ND = torch.index_select(x_TD, 0, rows_N, out=x_buffer[:n])
        y_NF = torch.mm(x_ND, w_FD.t(), out=y_buffer[:n])
        if weight_N1 is not None:
            y_NF.mul_(weight_N1)
        put_rows(y_TF, rows_N, y_NF, once)
    return y_TF.to(x_TD.dtype)


def linear_backward(
    dy_TF: torch.Tensor,
    x_TD: torch.Tensor,
    w_GFD: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    once: bool,
    need: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, w and the weights."""
    need_x, need_w, need_weight = need
    sizes = _sizes(offset_G1)
    largest = max(sizes, default=0)
    x_buffer, dx_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
    dy_buffer = x_TD.new_empty(largest, w_GFD.shape[1])
    dx_TD = x_TD.new_empty(0)
    if need_x:
        dx_TD = sums(x_TD, x_TD.shape[0], x_TD.shape[1], once, row_R.shape[0])
    dw_GFD, dw = _gradient(w_GFD, need_w, sizes)
    dweight_R, dweight = _gradient_by_row(weight_R, need_weight, x_TD, sizes)
    for n, rows_N, weight_N1, w_FD, dw_FD, dweight_N in zip(
        sizes,
        row_R.split(sizes),
        _columns(weight_R, sizes),
        w_GFD.unbind(0),
        dw,
        dweight,
        strict=True,
    ):
        if n == 0:
            continue
        x_ND, dx_ND = x_buffer[:n], dx_buffer[:n]
        dy_NF = torch.index_select(dy_TF, 0, rows_N, out=dy_buffer[:n])
        if need_w or need_weight:
            torch.index_select(x_TD, 0, rows_N, out=x_ND)
        if need_x or need_weight:
            torch.mm(dy_NF, w_FD, out=dx_ND)
        if dw_FD is not None:
            if weight_N1 is not None:
                dy_NF.mul_(weight_N1)
            torch.mm(dy_NF.t(), x_ND, out=dw_FD)
        if dweight_N is not None:
            torch.sum(x_ND.mul_(dx_ND), 1, out=dweight_N, dtype=dweight_N.dtype)
        if need_x:
            if weight_N1 is not None:
                dx_ND.mul_(weight_N1)
            put_rows(dx_TD, rows_N, dx_ND, once)
    return dx_TD.to(x_TD.dtype), dw_GFD, dweight_R


def swiglu(
    x_TD: torch.Tensor,
    w1_GFD: torch.Tensor,
    w3_GFD: torch.Tensor,
    w2_GDF: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    once: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[row] += weight · w2[g] (silu(w1[g] x[row]) ⊙ w3[g] x[row]), and both pre-activations."""
    sizes = _sizes(offset_G1)
    largest = max(sizes, default=0)
    rows, hidden = row_R.shape[0], w1_GFD.shape[1]
    gate_up_2RF = x_TD.new_empty(2, rows if keep else largest, hidden)
    gate_RF, up_RF = gate_up_2RF.unbind(0)
    x_buffer, y_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
    h_buffer = x_TD.new_empty(largest, hidden)
    y_TD = sums(x_TD, x_TD.shape[0], x_TD.shape[1], once, rows)
    for n, rows_N, weight_N1, gate_NF, up_NF, w1_FD, w3_FD, w2_DF in zip(
        sizes,
        row_R.split(sizes),
        _columns(weight_R, sizes),
        gate_RF.split(sizes) if keep else [gate_RF[:n] for n in sizes],
        up_RF.split(sizes) if keep else [up_RF[:n] for n in sizes],
        w1_GFD.unbind(0),
        w3_GFD.unbind(0),
        w2_GDF.unbind(0),
        strict=True,
    ):
        if n == 0:
            continue
        x_ND = torch.index_select(x_TD, 0, rows_N, out=x_buffer[:n])
        torch.mm(x_ND, w1_FD.t(), out=gate_NF)
        torch.mm(x_ND, w3_FD.t(), out=up_NF)
        h_NF = _aten.silu.out(gate_NF, out=h_buffer[:n]).mul_(up_NF)
        y_ND = torch.mm(h_NF, w2_DF.t(), out=y_buffer[:n])
        if weight_N1 is not None:
            y_ND.mul_(weight_N1)
        put_rows(y_TD, rows_N, y_ND, once)
    return y_TD.to(x_TD.dtype), gate_up_2RF if keep else x_TD.new_empty(0)


def swiglu_backward(
    dy_TD: torch.Tensor,
    gate_up_2RF: torch.Tensor,
    x_TD: torch.Tensor,
    w1_GFD: torch.Tensor,
    w3_GFD: torch.Tensor,
    w2_GDF: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    once: bool,
    need: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, w1, w3, w2 and the weights."""
    need_x, need_w1, need_w3, need_w2, need_weight = need
    sizes = _sizes(offset_G1)
    largest = max(sizes, default=0)
    x_buffer, dy_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
    h_buffer, dup_buffer, dgate_buffer = x_TD.new_empty(3, largest, w1_GFD.shape[1]).unbind(0)
    dx_TD = x_TD.new_empty(0)
    if need_x:
        dx_TD = sums(x_TD, x_TD.shape[0], x_TD.shape[1], once, row_R.shape[0])
    dw1_GFD, dw1 = _gradient(w1_GFD, need_w1, sizes)
    dw3_GFD, dw3 = _gradient(w3_GFD, need_w3, sizes)
    dw2_GDF, dw2 = _gradient(w2_GDF, need_w2, sizes)
    dweight_R, dweight = _gradient_by_row(weight_R, need_weight, x_TD, sizes)
    weights = zip(w1_GFD.unbind(0), w3_GFD.unbind(0), w2_GDF.unbind(0), strict=True)
    rows = zip(row_R.split(sizes), _columns(weight_R, sizes), dweight, strict=True)
    kept = zip(gate_up_2RF[0].split(sizes), gate_up_2RF[1].split(sizes), strict=True)
    for n, (rows_N, weight_N1, dweight_N), (gate_NF, up_NF), (w1_FD, w3_FD, w2_DF), dw in zip(
        sizes, rows, kept, weights, zip(dw1, dw3, dw2, strict=True), strict=True
    ):
        if n == 0:
            continue
        dw1_FD, dw3_FD, dw2_DF = dw
        h_NF, dup_NF, dgate_NF = h_buffer[:n], dup_buffer[:n], dgate_buffer[:n]
        dy_ND = torch.index_select(dy_TD, 0, rows_N, out=dy_buffer[:n])
        torch.mm(dy_ND, w2_DF, out=dgate_NF)  # gradient of h, turned in place into that of gate
        silu_NF = _aten.silu.out(gate_NF, out=dup_NF)
        torch.mul(silu_NF, up_NF, out=h_NF)
        if dw2_DF is not None:
            if weight_N1 is not None:
                dy_ND.mul_(weight_N1)
            torch.mm(dy_ND.t(), h_NF, out=dw2_DF)
        if dweight_N is not None:
            torch.sum(h_NF.mul_(dgate_NF), 1, out=dweight_N, dtype=dweight_N.dtype)
        silu_NF.mul_(dgate_NF)  # now the gradient of up
        dgate_NF.mul_(up_NF)
        _aten.silu_backward.grad_input(dgate_NF, gate_NF, grad_input=dgate_NF)
        if need_w1 or need_w3:
            x_ND = torch.index_select(x_TD, 0, rows_N, out=x_buffer[:n])
            if weight_N1 is not None:
                x_ND.mul_(weight_N1)
        if dw1_FD is not None:
            torch.mm(dgate_NF.t(), x_ND, out=dw1_FD)
        if dw3_FD is not None:
            torch.mm(dup_NF.t(), x_ND, out=dw3_FD)
        if need_x:
            dx_ND = torch.mm(dgate_NF, w1_FD, out=dy_ND)
            torch.addmm(dx_ND, dup_NF, w3_FD, out=dx_ND)
            if weight_N1 is not None:
                dx_ND.mul_(weight_N1)
            put_rows(dx_TD, rows_N, dx_ND, once)
    return dx_TD.to(x_TD.dtype), dw1_GFD, dw3_GFD, dw2_GDF, dweight_R


def _sizes(offset_G1: torch.Tensor) -> list[int]:
    """Rows of each group."""
    offsets = offset_G1.tolist()
    return [stop - start for start, stop in pairwise(offsets)]


def _columns(weight_R: torch.Tensor | None, sizes: list[int]) -> Sequence[torch.Tensor | None]:
    """Each group's weights as a column."""
    return [None] * len(sizes) if weight_R is None else weight_R[:, None].split(sizes)


def _gradient(
    w: torch.Tensor, needed: bool, sizes: list[int]
) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
    """An uninitialised gradient of ``w`` and each group's part of it; empty and nones if not
    needed. A part is zero where its group has no rows to write it.
    """
    if not needed:
        return w.new_empty(0), [None] * len(sizes)
    gradient = torch.empty_like(w, memory_format=torch.contiguous_format)
    parts = gradient.unbind(0)
    for part, size in zip(parts, sizes, strict=True):
        if size == 0:
            part.zero_()
    return gradient, parts


def _gradient_by_row(
    weight_R: torch.Tensor | None, needed: bool, x_TD: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
    """An uninitialised gradient of the weights and each group's part of it."""
    if weight_R is None or not needed:
        return x_TD.new_empty(0), [None] * len(sizes)
    gradient = torch.empty_like(weight_R, memory_format=torch.contiguous_format)
    return gradient, gradient.split(sizes)
