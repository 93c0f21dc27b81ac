"""Builds presets of the papers: a model (``decoders``) and a recipe, on prepared data of your own.

A preset needs ``--data.folder``. Sources are read in proportion to their tokens, unless
``--data.shares`` gives other shares.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

from earlyfuse.configs.base import RECOMPUTE, base_config
from earlyfuse.configs.optimizers import adamw
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.lr_schedule import LearningRate

SEQ_LEN = 4096
VOCABULARY = 65_536


@dataclass(frozen=True)
class Recipe:
    """Steps, batches and learning rates of a paper.

    ``rows`` of 4096 tokens per step; ``rows_at_once``: per rank and micro-batch. The learning rate
    rises for ``warmup`` steps to ``lr`` and ends at ``least_lr``, by default a hundredth of it.
    Optimizer: AdamW 0.9/0.95, ``eps``, weight decay 0.1 except norms and biases, clipping at 1,
    z-loss 1e-5 (arXiv 2405.09818, 2.3), also where a paper that follows Chameleon does not repeat
    them.
    """

    steps: int
    rows: int
    rows_at_once: int
    decay: Literal["linear", "exponential", "cosine"]
    warmup: int = 4000
    lr: float = 1e-4
    least_lr: float | None = None
    eps: float = 1e-5
    recompute: Literal["none", "selective", "full"] = "none"


def preset(
    name: str,
    title: str,
    model: Callable[[], Decoder.Config],
    recipe: Recipe,
    media_share: float | None = None,
    loss: ChameleonObjective.Config | None = None,
) -> Callable[[], Trainer.Config]:
    """A config function; ``title`` is its line in ``--list``."""

    def config() -> Trainer.Config:
        return _run(name, model(), recipe, media_share, loss)

    config.__name__, config.__doc__ = name, title
    return config


def _run(
    name: str,
    model: Decoder.Config,
    recipe: Recipe,
    media_share: float | None,
    loss: ChameleonObjective.Config | None,
) -> Trainer.Config:
    config = base_config(name, model, recipe.lr)
    config.optimizer = adamw(recipe.lr, eps=recipe.eps)
    config.loss = deepcopy(loss) if loss else ChameleonObjective.Config(z_loss=1e-5)
    least = 0.01 if recipe.least_lr is None else recipe.least_lr / recipe.lr
    config.lr_scheduler = LearningRate.Config(
        warmup_steps=recipe.warmup, decay_type=recipe.decay, min_lr_factor=least
    )
    training = config.training
    training.local_batch_size, training.global_batch_size = recipe.rows_at_once, recipe.rows
    training.seq_len, training.steps = SEQ_LEN, recipe.steps
    policy = RECOMPUTE[recipe.recompute]
    config.activation_checkpoint = policy and policy()
    config.checkpoint.interval = 1000
    config.validator.freq, config.validator.batch_rows = 1000, -1
    config.dataloader.media_share = media_share
    return config
