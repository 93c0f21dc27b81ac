"""Checks that a checkpoint is of this run's model and data, before anything is overwritten.

DCP alone would fail late, or load whatever fits.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpointer import DATALOADER, MODEL, TRAIN_STATE

from earlyfuse.data.console import printable
from earlyfuse.data.json_files import JsonObject, load_json, shown
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.models.state_dicts.decoder_config import differences
from earlyfuse.parallel.checkpoint.file_layout import step_of
from earlyfuse.parallel.checkpoint.files.dcp import is_parameter
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader

# fields of a model that decide what its parameters compute, and none of their shapes
_FUNCTION = (
    "norm_order", "rope_theta",
    *("diffusion.schedule", "diffusion.predicts", "diffusion.steps", "diffusion.shift"),
    *("vectors.bidirectional", "vectors.rotary", "vectors.later_see"),
)  # fmt: skip


def refuse_other_run(states: dict[str, Any], state_dict: dict[str, Any], reader: DcpReader) -> None:
    """``ValueError`` naming the part of model, data or step that differs from the checkpoint's.

    ``states``: the manager's; ``state_dict``: the states to load. All ranks call it.
    """
    stored = {
        key: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in reader.read_metadata().state_dict_metadata.items()
    }
    refuse_other_model(states[MODEL].state_dict(), state_dict, stored, reader.folder)
    step = step_of(reader.folder.name)
    if TRAIN_STATE in state_dict and step is not None:
        saved = reader.value(f"{TRAIN_STATE}.step")
        if saved != step:
            raise ValueError(
                f"checkpoint {reader.folder} holds step {shown(saved)}, not the step in its name; "
                "restore its name, or copy it again"
            )
    loader = states[DATALOADER]
    if DATALOADER in state_dict and hasattr(loader, "check_identity"):
        refuse_other_data(loader, reader)


def refuse_other_model(
    model: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Any],
    stored: Mapping[str, tuple[int, ...] | None],
    folder: Path,
) -> None:
    """``ValueError`` naming the parameters in which ``model`` differs from those in ``folder``.

    ``wanted``: the tensors to load. ``stored``: shapes by name, None for other values. All ranks
    call it.
    """
    wrong = [_difference(key, wanted[key].shape, stored.get(key)) for key in model if key in wanted]
    # a pipeline stage knows only its own layers
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (list(model), [line for line in wrong if line]))
    known = {key for keys, _ in everywhere for key in keys}
    wrong = list(dict.fromkeys(line for _, lines in everywhere for line in lines))
    unexpected = {key for key in stored if is_parameter(key) and key not in known}
    wrong += [f"{printable(key)}: only in the checkpoint" for key in sorted(unexpected)]
    if wrong:
        first = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(
            f"checkpoint {folder} is of another model: {first}. "
            "Use the config it was trained with, or another --dump_folder for a new run"
        )


def refuse_other_data(loader: LaneLoader, reader: DcpReader) -> None:
    """``ValueError`` naming the property of the data that differs from the checkpoint's."""
    identity = data_identity(reader)
    missing = [name for name in loader.identity() if name not in identity]
    if missing:
        raise ValueError(f"{identity.where} lacks {missing[0]}; {identity.remedy}")
    loader.check_identity(json.dumps(identity.values))


def data_identity(reader: DcpReader) -> JsonObject:
    """Reads the identity of the data that a checkpoint was trained on."""
    name = f"{DATALOADER}.identity"
    where, remedy = f"{reader.folder}: {name}", "copy the checkpoint again, or take another one"
    saved = reader.value(name)
    if not isinstance(saved, str):
        raise ValueError(f"{where} ({shown(saved)}) must be a text; {remedy}")
    return JsonObject.of(load_json(saved, where, remedy), where, remedy)


def refuse_other_function(here: dict[str, Any] | None, there: Any, folder: Path) -> None:
    """``ValueError`` if the model in ``folder`` computes another function of the same parameters.

    ``here``: the run's description, if it has one; ``there``: the model in the folder's config.
    """
    if here is None:
        return
    wrong = [
        line
        for line in differences(here["model"], there)
        if line.partition(" ")[0].endswith(tuple(f".{name}" for name in _FUNCTION))
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {folder} is of another model: here, {printable(wrong[0])}. Use the config "
            "it was trained with, or one that agrees"
        )


def _difference(key: str, shape: torch.Size, stored: tuple[int, ...] | None) -> str:
    if stored is None:
        return f"{key}: not in the checkpoint"
    if stored != tuple(shape):
        return f"{key}: {tuple(shape)} here, {stored} in the checkpoint"
    return ""
