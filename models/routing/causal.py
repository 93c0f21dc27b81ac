"""Causal routing of a whole model: inference, and what validation reports beside batch routing.

The router itself is in ``causal_router.py``; ``ForwardSettings.rule`` picks it.
"""

from torch import nn

from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.router import NO_CAUSAL_ROUTER, Router


def check_causal(model: nn.Module) -> None:
    """``ValueError`` if some router of ``model`` cannot decide by the causal rule."""
    for name, module in model.named_modules():
        if isinstance(module, Router) and not module.config.decides_causally:
            raise ValueError(f"{name} {NO_CAUSAL_ROUTER}")


def causal_routers(model: nn.Module) -> list[CausalRouter]:
    """All causal routers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, CausalRouter)]
