"""Causal routers: predict expert choice from the current token alone, for causal inference.

Expert choice compares a token with the whole of its routing group. In generation later tokens do
not exist yet, and an auxiliary router decides from the token alone (MoMa, arXiv 2407.21770, 2.4):

    score(x) = sigmoid(silu(x W1ᵀ) W2ᵀ)          selected where score > 0.5, i.e. its logit > 0

It is trained by binary cross-entropy on the batch's choice; the main router still supplies the
weight. Its input is detached: it never changes the main model. ``ForwardSettings.rule`` selects it.

T tokens, D width, E experts, R routed rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torchtitan.protocols.module import Module

from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.init_weights import Draw, normal
from earlyfuse.models.precision import wide
from earlyfuse.models.routes import Routes, group_of_rows
from earlyfuse.models.routing.router_stats import CausalStats


class CausalRouter(Module):
    """The auxiliary router of a pool. Parameters: w_hidden (D/2, D) and w_score (E, D/2).

    ``share``: the part of all tokens that the pool serves.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``at_least_one``: a token that no expert would take goes to the one of its highest score;
        in the paper it gets none."""

        at_least_one: bool = False

    def __init__(self, config: Config, *, dim: int, experts: int, share: float):
        super().__init__()
        self.config, self.share = config, share
        self.w_hidden = nn.Parameter(torch.empty(dim // 2, dim))
        self.w_score = nn.Parameter(torch.empty(experts, dim // 2))
        self.stats = CausalStats()

    def draws(self) -> dict[str, Draw]:
        return {"w_hidden": normal(), "w_score": normal()}

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits (T, E) fp32 of each expert taking each token (T, D)."""
        hidden_TH = F.silu(F.linear(wide(x_TD.detach()), wide(self.w_hidden)))
        return F.linear(hidden_TH, wide(self.w_score))

    def choose(
        self, x_TD: torch.Tensor, main_TE: torch.Tensor, eligible_T: torch.Tensor | None
    ) -> Routes:
        """Routes by the causal rule. ``main_TE``: logits of the main router, for the weights.

        The number of rows is data-dependent: the host waits for it.
        """
        logits_TE = self(x_TD)
        taken_TE = logits_TE > 0
        if self.config.at_least_one:
            # where any logit is positive, the highest is
            taken_TE = taken_TE.scatter(1, logits_TE.argmax(1, keepdim=True), True)
        if eligible_T is not None:
            taken_TE = taken_TE & eligible_T[:, None]
        return taken_routes(taken_TE, main_TE)

    def learn(
        self,
        x_TD: torch.Tensor,
        routes: Routes,
        eligible_T: torch.Tensor | None,
        settings: ForwardSettings,
    ) -> torch.Tensor:
        """The weights (R,) of ``routes``, through which this router's loss joins the graph.

        Loss: binary cross-entropy between its scores and which expert took which token, summed over
        experts, divided by the tokens of a whole step that the pool expects (share · step_tokens):
        a constant, so that ranks and micro-batches add up. In evaluation it is only recorded. No
        host synchronisation.
        """
        assert routes.weight_R is not None, "expert choice always weighs its rows"
        if not (self.training or settings.recording):
            return routes.weight_R
        logits_TE = self(x_TD)
        member_TE = members(routes, eligible_T, *logits_TE.shape)
        return self.teach(logits_TE, member_TE, eligible_T, settings, routes.weight_R)

    def teach(
        self,
        logits_TE: torch.Tensor,
        member_TE: torch.Tensor,
        eligible_T: torch.Tensor | None,
        settings: ForwardSettings,
        weight_R: torch.Tensor,
    ) -> torch.Tensor:
        """``weight_R``, through which the cross-entropy of ``logits_TE`` joins the graph.

        ``member_TE`` (T, E) bool: what they are to predict.
        """
        bce_TE = F.binary_cross_entropy_with_logits(
            logits_TE, member_TE.to(logits_TE.dtype), reduction="none"
        )
        if eligible_T is not None:
            bce_TE = bce_TE * eligible_T[:, None]
        if settings.recording:
            self.stats.record(bce_TE, logits_TE, member_TE, eligible_T)
        if not (self.training and torch.is_grad_enabled()):
            return weight_R
        tokens = settings.step_tokens or len(logits_TE)
        return carry_loss(weight_R, bce_TE.sum() / (self.share * tokens))


def causal_routers(model: nn.Module) -> list[CausalRouter]:
    """All causal routers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, CausalRouter)]


def taken_routes(taken_TE: torch.Tensor, logits_TE: torch.Tensor) -> Routes:
    """Routes of the tokens taken by each expert, weighed by sigmoid scores; the host waits for
    their number.
    """
    expert_R, row_R = taken_TE.t().nonzero(as_tuple=True)
    offset_G1 = F.pad(taken_TE.sum(0).cumsum(0), (1, 0))
    return Routes(row_R, offset_G1, logits_TE[row_R, expert_R].sigmoid())


def members(
    routes: Routes, eligible_T: torch.Tensor | None, tokens: int, experts: int
) -> torch.Tensor:
    """(T, E) bool: which expert took which token; rows of ineligible tokens are padding."""
    row_R, offset_G1, _ = routes
    real_R = torch.ones_like(row_R, dtype=torch.bool) if eligible_T is None else eligible_T[row_R]
    member_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=row_R.device)
    return member_TE.index_put((row_R, group_of_rows(offset_G1, len(row_R))), real_R)


def carry_loss(carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """``carrier``, through which a scalar loss joins the graph with gradient 1."""
    return _Carry.apply(carrier, loss)


class _Carry(torch.autograd.Function):
    """Returns the first argument; the second, a scalar loss, gets gradient 1."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcarrier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (loss,) = ctx.saved_tensors
        return dcarrier, torch.ones_like(loss)
