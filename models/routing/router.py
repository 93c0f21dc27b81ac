"""The contract of a router: what brings tokens to the experts of a pool, said about itself.

The module makes ``Routes``; its ``Config`` answers what it costs and what it needs. ``ExpertPool``,
``flops``, ``parallel/estimates``, ``parallel/strategies`` and the metrics ask and know no router by
name. A new one is a subclass of ``Router`` in a file of your own, given as ``ExpertPool.router``.

T tokens, D width, E experts of the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
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


class Router(Module):
    """Built with ``dim``, ``experts`` and ``share``, the part of all tokens that the pool serves.

    What it counts for the metrics is in ``Statistics`` among its submodules (``router_stats.py``).
    """

    keeps_fp32 = True  # rounded weights choose other experts than those of an exported model
    config: "Router.Config"

    def forward(
        self, x_TD: torch.Tensor, eligible_T: torch.Tensor | None, context: ForwardContext
    ) -> Routes:
        """Routes and weights of the tokens (T, D) among which ``eligible_T`` may be routed."""
        raise NotImplementedError

    def draws(self) -> dict[str, Draw]:
        return {}

    def static(self, context: ForwardContext) -> bool:
        """Whether every rank routes the same number of rows to each expert."""
        return False

    def balance(self, load_E: torch.Tensor, taken: torch.Tensor) -> None:
        """After a step, where ``Config.bias_rate`` is not 0: ``load_E`` sums the buffer of this
        name over all ranks; ``taken`` bool: whether the step was, decided on the device.
        """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        # chooses among all tokens of a row: refused with context parallelism
        needs_whole_rows: ClassVar[bool] = True

        @property
        def routing_rows(self) -> int:
            """Rows of the batch among which one choice is made."""
            return 1

        @property
        def static(self) -> bool:
            """Whether training routes the same number of rows to each expert on every rank."""
            return False

        @property
        def decides_causally(self) -> bool:
            """Whether it can route by tokens up to the one at hand alone, as generation needs."""
            return False

        @property
        def bias_rate(self) -> float:
            """By how much ``Router.balance`` moves selection biases after each step; 0: none."""
            return 0.0

        @property
        def causal(self) -> CausalRouter.Config | None:
            """An auxiliary router for inference, trained along."""
            return None

        @property
        def rows_per_token(self) -> float:
            """Experts that a token takes, on average."""
            raise NotImplementedError(
                f"{self.kind} must say its rows per token: override Config.rows_per_token"
            )

        def check_pool(self, name: str, groups: Sequence[int]) -> None:
            """``ValueError`` unless it fits a pool of these modality groups, () for all."""

        def check_model(self, name: str, modality_groups: int) -> None:
            """``ValueError`` unless it fits a pool in a model of so many modality groups."""

        def experts_by_group(self, experts: int) -> dict[int | None, int]:
            """Modality group → its experts, in order; None: of all groups."""
            return {None: experts}

        def routed_rows(self, batch: Microbatch, experts: int, share: float) -> int:
            """Rows that the experts take of a micro-batch, on average."""
            return round(self.rows_per_token * share * batch.tokens)

        def parameters(self, dim: int, experts: int) -> int:
            """Number of parameters, all in matrices."""
            return experts * dim

        def flops(self, dim: int, experts: int) -> Flops:
            """FLOPs of a token, which every router of a layer scores."""
            return products(self.parameters(dim, experts))

        @property
        def kind(self) -> str:
            """Name of the class that this configures."""
            return type(self).__qualname__.removesuffix(".Config")

        def saved(self, dim: int, experts: int, itemsize: int) -> int:
            """Elements of ``itemsize`` bytes that autograd keeps per token: the fp32 copy of its
            input.
            """
            return FP32 // itemsize * dim if itemsize < FP32 else 0
