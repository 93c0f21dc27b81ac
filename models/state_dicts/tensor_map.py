"""Tensor maps: how each tensor of a target is computed from tensors of a source.

A conversion maps target names to ``TensorMap``: the source tensors with their shapes, and a
function of them. ``check_keys`` reports the wrong keys of a source, ``Mapped`` computes the target,
one tensor at a time. Conversions chain:

    file → (names of another project → ours) → (parent → upcycled child) → (ours → theirs) → file
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from earlyfuse.data.console import printable

Shape = tuple[int, ...]
# types that models compute in; 8-bit values are quantised and need scales
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYER = re.compile(r"(?:^|[./])layers\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of a stored tensor, known before it is read."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Protocol):
    """Tensors by name, read one at a time; ``entries`` are known without reading any."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str) -> torch.Tensor:
        """Returns the tensor on the CPU; it may be a view of a mapped file: never write to it."""


@dataclass(frozen=True)
class TensorMap:
    """One target tensor of ``shape``: ``make`` of the ``sources`` (name, shape), in this order.

    Its dtype is that of the first source. Without sources, ``make()`` returns a new tensor, such as
    the router of an upcycled model.
    """

    shape: Shape
    sources: tuple[tuple[str, Shape], ...]
    make: Callable[..., torch.Tensor] = lambda tensor: tensor


TensorMaps = Mapping[str, TensorMap]


def renamed(name: str, shape: Shape) -> TensorMap:
    """Maps the source tensor ``name`` unchanged."""
    return TensorMap(shape, ((name, shape),))


class Mapped:
    """The target of ``maps`` over ``source``; each tensor is computed when it is read."""

    def __init__(self, maps: TensorMaps, source: Tensors):
        self.maps, self.source = maps, source
        stored, first = source.entries, next(iter(source.entries))
        self.entries = {
            name: Entry(one.shape, stored[one.sources[0][0] if one.sources else first].dtype)
            for name, one in maps.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Computes the target tensor ``name`` from its sources."""
        one = self.maps[name]
        made = one.make(*(self.source.read(source) for source, _ in one.sources))
        assert tuple(made.shape) == one.shape, f"{name}: made {made.shape}, not {one.shape}"
        return made.to(self.entries[name].dtype)


class Cast:
    """Tensors converted to ``dtype``; None keeps the dtype of each."""

    def __init__(self, source: Tensors, dtype: torch.dtype | None):
        self.source = source
        self.entries = {
            name: Entry(entry.shape, dtype or entry.dtype) for name, entry in source.entries.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Returns the converted tensor; ``ValueError`` if finite values overflow."""
        there, dtype = self.source.read(name), self.entries[name].dtype
        made = there.to(dtype)
        if there.dtype != dtype and bool((made.isinf() & there.isfinite()).any()):
            raise ValueError(
                f"{name} has values up to {there.abs().max().item():.3g}, beyond the "
                f"{torch.finfo(dtype).max:.3g} of {dtype}; convert to bfloat16, or keep the dtype"
            )
        return made


class Merged:
    """The tensors of two sources that share no name."""

    def __init__(self, first: Tensors, second: Tensors):
        self.first, self.second = first, second
        self.entries = {**first.entries, **second.entries}

    def read(self, name: str) -> torch.Tensor:
        """Returns the tensor ``name`` from the source that has it."""
        return (self.first if name in self.first.entries else self.second).read(name)


class StateDict:
    """A state dict as tensors by name; ``read`` returns no copy."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = tensors
        self.entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Returns the tensor ``name``."""
        return self.tensors[name].detach()


def common_dtype(tensors: Tensors) -> str | None:
    """Returns the dtype of all ``tensors``, as "bfloat16"; None if they differ."""
    dtypes = {entry.dtype for entry in tensors.entries.values()}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None


def check_layers(count: Any, field: str, entries: Mapping[str, Entry]) -> None:
    """``ValueError`` if a config's ``field`` states more layers than ``entries`` hold: all would be
    built before the first missing key is found.
    """
    found = len({match[1] for name in entries if (match := _LAYER.search(name))})
    if type(count) is int and count > found:  # other types are refused with the other fields
        raise ValueError(
            f"{field} ({count:,}) is more than the {found:,} layers in the files; correct it, or "
            "complete the files"
        )


def check_keys(
    maps: TensorMaps,
    entries: Mapping[str, Entry],
    where: str,
    ignored: Iterable[str] = (),
    expected: str = "the model that its config describes",
    remedy: str = "Correct the config or complete the files",
) -> None:
    """``ValueError`` listing every key that is missing, unexpected, mis-shaped or mis-typed.

    ``where`` names the source; ``ignored`` keys may be present unused.
    """
    wanted = {name: shape for one in maps.values() for name, shape in one.sources}
    unexpected = sorted(set(entries) - set(wanted) - set(ignored))
    lines = [f"missing    {name} {shape}" for name, shape in wanted.items() if name not in entries]
    lines += [f"unexpected {name} {entries[name].shape}" for name in unexpected]
    for name, shape in wanted.items():
        entry = entries.get(name, Entry(shape, torch.float32))
        if entry.shape != shape:
            lines.append(f"mis-shaped {name}: {entry.shape} instead of {shape}")
        elif entry.dtype not in _FLOATS:
            lines.append(f"mis-typed  {name}: {entry.dtype} instead of floating point")
    if lines:
        listing = "\n  ".join(map(printable, lines))
        raise ValueError(
            f"{where} is not {expected}; {len(lines)} of its keys are wrong:\n  {listing}\n"
            f"{remedy}{_wrapper_hint(set(wanted), entries)}"
        )


def _wrapper_hint(wanted: set[str], entries: Mapping[str, Entry]) -> str:
    """Advice if all sources are present behind a prefix, such as DDP's "module."; else ""."""
    longest = max(wanted, key=len)
    for prefix in {name.removesuffix(longest) for name in entries if name.endswith(longest)} - {""}:
        if all(prefix + name in entries for name in wanted):
            return (
                f". All names begin with {prefix!r}, which a wrapper (DDP, torch.compile …) adds: "
                "save the state dict of the wrapped model, or rename the keys"
            )
    return ""
