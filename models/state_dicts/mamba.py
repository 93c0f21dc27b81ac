"""Tensor names of public Mamba checkpoints, shared by Hugging Face and ``mamba_ssm``.

They differ in the name of the embedding only. Values are the same as ours; the public convolution
weight has a dimension of 1 between channels and taps, and the bias of the step sizes belongs to
their projection. Public heads are usually tied to the embedding, ours never: a tied head is
imported as a copy, and a head equal to the embedding is exported tied.
"""

import hashlib
from collections.abc import Mapping
from functools import partial

import torch

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts.plain_decoder import tensor_shapes
from earlyfuse.models.state_dicts.tensor_map import Entry, Shape, TensorMap, Tensors, renamed

EMBEDDING, HEAD = "tok_embeddings.weight", "lm_head.weight"
# our name of a mixer's parameter → its name in all public Mamba code
MIXER_NAMES = {
    "in_proj.weight": "in_proj.weight",
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "scan.dt_bias": "dt_proj.bias",
    "scan.A_log": "A_log",
    "scan.D": "D",
    "out_proj.weight": "out_proj.weight",
}
MAMBA_2 = (
    "Mamba-2 has one rate of decay for all channels and states of a head, and another recurrence "
    "(state-space duality); this is Mamba-1, with a rate for each channel and state, and neither "
    "can be computed as the other"
)


def name_of(ours: str, embedding: str) -> str:
    """Returns the public name of our parameter; ``embedding``: "embeddings" or "embedding"."""
    if not ours.startswith("layers."):
        return {
            EMBEDDING: f"backbone.{embedding}.weight",
            "norm.weight": "backbone.norm_f.weight",
            HEAD: HEAD,
        }[ours]
    _, number, owner, name = ours.split(".", 3)
    theirs = f"norm.{name}" if owner == "mamba_norm" else f"mixer.{MIXER_NAMES[name]}"
    return f"backbone.layers.{number}.{theirs}"


def import_map(ours: str, theirs: str, shape: Shape) -> TensorMap:
    """Maps their tensor to our parameter ``ours`` of ``shape``."""
    if ours.endswith("conv.weight"):
        sources = ((theirs, (shape[0], 1, shape[1])),)
        return TensorMap(shape, sources, lambda weight: weight.squeeze(1))
    return renamed(theirs, shape)


def export_map(ours: str, shape: Shape) -> TensorMap:
    """Maps our parameter ``ours`` of ``shape`` to their tensor."""
    if ours.endswith("conv.weight"):
        wide = (shape[0], 1, shape[1])
        return TensorMap(wide, ((ours, shape),), lambda weight: weight.unsqueeze(1))
    return renamed(ours, shape)


def import_maps(
    config: Decoder.Config,
    entries: Mapping[str, Entry],
    *,
    embedding: str,
    tied: bool,
    conv_bias: bool,
) -> dict[str, TensorMap]:
    """Maps the public tensors ``entries`` to ours; ``ValueError`` if they are of a Mamba-2.

    ``tied``: the head may be absent and is then the embedding. Without ``conv_bias``, ours is 0.
    """
    refuse_mamba_2(entries, "the checkpoint")
    maps = {
        name: import_map(name, name_of(name, embedding), shape)
        for name, shape in tensor_shapes(config).items()
    }
    if tied and HEAD not in entries:
        maps[HEAD] = maps[EMBEDDING]
    for name, one in maps.items():
        if name.endswith("conv.bias") and not conv_bias:
            maps[name] = TensorMap(one.shape, (), partial(torch.zeros, one.shape))
    return maps


def export_maps(
    config: Decoder.Config, *, embedding: str, tied: bool, conv_bias: bool
) -> dict[str, TensorMap]:
    """Maps our tensors to theirs: without a ``tied`` head, without biases unless ``conv_bias``."""
    return {
        name_of(name, embedding): export_map(name, shape)
        for name, shape in tensor_shapes(config).items()
        if not (tied and name == HEAD) and (conv_bias or not name.endswith("conv.bias"))
    }


def refuse_mamba_2(entries: Mapping[str, Entry], where: str) -> None:
    """``ValueError`` if the tensors are those of a Mamba-2."""
    for name, entry in entries.items():
        leaf = name.rpartition(".")[2]
        if leaf == "dt_bias" or (leaf == "A_log" and len(entry.shape) == 1):
            raise ValueError(f"{where} holds a Mamba-2: {name} {entry.shape}. {MAMBA_2}")


def is_tied(tensors: Tensors) -> bool:
    """True if our embedding and head are equal bit for bit; reads one of them at a time."""
    same_entry = tensors.entries[EMBEDDING] == tensors.entries[HEAD]
    return same_entry and _digest(tensors, EMBEDDING) == _digest(tensors, HEAD)


def _digest(tensors: Tensors, name: str) -> bytes:
    values = tensors.read(name).contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values.data).digest()


def has_conv_bias(tensors: Tensors) -> bool:
    """True if any bias of our convolutions is not 0."""
    return any(
        bool(tensors.read(name).any()) for name in tensors.entries if name.endswith("conv.bias")
    )
