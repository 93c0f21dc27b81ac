"""Recipes: how each tensor of a target is made from tensors of a source.

A conversion is a mapping from target names to recipes. A recipe names the tensors it needs, with
the shapes they must have, and a function of them. Everything else follows from mappings: the report
of keys (``check``), and ``Made``, the target as tensors that are computed one at a time when they
are read. Conversions chain, since what a mapping makes can be the source of the next one:

    file → (names of another project → ours) → (parent → upcycled child) → (ours → theirs) → file
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from earlyfuse.data.console import printable

Shape = tuple[int, ...]
# types that models compute in; of 8 bits, values are quantised and need scales
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYER = re.compile(r"(?:^|[./])layers\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """What a file says of a tensor before it is read."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Protocol):
    """Tensors by name, read one at a time; ``entries`` are known without reading any."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU; perhaps a view of a mapped file: not to be written to."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Recipe:
    """One target tensor of ``shape``: ``make`` of the ``sources`` (name, shape), in this order.

    Its dtype is that of the first source. Without sources, ``make()`` gives a new tensor, such as
    the router of an upcycled model.
    """

    shape: Shape
    sources: tuple[tuple[str, Shape], ...]
    make: Callable[..., torch.Tensor] = whole


Recipes = Mapping[str, Recipe]


def renamed(name: str, shape: Shape) -> Recipe:
    """The source tensor ``name`` under another name."""
    return Recipe(shape, ((name, shape),))


class Made:
    """The target of ``recipes`` over ``source``, tensor by tensor."""

    def __init__(self, recipes: Recipes, source: Tensors):
        self.recipes, self.source = recipes, source
        first = next(iter(source.entries.values()))
        self.entries = {
            name: Entry(
                recipe.shape,
                source.entries[recipe.sources[0][0]].dtype if recipe.sources else first.dtype,
            )
            for name, recipe in recipes.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Compute the target tensor ``name`` from its sources."""
        recipe = self.recipes[name]
        made = recipe.make(*(self.source.read(source) for source, _ in recipe.sources))
        assert tuple(made.shape) == recipe.shape, f"{name}: made {made.shape}, not {recipe.shape}"
        return made.to(self.entries[name].dtype)


class Cast:
    """Tensors in another type; a null one keeps each as it is."""

    def __init__(self, source: Tensors, dtype: torch.dtype | None):
        self.source = source
        self.entries = {
            name: Entry(entry.shape, dtype or entry.dtype) for name, entry in source.entries.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` of the source, converted; ``ValueError`` if its values are too large
        for the type.
        """
        there, dtype = self.source.read(name), self.entries[name].dtype
        made = there.to(dtype)
        if there.dtype != dtype and bool((made.isinf() & there.isfinite()).any()):
            raise ValueError(
                f"{name} has values up to {there.abs().max().item():.3g}, and {dtype} holds none "
                f"above {torch.finfo(dtype).max:.3g}; convert to bfloat16, or keep the type"
            )
        return made


def common_dtype(tensors: Tensors) -> str | None:
    """The type of all ``tensors``, as "bfloat16"; None if there are several."""
    dtypes = {entry.dtype for entry in tensors.entries.values()}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None


class Together:
    """The tensors of two sources; no name is in both."""

    def __init__(self, first: Tensors, second: Tensors):
        self.first, self.second = first, second
        self.entries = {**first.entries, **second.entries}

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` of the source that has it."""
        return (self.first if name in self.first.entries else self.second).read(name)


def check_layers(count: int, field: str, entries: Mapping[str, Entry]) -> None:
    """``ValueError`` if a config's ``field`` states more layers than ``entries`` hold: they would
    all be built before the first missing key is found.
    """
    matches = map(_LAYER.search, entries)
    found = len({match[1] for match in matches if match})
    if count > found:
        raise ValueError(
            f"{field} ({count:,}) is more than the {found:,} layers in the files; correct it, or "
            "complete the files"
        )


def check(
    recipes: Recipes, entries: Mapping[str, Entry], where: str, ignored: Iterable[str] = ()
) -> None:
    """``ValueError`` with all ``wrong_keys`` if there are any. ``where`` names the source."""
    if lines := wrong_keys(recipes, entries, ignored):
        listing = "\n  ".join(map(printable, lines))
        raise ValueError(
            f"{where} is not the model that its config describes; {len(lines)} of its keys are "
            f"wrong:\n  {listing}\nCorrect the config or complete the files"
            f"{of_a_wrapper(recipes, entries)}"
        )


def of_a_wrapper(recipes: Recipes, entries: Mapping[str, Entry]) -> str:
    """What to do if the ``entries`` are the sources behind a prefix, such as DDP's "module.", else
    "".
    """
    wanted = {name for recipe in recipes.values() for name, _ in recipe.sources}
    some = max(wanted, key=len)
    prefixes = {name.removesuffix(some) for name in entries if name.endswith(some)} - {""}
    for prefix in prefixes:
        if all(prefix + name in entries for name in wanted):
            return (
                f". All names have {prefix!r} before them, which a wrapper (DDP, torch.compile …) "
                "adds: save the state dict of the model inside it, or rename the keys"
            )
    return ""


def wrong_keys(
    recipes: Recipes, entries: Mapping[str, Entry], ignored: Iterable[str] = ()
) -> list[str]:
    """A line for every key that is missing, unexpected or mis-shaped, or no floating-point number.

    ``ignored`` are keys that may be there unused.
    """
    wanted = {name: shape for recipe in recipes.values() for name, shape in recipe.sources}
    unexpected = set(entries) - set(wanted) - set(ignored)
    lines = [f"missing    {name} {shape}" for name, shape in wanted.items() if name not in entries]
    lines += [f"unexpected {name} {entries[name].shape}" for name in sorted(unexpected)]
    for name, shape in wanted.items():
        if name not in entries:
            continue
        if entries[name].shape != shape:
            lines.append(f"mis-shaped {name}: {entries[name].shape} instead of {shape}")
        elif entries[name].dtype not in _FLOATS:
            lines.append(f"mis-typed  {name}: {entries[name].dtype} instead of floating point")
    return lines
