"""State dicts of the public Mixture-of-Mamba (Weixin-Liang/Mixture-of-Mamba, arXiv 2501.16295).

That code publishes a mixer, ``MixtureOfMamba``, the dense ``BaselineDenseMamba``, and an example in
which two of them replace one transformer layer; no embedding, head or checkpoints of models.

==================================  ===============================================================
``in_proj.weight`` …                a projection shared by all modalities, as in dense Mamba
``local_experts_in_proj.i.weight``  that of modality i, in its place; so ``x_proj``, ``out_proj``
``local_experts_dt_proj.i.bias``    with ``….weight``: the step sizes of modality i
``conv1d.*``, ``A_log``, ``D``      always shared
``block1.norm.weight``              a stack: the norm before the first mixer
``block1.mamba_model.*``            … the first mixer; ``block2.*`` the second
==================================  ===============================================================

A projection has one of its two names. Modality i is our modality group i: the i-th of
``Decoder.Config.modalities``.

Where ``dt_proj`` is shared, the public mixture omits its bias in the forward (its dense baseline
and its split projections do not): a defect, since steps begin at 0.69 instead of 0.001 to 0.1. The
bias is part of the function that the paper describes, so it is loaded and added here; a model
trained with that code has it at its unused initial values.

D width, I inner width, N states, R rank of the step sizes, W taps, G modality groups.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TypeVar

import torch
from torch import nn

from earlyfuse.models.blocks.mamba import WIDTHS, Mamba
from earlyfuse.models.decoder import Block
from earlyfuse.models.state_dicts.mamba import MIXER_NAMES, export_map, import_map, refuse_mamba_2
from earlyfuse.models.state_dicts.tensor_map import (
    Entry,
    Mapped,
    Shape,
    StateDict,
    TensorMap,
    TensorMaps,
    renamed,
    wrapper_hint,
    wrong_keys,
)

M = TypeVar("M", bound=nn.Module)

_EXPERT = re.compile(r"local_experts_(\w+_proj)\.(\d+)\.(\w+)")
_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_NORM, _MIXER = "block{}.norm.weight", "block{}.mamba_model."  # of a stack
# shape of each parameter that the sizes are read from; "2I" and "R+2N" are rows made of others
_SHAPES = {
    "in_proj.weight": ("2I", "D"),
    "out_proj.weight": ("D", "I"),
    "x_proj.weight": ("R+2N", "I"),
    "dt_proj.weight": ("I", "R"),
    "conv1d.weight": ("I", "1", "W"),
    "A_log": ("I", "N"),
    "D": ("I",),
}


def load_mixture_of_mamba(state_dict: Mapping[str, torch.Tensor]) -> Mamba:
    """Our mixer from the ``state_dict`` of ``MixtureOfMamba``, with any of its projections split,
    or of ``BaselineDenseMamba``.

    Sizes and modalities follow from the tensors; types and devices are kept, values are copied. The
    bias of a shared ``dt_proj`` is added (see above). ``ValueError`` lists every key that is
    missing, unexpected or mis-shaped, and names Mamba-2.
    """
    tensors = StateDict(state_dict)
    refuse_mamba_2(tensors.entries, "the state dict")
    config = _config(tensors.entries)
    maps = _import_maps(config, "", "")
    _check(maps, tensors.entries)
    return _filled(_on_meta(config), Mapped(maps, tensors))


def save_mixture_of_mamba(mixer: Mamba) -> dict[str, torch.Tensor]:
    """Inverse of ``load_mixture_of_mamba``: a state dict that the public mixer loads strictly."""
    return _copies(_export_maps(mixer.config, "", ""), mixer)


def load_mixture_of_mamba_stack(state_dict: Mapping[str, torch.Tensor]) -> list[Block]:
    """Our two blocks of the public example's stack, which replaces one transformer layer.

    Both have the norm before the mixer, with our epsilon of 1e-5; that of the public norm is in no
    file. Otherwise as ``load_mixture_of_mamba``.
    """
    tensors = StateDict(state_dict)
    refuse_mamba_2(tensors.entries, "the state dict")
    maps: dict[str, TensorMap] = {}
    configs = []
    for number in range(2):
        theirs = _MIXER.format(number + 1)
        parts = {
            n.removeprefix(theirs): e for n, e in tensors.entries.items() if n.startswith(theirs)
        }
        configs.append(config := _config(parts))
        norm = _NORM.format(number + 1)
        maps[f"{number}.mamba_norm.weight"] = renamed(norm, (config.dim,))
        maps |= _import_maps(config, f"{number}.mamba.", theirs)
    _check(maps, tensors.entries)
    with torch.device("meta"):
        blocks: list[Block] = [Block.Config(mamba=config).build() for config in configs]
    _filled(nn.ModuleList(blocks), Mapped(maps, tensors))
    return blocks


def save_mixture_of_mamba_stack(blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    """Inverse of ``load_mixture_of_mamba_stack``; ``ValueError`` for other blocks."""
    stackable = (
        block.branches == ("mamba",)
        and block.norm_order == "pre"
        and block.mamba_norm.weight.ndim == 1
        for block in blocks
    )
    if len(blocks) != 2 or not all(stackable):
        raise ValueError(
            "a stack of the public code is two blocks of a mixer alone, each with one norm before "
            "it for all modalities; give two such blocks"
        )
    maps: dict[str, TensorMap] = {}
    for number, block in enumerate(blocks):
        config = block.mamba.config
        norm = renamed(f"{number}.mamba_norm.weight", (config.dim,))
        maps[_NORM.format(number + 1)] = norm
        maps |= _export_maps(config, f"{number}.mamba.", _MIXER.format(number + 1))
    return _copies(maps, nn.ModuleList(blocks))


# ---------------------------------------------------------------- names


def _import_maps(config: Mamba.Config, ours: str, theirs: str) -> dict[str, TensorMap]:
    """Parameters of our mixer from theirs; ``ours`` and ``theirs`` precede the names."""
    maps = {}
    for name, shape in _shapes(config).items():
        public = MIXER_NAMES[name]
        groups = _groups(config, public)
        if groups == 1:
            maps[ours + name] = import_map(name, theirs + public, shape)
        else:
            sources = tuple((theirs + _expert(public, i), shape[1:]) for i in range(groups))
            maps[ours + name] = TensorMap(shape, sources, _stacked)
    return maps


def _export_maps(config: Mamba.Config, ours: str, theirs: str) -> dict[str, TensorMap]:
    maps = {}
    for name, shape in _shapes(config).items():
        public = MIXER_NAMES[name]
        groups = _groups(config, public)
        if groups == 1:
            maps[theirs + public] = export_map(ours + name, shape)
            continue
        for i in range(groups):
            one = TensorMap(shape[1:], ((ours + name, shape),), itemgetter(i))
            maps[theirs + _expert(public, i)] = one
    return maps


def _stacked(*experts: torch.Tensor) -> torch.Tensor:
    return torch.stack(experts)


def _groups(config: Mamba.Config, public: str) -> int:
    projection = public.partition(".")[0]
    return getattr(config, f"{projection}_groups") if projection in _PROJECTIONS else 1


def _expert(public: str, modality: int) -> str:
    projection, leaf = public.split(".")
    return f"local_experts_{projection}.{modality}.{leaf}"


def _check(maps: TensorMaps, entries: Mapping[str, Entry]) -> None:
    if lines := wrong_keys(maps, entries):
        listing = "\n  ".join(lines)
        raise ValueError(
            f"the state dict is not that of the public Mixture-of-Mamba; {len(lines)} of its keys "
            f"are wrong:\n  {listing}\nA mixer has {', '.join(_PROJECTIONS)} (the weights without "
            "biases, but for dt_proj), each once or as local_experts_… of every modality, conv1d "
            "with a bias, A_log and D, and no norm" + wrapper_hint(maps, entries)
        )


# ---------------------------------------------------------------- sizes


def _config(entries: Mapping[str, Entry]) -> Mamba.Config:
    """The sizes that most tensors agree on, so that the report of wrong keys names the tensor that
    differs; the paper's where no tensor tells.
    """
    votes: dict[str, list[int]] = {letter: [] for letter in ("D", "I", "R", "N", "W", "R+2N")}
    groups = dict.fromkeys(_PROJECTIONS, 1)
    for name, entry in entries.items():
        public = name
        if match := _EXPERT.fullmatch(name):
            public = f"{match[1]}.{match[3]}"
            if match[1] in groups:
                groups[match[1]] = max(groups[match[1]], int(match[2]) + 1, 2)
        for letter, size in zip(_SHAPES.get(public, ()), entry.shape, strict=False):
            if letter == "2I":
                votes["I"].append(size // 2)
            elif letter in votes and (letter != "W" or size in WIDTHS):
                votes[letter].append(size)
    dim = _most(votes["D"], 1)
    ranks = [rows - 2 * states for rows in votes["R+2N"] for states in votes["N"]]
    rank = _most(votes["R"] + ranks, -(-dim // 16))
    states = _most(votes["N"] + [(rows - rank) // 2 for rows in votes["R+2N"]], 16)
    modalities = max(groups.values())
    return Mamba.Config(
        dim=dim,
        inner_dim=_most(votes["I"], 2 * dim),
        dt_rank=rank,
        states=states,
        conv_width=_most(votes["W"], 4),
        **{f"{name}_groups": modalities if n > 1 else 1 for name, n in groups.items()},
    )


def _most(votes: list[int], usual: int) -> int:
    """The most frequent of the positive ``votes``; the ``usual`` size has one, too."""
    return Counter(vote for vote in [*votes, usual] if vote > 0).most_common(1)[0][0]


# ---------------------------------------------------------------- modules


def _on_meta(config: Mamba.Config) -> Mamba:
    with torch.device("meta"):
        return config.build()


def _shapes(config: Mamba.Config) -> dict[str, Shape]:
    return {name: tuple(p.shape) for name, p in _on_meta(config).named_parameters()}


def _copies(maps: TensorMaps, module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of ``maps`` over the module's, copied."""
    made = Mapped(maps, StateDict(module.state_dict()))
    return {name: made.read(name).clone() for name in made.entries}


def _filled(module: M, tensors: Mapped) -> M:
    """``module`` with copies of ``tensors`` as its parameters."""
    for name in tensors.entries:
        owner, _, leaf = name.rpartition(".")
        values = tensors.read(name).clone()
        module.get_submodule(owner).register_parameter(leaf, nn.Parameter(values))
    return module
