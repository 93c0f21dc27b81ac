"""What checks of arguments share: types, and ids where looking at them costs next to nothing."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def readable(tensor: torch.Tensor) -> bool:
    """Whether the values of ``tensor`` are there: no device to wait for, and nothing is traced."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
    )


def check_ids(name: str, ids: torch.Tensor, count: int, counted: str) -> None:
    """Raises ``ValueError`` unless all lie in 0 … count - 1; ``counted`` says what is counted."""
    if not ids.numel() or not readable(ids):
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} ({low} … {high}) must lie in 0 … {count - 1}, {counted}")
