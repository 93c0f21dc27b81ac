"""Mixture of modality-aware experts: MoMa's feed-forward (arXiv 2407.21770, section 2.2).

An ``ExpertPool`` is a number of SwiGLU experts and the router that brings tokens to them; a
``MixtureOfExperts`` is a list of pools, and of feed-forwards shared by all tokens or by all of a
modality. One pool of expert choice per modality is MoMa (``4t4i``: four text and four image
experts); a single one over all modalities is plain expert choice (``moe_8x``).

T tokens, D width, E experts of the pool, F inner width, R routed rows.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torchtitan.protocols.module import Module, ModuleList

from earlyfuse.kernels.grouped_gemm import grouped_swiglu
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.local_shard import to_local
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.routing.token_choice import TokenChoice


class ExpertPool(Module):
    """E experts for the tokens of some modality groups, and the router that brings them together.

    Output of a token: Σ over the experts that it is routed to of weight · SwiGLU(x); zero if there
    is none (MoMa eq. 1). Parameters: those of the router and of ``Experts``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``groups``: indices of the modality groups served, () for all. ``share``: the part of all
        tokens that they make up in the data, from which static budgets follow."""

        name: str
        dim: int
        hidden_dim: int
        experts: int
        groups: tuple[int, ...] = ()
        share: float = 1.0
        router: ExpertChoice.Config | TokenChoice.Config = field(
            default_factory=ExpertChoice.Config
        )

        def __post_init__(self) -> None:
            if self.groups and isinstance(self.router, TokenChoice.Config):
                raise ValueError(
                    f"groups ({self.groups}) of the {self.name} experts must be () with token "
                    "choice; name the modality group of each expert in router.serves"
                )
            if not 0 < self.share <= 1:
                raise ValueError(
                    f"share ({self.share}) of the {self.name} experts must be in (0, 1]; "
                    "give the part of all tokens that has this modality"
                )
            for name in ("experts", "hidden_dim"):
                if getattr(self, name) <= 0:
                    raise ValueError(
                        f"{name} ({getattr(self, name)}) of the {self.name} experts must be "
                        "positive"
                    )

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.router = config.router.build(
            dim=config.dim, experts=config.experts, share=config.share
        )
        self.experts = Experts(config.experts, config.hidden_dim, config.dim)
        self.dispatcher: TokenDispatcher = LocalDispatcher()

    def route(self, x_TD: torch.Tensor, context: ForwardContext) -> Routes:
        """Which of the tokens (T, D) each expert takes, and their weights."""
        return self.router(x_TD, self._eligible(context), context)

    def _eligible(self, context: ForwardContext) -> torch.Tensor | None:
        if not self.config.groups:
            return None
        served = [context.group_T == group for group in self.config.groups]
        return served[0] if len(served) == 1 else torch.stack(served).any(0)


class Experts(Module):
    """E SwiGLU experts. Parameters: w1 and w3 (E, F, D), w2 (E, D, F)."""

    def __init__(self, experts: int, hidden_dim: int, dim: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))

    def forward(self, x_TD: torch.Tensor, routes: Routes) -> torch.Tensor:
        """(T, D) → (T, D): for each token the weighted sum over the experts it is routed to."""
        return grouped_swiglu(
            x_TD, to_local(self.w1), to_local(self.w3), to_local(self.w2), *routes
        )


class TokenDispatcher(Protocol):
    """How tokens reach the ranks of their experts, and results come back; may work in the
    background between its calls.
    """

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Any:
        """Send the routed rows off. ``static``: every rank has the same number of rows."""

    def receive(self, sent: Any) -> tuple[torch.Tensor, Routes]:
        """The rows (T', D) for the experts held here, and their routes."""

    def send_back(self, y_TD: torch.Tensor, sent: Any) -> Any:
        """Return what the experts made of them, (T', D)."""

    def combine(self, returned: Any) -> torch.Tensor:
        """Results of this rank's own tokens, weighted and added up, (T, D)."""


class LocalDispatcher:
    """All experts are here."""

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Any:
        return x_TD, routes

    def receive(self, sent: Any) -> tuple[torch.Tensor, Routes]:
        return sent

    def send_back(self, y_TD: torch.Tensor, sent: Any) -> Any:
        return y_TD

    def combine(self, returned: Any) -> torch.Tensor:
        return returned


class MixtureOfExperts(Module):
    """The sum of its pools and shared experts; of disjoint modalities, each token meets those of
    its own.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``shared``: experts that every token takes, with weight 1: ``groups=1`` the same for all
        tokens, else one for each modality group."""

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

        def check_modalities(self, groups: int) -> None:
            """``ValueError`` unless all of a model's modality groups have their experts."""
            for pool in self.pools:
                serves = getattr(pool.router, "serves", ())
                if serves and set(serves) != set(range(groups)):
                    raise ValueError(
                        f"router.serves ({serves}) of the {pool.name} experts must name each of "
                        f"the model's {groups} modality groups, from 0, and no other"
                    )
            for shared in self.shared:
                if shared.groups not in (1, groups):
                    raise ValueError(
                        f"groups ({shared.groups}) of a shared expert must be 1, for all tokens, "
                        f"or {groups}, one for each modality group of the model"
                    )

    def __init__(self, config: Config):
        super().__init__()
        self.pools = ModuleList([pool.build() for pool in config.pools])
        self.shared = ModuleList([shared.build() for shared in config.shared])

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D).

        In turns over the pools: while the rows of one travel, another one computes, first of all
        the shared experts, whose tokens stay.
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
