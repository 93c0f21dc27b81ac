"""Activation checkpointing, with torchtitan's policies: none, selective, full, memory budget.

Recomputed blocks must route as they did: which rows an expert takes is saved, never chosen again.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    FullAC,
    SelectiveAC,
)

import earlyfuse.kernels.permute  # noqa: F401  registers the operator below

CHOICES = {torch.ops.earlyfuse.select_top_k.default}


def checkpoint_activations(
    model: nn.Module, config: ActivationCheckpointing.Config, dump_folder: str
) -> None:
    """Wrap the blocks of ``model`` as ``config`` says, in place."""
    if isinstance(config, FullAC.Config):
        KeepChoices(config, dump_folder).apply(model)
    elif isinstance(config, SelectiveAC.Config):
        KeepChoicesToo(config, dump_folder).apply(model)
    else:
        config.build(dump_folder=dump_folder).apply(model)


class KeepChoices(FullAC):
    """Recompute whole blocks, except what their routers chose."""

    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        return checkpoint_wrapper(
            module,
            context_fn=lambda: create_selective_checkpoint_contexts(_policy),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
            early_stop=False,
            debug=self.config.debug,
        )


class KeepChoicesToo(SelectiveAC):
    """torchtitan's selection of what is saved, and what routers chose."""

    def get_save_ops(self) -> set:
        return super().get_save_ops() | CHOICES


def _policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if function in CHOICES else CheckpointPolicy.PREFER_RECOMPUTE
