"""Transfusion at equal FLOPs, small

Configs of the study in docs/transfusion.md: the embedded ones at half their width. The transformers
are compared with one another, and Mixture-of-Mamba with dense Mamba.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from earlyfuse.configs import embedded
from earlyfuse.parallel.trainer import Trainer

SHAPE = replace(embedded.VECTOR_SHAPE, dim=96, heads=2, hidden_dim=192)
MAMBA_SHAPE = replace(embedded.VECTOR_MAMBA_SHAPE, dim=96)
FULL: dict[Callable[[Any], Trainer.Config], Any] = {
    embedded.transfusion: SHAPE,
    embedded.transfusion_mot: SHAPE,
    embedded.transfusion_moma: SHAPE,
    embedded.transfusion_mamba: MAMBA_SHAPE,
    embedded.transfusion_mom: MAMBA_SHAPE,
}
STEPS = 450


def _named(
    full: Callable[[Any], Trainer.Config], shape: Any
) -> tuple[str, Callable[[], Trainer.Config]]:
    def config() -> Trainer.Config:
        small = full(shape)
        small.validator.tasks = small.sampler.enable = False
        small.sampler.checked_images = 0
        small.training.steps, small.checkpoint.interval = STEPS, STEPS
        small.validator.freq, small.metrics.log_freq = 75, 25
        return small

    config.__doc__ = full.__doc__
    return full.__name__, config


CONFIGS = dict(_named(full, shape) for full, shape in FULL.items())
