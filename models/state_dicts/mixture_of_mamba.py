"""The public Mixture-of-Mamba code's names (Weixin-Liang/Mixture-of-Mamba, arXiv 2501.16295).

That code publishes a mixer, ``MixtureOfMamba``, the dense ``BaselineDenseMamba``, and an example of
how two of them stand for one transformer layer. It defines these names and no more: embedding, head
and checkpoints of whole models are not published.

==================================  ===============================================================
``in_proj.weight`` …                a projection shared by all modalities, as in dense Mamba
``local_experts_in_proj.i.weight``  that of modality i, in its place; so ``x_proj``, ``out_proj``
``local_experts_dt_proj.i.bias``    with ``….weight``: the step sizes of modality i
``conv1d.*``, ``A_log``, ``D``      shared always
``block1.norm.weight``              a stack: the norm before the first mixer
``block1.mamba_model.*``            … the first mixer; ``block2.*`` the second
==================================  ===============================================================

A projection is there under one of its two names: the code makes no others beside the split ones.
Modality i is our modality group i: the i-th of ``Decoder.Config.modalities``.

Where a projection of step sizes is shared, the public mixture makes no use of its bias in the
forward (its dense baseline, and its split projections, do). That is a defect: steps begin at 0.69
in place of 0.001 to 0.1. The bias is a parameter of the function that the paper describes, so we
load it and add it; models trained with that code and a shared ``dt_proj`` have a bias that was
never used, still at its first values, and compute here what they were meant to.

D width, I inner width, N states, R rank of the step sizes, W taps, G modality groups.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import TypeVar

import torch
from torch import nn

from earlyfuse.models.blocks.mamba import WIDTHS, Mamba
from earlyfuse.models.decoder import Block
from earlyfuse.models.state_dicts.mamba import (
    MIXER_NAMES,
    export_recipe,
    import_recipe,
    refuse_mamba_2,
)
from earlyfuse.models.state_dicts.tensor_map import (
    Entry,
    Made,
    Recipe,
    Shape,
    of_a_wrapper,
    wrong_keys,
)

M = TypeVar("M", bound=nn.Module)

_EXPERT = re.compile(r"local_experts_(\w+_proj)\.(\d+)\.(\w+)")
_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_BLOCKS, _NORM, _MIXER = ("block1.", "block2."), "norm.weight", "mamba_model."


def load_mixture_of_mamba(state_dict: Mapping[str, torch.Tensor]) -> Mamba:
    """Our mixer with the values of the public mixer's ``state_dict``: of ``MixtureOfMamba`` with
    any of its projections split, or of ``BaselineDenseMamba``.

    Sizes and modalities are read off the tensors; types and devices are kept, values are copied.
    The bias of a shared ``dt_proj`` is added, which the public forward forgets (see above).
    ``ValueError`` lists every key that is missing, unexpected or mis-shaped, and says so of
    Mamba-2.
    """
    tensors = _StateDict(state_dict)
    refuse_mamba_2(tensors.entries, "the state dict")
    config = _config(tensors.entries)
    recipes = _import_recipes(config, "", "")
    _check(recipes, tensors.entries)
    return _filled(_on_meta(config), Made(recipes, tensors))


def save_mixture_of_mamba(mixer: Mamba) -> dict[str, torch.Tensor]:
    """Inverse of ``load_mixture_of_mamba``: a state dict that the public mixer loads strictly."""
    tensors = _StateDict(mixer.state_dict())
    made = Made(_export_recipes(mixer.config, "", ""), tensors)
    return {name: made.read(name).clone() for name in made.entries}


def load_mixture_of_mamba_stack(state_dict: Mapping[str, torch.Tensor]) -> list[Block]:
    """Our two blocks of the public example's stack, which stands for one transformer layer.

    Both have the norm before the mixer, with our epsilon of 1e-5; that of the public norm is in no
    file. Otherwise as ``load_mixture_of_mamba``.
    """
    tensors = _StateDict(state_dict)
    refuse_mamba_2(tensors.entries, "the state dict")
    recipes: dict[str, Recipe] = {}
    configs = []
    for number, theirs in enumerate(_BLOCKS):
        of_mixer = f"{theirs}{_MIXER}"
        config = _config(
            {
                name.removeprefix(of_mixer): entry
                for name, entry in tensors.entries.items()
                if name.startswith(of_mixer)
            }
        )
        configs.append(Block.Config(mamba=config))
        norm = Recipe((config.dim,), ((theirs + _NORM, (config.dim,)),))
        recipes[f"{number}.mamba_norm.weight"] = norm
        recipes |= _import_recipes(config, f"{number}.mamba.", of_mixer)
    _check(recipes, tensors.entries)
    with torch.device("meta"):
        blocks: list[Block] = [config.build() for config in configs]
    _filled(nn.ModuleList(blocks), Made(recipes, tensors))
    return blocks


def save_mixture_of_mamba_stack(blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    """Inverse of ``load_mixture_of_mamba_stack``; ``ValueError`` for blocks that are no such
    stack."""
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
    tensors = _StateDict(nn.ModuleList(blocks).state_dict())
    recipes: dict[str, Recipe] = {}
    for number, (block, theirs) in enumerate(zip(blocks, _BLOCKS, strict=True)):
        config = block.mamba.config
        norm = f"{number}.mamba_norm.weight"
        recipes[theirs + _NORM] = Recipe((config.dim,), ((norm, (config.dim,)),))
        recipes |= _export_recipes(config, f"{number}.mamba.", f"{theirs}{_MIXER}")
    made = Made(recipes, tensors)
    return {name: made.read(name).clone() for name in made.entries}


# ---------------------------------------------------------------- names


def _import_recipes(config: Mamba.Config, ours: str, theirs: str) -> dict[str, Recipe]:
    """Our parameters of a mixer, ``ours`` before their names, from theirs."""
    recipes = {}
    for name, shape in _shapes(config).items():
        public = MIXER_NAMES[name]
        groups = _groups(config, public)
        if groups == 1:
            recipes[ours + name] = import_recipe(name, theirs + public, shape)
        else:
            sources = tuple((theirs + _expert(public, i), shape[1:]) for i in range(groups))
            recipes[ours + name] = Recipe(shape, sources, _stacked)
    return recipes


def _export_recipes(config: Mamba.Config, ours: str, theirs: str) -> dict[str, Recipe]:
    recipes = {}
    for name, shape in _shapes(config).items():
        public = MIXER_NAMES[name]
        groups = _groups(config, public)
        if groups == 1:
            recipes[theirs + public] = export_recipe(ours + name, shape)
        else:
            for i in range(groups):
                recipes[theirs + _expert(public, i)] = Recipe(
                    shape[1:], ((ours + name, shape),), itemgetter(i)
                )
    return recipes


def _stacked(*experts: torch.Tensor) -> torch.Tensor:
    return torch.stack(experts)


def _groups(config: Mamba.Config, public: str) -> int:
    projection = public.partition(".")[0]
    return getattr(config, f"{projection}_groups") if projection in _PROJECTIONS else 1


def _expert(public: str, modality: int) -> str:
    projection, leaf = public.split(".")
    return f"local_experts_{projection}.{modality}.{leaf}"


def _check(recipes: Mapping[str, Recipe], entries: Mapping[str, Entry]) -> None:
    if lines := wrong_keys(recipes, entries):
        listing = "\n  ".join(lines)
        raise ValueError(
            f"the state dict is not that of the public Mixture-of-Mamba; {len(lines)} of its keys "
            f"are wrong:\n  {listing}\nA mixer has {', '.join(_PROJECTIONS)} (the weights without "
            "biases, but for dt_proj), each once or as local_experts_… of every modality, conv1d "
            "with a bias, A_log and D, and no norm" + of_a_wrapper(recipes, entries)
        )


# ---------------------------------------------------------------- sizes


def _config(entries: Mapping[str, Entry]) -> Mamba.Config:
    """The sizes that most tensors agree on, so that one of another shape is the one that is wrong.

    Where there are too few tensors to tell, those of the paper.
    """
    shapes: dict[str, list[Shape]] = {name: [] for name in MIXER_NAMES.values()}
    groups = dict.fromkeys(_PROJECTIONS, 1)
    for name, entry in entries.items():
        public = name
        if match := _EXPERT.fullmatch(name):
            projection, place = match[1], int(match[2])
            public = f"{projection}.{match[3]}"
            if projection in groups:
                groups[projection] = max(groups[projection], place + 1, 2)
        if public in shapes:
            shapes[public].append(entry.shape)
    modalities = max(groups.values())

    def sizes(name: str, dimension: int) -> list[int]:
        return [shape[dimension] for shape in shapes[name] if len(shape) > dimension]

    dim = _most([*sizes("in_proj.weight", 1), *sizes("out_proj.weight", 0)], 1)
    inner = _most(
        [
            *(rows // 2 for rows in sizes("in_proj.weight", 0)),
            *sizes("out_proj.weight", 1),
            *sizes("x_proj.weight", 1),
            *sizes("dt_proj.weight", 0),
            *sizes("A_log", 0),
            *sizes("conv1d.weight", 0),
            *sizes("D", 0),
        ],
        2 * dim,
    )
    selected = sizes("x_proj.weight", 0)  # R + 2N
    rank = _most(
        [
            *sizes("dt_proj.weight", 1),
            *(rows - 2 * states for rows in selected for states in sizes("A_log", 1)),
        ],
        -(-dim // 16),
    )
    states = _most([*sizes("A_log", 1), *((rows - rank) // 2 for rows in selected)], 16)
    width = _most([taps for taps in sizes("conv1d.weight", 2) if taps in WIDTHS], 4)
    return Mamba.Config(
        dim=dim,
        inner_dim=inner,
        dt_rank=rank,
        states=states,
        conv_width=width,
        **{f"{name}_groups": modalities if n > 1 else 1 for name, n in groups.items()},
    )


def _most(votes: Iterable[int], usual: int) -> int:
    """The most frequent of the ``votes`` that can be a size; the ``usual`` has one, too."""
    possible = [vote for vote in [*votes, usual] if vote > 0]
    return Counter(possible).most_common(1)[0][0]


# ---------------------------------------------------------------- modules


class _StateDict:
    """A state dict as tensors by name."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = tensors
        self.entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, not a copy."""
        return self.tensors[name].detach()


def _on_meta(config: Mamba.Config) -> Mamba:
    with torch.device("meta"):
        return config.build()


def _shapes(config: Mamba.Config) -> dict[str, Shape]:
    return {name: tuple(p.shape) for name, p in _on_meta(config).named_parameters()}


def _filled(module: M, tensors: Made) -> M:
    """``module`` with copies of ``tensors`` as its parameters."""
    for name in tensors.entries:
        owner, _, leaf = name.rpartition(".")
        values = tensors.read(name).clone()
        module.get_submodule(owner).register_parameter(leaf, nn.Parameter(values))
    return module
