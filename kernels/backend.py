"""Which implementation of an op runs: resolved here, once, and said.

Every op in ``kernels/`` takes ``backend="auto"`` and has a table of its implementations, best
first. ``reference`` is the definition (plain differentiable PyTorch, slow and clear); ``torch`` is
a fast path in plain PyTorch that needs no compiler and no GPU.
"""

import logging
from collections.abc import Mapping
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

Implementation = TypeVar("Implementation")

_announced: set[tuple[str, str, str]] = set()


def resolve(
    op: str,
    requested: str,
    implementations: Mapping[str, Implementation],
    device: torch.device,
) -> Implementation:
    """The implementation of ``op`` to run on ``device``.

    ``implementations`` maps backend names to implementations, in order of preference. ``requested``
    is one of those names or ``"auto"``, which takes the first and logs its choice once per op and
    device type. Raises ``ValueError`` for a backend this op does not have: an explicit choice is
    never replaced.
    """
    if requested == "auto":
        chosen = next(iter(implementations))
        if (op, chosen, device.type) not in _announced:
            _announced.add((op, chosen, device.type))
            logger.info("%s: backend %s on %s", op, chosen, device.type)
        return implementations[chosen]
    if requested not in implementations:
        raise ValueError(
            f"backend ({requested!r}) is not available for {op}, which has "
            f"{', '.join(implementations)}; choose one of these, or 'auto'"
        )
    return implementations[requested]
