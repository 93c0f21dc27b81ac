"""Configs that continue a finished run: causal routers (stage 2), thresholds, upcycling.

Each function returns a copy of a config that starts from another run, as ``--start.model`` does on
the command line: its model may be a child of that run's (``models/upcycle.py``).
"""

from copy import deepcopy
from dataclasses import replace

from earlyfuse.configs import decoders, depth
from earlyfuse.configs.optimizers import adamw
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.gumbel_noise import RouterNoise
from earlyfuse.models.routing.running_threshold import RunningThreshold
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
    _set_model(config, _with_causal_routers(_model(config), causal))
    config.start = WarmStart.Config(model=run)
    config.train_only = "causal_routers"
    config.optimizer = adamw(lr, r"\.causal\.", not_decayed=None)
    config.lr_scheduler = LearningRate.Config(
        warmup_steps=warmup_steps, decay_type="linear", min_lr_factor=end_lr / lr
    )
    config.training.steps = steps
    return config


def thresholds_only(config: Trainer.Config, run: str, *, steps: int = 100) -> Trainer.Config:
    """Measures running thresholds on the finished ``run``, whose model stays as it is: its learning
    rate is 0, and thresholds need no other training.

    The thresholds are those of the routers of ``config``, or of default ones for inference.
    """
    config = deepcopy(config)
    model = _model(config)
    pools = [pool.router for _, pool, _, _ in model.traverse(ExpertPool.Config)]
    depths = [layer.depth.router for layer in model.layers if layer.depth is not None]
    threshold = RunningThreshold.Config()
    if any(getattr(router, "threshold", None) is None for router in pools) or not depths:
        model = decoders.with_routers(model, threshold=threshold)
    if any(router.threshold is None for router in depths):
        model = depth.with_depth_routers(model, threshold=threshold)
    _set_model(config, model)
    config.start = WarmStart.Config(model=run)
    config.optimizer = adamw(0.0)
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
    config.start = WarmStart.Config(model=run)
    return config


def depth_adapted(config: Trainer.Config, run: str) -> Trainer.Config:
    """``config``, depth-routed, started from its parent ``run``, the same model without depth
    routing: at that run's position in the data, with new routers whose weights begin near 1
    (``depth.near_parent``), a new schedule and optimizer.
    """
    config = deepcopy(config)
    _set_model(config, depth.near_parent(_model(config)))
    config.start = WarmStart.Config(model=run)
    return config


def _with_causal_routers(model: Decoder.Config, causal: CausalRouter.Config) -> Decoder.Config:
    """``model`` with causal routers in all pools, and predictors in depth routers that have no rule
    of inference of their own.
    """
    pools = list(model.traverse(ExpertPool.Config))
    routed = [layer for layer in model.layers if layer.depth is not None]
    if pools or not routed:
        model = decoders.with_routers(model, causal=causal)
    if any(layer.depth.router.inference is None for layer in routed if layer.depth is not None):
        predictor = CausalRouter.Config()
        model = depth.with_depth_routers(model, inference="predictor", predictor=predictor)
    return model


def _model(config: Trainer.Config) -> Decoder.Config:
    assert config.model_spec is not None and isinstance(config.model_spec.model, Decoder.Config)
    return config.model_spec.model


def _set_model(config: Trainer.Config, model: Decoder.Config) -> None:
    assert config.model_spec is not None
    config.model_spec = replace(config.model_spec, model=model)
