"""Causal routing of a whole model: inference, and what validation reports beside batch routing.

The router itself is in ``causal_router.py``; ``ForwardSettings.rule`` picks it.
"""

from torch import nn

from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.expert_choice import NO_CAUSAL_ROUTER, ExpertChoice


def check_causal(model: nn.Module) -> None:
    """``ValueError`` if some router of ``model`` chooses among a batch and has no causal router."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertChoice) and module.causal is None:
            raise ValueError(f"{name} {NO_CAUSAL_ROUTER}")


def causal_routers(model: nn.Module) -> list[CausalRouter]:
    """All causal routers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, CausalRouter)]
