"""fp32 for sums, exponents and comparisons, whatever type a model computes in."""

import torch


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """fp32, or ``dtype`` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in its ``wide_type``."""
    return tensor.to(wide_type(tensor.dtype))
