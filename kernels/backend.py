"""Which implementation of an op runs: resolved here, once, and said.

Every op in ``kernels/`` takes ``backend="auto"``. Its folder has a module per backend:

- ``reference``: the definition, plain differentiable PyTorch in fp32, slow and clear;
- ``torch`` (``torch_impl.py``): a fast path in plain PyTorch that needs no compiler and no GPU;
- ``triton`` (``triton_impl.py``): for CUDA devices of compute capability 8.0 and newer. With
  ``TRITON_INTERPRET=1`` set before Triton is imported, it can be asked for on CPU tensors too: very
  slow, for tests.
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

_announced: set[tuple[str, str, str]] = set()


def resolve(
    op: str,
    requested: str,
    backends: Sequence[str],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend of ``op`` to run on ``device``, for data of ``dtype`` if that matters.

    ``backends``: those that the op has, in order of preference. ``"auto"`` takes the first that can
    run and logs its choice once per op and device type. Raises ``ValueError`` for a backend that
    the op does not have or that cannot run on ``device``: an explicit choice is never replaced.
    """
    if requested == "auto":
        chosen = next(b for b in backends if obstacle(b, device, dtype, interpreter=False) is None)
        if (op, chosen, device.type) not in _announced:
            _announced.add((op, chosen, device.type))
            logger.info("%s: backend %s on %s", op, chosen, device.type)
        return chosen
    if requested not in backends:
        raise ValueError(
            f"backend ({requested!r}) is not available for {op}, which has {', '.join(backends)}; "
            "choose one of these, or 'auto'"
        )
    if (problem := obstacle(requested, device, dtype)) is not None:
        raise ValueError(
            f"backend ({requested!r}) of {op} cannot run on {device}: {problem}; choose another of "
            f"{', '.join(backends)}, or 'auto'"
        )
    return requested


def obstacle(
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    interpreter: bool = True,
) -> str | None:
    """Why ``backend`` cannot run on ``device`` (for ``dtype``); None if it can.

    ``interpreter``: whether Triton's interpreter counts as running.
    """
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "its kernels add up in float32, and float64 is given"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"its compute capability is {capability}, the oldest supported is (8, 0)"
        return None
    if interpreter and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Triton kernels need a CUDA device"


def implementation(package: str, backend: str) -> ModuleType:
    """The module behind a backend's name in an op's ``package``."""
    return importlib.import_module(f"{package}.{backend}_impl")
