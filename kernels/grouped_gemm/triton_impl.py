"""Grouped ops for CUDA: launches of ``triton_kernels.py``, without any host synchronisation.

Where a token may have several rows, their results are written side by side and added up by token
afterwards (``permute.combine``), in fixed order: atomic additions would move the same bytes and
give different sums on each run. With ``unique_tokens`` a kernel writes straight to the token.

T tokens, R routed rows, G groups, D model, F hidden.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from earlyfuse.kernels.grouped_gemm.op import Linear, Swiglu
from earlyfuse.kernels.grouped_gemm.triton_configurations import (
    BAND,
    HALF_BACKWARD,
    SINGLE,
)
from earlyfuse.kernels.grouped_gemm.triton_kernels import (
    activation_backward_kernel,
    gate_up_kernel,
    rows_kernel,
    weight_gradient_kernel,
)
from earlyfuse.kernels.permute.triton_impl import combine, inverse_of
from earlyfuse.kernels.triton_support import (
    compute_type,
    launcher,
    product_precision,
)

PROGRAMS_IN_INTERPRETER = 2


class Reading(Enum):
    """Access of a kernel to an operand."""

    GATHERED = "rows picked by the route"
    DENSE = "tiles anywhere in it"
    RAGGED = "rows of one group, zeros after its last"


@launcher
def grouped_linear(arguments: Linear) -> torch.Tensor:
    """y[row] += weight · (x[row] @ w[g].T); see ``grouped_gemm`` for shapes."""
    x_TD, w_GFD, row_R, offset_G1, weight_R, unique = arguments
    routes = (row_R, offset_G1, weight_R)
    return _to_tokens(x_TD, w_GFD, *routes, unique, gather=True, transposed=True)


@launcher
def grouped_linear_backward(
    dy_TF: torch.Tensor, arguments: Linear, need: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """Gradients of x, w and the weights."""
    x_TD, w_GFD, row_R, offset_G1, weight_R, unique = arguments
    need_x, need_w, _, _, need_weight = need
    found = {}
    if need_weight and weight_R is not None:
        dx_RD = _rows(dy_TF, w_GFD, row_R, offset_G1, None, gather=True, transposed=False)
        found["weight_R"] = (x_TD[row_R].float() * dx_RD.float()).sum(1)
        if need_x:
            found["x_TD"] = combine(dx_RD, *inverse_of(row_R, x_TD.shape[0]), weight_R)
    elif need_x:
        routes = (row_R, offset_G1, weight_R)
        found["x_TD"] = _to_tokens(dy_TF, w_GFD, *routes, unique, gather=True, transposed=False)
    if need_w:
        found["w_GFD"] = _weight_gradient(
            dy_TF, x_TD, row_R, offset_G1, weight_R, gather_p=True, gather_q=True
        )
    return found


@launcher
def grouped_swiglu(arguments: Swiglu, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """y[row] += weight · w2[g] (silu(w1[g] x[row]) ⊙ w3[g] x[row]), and both pre-activations."""
    x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, offset_G1, weight_R, unique = arguments
    groups, hidden, dim = w1_GFD.shape
    rows = row_R.shape[0]
    gate_up_2RF = x_TD.new_empty((2, rows, hidden) if keep else 0)
    gate_RF, up_RF = gate_up_2RF if keep else (gate_up_2RF, gate_up_2RF)
    h_RF = x_TD.new_empty(rows, hidden)
    if h_RF.numel():
        tma, (w1, w3) = operands((w1_GFD, Reading.DENSE), (w3_GFD, Reading.DENSE))
        gate_up_kernel[_programs(x_TD, rows, groups, hidden)](
            x_TD, w1, w3, row_R, offset_G1, gate_RF, up_RF, h_RF, groups, hidden, dim,
            KEEP=keep, TMA=tma, INDEX=_index(x_TD), **_common(x_TD, groups),
        )  # fmt: skip
    y_TD = _to_tokens(
        h_RF, w2_GDF, row_R, offset_G1, weight_R, unique,
        gather=False, transposed=True, tokens=x_TD.shape[0],
    )  # fmt: skip
    return y_TD, gate_up_2RF


@launcher
def grouped_swiglu_backward(
    dy_TD: torch.Tensor, gate_up_2RF: torch.Tensor, arguments: Swiglu, need: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """Gradients of x, w1, w3, w2 and the weights."""
    x_TD, w1_GFD, w3_GFD, w2_GDF, row_R, offset_G1, weight_R, unique = arguments
    need_x, need_w1, need_w3, need_w2, _, _, need_weight = need
    dgate_RF, dup_RF, h_RF, dweight_R = _activation_backward(
        dy_TD, gate_up_2RF, w2_GDF, row_R, offset_G1, weight_R, need_weight
    )
    found = {} if dweight_R is None else {"weight_R": dweight_R}
    routes = (row_R, offset_G1, None)
    if need_x:
        found["x_TD"] = _to_tokens(
            dgate_RF, w1_GFD, *routes, unique, gather=False, transposed=False,
            tokens=x_TD.shape[0], second=(dup_RF, w3_GFD),
        )  # fmt: skip
    for name, needed, p, q in (
        ("w1_GFD", need_w1, dgate_RF, x_TD),
        ("w3_GFD", need_w3, dup_RF, x_TD),
        ("w2_GDF", need_w2, dy_TD, h_RF),
    ):
        if needed:
            found[name] = _weight_gradient(p, q, *routes, gather_p=p is dy_TD, gather_q=q is x_TD)
    return found


# ---------------------------------------------------------------- TMA or pointers


def operands(*readings: tuple[torch.Tensor, Reading]) -> tuple[bool, list[Any]]:
    """True if a launch fetches tiles by TMA, and its operands: contiguous tensors or descriptors.

    TMA needs a device that has it and can address every operand that is not gathered; otherwise all
    operands are read through pointers, as gathered ones always are. Descriptors get their tiles
    when a configuration is chosen (``triton_configurations.tiles``).
    """
    # flattened, because a dimension of size 1 may have any stride and TMA needs the packed one
    tensors = [tensor.contiguous().flatten().view(tensor.shape) for tensor, _ in readings]
    how = [reading for _, reading in readings]
    tiled = [t for t, reading in zip(tensors, how, strict=True) if reading != Reading.GATHERED]
    if not tiled or not all(has_tma(t) and _addressable(t) for t in tiled):
        return False, tensors
    return True, list(map(_described, tensors, how))


def has_tma(tensor: torch.Tensor) -> bool:
    """True if tiles of the tensor's dtype are fetched by the device's tensor memory accelerator.

    fp32 products do not wait for tiles, and with TMA their kernels take twice the registers.
    """
    return (
        tensor.device.type == "cuda"
        and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
        and tensor.dtype != torch.float32
    )


def _addressable(tensor: torch.Tensor) -> bool:
    """True if not empty and every row begins at a multiple of 16 bytes, as TMA requires."""
    row_bytes = tensor.shape[-1] * tensor.element_size()
    return tensor.numel() > 0 and tensor.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def _described(tensor: torch.Tensor, reading: Reading) -> torch.Tensor | TensorDescriptor:
    if reading == Reading.GATHERED:
        return tensor
    if reading == Reading.RAGGED:
        return create_ragged_descriptor(tensor, [1, 1])
    return TensorDescriptor.from_tensor(tensor, [1] * tensor.ndim)


# ---------------------------------------------------------------- launches


def _activation_backward(
    dy_TD: torch.Tensor,
    gate_up_2RF: torch.Tensor,
    w2_GDF: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weighted dgate, dup and h, (R, F) each, and the gradient of the weights (R,) if needed."""
    groups, dim, hidden = w2_GDF.shape
    rows = row_R.shape[0]
    dgate_RF, dup_RF, h_RF = dy_TD.new_empty(3, rows, hidden)
    # as many column blocks as the narrowest configuration has; those not written stay 0
    narrowest = min(config.kwargs["BLOCK_N"] for config in (*HALF_BACKWARD, *SINGLE))
    partial_NR = dy_TD.new_zeros(
        triton.cdiv(hidden, narrowest) if need_weight else 0, rows, dtype=torch.float32
    )
    if h_RF.numel():
        tma, (w2,) = operands((w2_GDF, Reading.DENSE))
        activation_backward_kernel[_programs(dy_TD, rows, groups, hidden)](
            dy_TD, w2, gate_up_2RF[0], gate_up_2RF[1], row_R, offset_G1, weight_R,
            dgate_RF, dup_RF, h_RF, partial_NR, rows, groups, hidden, dim,
            WEIGHTED=weight_R is not None, NEED_WEIGHT=need_weight, TMA=tma,
            INDEX=_index(dy_TD), **_common(dy_TD, groups),
        )  # fmt: skip
    dweight_R = partial_NR.sum(0) if need_weight else None
    return dgate_RF, dup_RF, h_RF, dweight_R


