"""Selects trainable parameters: the whole model, or in the second stage its causal routers."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.causal_router import causal_routers

CAUSAL = ".causal."


def causal_routers_alone(spread: Callable[..., Decoder]) -> Callable[..., Decoder]:
    """A ``parallelize_fn`` that does what ``spread`` does and freezes all else.

    After the parameters are spread: each keeps its place, and the optimizer, which is built next,
    takes up only those that learn.
    """

    def spread_and_freeze(model: Decoder, **settings: Any) -> Decoder:
        model = spread(model, **settings)
        learning = {p for router in causal_routers(model) for p in router.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in learning)
        return model

    return spread_and_freeze


def check_optimizer(config: OptimizersContainer.Config, model: Decoder.Config) -> None:
    """``ValueError`` unless there are causal routers, and each parameter group has some of them."""
    with torch.device("meta"):
        names = [name for name, _ in model.build().named_parameters() if CAUSAL in name]
    if not names:
        raise ValueError(
            "train_only (causal_routers) needs a model that has causal routers; set causal of its "
            "expert-choice routers, as configs.decoders.with_routers does"
        )
    for group in config.param_groups:
        if not any(re.search(group.pattern, name) for name in names):
            raise ValueError(
                f"optimizer.param_groups has the pattern {group.pattern!r}, which no causal router "
                "matches, and train_only (causal_routers) leaves nothing else to optimise; remove "
                "that group, as configs.stages.causal_routers_only does"
            )


def apart(parameters: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """The main model's parameters and the causal routers', whose gradients are clipped apart: the
    one must not move because the other is there.
    """
    main = [p for name, p in parameters.items() if CAUSAL not in f".{name}"]
    return [main, [p for name, p in parameters.items() if CAUSAL in f".{name}"]]
