"""Checkpoints: torchtitan's DCP manager, which here looks before it loads.

A checkpoint of another model, or of a run on other data, is refused by name before anything is
overwritten; DCP itself would fail late, or load what happens to fit.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import DATALOADER, MODEL, CheckpointManager


class Checkpoints(CheckpointManager):
    """Writes <run folder>/checkpoint/step-N and loads the latest complete one."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        enable: bool = True
        """Save checkpoints, and resume from the latest in the run folder."""

        keep_latest_k: int = 3
        """Checkpoints to keep, at least 2; 0 keeps all."""

        last_save_model_only: bool = False
        """Save only weights at the last step; the run can then not be continued."""

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, **options: Any) -> None:
        """Load into ``state_dict``; raises ``ValueError`` if model or data differ from the
        checkpoint's.
        """
        if not options.get("from_hf"):
            self._check(state_dict, checkpoint_id)
        super().dcp_load(state_dict, checkpoint_id=checkpoint_id, **options)

    def _check(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        stored = dcp.FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
        model_keys = self.states[MODEL].state_dict().keys()
        wrong = [
            _difference(key, state_dict[key].shape, stored.get(key))
            for key in model_keys
            if key in state_dict
        ]
        wrong = [line for line in wrong if line]
        unexpected = {
            key
            for key in stored
            if key.partition(".")[0] in ("layers", "tok_embeddings", "lm_head", "norm")
            and key not in model_keys
        }
        wrong += [f"{key}: only in the checkpoint" for key in sorted(unexpected)]
        if wrong:
            shown = "; ".join(wrong[:4]) + (
                f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            )
            raise ValueError(
                f"checkpoint {checkpoint_id} is of another model: {shown}. "
                "Use the config it was trained with, or another --dump_folder for a new run"
            )
        loader = self.states[DATALOADER]
        if DATALOADER in state_dict and hasattr(loader, "check_identity"):
            saved = {DATALOADER: {"identity": ""}}
            dcp.load(saved, checkpoint_id=checkpoint_id)
            loader.check_identity(saved[DATALOADER]["identity"])


def _difference(key: str, shape: torch.Size, stored: Any) -> str:
    if not isinstance(stored, TensorStorageMetadata):
        return f"{key}: not in the checkpoint"
    if stored.size != shape:
        return f"{key}: {tuple(shape)} here, {tuple(stored.size)} in the checkpoint"
    return ""
