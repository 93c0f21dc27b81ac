"""Fits the model of a run to the one that it starts from (``--start.model``).

Sizes are those of the started model: widths, layers, heads, norms, rotary base. The form is that of
``--start.upcycle``, else that of the config: which parameters are untied by modality, experts,
routers, depth routing, dropout. Ids and modalities are those of the data.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from earlyfuse.configs import mamba_decoders
from earlyfuse.configs.forms import in_form
from earlyfuse.data.tokenizers import VOCABULARY_FILE
from earlyfuse.data.vocabulary import load_vocabulary
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.experts import MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.upcycle import unties, upcycle
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.checkpoint.file_layout import is_run
from earlyfuse.parallel.checkpoint.open_checkpoint import open_model
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.data_config import data_folder

AS_IT_IS = "none"


def with_start_model(config: Trainer.Config) -> tuple[Trainer.Config, str]:
    """A copy of ``config`` whose model is a child of the one in ``start.model``, and a line about
    it; ``config`` itself and "" without one. ``ValueError`` if there is no such child.
    """
    start, folder = config.start, Path(config.dump_folder)
    if not start.model:
        if start.upcycle:
            raise ValueError(
                f"start.upcycle ({start.upcycle}) needs start.model; pass --start.model FOLDER, "
                "the model to begin with"
            )
        return config, ""
    assert config.model_spec is not None and isinstance(config.model_spec.model, Decoder.Config)
    if not Path(start.model).expanduser().exists() and is_run(folder):
        # the run resumes from its own checkpoint, and needs the model no more
        child = open_model(folder, "trained").config
        line = f"model: that of {folder}, as start.model ({start.model}) is gone"
    else:
        opened = start.build().open()
        child = _child(opened.config, config)
        line = f"model: {_sizes(opened.config)}, of {opened.folder} ({opened.format})"
        line += f", as {start.upcycle}" if start.upcycle not in ("", AS_IT_IS) else ""
        if child.vocab_size != opened.config.vocab_size:
            line += f"; {child.vocab_size:,} ids, those of the data"
    config = deepcopy(config)
    config.model_spec = replace(config.model_spec, model=child)
    return config, line


def _child(parent: Decoder.Config, config: Trainer.Config) -> Decoder.Config:
    form, own = config.start.upcycle, deepcopy(config.model_spec.model)
    data = data_folder(config.data)
    stored = None if data is None else data / "tokenizers" / VOCABULARY_FILE
    if stored is not None and stored.is_file():
        vocabulary = load_vocabulary(stored)
        own.vocab_size, modalities = vocabulary.size, tuple(map(int, vocabulary.modalities))
    else:
        modalities = own.modalities
    parent = replace(deepcopy(parent), vocab_size=own.vocab_size)
    if not unties(parent.to_dict()["layers"]):
        parent.modalities = modalities if form else own.modalities
    if not form:
        return own if _is_child(parent, own) else _fitted(parent, own)
    child = parent if form == AS_IT_IS else in_form(parent, form)
    for layer in child.layers:
        layer.dropout = own.layers[0].dropout
    return child


def _is_child(parent: Decoder.Config, child: Decoder.Config) -> bool:
    try:
        return bool(upcycle(parent, child))
    except ValueError:
        return False


def _fitted(parent: Decoder.Config, own: Decoder.Config) -> Decoder.Config:
    """The form of ``own`` in the sizes of ``parent``; ``ValueError`` if it is no child of it."""
    same_depth = len(own.layers) == len(parent.layers)
    if not same_depth and any(layer != own.layers[0] for layer in own.layers):
        raise ValueError(
            f"start.model has {len(parent.layers)} layers, the config {len(own.layers)} that are "
            "not all alike: which become which cannot be told; choose a config of alike layers, "
            "give --start.upcycle FORM, or write one of your own (docs/presets.md)"
        )
    child = deepcopy(parent)
    child.vectors = deepcopy(own.vectors)
    child.modalities = own.modalities if unties(own.to_dict()["layers"]) else parent.modalities
    for index, layer in enumerate(child.layers):
        like = own.layers[index if same_depth else 0]
        if list(layer.branches) != list(like.branches):
            raise ValueError(
                f"start.model is made of {' and '.join(layer.branches)}, the config of "
                f"{' and '.join(like.branches)}; choose a config of its family (moma_4t4i, mot, "
                "mixture_of_mamba …), or give --start.upcycle FORM"
            )
        _shape_like(layer, like)
    child = replace(child)  # checks its fields together
    upcycle(parent, child)
    return child


def _shape_like(layer: Block.Config, like: Block.Config) -> None:
    """Give ``layer`` the untied parameters, experts, depth routing and dropout of ``like``."""
    layer.norm_groups, layer.dropout = like.norm_groups, like.dropout
    layer.depth = deepcopy(like.depth)
    if layer.attention is not None and like.attention is not None:
        layer.attention.groups = like.attention.groups
    if layer.mamba is not None and like.mamba is not None:
        for name in mamba_decoders.PROJECTIONS:
            setattr(layer.mamba, f"{name}_groups", getattr(like.mamba, f"{name}_groups"))
    ours, theirs = layer.feed_forward, like.feed_forward
    if isinstance(ours, FeedForward.Config) and isinstance(theirs, FeedForward.Config):
        ours.groups = theirs.groups
    elif isinstance(ours, FeedForward.Config) and isinstance(theirs, MixtureOfExperts.Config):
        mixture = deepcopy(theirs)
        for pool in mixture.pools:
            pool.dim, pool.hidden_dim = ours.dim, ours.hidden_dim
            if isinstance(pool.router, ExpertChoice.Config):  # the smallest jump (docs/moma.md)
                pool.router = replace(pool.router, init="centred", weights="normalised")
        layer.feed_forward = mixture


def _sizes(model: Decoder.Config) -> str:
    """``2 layers of 64, 4 heads, 96 ids``."""
    attention = next((layer.attention for layer in model.layers if layer.attention), None)
    heads = f", {attention.heads} heads" if attention else ""
    labels = [Modality(modality).label for modality in model.modalities]
    return (
        f"{len(model.layers)} layers of {model.dim}{heads}, {model.vocab_size:,} ids "
        f"({', '.join(labels)})"
    )
