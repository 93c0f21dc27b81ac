"""Activation checkpointing with torchtitan's policies: none, selective, full, memory budget.

Recomputed blocks keep their routing: the rows that experts selected are saved, not selected again.
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

import earlyfuse.kernels.permute
import earlyfuse.models.routing.running_threshold  # noqa: F401  both register operators

SELECTIONS = {
    torch.ops.earlyfuse.select_top_k.default,
    torch.ops.earlyfuse.count_above.default,
}


def checkpoint_activations(
    model: nn.Module, config: ActivationCheckpointing.Config, dump_folder: str
) -> None:
    """Wrap the blocks of ``model`` by the policy of ``config``, in place."""
    if isinstance(config, FullAC.Config):
        FullKeepRouting(config, dump_folder).apply(model)
    elif isinstance(config, SelectiveAC.Config):
        SelectiveKeepRouting(config, dump_folder).apply(model)
    else:
        config.build(dump_folder=dump_folder).apply(model)


class FullKeepRouting(FullAC):
    """Recomputes whole blocks, except the selections of routers."""

    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        return checkpoint_wrapper(
            module,
            context_fn=lambda: create_selective_checkpoint_contexts(_policy),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
            early_stop=False,
            debug=self.config.debug,
        )


class SelectiveKeepRouting(SelectiveAC):
    """Saves the operators of torchtitan's list, and the selections of routers."""

    def get_save_ops(self) -> set:
        return super().get_save_ops() | SELECTIONS


def _policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if function in SELECTIONS else CheckpointPolicy.PREFER_RECOMPUTE
    )
