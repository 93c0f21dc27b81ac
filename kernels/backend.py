"""Resolves which implementation of an op runs, and logs it once.

Every op in ``kernels/`` takes ``backend="auto"``. Its folder has a module per backend:

- ``reference``: the definition, plain differentiable PyTorch in fp32, slow and clear;
- ``torch`` (``torch_impl.py``): a fast path in plain PyTorch that needs no compiler and no GPU;
- ``triton`` (``triton_impl.py``): for CUDA devices of compute capability 8.0 and newer, in fp32,
  bf16 and fp16 (it computes in fp32). With ``TRITON_INTERPRET=1`` set before Triton is imported, it
  can be requested for CPU tensors too: very slow, for tests.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (8, 0)
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_announced: set[tuple[str, str, str]] = set()


def resolve(op: str, requested: str, backends: Sequence[str], like: torch.Tensor) -> str:
    """Backend of ``op`` for tensors of the device and dtype of ``like``.

    ``backends`` of the op come in order of preference. ``"auto"`` takes the first that can run and
    logs its choice once per op and device type. Raises ``ValueError`` for a backend that the op
    does not have or that cannot run on ``like``: an explicit choice is never replaced.
    """
    device = like.device
    if requested == "auto":
        chosen = next(b for b in backends if obstacle(b, like, interpreter=False) is None)
        if (op, chosen, device.type) not in _announced:
            _announced.add((op, chosen, device.type))
            logger.info("%s: backend %s on %s", op, chosen, device.type)
        return chosen
    if requested not in backends:
        raise ValueError(
            f"backend ({requested!r}) is not available for {op}, which has {', '.join(backends)}; "
            "choose one of these, or 'auto'"
        )
    if (problem := obstacle(requested, like)) is not None:
        raise ValueError(
            f"backend ({requested!r}) of {op} cannot run on {device}: {problem}; choose another of "
            f"{', '.join(backends)}, or 'auto'"
        )
    return requested


def obstacle(backend: str, like: torch.Tensor, interpreter: bool = True) -> str | None:
    """Reason why ``backend`` cannot run on ``like``; None if it can.

    ``interpreter``: Triton's interpreter counts as running.
    """
    if backend != "triton":
        return None
    device = like.device
    interpreted = interpreter and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return "Triton kernels need a CUDA device"
    if like.dtype not in TRITON_TYPES:
        return f"Triton kernels take float32, bfloat16 and float16, not {like.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"its compute capability is {capability}, the oldest supported is (8, 0)"
    return None


def implementation(package: str, backend: str) -> ModuleType:
    """Module of a backend in an op's ``package``."""
    return importlib.import_module(f"{package}.{backend}_impl")
