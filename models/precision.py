"""Selects what computes in fp32 whatever the model's dtype, and refuses autocast.

Sums, exponents and comparisons are computed ``wide``. Modules whose class sets ``keeps_fp32``
(scans, routers) keep their parameters in fp32 too.
"""

from collections.abc import Iterator

import torch
from torch import nn


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """fp32, or ``dtype`` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in its ``wide_type``."""
    return tensor.to(wide_type(tensor.dtype))


def fp32_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of ``model`` whose parameters stay in fp32, in order."""
    return [module for _, module in _outermost(model)]


def fp32_parameters(model: nn.Module) -> dict[str, str]:
    """Name of each parameter of ``fp32_modules`` → name of its module."""
    return {
        f"{prefix}.{name}": prefix
        for prefix, module in _outermost(model)
        for name, _ in module.named_parameters()
    }


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: set[nn.Module] = set()
    for prefix, module in model.named_modules():
        if getattr(module, "keeps_fp32", False) and module not in inside:
            inside |= set(module.modules())
            yield prefix, module


def refuse_autocast(device_type: str) -> None:
    """``ValueError`` under ``torch.autocast``, which knows neither the kernels here nor what must
    stay in fp32.
    """
    if not torch.amp.is_autocast_available(device_type):
        return
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        raise ValueError(
            f"torch.autocast ({device_type}, {dtype}) must be off around a Decoder, whose layers "
            "choose what is computed in fp32; cast the model (model.to(dtype), or "
            "load_model(folder, dtype=dtype)), or train with training.mixed_precision_param"
        )
