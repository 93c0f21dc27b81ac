"""Mixture of modality-aware experts: MoMa's feed-forward (arXiv 2407.21770, section 2.2).

An ``ExpertPool`` is a number of SwiGLU experts and their router; a ``MixtureOfExperts`` is a list
of pools, and of feed-forwards shared by all tokens or by all of a modality. One pool of expert
choice per modality is MoMa (``4t4i``: four text and four image experts); a single one over all
modalities is plain expert choice (``moe_8x``).

T tokens, D width, E experts of the pool, F inner width, R routed rows.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import nn
from torchtitan.protocols.module import Module, ModuleList

from earlyfuse.kernels.grouped_gemm import grouped_swiglu
from earlyfuse.models.blocks.branch import (
    ALL_USES,
    FP32,
    INT64,
    Branch,
    Collective,
    Flops,
    Inherited,
    Matrix,
    Microbatch,
    Parent,
    Regrouping,
    Shape,
    Use,
    products,
    same_or_untied,
    sums_of_split_region,
)
from earlyfuse.models.blocks.feed_forward import DRAWS, TENSOR_SPLIT, FeedForward
from earlyfuse.models.blocks.linear import to_local
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.field_checks import check_positive
from earlyfuse.models.init_weights import Draw
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.routing.router import Router


class ExpertPool(Module):
    """E experts for the tokens of some modality groups, and their router.

    Output of a token: Σ over the experts that it is routed to of weight · SwiGLU(x); zero if there
    is none (MoMa eq. 1).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``groups``: indices of the modality groups served, () for all. ``share``: their part of
        all tokens in the data, from which static budgets follow."""

        name: str
        dim: int
        hidden_dim: int
        experts: int
        groups: tuple[int, ...] = ()
        share: float = 1.0
        router: Router.Config = field(default_factory=ExpertChoice.Config)

        def __post_init__(self) -> None:
            self.router.check_pool(self.name, self.groups)
            if not 0 < self.share <= 1:
                raise ValueError(
                    f"share ({self.share}) of the {self.name} experts must be in (0, 1]; "
                    "give the part of all tokens that has this modality"
                )
            check_positive(self, "experts", "hidden_dim", of=f" of the {self.name} experts")

        @property
        def expert_parameters(self) -> int:
            """Number of parameters of one expert."""
            return 3 * self.dim * self.hidden_dim

        def serves(self, group: int) -> bool:
            """True if tokens of the modality group are routed here."""
            return not self.groups or group in self.groups

        def routed_rows(self, batch: Microbatch) -> int:
            """Rows of a micro-batch that are routed to the experts, on average."""
            return self.router.routed_rows(batch, self.experts, self.share)

        def saved(self, batch: Microbatch) -> int:
            """Elements per token: gate and up of each routed row, and what the router keeps."""
            rows = 2 * self.hidden_dim * self.routed_rows(batch)
            router = self.router.saved(self.dim, self.experts, batch.itemsize)
            return rows // batch.tokens // batch.tensor_ranks + router

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            """The sums of a split region; rows to and from the ranks of their experts."""
            rows = self.routed_rows(batch)
            yield sums_of_split_region(batch, self.dim)
            yield Collective("split activations", "all_reduce", "tp", rows * FP32, backward=1)
            if not self.router.static:
                counts = batch.expert_ranks * self.experts * INT64
                yield Collective("expert counts", "all_gather", "ep", counts, forward=1)
            size = rows * self.dim * batch.itemsize
            yield Collective("expert rows", "all_to_all", "ep", size, 2, 2, kept=True)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.router = config.router.build(
            dim=config.dim, experts=config.experts, share=config.share
        )
        self.experts = Experts(config.experts, config.hidden_dim, config.dim)
        self.dispatcher: TokenDispatcher = LocalDispatcher()

    def route(self, x_TD: torch.Tensor, context: ForwardContext) -> Routes:
        """Assigns the tokens (T, D) to experts, with weights."""
        return self.router(x_TD, self._eligible(context), context)

    def _eligible(self, context: ForwardContext) -> torch.Tensor | None:
        if not self.config.groups:
            return context.real_T
        served = [context.group_T == group for group in self.config.groups]
        eligible_T = served[0] if len(served) == 1 else torch.stack(served).any(0)
        return eligible_T if context.real_T is None else eligible_T & context.real_T


class Experts(Module):
    """E SwiGLU experts. Parameters: w1 and w3 (E, F, D), w2 (E, D, F)."""

    tensor_split: ClassVar = TENSOR_SPLIT
    expert_split = True  # expert parallelism shards the first dimension

    def __init__(self, experts: int, hidden_dim: int, dim: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))

    def draws(self) -> dict[str, Draw]:
        return DRAWS

    def forward(self, x_TD: torch.Tensor, routes: Routes) -> torch.Tensor:
        """(T, D) → (T, D): for each token the weighted sum over the experts it is routed to."""
        w1, w3, w2 = to_local(self.w1), to_local(self.w3), to_local(self.w2)
        return grouped_swiglu(x_TD, w1, w3, w2, *routes)


class TokenDispatcher(Protocol):
    """Sends tokens to the ranks of their experts, and results back; may work in the background
    between its calls.
    """

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Any:
        """Send the routed rows. ``static``: every rank has the same number of rows."""

    def receive(self, sent: Any) -> tuple[torch.Tensor, Routes]:
        """The rows (T', D) for this rank's experts, and their routes."""

    def send_back(self, y_TD: torch.Tensor, sent: Any) -> Any:
        """Return the experts' outputs (T', D)."""

    def combine(self, returned: Any) -> torch.Tensor:
        """Weighted sums of the outputs for this rank's own tokens, (T, D)."""


