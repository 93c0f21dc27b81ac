"""Configs that continue a finished run: causal-router training (stage 2) and upcycling.

Each function returns a copy of a config that starts from another run, as ``--start.run`` does on
the command line: its model may be a child of that run's (``models/upcycle.py``).
"""

from copy import deepcopy
from dataclasses import replace

from earlyfuse.configs import decoders
from earlyfuse.configs.optimizers import adamw
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.gumbel_noise import RouterNoise
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.lr_schedule import LearningRate
from earlyfuse.parallel.training.warm_start import WarmStart


def causal_routers_only(
    config: Trainer.Config,
    run: str,
    *,
    lr: float = 1e-4,
    end_lr: float = 1e-6,
    warmup_steps: int = 2000,
    steps: int = 10_000,
    at_least_one: bool = False,
) -> Trainer.Config:
    """The second stage of MoMa (arXiv 2407.21770, 2.4 and table 6) on the finished ``run``.

    Defaults are those of the paper's 1.4B models; 435M: 1000 warm-up steps, 5000 in all. The
    paper's batch is 4,194,304 tokens; AdamW and weight decay, not in the paper, are those of the
    first stage. The data continue where ``run`` stopped, which requires its global batch.
    """
    config = deepcopy(config)
    causal = CausalRouter.Config(at_least_one=at_least_one)
    _set_model(config, decoders.with_routers(_model(config), causal=causal))
    config.start = WarmStart.Config(run=run)
    config.train_only = "causal_routers"
    config.optimizer = adamw(lr, r"\.causal\.", not_decayed=None)
    config.lr_scheduler = LearningRate.Config(
        warmup_steps=warmup_steps, decay_type="linear", min_lr_factor=end_lr / lr
    )
    config.training.steps = steps
    return config


def upcycled(
    config: Trainer.Config, run: str, noise_steps: int | None = None, temperature: float = 1.0
) -> Trainer.Config:
    """``config`` started from its parent ``run``, at that run's position in the data, with a new
    schedule and optimizer (arXiv 2407.21770, 2.5).

    ``noise_steps``: steps of router noise, falling from ``temperature``; None: no noise.
    """
    config = deepcopy(config)
    noise = None
    if noise_steps is not None:
        noise = RouterNoise.Config(end_step=noise_steps, temperature=temperature)
    _set_model(config, decoders.with_routers(_model(config), noise=noise))
    config.start = WarmStart.Config(run=run)
    return config


def _model(config: Trainer.Config) -> Decoder.Config:
    assert config.model_spec is not None and isinstance(config.model_spec.model, Decoder.Config)
    return config.model_spec.model


def _set_model(config: Trainer.Config, model: Decoder.Config) -> None:
    assert config.model_spec is not None
    config.model_spec = replace(config.model_spec, model=model)
