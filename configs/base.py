"""The base run of all configs, also of your own."""

from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CompileConfig
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.protocols.model_spec import ModelSpec

from earlyfuse.configs.optimizers import adamw
from earlyfuse.models.decoder import Decoder
from earlyfuse.parallel.plan import parallelize
from earlyfuse.parallel.strategies.pipeline import pipeline
from earlyfuse.parallel.trainer import Trainer

RECOMPUTE = {
    "none": None,
    "selective": SelectiveAC.Config,
    "full": FullAC.Config,
    "memory-budget": MemoryBudgetAC.Config,
}
"""Activation checkpointing by its name on the command line."""


def base_config(name: str, model: Decoder.Config, lr: float) -> Trainer.Config:
    """A run of ``model`` in runs/``name``: AdamW at ``lr``, FSDP over all ranks, no compilation."""
    return Trainer.Config(
        model_spec=ModelSpec(
            name="earlyfuse",
            flavor=name,
            model=model,
            parallelize_fn=parallelize,
            pipelining_fn=pipeline,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        ),
        dump_folder=f"runs/{name}",
        optimizer=adamw(lr),
        training=TrainingConfig(disable_cuda_graphs=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        activation_checkpoint=None,
        compile=CompileConfig(enable=False),
    )
