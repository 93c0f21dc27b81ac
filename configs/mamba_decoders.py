"""Mamba decoders by composition: dense, Mixture-of-Mamba and its ablations, and hybrids.

Two Mamba blocks stand for one transformer layer (arXiv 2501.16295). All have the FLOPs of dense
Mamba, whichever projections are untied.
"""

from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import Modality

FORM = "mixture_of_mamba"  # name of ``grown`` in tools/convert --upcycle
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True)
class MambaShape:
    """Sizes that all variants share. ``layers``: pairs of Mamba blocks."""

    dim: int
    layers: int
    vocab_size: int
    expand: int = 2
    states: int = 16
    conv_width: int = 4
    norm_order: Literal["pre", "swin"] = "pre"
    init_std: float = 0.02
    dropout: float = 0.0
    modalities: tuple[Modality, ...] = (Modality.TEXT, Modality.IMAGE)


def mamba(shape: MambaShape) -> Decoder.Config:
    """Dense: every token uses the same parameters."""
    return mixture_of_mamba(shape, untied=())


def mixture_of_mamba(shape: MambaShape, untied: Collection[str] = PROJECTIONS) -> Decoder.Config:
    """The ``untied`` ones of ``PROJECTIONS`` are untied by modality, the others shared."""
    blocks = [
        Block.Config(mamba=mixer(shape, untied), norm_order=shape.norm_order, dropout=shape.dropout)
        for _ in range(2 * shape.layers)
    ]
    return Decoder.Config(
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        layers=blocks,
        modalities=tuple(int(m) for m in shape.modalities),
        init_std=shape.init_std,
    )


def hybrid(
    transformer: Decoder.Config,
    pattern: str,
    *,
    expand: int = 2,
    states: int = 16,
    untied: Collection[str] = PROJECTIONS,
) -> Decoder.Config:
    """Layers of ``transformer``, of any kind, some with Mamba in place of attention.

    ``pattern``, repeated over its layers, has a letter for each: "a" keeps the layer, "m" has Mamba
    in place of attention, "s" Mamba alone, without the feed-forward. ``untied``: see
    ``mixture_of_mamba``.
    """
    if not pattern or set(pattern) - set("ams"):
        raise ValueError(
            f"pattern ({pattern!r}) must be letters a (attention and feed-forward), m (Mamba and "
            "feed-forward) or s (Mamba alone), one for each layer of a period"
        )
    model = deepcopy(transformer)
    modalities = tuple(Modality(modality) for modality in model.modalities)
    shape = MambaShape(
        dim=model.dim, layers=0, vocab_size=0, expand=expand, states=states, modalities=modalities
    )
    for index, layer in enumerate(model.layers):
        letter = pattern[index % len(pattern)]
        if letter != "a":
            layer.attention, layer.mamba = None, mixer(shape, untied)
        if letter == "s":
            layer.feed_forward = None
    return model


def grown(parent: Decoder.Config, untied: Collection[str] = PROJECTIONS) -> Decoder.Config:
    """The model that a dense Mamba or hybrid ``parent`` is upcycled to: the same with these
    projections ``untied`` too. ``ValueError`` if there is none to untie.
    """
    _check_known(untied)
    child = deepcopy(parent)
    for layer in child.layers:
        for name in untied if layer.mamba is not None else ():
            setattr(layer.mamba, f"{name}_groups", len(child.modalities))
    if child == parent:
        raise ValueError(
            f"{FORM} unties the projections of Mamba by modality, and the parent has none that is "
            "shared; give one with dense Mamba blocks and several modalities"
        )
    return child


def mixer(shape: MambaShape, untied: Collection[str] = PROJECTIONS) -> Mamba.Config:
    """One mixer of Mamba's sizes: inner width ``expand`` · dim, rank a sixteenth of dim."""
    _check_known(untied)
    groups = {
        f"{name}_groups": len(shape.modalities) if name in untied else 1 for name in PROJECTIONS
    }
    return Mamba.Config(
        dim=shape.dim,
        inner_dim=shape.expand * shape.dim,
        dt_rank=-(-shape.dim // 16),
        states=shape.states,
        conv_width=shape.conv_width,
        **groups,
    )


def _check_known(untied: Collection[str]) -> None:
    unknown = sorted(set(untied) - set(PROJECTIONS))
    if unknown:
        raise ValueError(f"untied ({unknown}) must be among {', '.join(PROJECTIONS)}")
