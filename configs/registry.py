"""All configs by name, for ``train.py``."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

from earlyfuse.configs import embedded
from earlyfuse.configs.presets import chameleon, mixture_of_mamba, mixture_of_transformers, moma
from earlyfuse.parallel.trainer import Trainer

ConfigFunction: TypeAlias = Callable[[], Trainer.Config]

DEFAULT = "moma_4t4i"
MODULES: tuple[ModuleType, ...] = (
    embedded,
    moma,
    mixture_of_mamba,
    mixture_of_transformers,
    chameleon,
)


def sections() -> dict[str, dict[str, ConfigFunction]]:
    """First line of a module's docstring → its configs by name: its public functions without
    parameters, and those in its ``CONFIGS``.
    """
    found: dict[str, dict[str, ConfigFunction]] = {}
    for module in MODULES:
        title = (module.__doc__ or "").strip().splitlines()[0]
        written = {
            name: function
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if function.__module__ == module.__name__
            and not name.startswith("_")
            and not inspect.signature(function).parameters
        }
        found[title] = written | getattr(module, "CONFIGS", {})
    return found


def catalogue() -> dict[str, ConfigFunction]:
    """Name → function, of all modules."""
    return {name: function for configs in sections().values() for name, function in configs.items()}
