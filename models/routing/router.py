"""The contract of a router: what assigns tokens to the experts of a pool, and says about itself.

The module makes ``Routes``; its ``Config`` answers what it costs and what it needs. ``ExpertPool``,
``flops``, ``parallel/estimates``, ``parallel/strategies`` and the metrics ask and know no router by
name. A new one is a subclass of ``Router`` in a file of your own, given as ``ExpertPool.router``.

T tokens, D width, E experts of the pool.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.models.blocks.branch import FP32, Flops, Microbatch, products
from earlyfuse.models.context import ForwardContext, Rule
from earlyfuse.models.init_weights import Draw
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.running_threshold import measured

CAUSAL_RULES: tuple[Rule, ...] = ("causal", "threshold")
"""Those that look at no later token, in order of preference."""

_TRAIN_CAUSAL = (
    "train a causal router (a predictor, for depth) on the finished model in a second stage "
    "(--train-only causal_routers, docs/moma.md), or along with it by a config whose routers have "
    "causal set"
)
_MEASURE_THRESHOLDS = (
    "measure running thresholds on the finished model (configs.stages.thresholds_only, "
    "docs/moma.md), or along with it by a config whose routers have threshold set"
)
LACKING = {
    "causal": f"cannot route by the causal rule: it has no causal router; {_TRAIN_CAUSAL}",
    "threshold": f"cannot route by thresholds: it has none; {_MEASURE_THRESHOLDS}",
    None: (
        "cannot route causally: it has no causal router and no thresholds; "
        f"{_TRAIN_CAUSAL}; or {_MEASURE_THRESHOLDS}"
    ),
}


class Router(Module, ABC):
    """Built with ``dim``, ``experts`` and ``share``, the part of all tokens that the pool serves.

    Metrics are ``Statistics`` among its submodules (``router_stats.py``).
    """

    keeps_fp32 = True  # rounded weights choose other experts than those of an exported model
    config: "Router.Config"

    @abstractmethod
    def forward(
        self, x_TD: torch.Tensor, eligible_T: torch.Tensor | None, context: ForwardContext
    ) -> Routes:
        """Routes and weights of the tokens (T, D) among which ``eligible_T`` may be routed."""

    def draws(self) -> dict[str, Draw]:
        return {}

    def static(self, context: ForwardContext) -> bool:
        """True if every rank routes the same number of rows to each expert."""
        return False

    def balance(self, load_E: torch.Tensor, taken: torch.Tensor) -> None:
        """Called after a step if ``Config.bias_rate`` is not 0. ``load_E``: the buffer of this name
        summed over all ranks; ``taken`` bool: False if the step was skipped.
        """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config, ABC):
        """``needs_whole_rows``: chooses among all tokens of a row, so context parallelism is
        refused."""

        needs_whole_rows: ClassVar[bool] = True

        @property
        @abstractmethod
        def rows_per_token(self) -> float:
            """Experts that a token takes, on average."""

        @property
        def routing_rows(self) -> int:
            """Rows of the batch among which one choice is made."""
            return 1

        @property
        def static(self) -> bool:
            """True if training routes the same number of rows to each expert on every rank."""
            return False

        @property
        def causal_rules(self) -> tuple[Rule, ...]:
            """Rules of ``CAUSAL_RULES`` by which it can route, as generation needs. A router whose
            choice by a rule is not that of the batch has ``Statistics`` of this kind."""
            return ()

        @property
        def bias_rate(self) -> float:
            """Step size of ``Router.balance``; 0: never called."""
            return 0.0

        @property
        def causal(self) -> CausalRouter.Config | None:
            """An auxiliary router for inference, trained along."""
            return None

        def check_pool(self, name: str, groups: Sequence[int]) -> None:
            """``ValueError`` unless it fits a pool of these modality groups, () for all."""

        def check_model(self, name: str, modality_groups: int) -> None:
            """``ValueError`` unless it fits a pool in a model of so many modality groups."""

        def experts_by_group(self, experts: int) -> dict[int | None, int]:
            """Modality group → number of its experts, in order; None: experts of all groups."""
            return {None: experts}

        def routed_rows(self, batch: Microbatch, experts: int, share: float) -> int:
            """Rows of a micro-batch that are routed to the experts, on average."""
            return round(self.rows_per_token * share * batch.tokens)

        def parameters(self, dim: int, experts: int) -> int:
            """Number of parameters, all in matrices."""
            return experts * dim

        def flops(self, dim: int, experts: int) -> Flops:
            """FLOPs of a token; every router of a layer scores every token."""
            return products(self.parameters(dim, experts))

        def saved(self, dim: int, experts: int, itemsize: int) -> int:
            """Elements of ``itemsize`` bytes per token that autograd keeps: the fp32 copy of its
            input.
            """
            return FP32 // itemsize * dim if itemsize < FP32 else 0

        @property
        def kind(self) -> str:
            """Name of the class that this configures."""
            return type(self).__qualname__.removesuffix(".Config")


def routing_modules(model: nn.Module) -> dict[str, tuple[Rule, ...]]:
    """The modules of ``model`` that route, by name: the ``causal_rules`` of their config."""
    return {
        name: module.config.causal_rules
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "causal_rules")
    }


def causal_rules(model: nn.Module) -> list[Rule]:
    """Rules of ``CAUSAL_RULES`` that all routing modules of ``model`` have; all if it has none."""
    found = routing_modules(model).values()
    return [rule for rule in CAUSAL_RULES if all(rule in rules for rules in found)]


def usable_rules(model: nn.Module) -> list[Rule]:
    """``causal_rules``, without "threshold" before a step has measured thresholds."""
    return [rule for rule in causal_rules(model) if rule != "threshold" or measured(model)]


def selecting_rules(model: nn.Module) -> set[Rule]:
    """Rules of inference under which some module of ``model`` compares tokens of a medium with
    later ones, as if the medium were there as a whole.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    return {rule for config in configs for rule in getattr(config, "selecting_rules", ())}


def check_causal(model: nn.Module, rule: Rule | None = None) -> Rule:
    """``rule``, or the first of ``causal_rules``; ``ValueError`` names a module that lacks it."""
    if rule not in (None, *CAUSAL_RULES):
        raise ValueError(
            f"rule ({rule!r}) must be one of {', '.join(CAUSAL_RULES)}: others look at later tokens"
        )
    rules = causal_rules(model)
    if rule in rules or (rule is None and rules):
        return rule or rules[0]
    found = routing_modules(model)
    lacking = [name for name, own in found.items() if (rule not in own if rule else not own)]
    if not lacking:  # each has a rule, and they have none in common
        rule = CAUSAL_RULES[0]
        lacking = [name for name, own in found.items() if rule not in own]
    raise ValueError(f"{lacking[0]} {LACKING[rule]}")


def inference_rule(model: nn.Module, rule: Rule | None = None) -> Rule:
    """``check_causal``; also ``ValueError`` for thresholds that no training step has measured."""
    rule = check_causal(model, rule)
    if rule not in usable_rules(model):
        raise ValueError(
            "the model's thresholds are not measured: no training step was taken since they were "
            f"added; train it, or {_MEASURE_THRESHOLDS}"
        )
    return rule
