"""Routing that does not look ahead: each token by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from earlyfuse.models.blocks.layout import Layout
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.expert_choice import ExpertChoice


@contextmanager
def routing(model: nn.Module, rule: str) -> Iterator[None]:
    """Routers by ``rule`` "causal": a token goes to the experts whose score is above one half."""
    assert rule == "causal", rule
    routers = [module for module in model.modules() if isinstance(module, ExpertChoice)]
    budgets = [router.budget for router in routers]
    for router in routers:
        router.budget = "exact"
        router.__dict__["_choose"] = partial(_above_one_half, router)
    try:
        yield
    finally:
        for router, budget in zip(routers, budgets, strict=True):
            router.budget = budget
            del router.__dict__["_choose"]


def _above_one_half(
    router: ExpertChoice, logits_TE: torch.Tensor, eligible_T: torch.Tensor | None, layout: Layout
) -> Routes:
    chosen_TE = logits_TE > 0
    if eligible_T is not None:
        chosen_TE = chosen_TE & eligible_T.unsqueeze(1)
    expert_R, row_R = chosen_TE.t().nonzero(as_tuple=True)
    offset_G1 = F.pad(chosen_TE.sum(0).cumsum(0), (1, 0))
    return Routes(row_R, offset_G1, logits_TE[row_R, expert_R].sigmoid())
