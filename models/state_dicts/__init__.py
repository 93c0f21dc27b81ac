"""Loads a run's last checkpoint on one device."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.models.modality import Vocabulary
from earlyfuse.models.routing.expert_choice import ExpertChoice


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu"
) -> tuple[Decoder, Vocabulary]:
    """The model of a run folder, in evaluation mode, and its vocabulary."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} must hold a model: a run (run.json)")
    config = json.loads((folder / "run.json").read_text())["config"]
    model = _decoder(config["model_spec"]["model"]).build()
    model.init_states()
    root = folder / "checkpoint"
    if not (root / "latest").is_file():
        raise ValueError(f"the run {folder} has no complete checkpoint in {root} yet")
    states = model.state_dict()
    dcp.load(states, checkpoint_id=str(root / (root / "latest").read_text().strip()))
    vocabulary = Path(config["data"]["folder"]) / "tokenizers" / "vocabulary.json"
    return model.to(device).eval(), Vocabulary.from_dict(json.loads(vocabulary.read_text()))


def _decoder(fields: dict[str, Any]) -> Decoder.Config:
    layers = [
        Block.Config(
            **_plain(layer, "norm_order", "norm_groups", "dropout"),
            attention=Attention.Config(**_plain(layer["attention"])),
            feed_forward=_feed_forward(layer["feed_forward"]),
        )
        for layer in fields["layers"]
    ]
    sizes = _plain(fields, "dim", "vocab_size", "rope_theta", "init_std", "seed")
    return Decoder.Config(layers=layers, modalities=tuple(fields["modalities"]), **sizes)


def _feed_forward(fields: dict[str, Any]) -> FeedForward.Config | MixtureOfExperts.Config:
    if "pools" not in fields:
        return FeedForward.Config(**_plain(fields))
    pools = [
        ExpertPool.Config(
            **_plain(pool, "name", "dim", "hidden_dim", "experts", "share"),
            groups=tuple(pool["groups"]),
            router=ExpertChoice.Config(**_plain(pool["router"])),
        )
        for pool in fields["pools"]
    ]
    return MixtureOfExperts.Config(pools=pools)


def _plain(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {
        name: value
        for name, value in fields.items()
        if (name in names if names else name not in ("param_init", "sharding_config"))
    }
