"""Mixture of modality-aware experts: MoMa's feed-forward (arXiv 2407.21770, section 2.2).

An ``ExpertPool`` is a number of SwiGLU experts that choose tokens of certain modalities; a
``MixtureOfExperts`` is a list of pools. One pool per modality is MoMa (``4t4i``: four text and four
image experts); a single pool over all modalities is plain expert choice (``moe_8x``).

T tokens, D width, E experts of the pool, F inner width, R routed rows.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.module import Module, ModuleList

from earlyfuse.kernels.grouped_gemm import grouped_swiglu
from earlyfuse.models.blocks.held import held
from earlyfuse.models.blocks.layout import Layout
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.expert_choice import expert_choice, static_budget


class ExpertPool(Module):
    """E experts that choose among the tokens of some modality groups.

    Output of a token: Σ over the experts that chose it of sigmoid(score) · SwiGLU(x); zero if none
    did (MoMa eq. 1). Parameters: router (E, D), and those of ``Experts``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``groups``: indices of the modality groups served, () for all. ``share``: the part of all
        tokens that they make up in the data, from which static budgets follow. ``routing_rows``:
        rows of the batch among which one choice is made."""

        name: str
        dim: int
        hidden_dim: int
        experts: int
        groups: tuple[int, ...] = ()
        share: float = 1.0
        capacity_factor: float = 1.0
        routing_rows: int = 1
        budget: Literal["static", "exact"] = "static"

        def __post_init__(self) -> None:
            if not 0 < self.share <= 1:
                raise ValueError(
                    f"share ({self.share}) of the {self.name} experts must be in (0, 1]; "
                    "give the part of all tokens that has this modality"
                )
            for field in ("experts", "routing_rows", "capacity_factor", "hidden_dim"):
                if getattr(self, field) <= 0:
                    raise ValueError(
                        f"{field} ({getattr(self, field)}) of the {self.name} experts must be "
                        "positive"
                    )

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.budget = config.budget
        self.router = nn.Parameter(torch.empty(config.experts, config.dim))
        self.experts = Experts(config.experts, config.hidden_dim, config.dim)
        self.exchange: Exchange = NoExchange()
        self.stats = RouterStats(config.experts)

    def route(self, x_TD: torch.Tensor, layout: Layout) -> Routes:
        """Which of the tokens (T, D) each expert takes, and their weights."""
        eligible_T = self._eligible(layout)
        # router in fp32: ties in bf16 would reorder the top-k
        logits_TE = F.linear(x_TD.float(), self.router.float())
        routes = self._choose(logits_TE, eligible_T, layout)
        if self.stats.recording:
            self.stats.record(logits_TE, eligible_T, routes)
        return routes

    def _eligible(self, layout: Layout) -> torch.Tensor | None:
        if not self.config.groups:
            return None
        served = [layout.group_T == group for group in self.config.groups]
        return served[0] if len(served) == 1 else torch.stack(served).any(0)

    def _choose(
        self, logits_TE: torch.Tensor, eligible_T: torch.Tensor | None, layout: Layout
    ) -> Routes:
        config = self.config
        if layout.rows % config.routing_rows:
            raise ValueError(
                f"batch of {layout.rows} rows cannot be cut into routing groups of routing_rows "
                f"({config.routing_rows}); make the local batch size a multiple of it"
            )
        budget = None
        if self.budget == "static":
            tokens = config.routing_rows * layout.seq_len
            budget = static_budget(config.share, config.capacity_factor, tokens, config.experts)
        return expert_choice(
            logits_TE,
            eligible_T,
            layout.rows // config.routing_rows,
            budget=budget,
            capacity_factor=config.capacity_factor,
        )


class Experts(Module):
    """E SwiGLU experts. Parameters: w1 and w3 (E, F, D), w2 (E, D, F)."""

    def __init__(self, experts: int, hidden_dim: int, dim: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))

    def forward(self, x_TD: torch.Tensor, routes: Routes) -> torch.Tensor:
        """(T, D) → (T, D): for each token the weighted sum over the experts it is routed to."""
        return grouped_swiglu(x_TD, held(self.w1), held(self.w3), held(self.w2), *routes)


class Exchange(Protocol):
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


class NoExchange:
    """All experts are here."""

    def send(self, x_TD: torch.Tensor, routes: Routes, static: bool) -> Any:
        return x_TD, routes

    def receive(self, sent: Any) -> tuple[torch.Tensor, Routes]:
        return sent

    def send_back(self, y_TD: torch.Tensor, sent: Any) -> Any:
        return y_TD

    def combine(self, returned: Any) -> torch.Tensor:
        return returned


class RouterStats(Module):
    """Sums over the forwards made while ``recording``: what the routers did, kept on the device.

    ``load_E`` counts real tokens taken by each expert. ``sums_6``: eligible tokens, eligible tokens
    that some expert took, rows, rows of real tokens, their weights, squared logits.
    """

    def __init__(self, experts: int):
        super().__init__()
        self.recording = False
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)
        self.register_buffer("sums_6", torch.zeros(6), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.load_E.zero_()
        self.sums_6.zero_()

    @torch.no_grad()
    def record(
        self, logits_TE: torch.Tensor, eligible_T: torch.Tensor | None, routes: Routes
    ) -> None:
        """Add one forward's routing. No host synchronisation."""
        row_R, _, weight_R = routes
        assert weight_R is not None, "expert choice always weighs its rows"
        tokens, experts = logits_TE.shape
        eligible = logits_TE.new_ones(tokens) if eligible_T is None else eligible_T.float()
        real_R = eligible[row_R]
        reached_T = torch.zeros_like(eligible).index_fill_(0, row_R, 1.0) * eligible
        squares = (logits_TE.square().mean(1) * eligible).sum()
        self.load_E += real_R.view(experts, -1).sum(1)
        rows = real_R.new_full((), real_R.numel())
        self.sums_6 += torch.stack(
            [eligible.sum(), reached_T.sum(), rows, real_R.sum(), weight_R.sum(), squares]
        )

    def take(self) -> dict[str, float]:
        """Summary since the last call, and start anew.

        ``load_min``, ``load_max``: least and most loaded expert relative to an even share of the
        eligible tokens; ``reached``: share of eligible tokens with an expert; ``filled``: share of
        the budget used; ``weight``: mean weight of a chosen token; ``logit_rms``.
        """
        eligible, reached, rows, real, weight, squares = self.sums_6.tolist()
        load = (self.load_E * len(self.load_E) / max(eligible, 1)).tolist()
        summary = {
            "load_min": min(load),
            "load_max": max(load),
            "reached": reached / max(eligible, 1),
            "filled": real / max(rows, 1),
            "weight": weight / max(real, 1),
            "logit_rms": (squares / max(eligible, 1)) ** 0.5,
        }
        self._init_self_buffers()
        return summary


class MixtureOfExperts(Module):
    """The sum of its pools; of disjoint modalities, each token meets those of its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pools: list[ExpertPool.Config]

        def __post_init__(self) -> None:
            names = [pool.name for pool in self.pools]
            if not names or len(set(names)) != len(names):
                raise ValueError(f"pools {names} must be at least one, with different names")

    def __init__(self, config: Config):
        super().__init__()
        self.pools = ModuleList([pool.build() for pool in config.pools])

    def forward(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(T, D) → (T, D).

        In turns over the pools: while the rows of one travel, another one computes.
        """
        sent = [
            pool.exchange.send(x_TD, pool.route(x_TD, layout), pool.budget == "static")
            for pool in self.pools
        ]
        returned = [
            pool.exchange.send_back(pool.experts(*pool.exchange.receive(rows)), rows)
            for pool, rows in zip(self.pools, sent, strict=True)
        ]
        outputs = [
            pool.exchange.combine(rows) for pool, rows in zip(self.pools, returned, strict=True)
        ]
        return sum(outputs[1:], start=outputs[0])
