"""Whether a checkpoint is of this model and this data, asked before anything is overwritten.

DCP itself would fail late, or load what happens to fit.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import DATALOADER, MODEL

from earlyfuse.data.json_files import read_json
from earlyfuse.models.state_dicts.decoder_config import differences
from earlyfuse.models.state_dicts.exported import CONFIG, REMEDY


def refuse_other_run(
    states: dict[str, Any], state_dict: dict[str, Any], checkpoint_id: str
) -> None:
    """``ValueError`` naming what of model or data differs from the checkpoint's.

    ``states``: the manager's; ``state_dict``: what is to be loaded. Called on all ranks.
    """
    stored = dcp.FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    model_keys = states[MODEL].state_dict().keys()
    wrong = [
        _difference(key, state_dict[key].shape, stored.get(key))
        for key in model_keys
        if key in state_dict
    ]
    # the stages of a pipeline know only what they hold
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (list(model_keys), [line for line in wrong if line]))
    known = {key for keys, _ in everywhere for key in keys}
    wrong = list(dict.fromkeys(line for _, lines in everywhere for line in lines))
    unexpected = {key for key in stored if is_parameter(key) and key not in known}
    wrong += [f"{key}: only in the checkpoint" for key in sorted(unexpected)]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(
            f"checkpoint {checkpoint_id} is of another model: {shown}. "
            "Use the config it was trained with, or another --dump_folder for a new run"
        )
    loader = states[DATALOADER]
    if DATALOADER in state_dict and hasattr(loader, "check_identity"):
        saved = {DATALOADER: {"identity": ""}}
        dcp.load(saved, checkpoint_id=checkpoint_id)
        loader.check_identity(saved[DATALOADER]["identity"])


def is_parameter(key: str) -> bool:
    """Whether a key of a checkpoint is a parameter of the model."""
    return key.partition(".")[0] in ("layers", "tok_embeddings", "lm_head", "norm")


def refuse_other_function(here: dict[str, Any] | None, folder: Path) -> None:
    """``ValueError`` if the checkpoint's model computes another function of the same parameters.

    ``here``: the run's own description, as in the checkpoint's ``config.json``; None, or a folder
    without one, is not compared.
    """
    if here is None or not (folder / CONFIG).is_file():
        return
    wrong = [
        line
        for line in differences(
            here["model"], read_json(folder / CONFIG, REMEDY).values.get("model")
        )
        if line.partition(" ")[0].endswith((".norm_order", ".rope_theta"))
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {folder} is of another model: here, {wrong[0]}. Use the config it was "
            "trained with, or one that agrees"
        )


def _difference(key: str, shape: torch.Size, stored: Any) -> str:
    if not isinstance(stored, TensorStorageMetadata):
        return f"{key}: not in the checkpoint"
    if stored.size != shape:
        return f"{key}: {tuple(shape)} here, {tuple(stored.size)} in the checkpoint"
    return ""
