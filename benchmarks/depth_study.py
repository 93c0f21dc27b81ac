"""Mixture-of-Depths at equal FLOPs, small

Configs of the study in docs/mixture_of_depths.md: the embedded ones at half their width, with
running thresholds beside other rules of inference. Those on clips are compared with each other.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

from earlyfuse.configs import embedded
from earlyfuse.configs.decoders import Shape
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.routing.running_threshold import RunningThreshold
from earlyfuse.parallel.trainer import Trainer

SHAPE = replace(embedded.SHAPE, dim=96, heads=2, hidden_dim=192)
FULL: tuple[Callable[[Shape], Trainer.Config], ...] = (
    embedded.dense,
    embedded.mod,
    embedded.moma_4t4i,
    embedded.moma_4t4i_mod,
    embedded.moma_4t4i_threshold,
    embedded.moma_4t4i_mod_threshold,
    embedded.p_mod,
    embedded.gamma_mod,
    embedded.dense_clips,
    embedded.videollm_mod,
)


# steps in place of 300, so that all runs end after 1.5e12 training FLOPs, within 4 %
STEPS = {"mod": 337, "moma_4t4i_mod_threshold": 313, "p_mod": 317}


def _small(full: Callable[[Shape], Trainer.Config]) -> Trainer.Config:
    config = full(SHAPE)
    config.validator.tasks = config.sampler.enable = False
    config.training.steps = STEPS.get(full.__name__, 300)
    config.validator.freq, config.metrics.log_freq = 100, 20
    config.model_spec.model = _measured(config.model_spec.model)
    return config


def _measured(model: Any) -> Any:
    """``model`` with a running threshold in each router that has none."""
    model = deepcopy(model)
    routers = [layer.depth.router for layer in model.layers if layer.depth is not None]
    routers += [pool.router for _, pool, _, _ in model.traverse(ExpertPool.Config)]
    for router in routers:
        if router.threshold is None:
            router.threshold = RunningThreshold.Config(half_life=4096)
    return model


def _named(full: Callable[[Shape], Trainer.Config]) -> tuple[str, Callable[[], Trainer.Config]]:
    def config() -> Trainer.Config:
        return _small(full)

    config.__doc__ = full.__doc__
    return full.__name__, config


CONFIGS = dict(map(_named, FULL))
