"""torchtitan's trainer and validator, imported without what runs do not use."""

from earlyfuse.parallel import compat

with compat.light_imports():
    from torchtitan.components.validate import Validator
    from torchtitan.trainer import Trainer

__all__ = ["Trainer", "Validator"]
