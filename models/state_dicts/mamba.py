"""The decoders that public Mamba formats can express: sizes, names, and why others cannot be.

Hugging Face and ``mamba_ssm`` name all tensors alike but for the embedding. Values are ours; the
convolution's weight has a dimension of 1 between channels and taps there, and the bias of the step
sizes belongs to their projection. The head is tied to the embedding there as a rule, and here it
never is: a tied one is imported as a copy, and equal ones are exported tied.

D width, I inner width, N states, R rank of the step sizes, W taps.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.models.state_dicts.chameleon import function_differences, tensor_shapes
from earlyfuse.models.state_dicts.tensor_map import Entry, Recipe, Shape, Tensors, renamed

EMBEDDING, HEAD = "tok_embeddings.weight", "lm_head.weight"
# of a mixer's parameter, in all public Mamba code
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


@dataclass(frozen=True)
class MambaSizes:
    """A dense Mamba: all blocks a mixer alone, all parameters shared by all modalities."""

    dim: int
    layers: int
    inner_dim: int
    dt_rank: int
    vocab_size: int
    states: int = 16
    conv_width: int = 4
    init_std: float = 0.02

    def decoder(self) -> Decoder.Config:
        """Our config of it; ``ValueError`` if there can be no such mixer."""
        layers = [
            Block.Config(
                mamba=Mamba.Config(
                    dim=self.dim,
                    inner_dim=self.inner_dim,
                    dt_rank=self.dt_rank,
                    states=self.states,
                    conv_width=self.conv_width,
                )
            )
            for _ in range(self.layers)
        ]
        return Decoder.Config(
            dim=self.dim, vocab_size=self.vocab_size, layers=layers, init_std=self.init_std
        )

    @classmethod
    def of(cls, config: Decoder.Config, target: str) -> "MambaSizes":
        """The sizes of ``config``; ``ValueError`` says why ``target`` cannot express it."""
        for index, layer in enumerate(config.layers):
            if list(layer.branches) != ["mamba"]:
                found = " and ".join(layer.branches)
                raise ValueError(_cannot(target, [f"layers[{index}] is made of {found}"]))
        mixer = config.layers[0].mamba
        assert mixer is not None
        sizes = cls(
            dim=config.dim,
            layers=len(config.layers),
            inner_dim=mixer.inner_dim,
            dt_rank=mixer.dt_rank,
            vocab_size=config.vocab_size,
            states=mixer.states,
            conv_width=mixer.conv_width,
            init_std=config.init_std,
        )
        if wrong := function_differences(config, sizes.decoder()):
            raise ValueError(_cannot(target, wrong))
        return sizes


def _cannot(target: str, reasons: list[str]) -> str:
    shown = "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")
    return (
        f"{target} cannot express this model: {shown}. Mamba there is dense, its blocks are "
        "mixers alone, all alike, with the norm before, and all modalities share all parameters; "
        "hybrids and Mixture-of-Mamba convert to earlyfuse and dcp only"
    )


def agreed(written: Decoder.Config, config: Decoder.Config, where: str) -> Decoder.Config:
    """Our own description of a model beside another's, ``written``; ``ValueError`` unless both are
    of the same function.
    """
    if wrong := function_differences(written, config):
        raise ValueError(
            f"{where} contradicts what earlyfuse wrote beside it: {'; '.join(wrong[:3])}. Remove "
            "that part if the model was changed since it was exported"
        )
    return written


# ---------------------------------------------------------------- names


def name_of(ours: str, embedding: str) -> str:
    """Public name of a parameter of ours; ``embedding``: "embeddings", or "embedding"."""
    if not ours.startswith("layers."):
        return {
            EMBEDDING: f"backbone.{embedding}.weight",
            "norm.weight": "backbone.norm_f.weight",
            HEAD: HEAD,
        }[ours]
    _, number, owner, name = ours.split(".", 3)
    theirs = f"norm.{name}" if owner == "mamba_norm" else f"mixer.{MIXER_NAMES[name]}"
    return f"backbone.layers.{number}.{theirs}"


def import_recipe(ours: str, theirs: str, shape: Shape) -> Recipe:
    """A parameter of ours, of ``shape``, from theirs."""
    if ours.endswith("conv.weight"):
        return Recipe(shape, ((theirs, (shape[0], 1, shape[1])),), lambda weight: weight.squeeze(1))
    return renamed(theirs, shape)


def export_recipe(ours: str, shape: Shape) -> Recipe:
    """Theirs from the parameter ``ours`` of ``shape``."""
    if ours.endswith("conv.weight"):
        wide = (shape[0], 1, shape[1])
        return Recipe(wide, ((ours, shape),), lambda weight: weight.unsqueeze(1))
    return renamed(ours, shape)


def import_recipes(
    config: Decoder.Config,
    entries: Mapping[str, Entry],
    *,
    embedding: str,
    tied: bool,
    conv_bias: bool,
) -> dict[str, Recipe]:
    """Ours from theirs, which are ``entries``.

    ``tied``: the head may be absent, and is then the embedding. Without ``conv_bias``, ours is 0.
    """
    recipes = {
        name: import_recipe(name, name_of(name, embedding), shape)
        for name, shape in tensor_shapes(config).items()
    }
    if tied and HEAD not in entries:
        recipes[HEAD] = recipes[EMBEDDING]
    if not conv_bias:
        for name, recipe in recipes.items():
            if name.endswith("conv.bias"):
                recipes[name] = Recipe(recipe.shape, (), lambda shape=recipe.shape: _zeros(shape))
    return recipes


def _zeros(shape: Shape) -> torch.Tensor:
    return torch.zeros(shape)


def export_recipes(
    sizes: MambaSizes, *, embedding: str, tied: bool, conv_bias: bool
) -> dict[str, Recipe]:
    """Theirs from ours: without the head if it is ``tied``, without biases unless ``conv_bias``."""
    return {
        name_of(name, embedding): export_recipe(name, shape)
        for name, shape in tensor_shapes(sizes.decoder()).items()
        if not (tied and name == HEAD) and (conv_bias or not name.endswith("conv.bias"))
    }


def refuse_mamba_2(entries: Mapping[str, Entry], where: str) -> None:
    """``ValueError`` if the tensors are those of a Mamba-2."""
    found = [name for name, entry in entries.items() if _of_mamba_2(name, entry)]
    if found:
        raise ValueError(
            f"{where} holds a Mamba-2: {found[0]} {entries[found[0]].shape}. {MAMBA_2}"
        )


def _of_mamba_2(name: str, entry: Entry) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "dt_bias" or (leaf == "A_log" and len(entry.shape) == 1)


# ---------------------------------------------------------------- values that decide on an export


def is_tied(tensors: Tensors) -> bool:
    """Whether embedding and head are the same, bit for bit; holds one of them at a time."""
    one, other = tensors.entries[EMBEDDING], tensors.entries[HEAD]
    return one == other and _digest(tensors, EMBEDDING) == _digest(tensors, HEAD)


def _digest(tensors: Tensors, name: str) -> bytes:
    values = tensors.read(name).contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values.data).digest()


def has_conv_bias(tensors: Tensors) -> bool:
    """Whether any bias of the convolutions is not 0."""
    return any(
        bool(tensors.read(name).any()) for name in tensors.entries if name.endswith("conv.bias")
    )
