"""Selects trainable parameters: the whole model, or in the second stage its causal routers."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.causal_router import causal_routers

CAUSAL = ".causal."


def causal_routers_alone(parallelize: Callable[..., Decoder]) -> Callable[..., Decoder]:
    """``parallelize``, followed by freezing everything but the causal routers.

    In this order, as sharding replaces parameters; the optimizer, built next, takes the trainable.
    """

    def parallelize_and_freeze(model: Decoder, **settings: Any) -> Decoder:
        model = parallelize(model, **settings)
        trainable = {p for router in causal_routers(model) for p in router.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
        return model

    return parallelize_and_freeze


def check_optimizer(config: OptimizersContainer.Config, model: Decoder.Config) -> None:
    """``ValueError`` unless the model has causal routers and each parameter group matches some."""
    with torch.device("meta"):
        names = [name for name, _ in model.build().named_parameters() if CAUSAL in name]
    if not names:
        raise ValueError(
            "train_only (causal_routers) needs a model that has causal routers; set causal of "
            "its expert-choice routers, as configs.decoders.with_routers does"
        )
    for group in config.param_groups:
        if not any(re.search(group.pattern, name) for name in names):
            raise ValueError(
                f"optimizer.param_groups has the pattern {group.pattern!r}, which no causal router "
                "matches, and train_only (causal_routers) trains nothing else; remove that group, "
                "as configs.stages.causal_routers_only does"
            )


def split_router_parameters(parameters: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """Parameters of the main model, and of its causal routers.

    Their gradients are clipped separately, so that training the one does not depend on the other.
    """
    groups: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for name, parameter in parameters.items():
        groups[CAUSAL in f".{name}"].append(parameter)
    return list(groups)
