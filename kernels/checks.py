"""Checks an op's arguments: shapes and dtypes by name, and ids where reading them is free."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int64, torch.int32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# dtypes relative to the first argument's: the same; float32, or float64 for float64
SAME, WIDE = "same", "wide"


class Rule(NamedTuple):
    """An argument's dimensions by letter, and its dtypes by the dtype of the first argument."""

    name: str
    dims: tuple[str, ...]
    types: dict[torch.dtype, tuple[torch.dtype, ...]]


def rules(**types: Sequence[torch.dtype | str]) -> tuple[Rule, ...]:
    """Rules of an op's tensors, in order. The suffix of a name gives the dimensions: ``w_GFD`` has
    G, F and D; ``offset_G1`` has G + 1.
    """

    def resolved(first: torch.dtype, allowed: Sequence[torch.dtype | str]) -> list[torch.dtype]:
        wide = torch.promote_types(first, torch.float32)
        named = {SAME: first, WIDE: wide}
        return [named[one] if isinstance(one, str) else one for one in allowed]

    return tuple(
        Rule(
            name,
            tuple(re.findall(r"[A-Z]1?", name.rpartition("_")[2])),
            {first: tuple(resolved(first, allowed)) for first in FLOATS},
        )
        for name, allowed in types.items()
    )


def check(of: tuple[Rule, ...], tensors: Sequence, **sizes: int) -> None:
    """Raises ``ValueError`` where a tensor breaks its rule, or differs in the size of a dimension
    from ``sizes`` or an earlier tensor, or in device from the first. None is skipped.
    """
    first = tensors[0]
    if first.dtype not in FLOATS:
        _refuse_type(of[0].name, first, FLOATS, "")
    for rule, tensor in zip(of, tensors, strict=False):  # flags follow the tensors
        if tensor is None:
            continue
        name, dims, types = rule
        if tensor.ndim != len(dims):
            _refuse_shape(rule, tensor, sizes)
        for dim, size in zip(dims, tensor.shape, strict=True):
            if dim[1:]:
                dim, size = dim[0], size - 1
            if sizes.setdefault(dim, size) != size:
                _refuse_shape(rule, tensor, sizes)
        if tensor.dtype not in types[first.dtype]:
            depends = len(set(types.values())) > 1
            where = f" where {of[0].name} is {first.dtype}" if depends else ""
            _refuse_type(name, tensor, types[first.dtype], where)
        if tensor.device != first.device:
            raise ValueError(
                f"{name} ({tensor.device}) must be on the device of {of[0].name} ({first.device}); "
                "move it"
            )


def _refuse_shape(rule: Rule, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    known = {dim: sizes[dim[0]] + len(dim[1:]) for dim in rule.dims if dim[0] in sizes}
    expected = ", ".join(str(known.get(dim, dim)) for dim in rule.dims)
    letters = ", ".join(rule.dims)
    raise ValueError(
        f"{rule.name} {tuple(tensor.shape)} must have the shape ({expected}), ({letters}) by its "
        "name; reshape it"
    )


def _refuse_type(
    name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype], where: str
) -> None:
    words = " or ".join(dict.fromkeys(str(one) for one in allowed))
    raise ValueError(f"{name} ({tensor.dtype}) must be {words}{where}; cast it")


def readable(tensor: torch.Tensor) -> bool:
    """True if reading values is free: on a CPU, outside tracing."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
    )


def check_ids(name: str, ids: torch.Tensor, count: int, counted: str) -> None:
    """Raises ``ValueError`` unless all lie in 0 … count - 1; ``counted`` says of what."""
    if not ids.numel() or not readable(ids):
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} ({low} … {high}) must lie in 0 … {count - 1}, {counted}")
