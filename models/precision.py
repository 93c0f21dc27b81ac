"""Parameters that stay in fp32 whatever a model computes in, and the refusal of autocast.

A module whose class says ``keeps_fp32``: scans and routers.
"""

import torch
from torch import nn


def fp32_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` whose parameters stay in fp32, in order."""
    return [module for module in model.modules() if getattr(module, "keeps_fp32", False)]


def fp32_parameters(model: nn.Module) -> dict[str, str]:
    """Name of each parameter of theirs → name of its module."""
    return {
        f"{prefix}.{name}": prefix
        for prefix, module in model.named_modules()
        if getattr(module, "keeps_fp32", False)
        for name, _ in module.named_parameters()
    }


def refuse_autocast(device_type: str) -> None:
    """``ValueError`` where ``torch.autocast`` is on: it knows neither the kernels here, which it
    would leave in fp32 or hand two types at once, nor what must stay in fp32.
    """
    if not torch.amp.is_autocast_available(device_type):
        return
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        raise ValueError(
            f"torch.autocast ({device_type}, {dtype}) must be off around a Decoder, whose layers "
            "choose what is computed in fp32; cast the model itself (model.to(dtype), or "
            "load_model(folder, dtype=dtype)), and train with training.mixed_precision_param"
        )