def _to_tokens(
    a: torch.Tensor,
    b: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    unique: bool,
    *,
    gather: bool,
    transposed: bool,
    tokens: int | None = None,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The rows' products, weighted and added up by token: (T, columns of b)."""
    tokens = a.shape[0] if tokens is None else tokens
    if unique:
        out = a.new_zeros(tokens, b.shape[1] if transposed else b.shape[2])
        routes = (row_R, offset_G1, weight_R)
        return _rows(
            a, b, *routes, gather=gather, transposed=transposed, second=second, scatter_to=out
        )
    y = _rows(a, b, row_R, offset_G1, None, gather=gather, transposed=transposed, second=second)
    return combine(y, *inverse_of(row_R, tokens), weight_R)


def _rows(
    a: torch.Tensor,
    b: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    *,
    gather: bool,
    transposed: bool,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
    scatter_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """One product per routed row, in rows of its own or of its token in ``scatter_to``."""
    a2, b2 = second if second is not None else (a, b)
    groups, rows = b.shape[0], row_R.shape[0]
    columns, inner = (b.shape[1], b.shape[2]) if transposed else (b.shape[2], b.shape[1])
    out = a.new_empty(rows, columns) if scatter_to is None else scatter_to
    if rows and columns:
        reading, dense = Reading.GATHERED if gather else Reading.DENSE, Reading.DENSE
        tma, tensors = operands((a, reading), (b, dense), (a2, reading), (b2, dense))
        rows_kernel[_programs(a, rows, groups, columns)](
            *tensors, row_R, offset_G1, weight_R, out, groups, columns, inner,
            GATHER=gather, TRANSPOSED=transposed, TWO=second is not None,
            SCATTER=scatter_to is not None, WEIGHTED=weight_R is not None, TMA=tma,
            INDEX=_index(a, out), **_common(a, groups),
        )  # fmt: skip
    return out


def _weight_gradient(
    p: torch.Tensor,
    q: torch.Tensor,
    row_R: torch.Tensor,
    offset_G1: torch.Tensor,
    weight_R: torch.Tensor | None,
    *,
    gather_p: bool,
    gather_q: bool,
) -> torch.Tensor:
    """Σ over the rows of each group of weight · pᵀ q → (G, columns of p, columns of q)."""
    groups = offset_G1.shape[0] - 1
    if not row_R.numel():  # a configuration chosen for no rows would stay
        return p.new_zeros(groups, p.shape[1], q.shape[1])
    out = p.new_empty(groups, p.shape[1], q.shape[1])
    if out.numel():
        common = _common(p, groups)
        del common["GROUPS"]
        tma, tensors = operands(
            (p, Reading.GATHERED if gather_p else Reading.RAGGED),
            (q, Reading.GATHERED if gather_q else Reading.RAGGED),
        )
        weight_gradient_kernel[_programs(p, groups * p.shape[1], groups, q.shape[1])](
            *tensors, row_R, offset_G1, weight_R, out, groups, p.shape[1], q.shape[1],
            GATHER_P=gather_p, GATHER_Q=gather_q, WEIGHTED=weight_R is not None, TMA=tma, **common,
        )  # fmt: skip
    return out


def _programs(like: torch.Tensor, rows: int, groups: int, columns: int) -> Callable[[dict], tuple]:
    """Grid of as many programs as the device runs at once, but no more than tiles."""
    if like.device.type != "cuda":
        return lambda blocks: (PROGRAMS_IN_INTERPRETER,)
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count

    def grid(blocks: dict) -> tuple[int]:
        most = triton.cdiv(rows, blocks["BLOCK_M"]) + groups
        tiles = most * triton.cdiv(columns, blocks["BLOCK_N"])
        return (min(tiles, processors * blocks["PER_SM"]),)

    return grid


def _index(*tensors: torch.Tensor) -> tl.dtype:
    return tl.int64 if max(tensor.numel() for tensor in tensors) >= 2**31 else tl.int32


def _common(like: torch.Tensor, groups: int) -> dict[str, Any]:
    return {
        "GROUPS": max(triton.next_power_of_2(groups), 2),
        "BAND": BAND,
        "DOT": compute_type(like.dtype),
        "PRECISION": product_precision(like.dtype),
    }
