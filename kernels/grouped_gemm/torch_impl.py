"""Grouped ops in plain PyTorch at about the cost of dense ones, with hand-written gradients.

What makes the obvious loop slow is its backward: the gradient of ``w[g]`` is a zero tensor of all G
groups, once per group. Here each group's weight gradient is written straight into its slot. A group
is handled from gather to scatter before the next one starts, in buffers of one group's size, so
that its activations are still in cache when they are read again. Only the gate and up
pre-activations, which backward cannot cheaply recompute, are kept for all rows.

The router-weight gradient needs no down-projection output: ∂L/∂weight = <dy, w2 h> = <dy w2, h>,
and dy w2 is computed anyway (SonicMoE, arXiv 2512.14080).

Offsets are read on the host: on CUDA that is one synchronisation per call.

T tokens, R routed rows, N rows of one group, G groups, D model, F hidden.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from earlyfuse.kernels.permute.torch_impl import add_rows, zeros_to_add_to

_aten = torch.ops.aten


def grouped_linear(
    x_TD: torch.Tensor,
    w_GFD: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[row] += weight · (x[row] @ w[g].T); see ``grouped_gemm`` for shapes."""
    return _GroupedLinear.apply(x_TD, w_GFD, row_R, weight_R, _sizes(offset_G1))


