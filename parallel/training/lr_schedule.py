"""Learning-rate schedules: torchtitan's, and exponential decay (Chameleon)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torchtitan.components.optimizer import LRSchedulersContainer


class LearningRate(LRSchedulersContainer):
    """Linear warm-up, optionally a constant phase, and decay."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        # the field is torchtitan's, with one more choice
        decay_type: Literal["linear", "sqrt", "cosine", "exponential"] = "linear"
        """Decay of the learning rate; "exponential": by a constant factor per step, down to
        min_lr_factor, which must then be positive."""

        def __post_init__(self) -> None:
            if self.decay_type == "exponential" and not 0 < self.min_lr_factor <= 1:
                raise ValueError(
                    f"lr_scheduler.min_lr_factor ({self.min_lr_factor}) must be in (0, 1] with "
                    "exponential decay; 0.01 is usual"
                )

        def build(self, *, optimizers: Any, training_steps: int) -> LRSchedulersContainer:
            """torchtitan's container, for ``optimizers`` and a run of ``training_steps``."""
            if self.decay_type != "exponential":
                return LRSchedulersContainer.Config.build(
                    self, optimizers=optimizers, training_steps=training_steps
                )
            steps = self.total_steps or training_steps
            warmup = min(self.warmup_steps, steps)
            decay = steps - warmup
            if self.decay_ratio is not None:
                decay = min(round(steps * self.decay_ratio), decay)
            factor = partial(
                exponential_factor,
                warmup=warmup,
                stable=steps - warmup - decay,
                decay=decay,
                floor=self.min_lr_factor,
            )
            return LearningRate(optimizers, factor)


def exponential_factor(step: int, warmup: int, stable: int, decay: int, floor: float) -> float:
    """Factor of the peak rate in ``step`` (from 0): linear over ``warmup`` steps, 1 for ``stable``
    steps, then ``floor`` to the power of the fraction of ``decay`` steps done.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = max(step - warmup - stable, 0)
    return floor ** min(done / max(decay, 1), 1.0)
