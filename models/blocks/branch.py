"""The contract of a branch: what a sub-layer of a block says about itself.

A branch stands between a norm and the residual: attention, Mamba, a feed-forward, experts. Its
module computes and names its initial values; its ``Config`` answers all other questions: cost,
what cannot be sharded, decoding, upcycling. ``init_weights``, ``flops``, ``parallel/estimates``,
``parallel/strategies`` and ``upcycle`` ask and know no branch by name.

A new one is a subclass of ``Branch`` in a file of your own, put into
``Block.Config.extra_branches``. It must define ``draws``, ``matrices`` and ``saved``; parameters
and FLOPs follow from its matrices; uses not in its ``supports`` are refused by its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torchtitan.protocols.module import Module

from earlyfuse.models.init_weights import Draw

Shape = tuple[int, ...]
Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "receive"]
Use = Literal["tensor_parallel", "context_parallel", "decoding"]
ALL_USES: tuple[Use, ...] = ("tensor_parallel", "context_parallel", "decoding")
FP32, INT64 = 4, 8


class Microbatch(NamedTuple):
    """One rank's micro-batch: ``rows`` of ``seq_len`` positions, in a dtype of ``itemsize`` bytes,
    and the number of ranks that share its layers, rows and experts.
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


class Matrix(NamedTuple):
    """A weight (outputs, inputs) that every token is multiplied by, in ``groups`` sets.

    ``split_outputs``: tensor parallelism shards its outputs.
    """

    inputs: int
    outputs: int
    groups: int = 1
    split_outputs: bool = False

    @property
    def size(self) -> int:
        """Elements of one set."""
        return self.inputs * self.outputs


class Flops(NamedTuple):
    """FLOPs of one token; a multiply-add is 2."""

    forward: float
    backward: float

    def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]
        return Flops(self.forward + other.forward, self.backward + other.backward)


def products(multiply_adds: float) -> Flops:
    """FLOPs of matrix products, of which backward computes two for each of forward."""
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


def sums_of_split_region(batch: Microbatch, dim: int) -> Collective:
    """The all-reduces around a tensor-parallel branch: outputs in forward, inputs in backward."""
    size = batch.tokens * dim * batch.itemsize
    return Collective("split activations", "all_reduce", "tp", size, 1, 1)


class Regrouping(NamedTuple):
    """Other modality groups for a model: ``old[i]`` is the present index of group i, None for a new
    one, ``labels[i]`` its modality.
    """

    old: tuple[int | None, ...]
    labels: tuple[str, ...]

    def sets(self, groups: int) -> int:
        """Parameter sets, one for each group, in place of ``groups``; 1 stays shared."""
        return len(self.old) if groups > 1 else 1

    def places(self, groups: Sequence[int]) -> tuple[int, ...]:
        """The places of the present ``groups``, without those that are left out."""
        return tuple(place for place, old in enumerate(self.old) if old in groups)

    @property
    def new(self) -> tuple[int, ...]:
        """The groups that the model does not have yet."""
        return self.places((None,))  # type: ignore[arg-type]


class Parent(NamedTuple):
    """The model that another one is upcycled from: shapes of all its parameters, and the config of
    the branch at the same place as plain values.
    """

    shapes: Mapping[str, Shape]
    branch: Mapping[str, Any]


@dataclass(frozen=True)
class Inherited:
    """A tensor of an upcycled child, made of the parent's ``name`` of ``shape``.

    ``parts``: None, the tensor as it is; else for each index of the child's first dimension an
    index of the parent's, or None for all of the parent's tensor.
    """

    name: str
    shape: Shape
    parts: tuple[int | None, ...] | None = None

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        """The child's tensor, from the parent's."""
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
    class Config(Module.Config, ABC):
        """Has a field or property ``dim``, the width of its input and output.

        ``inherited_fields``: those in which an upcycled model must equal its parent.
        """

        inherited_fields: ClassVar[tuple[str, ...]] = ()
        supports: ClassVar[tuple[Use, ...]] = ()

        @abstractmethod
        def matrices(self) -> list[Matrix]:
            """The matrices that every token is multiplied by, in the order of computation."""

        @abstractmethod
        def saved(self, batch: Microbatch) -> int:
            """Elements per token that autograd keeps, an estimate for ``parallel/estimates``."""

        def vectors(self) -> list[tuple[int, int]]:
            """(elements, sets) of the parameters that are not in ``matrices``."""
            return []

        def check(self, modality_groups: int) -> None:
            """``ValueError`` unless the branch fits a model of so many modality groups."""

        def regrouped(self, to: Regrouping) -> Self:
            """The same branch in a model of other modality groups; ``ValueError`` if it does not
            say what becomes of its parameters by modality.
            """
            if any(matrix.groups > 1 for matrix in self.matrices()) or any(
                sets > 1 for _, sets in self.vectors()
            ):
                raise ValueError(
                    f"{self.kind} has parameters by modality and does not say how it works with "
                    f"{', '.join(to.labels)}; define its regrouped, or change the data"
                )
            return self

        def parameters(self, group: int | None = None) -> int:
            """Number of parameters; with ``group``, of those that a token of that modality group
            uses.
            """
            sizes = [(matrix.size, matrix.groups) for matrix in self.matrices()] + self.vectors()
            return sum(size * (sets if group is None else 1) for size, sets in sizes)

        def flops(self, seq_len: int, group: int) -> Flops:
            """FLOPs of a token of a modality group in rows of ``seq_len``; ``models/flops.py`` has
            the conventions.
            """
            return products(sum(matrix.size for matrix in self.matrices()))

        def saved_by_selective(self, batch: Microbatch) -> int:
            """Elements per token kept under selective activation checkpointing, which saves the
            output of attention and of every second plain matrix product.
            """
            plain = [matrix for matrix in self.matrices() if matrix.groups == 1]
            return sum(
                matrix.outputs // (batch.tensor_ranks if matrix.split_outputs else 1)
                for matrix in plain[::2]
            )

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            """Collectives of tensor, expert and context parallelism."""
            yield from ()

        def even_sizes(self, axis: Literal["tensor", "expert"]) -> dict[str, int]:
            """Name → size that the degree of tensor or expert parallelism must divide."""
            return {}

        def refusal(self, use: Use) -> str | None:
            """Reason that the branch cannot be used in that way; None if it can."""
            if use in self.supports:
                return None
            return f"{self.kind} does not say how it works with {use.replace('_', ' ')}"

        def inherit(
            self, name: str, shape: Shape, parent: Parent, modality_groups: int
        ) -> Inherited | None:
            """Source of the parameter ``name``, a full name, in upcycling; None: it is drawn.

            ``ValueError`` if the parent has no such tensor.
            """
            return same_or_untied(name, shape, parent.shapes)

        @property
        def kind(self) -> str:
            """Name of the class that this configures."""
            return type(self).__qualname__.removesuffix(".Config")
