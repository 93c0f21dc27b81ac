"""All configs by name, for ``train.py``."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

from earlyfuse.configs import embedded
from earlyfuse.parallel.trainer import Trainer

ConfigFunction: TypeAlias = Callable[[], Trainer.Config]

DEFAULT = "moma_4t4i"
MODULES: tuple[ModuleType, ...] = (embedded,)


def catalogue() -> dict[str, ConfigFunction]:
    """Name → function: the public functions of ``MODULES`` without parameters."""
    found: dict[str, ConfigFunction] = {}
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(function)
            if (
                function.__module__ == module.__name__
                and not name.startswith("_")
                and not signature.parameters
            ):
                found[name] = function
    return found
