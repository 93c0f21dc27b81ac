"""The contract of a branch: what a sub-layer of a block says about itself.

A branch stands between a norm and the residual: attention, Mamba, a feed-forward, experts. Its
module computes and names its initial values; its ``Config`` answers all other questions: cost,
what cannot be sharded, decoding, upcycling. ``init_weights``, ``flops``, ``parallel/estimates``,
``parallel/strategies`` and ``upcycle`` ask and know no branch by name.

A new one is a subclass of ``Branch`` in a file of your own, put into
``Block.Config.extra_branches``. It must say ``draws``, ``flops`` and ``saved``; what else it leaves
out is counted from its parameters, or refused by its name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torchtitan.protocols.module import Module

from earlyfuse.models.init_weights import Draw

Shape = tuple[int, ...]
Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "receive"]
Use = Literal["tensor_parallel", "context_parallel", "decoding"]
FP32, INT64 = 4, 8


class Microbatch(NamedTuple):
    """What one rank computes at once: ``rows`` of ``seq_len`` positions, in a dtype of
    ``itemsize`` bytes, and the ranks with which it shares layers, rows and experts.
    """

    rows: int
    seq_len: int
    itemsize: int = FP32
    tensor_ranks: int = 1
    context_ranks: int = 1
    expert_ranks: int = 1

    @property
    def tokens(self) -> int:
        """Positions of all rows."""
        return self.rows * self.seq_len


class Flops(NamedTuple):
    """FLOPs of one token; a multiply-add is 2."""

    forward: float
    backward: float

    def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]
        return Flops(self.forward + other.forward, self.backward + other.backward)


def products(multiply_adds: float) -> Flops:
    """Matrix products: backward computes two for each of forward."""
    return Flops(2 * multiply_adds, 4 * multiply_adds)


class Collective(NamedTuple):
    """Collectives of a micro-batch along a mesh axis: ``size`` bytes of the whole tensor,
    ``forward`` times in forward, repeated where that is recomputed, and ``backward`` times.

    ``kept``: selective activation checkpointing saves its result.
    """

    purpose: str
    kind: Kind
    axis: str
    size: int
    forward: int = 0
    backward: int = 0
    kept: bool = False


@dataclass(frozen=True)
class Inherited:
    """A tensor of an upcycled child, made of the parent's ``name`` of ``shape``.

    ``parts``: None, the tensor as it is; else for each place along the child's first dimension the
    parent's place along its own, or None for all of the parent's tensor.
    """

    name: str
    shape: Shape
    parts: tuple[int | None, ...] | None = None

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        """The child's tensor, of the parent's."""
        if self.parts is None:
            return tensor
        return torch.stack([tensor if part is None else tensor[part] for part in self.parts])


def same_or_untied(name: str, shape: Shape, parent: Mapping[str, Shape]) -> Inherited:
    """The parent's tensor ``name``, or a copy of it for each modality; else ``ValueError``."""
    theirs = parent.get(name)
    if theirs is None:
        raise ValueError(f"{name} is not in the parent")
    if theirs == shape:
        return Inherited(name, shape)
    if theirs == shape[1:]:
        return Inherited(name, theirs, (None,) * shape[0])
    raise ValueError(f"{name} is {shape}, in the parent {theirs}")


class Branch(Module):
    """A sub-layer: ``forward(x_TD, context)`` (T, D) → (T, D)."""

    tensor_split: ClassVar[Mapping[str, int]] = {}
    """Parameter → dimension, from the end, that tensor parallelism shards; the outputs of its ranks
    are summed. Of any module in a branch."""

    def draws(self) -> dict[str, Draw]:
        """Initial value of each parameter that no submodule names (``models/init_weights.py``)."""
        return {}

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Has a field or property ``dim``, the width of its input and output."""

        # fields in which an upcycled model must equal its parent
        inherited_fields: ClassVar[tuple[str, ...]] = ()

        def check(self, modality_groups: int) -> None:
            """``ValueError`` unless the branch fits a model of so many modality groups."""

        def parameters(self, group: int | None = None) -> int:
            """Number of parameters; with ``group``, of those that a token of that modality group
            meets.
            """
            with torch.device("meta"):
                return sum(p.numel() for p in self.build().parameters())

        def flops(self, seq_len: int, group: int) -> Flops:
            """FLOPs of a token of a modality group in rows of ``seq_len``; conventions are in
            ``models/flops.py``.
            """
            raise NotImplementedError(f"{self.kind} must say its FLOPs: override Config.flops")

        def saved(self, batch: Microbatch) -> int:
            """Elements per token that autograd keeps, an estimate for ``parallel/estimates``."""
            raise NotImplementedError(f"{self.kind} must say what it keeps: override Config.saved")

        def saved_by_selective(self, batch: Microbatch) -> int:
            """The same under selective activation checkpointing, which saves the output of
            attention and of every second plain matrix product.
            """
            return 0

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            """What tensor, expert and context parallelism send."""
            yield from ()

        def even_sizes(self, axis: Literal["tensor", "expert"]) -> dict[str, int]:
            """Name → size that the degree of tensor or expert parallelism must divide."""
            return {}

        def refusal(self, use: Use) -> str | None:
            """Why the branch cannot be used in that way; None if it can."""
            return f"{self.kind} does not say how it works with {use.replace('_', ' ')}"

        def inherit(
            self,
            name: str,
            shape: Shape,
            parent: Mapping[str, Shape],
            description: Mapping[str, Any],
            modality_groups: int,
        ) -> Inherited | None:
            """Where upcycling takes a parameter from; None: it is drawn anew.

            ``name``, and the names in ``parent``, are whole; ``description``: the parent's branch
            as plain values. ``ValueError`` if the parent has no such tensor.
            """
            return same_or_untied(name, shape, parent)

        @property
        def kind(self) -> str:
            """Name of the class that this configures."""
            return type(self).__qualname__.removesuffix(".Config")
