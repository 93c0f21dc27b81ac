"""Token choice: each token takes its top k experts by itself, hence causally.

Sigmoid scores with a bias per expert that affects the selection alone and is moved towards even
load after each step, in place of an auxiliary loss (arXiv 2408.15664; 2412.19437, 2.1.2).

As in MoMa, an expert may serve one modality group only, and is then chosen by tokens of that group
alone. All experts are still one pool: each token has exactly k rows, so no number of rows depends
on the batch, the host does not wait, and no row is padded or dropped. Separate pools would have as
many rows as the batch has tokens of their modality, a number that only the device knows.

T tokens, D width, E experts, k experts of a token, R = T·k rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.module import ModuleList

from earlyfuse.kernels.permute import select_top_k
from earlyfuse.models.blocks.branch import Microbatch
from earlyfuse.models.context import ForwardContext, Rule
from earlyfuse.models.field_checks import check_at_least
from earlyfuse.models.init_weights import Draw, normal
from earlyfuse.models.precision import wide
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.router import CAUSAL_RULES, Router
from earlyfuse.models.routing.router_stats import RouterStats


class TokenChoice(Router):
    """The router of a pool whose experts are chosen by the tokens.

    Parameter: ``weight`` (E, D). ``bias_E`` fp32: added to the logits in selection, saved in
    checkpoints. ``load_E`` int64: rows of each expert in a step's training forwards, which
    ``parallel/training/expert_bias.py`` sums over ranks and passes to ``balance``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Router.Config):
        """``top_k``: experts of a token. ``serves``: the modality group of each expert, () if all
        serve all. ``normalise``: weights of a token's experts sum to ``scale``; else each is
        ``scale`` times its sigmoid score. ``bias_rate``: step of the biases, in units of a logit,
        up for experts below even load and down above; 0: none."""

        needs_whole_rows: ClassVar[bool] = False

        top_k: int = 1
        serves: tuple[int, ...] = ()
        normalise: bool = False
        scale: float = 1.0
        bias_rate: float = 0.001

        def __post_init__(self) -> None:
            check_at_least(self, 1, "top_k")
            check_at_least(self, 0, "bias_rate")
            if not 0 < self.scale < math.inf:
                raise ValueError(f"scale ({self.scale}) must be positive; 1 leaves weights alone")
            for group in set(self.serves):
                if (experts := self.serves.count(group)) < self.top_k:
                    raise ValueError(
                        f"top_k ({self.top_k}) must be at most the number of experts that serve "
                        f"modality group {group} ({experts}); lower it or add experts"
                    )
            if self.normalise and self.top_k == 1:
                raise ValueError(
                    "normalise (True) needs top_k (1) of at least 2: a single weight would be "
                    "constant, and the router would not learn"
                )

        def check_pool(self, name: str, groups: Sequence[int]) -> None:
            if groups:
                raise ValueError(
                    f"groups ({groups}) of the {name} experts must be () with token choice; name "
                    "the modality group of each expert in router.serves"
                )

        def check_model(self, name: str, modality_groups: int) -> None:
            if self.serves and set(self.serves) != set(range(modality_groups)):
                raise ValueError(
                    f"router.serves ({self.serves}) of the {name} experts must name each of the "
                    f"model's {modality_groups} modality groups, from 0, and no other"
                )

        @property
        def causal_rules(self) -> tuple[Rule, ...]:
            return CAUSAL_RULES

        @property
        def rows_per_token(self) -> float:
            return self.top_k

        def routed_rows(self, batch: Microbatch, experts: int, share: float) -> int:
            return self.top_k * batch.tokens

        def experts_by_group(self, experts: int) -> dict[int | None, int]:
            if not self.serves:
                return {None: experts}
            return {group: self.serves.count(group) for group in sorted(set(self.serves))}

    def __init__(self, config: Config, *, dim: int, experts: int, share: float):
        super().__init__()
        if config.serves and len(config.serves) != experts:
            raise ValueError(
                f"serves ({config.serves}) must name a modality group for each of the {experts} "
                "experts, or be empty"
            )
        if config.top_k > experts:
            raise ValueError(
                f"top_k ({config.top_k}) must be at most the number of experts ({experts}); lower "
                "it or add experts"
            )
        if share != 1.0:
            raise ValueError(
                f"share ({share}) must be 1 with token choice, whose experts serve all tokens; "
                "leave it out"
            )
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("serves_E", torch.tensor(config.serves), persistent=False)
        groups = config.experts_by_group(experts).items()  # in order
        self.stats = ModuleList(
            [RouterStats(count, config.top_k, group) for group, count in groups]
        )

    def draws(self) -> dict[str, Draw]:
        return {"weight": normal()}

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.bias_E.zero_()
        self.load_E.zero_()
        self.serves_E.copy_(torch.tensor(self.config.serves))

    def forward(
        self, x_TD: torch.Tensor, eligible_T: torch.Tensor | None, context: ForwardContext
    ) -> Routes:
        # router in fp32: ties in bf16 would reorder the top-k
        logits_TE = F.linear(wide(x_TD), wide(self.weight))
        scores_TE = logits_TE.detach().float() + self.bias_E.float()  # of a model in fp64 too
        if self.config.serves:
            scores_TE = scores_TE.masked_fill(context.group_T[:, None] != self.serves_E, -torch.inf)
        config = self.config
        routes = token_choice(logits_TE, scores_TE, config.top_k, config.normalise, config.scale)
        load_E = routes.offset_G1.diff()
        if eligible_T is not None:  # tokens that only fill a selection up
            real_R = eligible_T[routes.row_R]
            assert routes.weight_R is not None, "token choice always weighs its rows"
            routes = routes._replace(weight_R=routes.weight_R * real_R)
            load_E = F.pad(real_R.cumsum(0), (1, 0))[routes.offset_G1].diff()
        if self.training and config.bias_rate:
            self.load_E += load_E
        if context.settings.recording:
            self._record(logits_TE, eligible_T, context, routes)
        return routes

    def _record(
        self,
        logits_TE: torch.Tensor,
        eligible_T: torch.Tensor | None,
        context: ForwardContext,
        routes: Routes,
    ) -> None:
        if not self.config.serves:
            self.stats[0].record(logits_TE, eligible_T, routes)
            return
        by_group_E = self.serves_E.argsort(stable=True).split([len(s.load_E) for s in self.stats])
        for own_E, stats in zip(by_group_E, self.stats, strict=True):
            own_T = context.group_T == stats.group
            if eligible_T is not None:
                own_T = own_T & eligible_T
            stats.record(logits_TE, own_T, routes, own_E)

    @torch.no_grad()
    def balance(self, load_E: torch.Tensor, taken: torch.Tensor) -> None:
        """Moves the biases one step towards even load among the experts of a modality group.

        ``load_E``: of all ranks. An expert at the mean keeps its bias; all do where ``taken``, a
        bool tensor, is False. No host synchronisation.
        """
        load_E = load_E.double()
        mean_E = load_E.mean().expand_as(load_E)
        if self.config.serves:
            same_EE = self.serves_E[:, None] == self.serves_E
            mean_E = (load_E * same_EE).sum(1) / same_EE.sum(1)
        step_E = self.config.bias_rate * torch.sign(mean_E - load_E).float()
        self.bias_E += torch.where(taken, step_E, 0.0)


def token_choice(
    logits_TE: torch.Tensor, scores_TE: torch.Tensor, top_k: int, normalise: bool, scale: float
) -> Routes:
    """Routes of every token to its ``top_k`` experts of the highest scores, lower index in ties.

    ``logits_TE``  (T, E) fp32; weights are scale · sigmoid, or scale · sigmoid / their sum over the
                   token's experts (``normalise``)
    ``scores_TE``  (T, E) fp32 without gradient, to choose by; -inf: never
    """
    # many short rows: torch's top-k, as the Triton one is for a few long rows
    chosen_Tk = select_top_k(scores_TE, top_k, backend="torch")
    weight_Tk = logits_TE.gather(1, chosen_Tk).sigmoid()
    if normalise:
        weight_Tk = weight_Tk / weight_Tk.sum(1, keepdim=True).clamp_min(1e-20)
    expert_R, order_R = chosen_Tk.flatten().sort(stable=True)
    experts = torch.arange(logits_TE.shape[1] + 1, device=logits_TE.device)
    weight_R = (weight_Tk * scale).flatten()[order_R]
    return Routes(order_R // top_k, torch.searchsorted(expert_R, experts), weight_R)
