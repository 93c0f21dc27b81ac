"""The specialisations in which Triton kernels are compiled ahead of time (``ahead_of_time.py``).

One ``Variant`` per specialisation that a launch may compile, over the list its autotuner chooses
from. Kernels are switched to their most expensive options.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from earlyfuse.kernels.causal_conv1d import triton_kernels as conv
from earlyfuse.kernels.grouped_gemm import triton_configurations as grouped
from earlyfuse.kernels.grouped_gemm import triton_kernels as grouped_kernels
from earlyfuse.kernels.linear_cross_entropy import triton_impl as loss
from earlyfuse.kernels.permute import triton_impl as permute
from earlyfuse.kernels.selective_scan import triton_impl as scan
from earlyfuse.kernels.selective_scan.chunks import CHUNK
from earlyfuse.kernels.selective_scan.triton_kernels import SIZES
from earlyfuse.kernels.triton_support import compute_type, product_precision

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch would compile it.

    ``types``: Triton's word for each argument that is no constant ("*bf16", "i32", "fp32",
    "tensordesc<bf16[64, 128]>").
    ``constants``: values of ``tl.constexpr`` arguments, and None for pointers that are not given.
    ``aligned``: integer arguments known to be multiples of 16; pointers always are.
    ``registers``: the launch's limit for a thread, if it has one.
    ``tensor_cores``: whether its products must run on them. ``tma``: whether tiles must be fetched
    by the tensor memory accelerator. ``oldest``: the first capability that has what it uses.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    tensor_cores: bool = False
    tma: bool = False
    oldest: int = 80


def variants() -> list[Variant]:
    """All variants of all ops."""
    return [*_convolution(), *_grouped(), *_loss(), *_permute(), *_scan()]


def _convolution() -> Iterator[Variant]:
    """Every configuration in bf16, one in fp32, and one without anything that may be missing."""
    for config in conv.FORWARD_CONFIGS:
        yield _conv_forward(config, torch.bfloat16, True)
    yield _conv_forward(conv.FORWARD_CONFIGS[0], torch.float32, True)
    yield _conv_forward(conv.FORWARD_CONFIGS[0], torch.bfloat16, False)
    for config in conv.BACKWARD_CONFIGS:
        yield _conv_backward(config, torch.bfloat16, True)
    yield _conv_backward(conv.BACKWARD_CONFIGS[0], torch.float32, True)
    yield _conv_backward(conv.BACKWARD_CONFIGS[0], torch.bfloat16, False)


def _conv_forward(config: triton.Config, dtype: torch.dtype, full: bool) -> Variant:
    return _conv_variant(
        "forward", conv.forward_kernel, config, dtype, full, ("x", "weight", "y", "final"), ("x",)
    )


def _conv_backward(config: triton.Config, dtype: torch.dtype, full: bool) -> Variant:
    tensors = ("dy", "dfinal", "x", "weight", "dx", "dstate")
    return _conv_variant(
        "backward", conv.backward_kernel, config, dtype, full, tensors, ("dy", "x")
    )


def _conv_variant(
    pass_name: str,
    kernel: Any,
    config: triton.Config,
    dtype: torch.dtype,
    full: bool,
    tensors: tuple[str, ...],
    strided: tuple[str, ...],
) -> Variant:
    """``full``: with bias, positions and state; ``strided``: the tensors that have strides."""
    pointer, backward = POINTERS[dtype], kernel is conv.backward_kernel
    optional = {"bias": pointer, "positions": "*i64", "state": pointer}
    strides = [f"{name}_{which}_stride" for name in strided for which in ("row", "token")]
    return Variant(
        name=f"causal_conv1d {pass_name} {pointer[1:]} {config.kwargs['CHANNELS']} channels, "
        f"warps {config.num_warps}{'' if full else ', bare'}",
        kernel=kernel,
        types={
            **dict.fromkeys(tensors, pointer),
            **({"partial": "*fp32"} if backward else {}),
            **(optional if full else {}),
            **dict.fromkeys(("B", "L", "D", *strides), "i32"),
        },
        constants={
            "W": 4,
            "TOKENS": conv.BACKWARD_TOKENS if backward else conv.FORWARD_TOKENS,
            "STEPS": conv.UNROLLED,
            "SILU": True,
            **{f"HAS_{name.upper()}": full for name in optional},
            **({} if full else dict.fromkeys(optional)),
            **config.kwargs,
        },
        aligned=("D", *strides),
        warps=config.num_warps,
    )


def _grouped() -> Iterator[Variant]:
    """Every configuration of every kernel, with what costs most switched on; bf16 also by TMA."""
    for dtype in (torch.bfloat16, torch.float32):
        data, single = POINTERS[dtype], dtype == torch.float32
        route = {"row_ptr": "*i64", "offset_ptr": "*i64", "weight_ptr": "*fp32"}
        sizes = {"groups": "i32", "N": "i32", "K": "i32"}
        linear = {"GATHER": True, "TRANSPOSED": True, "TWO": False, "SCATTER": True}
        dx = {"GATHER": False, "TRANSPOSED": False, "TWO": True, "SCATTER": False}
        matrices = ("b_ptr", "b2_ptr")
        for name, half, flags, tiled in (
            ("linear", grouped.HALF, linear, matrices),
            ("dx", grouped.HALF, dx, ("a_ptr", "a2_ptr", *matrices)),
        ):
            pointers = dict.fromkeys(("a_ptr", "b_ptr", "a2_ptr", "b2_ptr", "out_ptr"), data)
            yield from _tuned_variants(
                name, grouped_kernels.rows_kernel, dtype, grouped.SINGLE if single else half,
                pointers | route | sizes, {**flags, "WEIGHTED": name == "linear", "GROUPS": 8},
                tiled,
            )  # fmt: skip
        names: tuple[str, ...] = ("x_ptr", "w1_ptr", "w3_ptr", "gate_ptr", "up_ptr", "h_ptr")
        types = dict.fromkeys(names, data) | {"row_ptr": "*i64", "offset_ptr": "*i64"} | sizes
        yield from _tuned_variants(
            "gate and up", grouped_kernels.gate_up_kernel, dtype,
            grouped.SINGLE if single else (*grouped.HALF_GATE_UP, *grouped.FROM_SM_90),
            types, {"KEEP": True, "GROUPS": 8}, ("w1_ptr", "w3_ptr"),
        )  # fmt: skip
        names = ("dy_ptr", "w2_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr", "h_ptr")
        types = dict.fromkeys(names, data) | route | sizes
        yield from _tuned_variants(
            "activation backward", grouped_kernels.activation_backward_kernel, dtype,
            grouped.SINGLE if single else grouped.HALF_BACKWARD,
            types | {"partial_ptr": "*fp32", "rows": "i32"},
            {"WEIGHTED": True, "NEED_WEIGHT": True, "GROUPS": 8}, ("w2_ptr",),
        )  # fmt: skip
        types = dict.fromkeys(("p_ptr", "q_ptr", "out_ptr"), data) | route
        yield from _tuned_variants(
            "dw", grouped_kernels.weight_gradient_kernel, dtype,
            grouped.SINGLE if single else grouped.HALF_SUMS,
            types | {"groups": "i32", "M": "i32", "N": "i32"},
            {"GATHER_P": False, "GATHER_Q": True, "WEIGHTED": False}, ("p_ptr",),
        )  # fmt: skip


def _tuned_variants(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    configs: Sequence[triton.Config],
    types: dict[str, str],
    flags: dict[str, Any],
    tiled: Sequence[str],
) -> Iterator[Variant]:
    """``tiled``: the operands that are not gathered, which come by TMA where it is used."""
    data = POINTERS[dtype][1:]
    common = {"BAND": grouped.BAND, "DOT": compute_type(dtype), "EVEN_K": True, "INDEX": tl.int32}
    for tma, config in product((False, True) if dtype == torch.bfloat16 else (False,), configs):
        if flags.get("TWO") and config in grouped.ONE_PRODUCT and not tma:
            continue
        constants = {**common, "PRECISION": product_precision(dtype), "TMA": tma}
        constants |= {**flags, **config.kwargs}
        shapes = grouped.tiles(constants)
        descriptors = {name: f"tensordesc<{data}{shapes[name]}>" for name in tiled}
        blocks = "x".join(str(config.kwargs[f"BLOCK_{axis}"]) for axis in "MNK")
        new = tma or (kernel is grouped_kernels.gate_up_kernel and config in grouped.FROM_SM_90)
        yield Variant(
            name=f"grouped_gemm {name} {data} {blocks}{', TMA' if tma else ''}",
            kernel=kernel,
            types=types | descriptors if tma else types,
            constants=constants,
            aligned=tuple(name for name in ("M", "N", "K") if name in types),
            warps=config.num_warps,
            stages=config.num_stages,
            tensor_cores=dtype == torch.bfloat16,
            tma=tma,
            oldest=90 if new else 80,
        )


def _loss() -> Iterator[Variant]:
    """A whole vocabulary in bf16 and fp32; the passes apart, as shards of it take them, in bf16."""
    yield _loss_variant(torch.bfloat16, statistics=True, gradient=True)
    yield _loss_variant(torch.float32, statistics=True, gradient=True)
    yield _loss_variant(torch.bfloat16, statistics=True, gradient=False)
    yield _loss_variant(torch.bfloat16, statistics=False, gradient=True)


def _loss_variant(dtype: torch.dtype, statistics: bool, gradient: bool) -> Variant:
    pointer = POINTERS[dtype]
    parts = " and ".join(
        name for name, has in (("statistics", statistics), ("gradient", gradient)) if has
    )
    given = "statistics" if statistics else "log_z"
    return Variant(
        name=f"linear_cross_entropy {parts} {pointer[1:]}",
        kernel=loss._turn_rows,
        types={
            "logits": pointer,
            "rows": "*i64",
            given: "*fp32",
            "z_weight": "fp32",
            "V": "i32",
        },
        constants={
            "log_z" if statistics else "statistics": None,
            "STATISTICS": statistics,
            "GRADIENT": gradient,
            "BLOCK": loss.BLOCK,
        },
        aligned=("V",),
        warps=loss.WARPS,
    )


def _permute() -> Iterator[Variant]:
    for dtype in (torch.bfloat16, torch.float32):
        data = POINTERS[dtype]
        for block in permute.WIDTHS if dtype == torch.bfloat16 else permute.WIDTHS[1:]:
            at = f"{data[1:]} {block}"
            yield Variant(
                f"permute gather {at}", permute._gather_kernel,
                {"x_ptr": data, "row_ptr": "*i64", "out_ptr": data, "width": "i32"},
                {"BLOCK": block}, aligned=("width",),
            )  # fmt: skip
            types = {"y_ptr": data, "order_ptr": "*i32", "begin_ptr": "*i32"}
            yield Variant(
                f"permute combine {at}", permute._combine_kernel,
                types | {"weight_ptr": "*fp32", "out_ptr": data, "width": "i32"},
                {"WEIGHTED": True, "BLOCK": block}, aligned=("width",),
            )  # fmt: skip
        types = {"dout_ptr": data, "y_ptr": data, "row_ptr": "*i64", "weight_ptr": "*fp32"}
        yield Variant(
            f"permute combine backward {data[1:]} {permute.WIDTHS[1]}",
            permute._combine_backward_kernel,
            types | {"dy_ptr": data, "dweight_ptr": "*fp32", "width": "i32"},
            {"WEIGHTED": True, "NEED_Y": True, "NEED_WEIGHT": True, "BLOCK": permute.WIDTHS[1]},
            aligned=("width",),
        )  # fmt: skip
    yield Variant(
        "permute select", permute._select_kernel,
        {"score_ptr": "*fp32", "out_ptr": "*i64", "tokens": "i32", "k": "i32"},
        {"BLOCK": permute.SELECT_BLOCK, "BITS": permute.RADIX_BITS}, warps=permute.SELECT_WARPS,
    )  # fmt: skip


def _scan() -> Iterator[Variant]:
    """N = 16 in bf16 and fp32, and the other N in bf16, all with every option given. And in bf16
    with N = 16: without any, and as in training, where no state is handed on.
    """
    for dtype, states, case in (
        (torch.bfloat16, 16, ""),
        (torch.bfloat16, 16, "bare"),
        (torch.bfloat16, 16, "training"),
        (torch.float32, 16, ""),
        (torch.bfloat16, 32, ""),
        (torch.bfloat16, 64, ""),
    ):
        absent = {"": (), "bare": _OPTIONS, "training": _STATES}[case]
        for kernel, (tokens, width, warps, registers) in (
            (scan.ends_kernel, scan.FORWARD[states]),
            (scan.forward_kernel, scan.FORWARD[states]),
            (scan.adjoints_kernel, scan.BACKWARD[states]),
            (scan.backward_kernel, scan.BACKWARD[states]),
        ):
            if case == "training" and kernel in (scan.ends_kernel, scan.adjoints_kernel):
                continue  # which have to do with none
            by_tensor_cores = scan._by_tensor_cores(dtype, width)
            constants: dict[str, int | None]
            constants = {"N": states, "CHUNK": CHUNK, "TOKENS": tokens, "WIDTH": width}
            constants |= {"GROUPS": 1 if case == "bare" else 2, "DOT": by_tensor_cores}
            constants |= dict.fromkeys(absent)
            names = [p.name for p in kernel.params if p.name not in constants]
            types = {name: _type_of(name, POINTERS[dtype]) for name in names}
            if states == scan.WIDENED and kernel in (scan.ends_kernel, scan.forward_kernel):
                types |= {name: "*fp32" for name in ("B", "C") if name in types}
            yield Variant(
                name=f"selective_scan {kernel.fn.__name__.removesuffix('_kernel')}, "
                f"{str(dtype).removeprefix('torch.')}, N {states}{case and ', ' + case}",
                kernel=kernel,
                types=types,
                constants={p.name: constants[p.name] for p in kernel.params if p.name in constants},
                aligned=tuple(n for n in names if n == "channels" or n[-2:] in _AXES),
                warps=warps,
                stages=1,
                registers=registers,
                tensor_cores=by_tensor_cores and kernel is scan.backward_kernel,
            )


_AXES = ("_b", "_l")
_OPTIONS = ("skip", "z", "bias", "group", "reset", "first", "dfinal", "dskip", "dz", "dbias")
_STATES = ("first", "dfinal")
_NARROW = ("u", "delta", "B", "C", "z", "y", "dy", "du", "ddelta", "dz")


def _type_of(name: str, narrow: str) -> str:
    """Triton's word for an argument of these kernels."""
    if name == "channels" or name in SIZES or name[-2:] in _AXES:
        return "i32"
    return {"group": "*u8", "reset": "*i1"}.get(name, narrow if name in _NARROW else "*fp32")
