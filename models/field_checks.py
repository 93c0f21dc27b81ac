"""Checks of config fields; each raises ``ValueError`` naming the field, its value and the rule."""

import math
from typing import Any


def check_positive(config: Any, *names: str, of: str = "") -> None:
    """These numbers are positive and finite; ``of``: what they belong to, for the message."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} ({getattr(config, name)}){of} must be positive and finite")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """These numbers are at least ``least`` and finite."""
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(
                f"{name} ({getattr(config, name)}) must be at least {least} and finite"
            )


def check_choices(config: Any, **allowed: tuple[str, ...]) -> None:
    """Each field has one of its allowed values."""
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            choices = " or ".join(f'"{value}"' for value in values)
            raise ValueError(f"{name} ({getattr(config, name)!r}) must be {choices}")
