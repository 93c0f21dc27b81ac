"""Expert choice: each expert takes its top k tokens of a routing group (arXiv 2407.21770, 2.2).

A routing group is a fixed number of rows of the global batch, so the function computed does not
depend on ranks, micro-batches or accumulation, and routing needs no communication. Selection looks
at a whole group, later tokens included: it is not causal.

T tokens, D width, N routing groups of L = T/N tokens, E experts, k tokens an expert takes in a
group, R = E·N·k rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from earlyfuse.kernels.permute import select_top_k
from earlyfuse.models.blocks.branch import FP32, Flops, Microbatch
from earlyfuse.models.context import ForwardContext, Rule
from earlyfuse.models.field_checks import check_choices, check_positive
from earlyfuse.models.init_weights import Draw, normal
from earlyfuse.models.precision import wide
from earlyfuse.models.routes import Routes, group_of_rows
from earlyfuse.models.routing.causal_router import CausalRouter, members, taken_routes
from earlyfuse.models.routing.gumbel_noise import RouterNoise
from earlyfuse.models.routing.router import LACKING, Router
from earlyfuse.models.routing.router_stats import RouterStats
from earlyfuse.models.routing.running_threshold import RunningThreshold


class ExpertChoice(Router):
    """The router of a pool whose experts choose their tokens. Parameter: weight (E, D)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Router.Config):
        """``capacity_factor``: experts that a token gets on average. ``routing_rows``: rows of the
        batch in a routing group. ``budget``: see ``expert_choice``. ``weights``: "sigmoid" scores
        (MoMa eq. 1), or "normalised" to a sum of 1 over a token's experts. ``init`` "centred": the
        weight less its mean over experts, whose directions then form a simplex, so that they choose
        different tokens. ``causal``: a router for inference, trained along. ``noise``: in the
        choice, while training. ``threshold``: a running one of each expert, for inference and, if
        it ``chooses``, training; it follows the scores that training chooses by, with noise."""

        capacity_factor: float = 1.0
        routing_rows: int = 1
        budget: Literal["static", "exact"] = "static"
        weights: Literal["sigmoid", "normalised"] = "sigmoid"
        init: Literal["normal", "centred"] = "normal"
        init_gain: float = 1.0
        causal: CausalRouter.Config | None = None
        noise: RouterNoise.Config | None = None
        threshold: RunningThreshold.Config | None = None

        def __post_init__(self) -> None:
            check_positive(self, "routing_rows", "capacity_factor", "init_gain")
            if self.threshold is not None and self.budget != "static":
                raise ValueError(
                    f'budget ({self.budget!r}) must be "static" with thresholds, which follow the '
                    "last token of a static budget; set it, or leave threshold None"
                )
            if self.threshold is not None and self.threshold.chooses and self.causal is not None:
                raise ValueError(
                    "causal must be None where thresholds choose in training, which is a causal "
                    "rule already; leave it out, or set threshold.chooses to False"
                )
            check_choices(
                self,
                budget=("static", "exact"),
                weights=("sigmoid", "normalised"),
                init=("normal", "centred"),
            )

        @property
        def static(self) -> bool:
            return self.budget == "static"

        @property
        def causal_rules(self) -> tuple[Rule, ...]:
            rules: dict[Rule, object] = {"causal": self.causal, "threshold": self.threshold}
            return tuple(rule for rule, has in rules.items() if has is not None)

        @property
        def rows_per_token(self) -> float:
            return self.capacity_factor

        def routed_rows(self, batch: Microbatch, experts: int, share: float) -> int:
            """Rows by the static rule, the average of exact budgets; where thresholds choose, all
            slots, of which ``rows_per_token`` counts those that are taken in expectation.
            """
            group_tokens = self.routing_rows * batch.seq_len
            slots = static_budget(share, self.capacity_factor, group_tokens, experts)
            if self.threshold is not None:
                slots = self.threshold.slots(slots, group_tokens)
            return experts * slots * (batch.rows // self.routing_rows)

        def parameters(self, dim: int, experts: int) -> int:
            causal = 0 if self.causal is None else dim // 2 * (dim + experts)
            return experts * dim + causal

        def flops(self, dim: int, experts: int) -> Flops:
            """Causal routers give no gradient to their input."""
            flops = Router.Config.flops(self, dim, experts)
            spared = 0 if self.causal is None else 2 * dim * (dim // 2)
            return Flops(flops.forward, flops.backward - spared)

        def saved(self, dim: int, experts: int, itemsize: int) -> int:
            """Adds the causal router's hidden units before and after SiLU, and its logits."""
            causal = 0 if self.causal is None else 2 * (dim // 2) + 2 * experts
            return Router.Config.saved(self, dim, experts, itemsize) + FP32 // itemsize * causal

    def __init__(self, config: Config, *, dim: int, experts: int, share: float):
        super().__init__()
        self.config, self.share = config, share
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.stats = RouterStats(experts)
        sizes = {"dim": dim, "experts": experts, "share": share}
        self.causal = config.causal.build(**sizes) if config.causal is not None else None
        self.noise = config.noise.build() if config.noise is not None else None
        self.threshold = (
            config.threshold.build(experts=experts) if config.threshold is not None else None
        )

    def draws(self) -> dict[str, Draw]:
        centred = self.config.init == "centred"
        return {"weight": normal(self.config.init_gain, centred=centred)}

    def static(self, context: ForwardContext) -> bool:
        """True unless budgets are exact or the rule is not that of the batch."""
        settings = context.settings
        exact = settings.rule != "batch" or settings.budgets == "exact"
        return self.config.budget == "static" and not exact

    def forward(
        self, x_TD: torch.Tensor, eligible_T: torch.Tensor | None, context: ForwardContext
    ) -> Routes:
        # router in fp32: ties in bf16 would reorder the top-k
        x_TD = wide(x_TD)
        logits_TE = F.linear(x_TD, wide(self.weight))
        rule = context.settings.rule
        if rule == "causal":
            if self.causal is None:
                raise ValueError(f"an expert-choice router {LACKING[rule]}")
            return self._weighed(self.causal.choose(x_TD, logits_TE, eligible_T), len(x_TD))
        if rule == "threshold":
            if self.threshold is None:
                raise ValueError(f"an expert-choice router {LACKING[rule]}")
            taken_TE = self.threshold.above(logits_TE, eligible_T)
            return self._weighed(taken_routes(taken_TE, logits_TE), len(x_TD))
        routes, taken_R = self._choose(logits_TE, eligible_T, context)
        routes = self._weighed(routes, len(x_TD))
        if context.settings.recording:
            self.stats.record(logits_TE, eligible_T, routes, taken_R=taken_R)
        if self.causal is not None:
            weight_R = self.causal.learn(x_TD, routes, eligible_T, context.settings)
            routes = routes._replace(weight_R=weight_R)
        return routes

    def _weighed(self, routes: Routes, tokens: int) -> Routes:
        return routes if self.config.weights == "sigmoid" else normalised(routes, tokens)

    def _choose(
        self, logits_TE: torch.Tensor, eligible_T: torch.Tensor | None, context: ForwardContext
    ) -> tuple[Routes, torch.Tensor | None]:
        """Routes by the rule of training, and which of their rows are taken; None: all."""
        config = self.config
        # of a selection over several rows, a row holds the tokens of them all
        rows, rest = divmod(config.routing_rows, context.merged_rows)
        if rest or context.rows % rows:
            raise ValueError(
                f"a batch of {context.rows * context.merged_rows} rows cannot be split into "
                f"routing groups of routing_rows ({config.routing_rows}); make the local batch "
                "size a multiple of it"
            )
        groups, tokens = context.rows // rows, rows * context.seq_len
        budget = slots = None
        if self.static(context):
            experts = logits_TE.shape[1]
            budget = slots = static_budget(self.share, config.capacity_factor, tokens, experts)
            if config.threshold is not None and self.training:
                slots = config.threshold.slots(budget, tokens)
        selected_by_TE = logits_TE
        if self.noise is not None and self.training:
            selected_by_TE = self.noise(logits_TE, context)
        routes = expert_choice(
            logits_TE,
            eligible_T,
            groups,
            budget=slots,
            capacity_factor=config.capacity_factor,
            selected_by_TE=selected_by_TE,
        )
        taken_R = None
        if self.threshold is not None:
            scores_TE = selected_by_TE.detach()
            if context.settings.recording:
                chosen = routes if budget is None else _first(routes, groups, budget)
                member_TE = members(chosen, eligible_T, *logits_TE.shape)
                self.threshold.compare(scores_TE, member_TE, eligible_T)
            if budget is not None and self.training:
                score_R = _scores(routes, scores_TE, eligible_T)
                score_ENk = score_R.view(logits_TE.shape[1], groups, -1)
                taken_R = self.threshold.follow(score_ENk, budget, context.settings.recording)
        if taken_R is not None:
            assert routes.weight_R is not None, "expert choice always weighs its rows"
            routes = routes._replace(weight_R=routes.weight_R * taken_R)
        return routes, taken_R


def _scores(
    routes: Routes, scores_TE: torch.Tensor, eligible_T: torch.Tensor | None
) -> torch.Tensor:
    """(R,) fp32 scores of the rows of ``routes``, -inf for tokens that are not eligible."""
    row_R, offset_G1, _ = routes
    score_R = scores_TE[row_R, group_of_rows(offset_G1, len(row_R))].float()
    return score_R if eligible_T is None else score_R.masked_fill(~eligible_T[row_R], -torch.inf)


def _first(routes: Routes, groups: int, budget: int) -> Routes:
    """The first ``budget`` rows of each expert in each routing group, of static routes."""
    experts = len(routes.offset_G1) - 1
    row_R = routes.row_R.view(experts * groups, -1)[:, :budget].flatten()
    per_expert = groups * budget
    offset_G1 = torch.arange(experts + 1, device=row_R.device) * per_expert
    return Routes(row_R, offset_G1)


def normalised(routes: Routes, tokens: int) -> Routes:
    """``routes`` with weights that sum to 1 over the experts of each token that has any.

    The weight of a token with one expert is 1 whatever its score, so only tokens of several experts
    train the router. Equal experts give every routed token the output of one of them, which sigmoid
    weights do not: upcycling uses this.
    """
    row_R, offset_G1, weight_R = routes
    assert weight_R is not None, "expert choice always weighs its rows"
    group_R = group_of_rows(offset_G1, len(row_R))
    weight_TE = weight_R.new_zeros(tokens, len(offset_G1) - 1)
    # each pair is there once: the sum over experts has one order on all devices
    total_T = weight_TE.index_put((row_R, group_R), weight_R).sum(1)
    total_T = torch.where(total_T > 0, total_T, torch.ones_like(total_T))
    return Routes(row_R, offset_G1, weight_R / total_T[row_R])


def expert_choice(
    logits_TE: torch.Tensor,
    eligible_T: torch.Tensor | None,
    routing_groups: int,
    *,
    budget: int | None,
    capacity_factor: float,
    selected_by_TE: torch.Tensor | None = None,
) -> Routes:
    """Routes of the tokens that the experts choose; weights are sigmoid scores (MoMa eq. 1).

    ``logits_TE``       (T, E) fp32 raw router outputs, for the weights
    ``eligible_T``      (T,) bool, tokens that may be chosen; None: all
    ``budget``          k of the static rule: k rows per expert and group, of weight 0 where no
                        eligible token is left. None: the paper's exact rule, k =
                        round(capacity_factor · eligible tokens of the group / E), a number that
                        the host waits for
    ``selected_by_TE``  (T, E) what tokens are selected by, lower index first in ties; None: logits
    """
    # fp32 of a model in fp64 too
    scores_TE = (logits_TE if selected_by_TE is None else selected_by_TE).detach().float()
    if eligible_T is not None:
        scores_TE = scores_TE.masked_fill(~eligible_T.unsqueeze(1), -torch.inf)
    scores_ENL = scores_TE.t().reshape(logits_TE.shape[1], routing_groups, -1)
    if budget is None:
        return _exact(logits_TE, scores_ENL, capacity_factor)
    return _static(logits_TE, scores_ENL, eligible_T, budget)


def static_budget(share: float, capacity_factor: float, group_tokens: int, experts: int) -> int:
    """k = round(capacity_factor · share · tokens of a routing group / experts).

    Raises ``ValueError`` when that is 0 or more than a group holds.
    """
    budget = round(capacity_factor * share * group_tokens / experts)
    if not 0 < budget <= group_tokens:
        raise ValueError(
            f"each of {experts} experts would take {budget} of the {group_tokens} tokens of a "
            f"routing group (share {share}, capacity_factor {capacity_factor}); it must be between "
            f"1 and {group_tokens}: raise share, routing_rows or seq_len, or use fewer experts"
        )
    return budget


def _static(
    logits_TE: torch.Tensor,
    scores_ENL: torch.Tensor,
    eligible_T: torch.Tensor | None,
    budget: int,
) -> Routes:
    experts, routing_groups, length = scores_ENL.shape
    device, per_expert = logits_TE.device, routing_groups * budget
    chosen_ENk = select_top_k(scores_ENL.flatten(0, 1), budget).view(experts, routing_groups, -1)
    start_N1 = torch.arange(routing_groups, device=device).unsqueeze(1) * length
    row_R = (chosen_ENk + start_N1).flatten()
    offset_G1 = torch.arange(experts + 1, device=device) * per_expert
    expert_R = torch.arange(experts, device=device).repeat_interleave(per_expert)
    weight_R = logits_TE[row_R, expert_R].sigmoid()
    if eligible_T is not None:
        weight_R = weight_R * eligible_T[row_R]
    return Routes(row_R, offset_G1, weight_R)


def _exact(logits_TE: torch.Tensor, scores_ENL: torch.Tensor, capacity_factor: float) -> Routes:
    experts, routing_groups, length = scores_ENL.shape
    count_N = (scores_ENL[0] > -torch.inf).sum(1)
    # half to even, like Python's round in static_budget, so that both rules agree on equal counts
    budget_N = (count_N * capacity_factor / experts).round().long().clamp(max=count_N)
    order_ENL = select_top_k(scores_ENL.flatten(0, 1), length).view_as(scores_ENL)
    order_ENL = order_ENL + torch.arange(routing_groups, device=order_ENL.device)[:, None] * length
    taken_NL = torch.arange(length, device=order_ENL.device) < budget_N[:, None]
    row_R = order_ENL[taken_NL.expand_as(order_ENL)]
    per_expert = int(budget_N.sum())
    offset_G1 = torch.arange(experts + 1, device=row_R.device) * per_expert
    expert_R = torch.arange(experts, device=row_R.device).repeat_interleave(per_expert)
    return Routes(row_R, offset_G1, logits_TE[row_R, expert_R].sigmoid())