def grouped_swiglu(
    x_TD: torch.Tensor,
    w1_GFD: torch.Tensor,
    w3_GFD: torch.Tensor,
    w2_GDF: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[row] += weight · w2[g] (silu(w1[g] x[row]) ⊙ w3[g] x[row]); shapes in ``grouped_gemm``."""
    inputs = (x_TD, w1_GFD, w3_GFD, w2_GDF, weight_R)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _GroupedSwiGLU.apply(
        x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, weight_R, _sizes(offset_G1), keep
    )


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w_GFD: torch.Tensor,
        row_R: torch.Tensor,
        weight_R: torch.Tensor | None,
        sizes: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, w_GFD, row_R, weight_R)
        ctx.sizes = sizes
        largest = max(sizes, default=0)
        x_buffer = x_TD.new_empty(largest, x_TD.shape[1])
        y_buffer = x_TD.new_empty(largest, w_GFD.shape[1])
        y_TF = zeros_to_add_to(x_TD, x_TD.shape[0], w_GFD.shape[1])
        for n, rows_N, weight_N1, w_FD in zip(
            sizes, row_R.split(sizes), _columns(weight_R, sizes), w_GFD.unbind(0), strict=True
        ):
            if n == 0:
                continue
            x_ND = torch.index_select(x_TD, 0, rows_N, out=x_buffer[:n])
            y_NF = torch.mm(x_ND, w_FD.t(), out=y_buffer[:n])
            if weight_N1 is not None:
                y_NF.mul_(weight_N1)
            add_rows(y_TF, rows_N, y_NF)
        return y_TF.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, w_GFD, row_R, weight_R = ctx.saved_tensors
        need_x, need_w, _, need_weight, _ = ctx.needs_input_grad
        sizes = ctx.sizes
        largest = max(sizes, default=0)
        x_buffer, dx_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
        dy_buffer = x_TD.new_empty(largest, w_GFD.shape[1])
        dx_TD = zeros_to_add_to(x_TD, *x_TD.shape) if need_x else None
        dw_GFD, dw = _gradient(w_GFD, need_w, sizes)
        dweight_R, dweight = _gradient(weight_R, need_weight, sizes, by_row=True)
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
            if dx_TD is not None:
                if weight_N1 is not None:
                    dx_ND.mul_(weight_N1)
                add_rows(dx_TD, rows_N, dx_ND)
        dx_TD = None if dx_TD is None else dx_TD.to(x_TD.dtype)
        return dx_TD, dw_GFD, None, dweight_R, None  # row_R, sizes


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w1_GFD: torch.Tensor,
        w3_GFD: torch.Tensor,
        w2_GDF: torch.Tensor,
        row_R: torch.Tensor,
        weight_R: torch.Tensor | None,
        sizes: list[int],
        keep: bool,
    ) -> torch.Tensor:
        largest = max(sizes, default=0)
        gate_RF, up_RF = x_TD.new_empty(
            2, row_R.shape[0] if keep else largest, w1_GFD.shape[1]
        ).unbind(0)
        x_buffer, y_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
        h_buffer = x_TD.new_empty(largest, w1_GFD.shape[1])
        y_TD = zeros_to_add_to(x_TD, *x_TD.shape)
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
            add_rows(y_TD, rows_N, y_ND)
        if keep:
            ctx.save_for_backward(x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, weight_R, gate_RF, up_RF)
            ctx.sizes = sizes
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, weight_R, gate_RF, up_RF = ctx.saved_tensors
        need_x, need_w1, need_w3, need_w2, _, need_weight, _, _ = ctx.needs_input_grad
        sizes = ctx.sizes
        largest = max(sizes, default=0)
        x_buffer, dy_buffer = x_TD.new_empty(2, largest, x_TD.shape[1]).unbind(0)
        h_buffer, dup_buffer, dgate_buffer = x_TD.new_empty(3, largest, w1_GFD.shape[1]).unbind(0)
        dx_TD = zeros_to_add_to(x_TD, *x_TD.shape) if need_x else None
        dw1_GFD, dw1 = _gradient(w1_GFD, need_w1, sizes)
        dw3_GFD, dw3 = _gradient(w3_GFD, need_w3, sizes)
        dw2_GDF, dw2 = _gradient(w2_GDF, need_w2, sizes)
        dweight_R, dweight = _gradient(weight_R, need_weight, sizes, by_row=True)
        weights = zip(w1_GFD.unbind(0), w3_GFD.unbind(0), w2_GDF.unbind(0), strict=True)
        rows = zip(row_R.split(sizes), _columns(weight_R, sizes), dweight, strict=True)
        kept = zip(gate_RF.split(sizes), up_RF.split(sizes), strict=True)
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
            if weight_N1 is not None:
                dgate_NF.mul_(weight_N1)
            silu_NF.mul_(dgate_NF)  # now the gradient of up
            dgate_NF.mul_(up_NF)
            _aten.silu_backward.grad_input(dgate_NF, gate_NF, grad_input=dgate_NF)
            if need_w1 or need_w3:
                x_ND = torch.index_select(x_TD, 0, rows_N, out=x_buffer[:n])
            if dw1_FD is not None:
                torch.mm(dgate_NF.t(), x_ND, out=dw1_FD)
            if dw3_FD is not None:
                torch.mm(dup_NF.t(), x_ND, out=dw3_FD)
            if dx_TD is not None:
                dx_ND = torch.mm(dgate_NF, w1_FD, out=dy_ND)
                torch.addmm(dx_ND, dup_NF, w3_FD, out=dx_ND)
                add_rows(dx_TD, rows_N, dx_ND)
        dx_TD = None if dx_TD is None else dx_TD.to(x_TD.dtype)
        return dx_TD, dw1_GFD, dw3_GFD, dw2_GDF, None, dweight_R, None, None  # row_R, sizes, keep


def _sizes(offset_G1: torch.Tensor) -> list[int]:
    """Rows of each group."""
    offsets = offset_G1.tolist()
    return [stop - start for start, stop in pairwise(offsets)]


def _columns(weight_R: torch.Tensor | None, sizes: list[int]) -> Sequence[torch.Tensor | None]:
    """Each group's weights as a column."""
    return [None] * len(sizes) if weight_R is None else weight_R[:, None].split(sizes)


def _gradient(
    tensor: torch.Tensor | None, needed: bool, sizes: list[int], by_row: bool = False
) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]:
    """An uninitialised gradient of ``tensor`` and each group's part of it, or nones.

    A weight's part is zero where its group has no rows to write it.
    """
    if tensor is None or not needed:
        return None, [None] * len(sizes)
    gradient = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if by_row:
        return gradient, gradient.split(sizes)
    parts = gradient.unbind(0)
    for part, size in zip(parts, sizes, strict=True):
        if size == 0:
            part.zero_()
    return gradient, parts
