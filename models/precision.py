"""Which parameters stay in fp32 whatever a model computes in: those of scans and of routers.

A scan's rates are exponents, and errors of theirs add up over a document. A router's logits are
compared: rounded weights choose other experts than those of an exported model. What spreads or
loads a model asks here.
"""

from torch import nn

from earlyfuse.models.blocks.mamba import Scan
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.routing.token_choice import TokenChoice

FP32_MODULES = (Scan, ExpertChoice, TokenChoice)  # a causal router is part of an ExpertChoice


def fp32_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` whose parameters stay in fp32, in order."""
    return [module for module in model.modules() if isinstance(module, FP32_MODULES)]


def fp32_parameters(model: nn.Module) -> dict[str, str]:
    """Name of each parameter of theirs → name of its module."""
    return {
        f"{prefix}.{name}": prefix
        for prefix, module in model.named_modules()
        if isinstance(module, FP32_MODULES)
        for name, _ in module.named_parameters()
    }
