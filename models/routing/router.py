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
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.init_weights import Draw
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.causal_router import CausalRouter

NO_CAUSAL_ROUTER = (
    "cannot route causally: it has no causal router. Train one on the finished model in a second "
    "stage (--train-only causal_routers, docs/moma.md), or along with it by a config whose routers "
    "have causal set"
)


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
        def decides_causally(self) -> bool:
            """True if it can route by the present and earlier tokens alone, as generation needs."""
            return False

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


def check_causal(model: nn.Module) -> None:
    """``ValueError`` if a router of ``model`` has no causal rule (``ForwardSettings.rule``)."""
    for name, module in model.named_modules():
        if isinstance(module, Router) and not module.config.decides_causally:
            raise ValueError(f"{name} {NO_CAUSAL_ROUTER}")
