"""What the papers' runs have in common here: prepared data of one's own, bf16, FSDP2, checkpoints.

A preset is a model (``decoders``) and a recipe. It needs ``--data.folder``; which sources are read,
and how much of each, follows from what the folder holds unless ``--data.shares`` says it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CompileConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.configs.embedded import adamw, model_spec
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.parallel.checkpoint.manager import Checkpoints
from earlyfuse.parallel.evaluation.validation import Validation
from earlyfuse.parallel.reporting.metrics import RunMetrics
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.lr_schedule import LearningRate

SEQ_LEN = 4096
VOCABULARY = 65_536

RECOMPUTE = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}


@dataclass(frozen=True)
class Recipe:
    """How long, in which batches and at which learning rates a paper trained.

    ``rows`` of 4096 tokens in a step; ``rows_at_once``: on one rank, in a micro-batch. The learning
    rate rises for ``warmup`` steps to ``lr`` and ends at a hundredth of it. Optimizer: AdamW
    0.9/0.95, eps 1e-5, weight decay 0.1 except norms and biases, clipping at 1, z-loss 1e-5
    (arXiv 2405.09818, 2.3), also where a paper on Chameleon's recipe does not repeat them.
    """

    steps: int
    rows: int
    rows_at_once: int
    decay: Literal["linear", "exponential"]
    warmup: int = 4000
    lr: float = 1e-4
    recompute: Literal["none", "selective", "full"] = "none"


def preset(
    name: str,
    title: str,
    model: Callable[[], Decoder.Config],
    recipe: Recipe,
    media_share: float | None = None,
) -> Callable[[], Trainer.Config]:
    """A config function for the catalogue; ``title`` is its line there."""

    def config() -> Trainer.Config:
        return _run(name, model(), recipe, media_share)

    config.__name__, config.__doc__ = name, title
    return config


def _run(
    name: str, model: Decoder.Config, recipe: Recipe, media_share: float | None
) -> Trainer.Config:
    config = Trainer.Config(
        model_spec=model_spec(name, model),
        dump_folder=f"runs/{name}",
        loss=ChameleonObjective.Config(z_loss=1e-5),
        optimizer=adamw(recipe.lr),
        lr_scheduler=LearningRate.Config(
            warmup_steps=recipe.warmup, decay_type=recipe.decay, min_lr_factor=0.01
        ),
        training=TrainingConfig(
            local_batch_size=recipe.rows_at_once,
            global_batch_size=recipe.rows,
            seq_len=SEQ_LEN,
            steps=recipe.steps,
            max_norm=1.0,
            mixed_precision_param="bfloat16",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        activation_checkpoint=RECOMPUTE[recipe.recompute],
        compile=CompileConfig(enable=False),
        checkpoint=Checkpoints.Config(interval=1000),
        metrics=RunMetrics.Config(log_freq=10),
        validator=Validation.Config(freq=1000, batch_rows=-1),
    )
    config.dataloader.media_share = media_share
    return config