class LocalDispatcher:
    """All experts are on this rank."""

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Any:
        return x_TD, routes

    def receive(self, sent: Any) -> tuple[torch.Tensor, Routes]:
        return sent

    def send_back(self, y_TD: torch.Tensor, sent: Any) -> Any:
        return y_TD

    def combine(self, returned: Any) -> torch.Tensor:
        return returned


class MixtureOfExperts(Branch):
    """The sum of pools of routed experts and of shared experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(Branch.Config):
        """``shared``: experts that every token takes, with weight 1: ``groups=1`` the same for all
        tokens, else one for each modality group."""

        supports: ClassVar[tuple[Use, ...]] = ALL_USES

        pools: list[ExpertPool.Config]
        shared: list[FeedForward.Config] = field(default_factory=list)

        def __post_init__(self) -> None:
            names = [pool.name for pool in self.pools]
            if not names or len(set(names)) != len(names):
                raise ValueError(f"pools {names} must be at least one, with different names")

        @property
        def dim(self) -> int:
            """Width of the tokens."""
            return self.pools[0].dim

        def check(self, modality_groups: int) -> None:
            for pool in self.pools:
                pool.router.check_model(pool.name, modality_groups)
            for shared in self.shared:
                if shared.groups not in (1, modality_groups):
                    raise ValueError(
                        f"groups ({shared.groups}) of a shared expert must be 1, for all tokens, "
                        f"or {modality_groups}, one for each modality group of the model"
                    )

        def regrouped(self, to: Regrouping) -> Self:
            """A new group has a pool like the last one that serves some groups."""
            pools = []
            for pool in self.pools:
                if None not in pool.router.experts_by_group(pool.experts):
                    raise ValueError(
                        f"router.serves of the {pool.name} experts names modality groups, and the "
                        f"data have {', '.join(to.labels)}; give the experts of each in a config "
                        "of your own"
                    )
                served = to.places(pool.groups)
                if served or not pool.groups:
                    pools.append(replace(pool, groups=served))
            template = next((pool for pool in reversed(self.pools) if pool.groups), None)
            for group in to.new if template else ():
                assert template is not None
                pools.append(replace(template, name=to.labels[group], groups=(group,)))
            shared = [shared.regrouped(to) for shared in self.shared]
            return deepcopy(replace(self, pools=pools, shared=shared))

        def matrices(self) -> list[Matrix]:
            """Matrices of the shared experts; those of pools depend on the routes."""
            return [matrix for shared in self.shared for matrix in shared.matrices()]

        def parameters(self, group: int | None = None) -> int:
            """Experts and routers; of one modality, the experts that a token takes on average."""
            found = float(Branch.Config.parameters(self, group))
            for pool in self.pools:
                if group is None or pool.serves(group):
                    taken = pool.experts if group is None else pool.router.rows_per_token
                    found += taken * pool.expert_parameters
                    found += pool.router.parameters(pool.dim, pool.experts)
            return round(found)

        def flops(self, seq_len: int, group: int) -> Flops:
            """Experts that a token takes, on average; every router scores every token."""
            found = Branch.Config.flops(self, seq_len, group)
            for pool in self.pools:
                found += pool.router.flops(pool.dim, pool.experts)
                if pool.serves(group):
                    found += products(pool.router.rows_per_token * pool.expert_parameters)
            return found

        def _parts(self) -> list[ExpertPool.Config | FeedForward.Config]:
            return [*self.pools, *self.shared]

        def saved(self, batch: Microbatch) -> int:
            return sum(part.saved(batch) for part in self._parts())

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            for part in self._parts():
                yield from part.collectives(batch)

        def even_sizes(self, axis: Literal["tensor", "expert"]) -> dict[str, int]:
            """Inner widths, or numbers of experts of each modality."""
            if axis == "tensor":
                widths = {f"{pool.name}.hidden_dim": pool.hidden_dim for pool in self.pools}
                shared = enumerate(self.shared)
                return widths | {f"shared[{i}].hidden_dim": one.hidden_dim for i, one in shared}
            return {
                f"{pool.name}.experts"
                + ("" if group is None else f" of modality group {group}"): experts
                for pool in self.pools
                for group, experts in pool.router.experts_by_group(pool.experts).items()
            }

        def refusal(self, use: Use) -> str | None:
            """Refuses context parallelism where a router chooses among all tokens of a row."""
            if use == "context_parallel":
                for pool in self.pools:
                    if pool.router.needs_whole_rows:
                        return (
                            f"its pool {pool.name} has experts that choose among all tokens of a "
                            f"row ({pool.router.kind}), of which a rank has a part; use token "
                            "choice, or data_parallel_shard_degree and activation checkpointing"
                        )
            return None

        def inherit(
            self, name: str, shape: Shape, parent: Parent, modality_groups: int
        ) -> Inherited | None:
            """Experts from experts of the same pool, or from a feed-forward; routers from a router
            of the same shape, else none.
            """
            head, _, rest = name.partition(".pools.")
            if not rest:
                return same_or_untied(name, shape, parent.shapes)
            number, _, leaf = rest.partition(".")
            if leaf.startswith("router."):
                return Inherited(name, shape) if parent.shapes.get(name) == shape else None
            if "pools" in parent.branch:
                return self._from_experts(name, shape, parent)
            source, pool = f"{head}.{leaf.removeprefix('experts.')}", self.pools[int(number)]
            served = pool.groups or tuple(range(modality_groups))
            return _from_feed_forward(name, shape, source, parent.shapes, served)

        def _from_experts(self, name: str, shape: Shape, parent: Parent) -> Inherited:
            """Each expert of the parent becomes the same number of experts of the same pool."""
            ours = [pool.groups for pool in self.pools]
            theirs = [tuple(pool["groups"]) for pool in parent.branch["pools"]]
            if theirs != ours:
                raise ValueError(
                    f"the pools of {name} serve the groups {ours}, those of the parent {theirs}"
                )
            whole = parent.shapes[name]
            if whole == shape:
                return Inherited(name, whole)
            if whole[1:] != shape[1:] or shape[0] % whole[0]:
                raise ValueError(f"{name} is {shape}, in the parent {whole}")
            copies = shape[0] // whole[0]
            return Inherited(name, whole, tuple(place // copies for place in range(shape[0])))

    def __init__(self, config: Config):
        super().__init__()
        self.pools = ModuleList([pool.build() for pool in config.pools])
        self.shared = ModuleList([shared.build() for shared in config.shared])

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D).

        Overlaps communication and computation: while rows of one pool travel, another pool or the
        shared experts, whose tokens stay, compute.
        """
        sent = [
            pool.dispatcher.send(x_TD, pool.route(x_TD, context), pool.router.static(context))
            for pool in self.pools
        ]
        outputs = [shared(x_TD, context) for shared in self.shared]
        returned = [
            pool.dispatcher.send_back(pool.experts(*pool.dispatcher.receive(rows)), rows)
            for pool, rows in zip(self.pools, sent, strict=True)
        ]
        outputs += [
            pool.dispatcher.combine(rows) for pool, rows in zip(self.pools, returned, strict=True)
        ]
        return sum(outputs[1:], start=outputs[0])


def _from_feed_forward(
    name: str, shape: Shape, source: str, parent: Mapping[str, Shape], served: tuple[int, ...]
) -> Inherited:
    """All experts of a pool from one feed-forward: the only one, or that of their modality."""
    theirs = parent.get(source)
    if theirs is None:
        raise ValueError(f"{source}, from which {name} would come, is not in the parent")
    if theirs == shape[1:]:
        return Inherited(source, theirs, (None,) * shape[0])
    if theirs[1:] != shape[1:]:
        raise ValueError(f"an expert of {name} is {shape[1:]}, {source} of the parent {theirs}")
    if len(served) > 1:
        raise ValueError(
            f"all experts of {name} serve {len(served)} modalities, and {source} of the parent has "
            "a feed-forward for each; begin with a dense parent"
        )
    return Inherited(source, theirs, (served[0],) * shape[0])
