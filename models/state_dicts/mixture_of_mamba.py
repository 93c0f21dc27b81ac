"""State dicts of the public Mixture-of-Mamba (Weixin-Liang/Mixture-of-Mamba, arXiv 2501.16295).

That code publishes a mixer, ``MixtureOfMamba``, the dense ``BaselineDenseMamba``, and an example in
which a stack of two mixers replaces one transformer layer; no embedding, head or model checkpoints.

==================================  ===============================================================
``in_proj.weight`` …                a projection shared by all modalities, as in dense Mamba
``local_experts_in_proj.i.weight``  instead: that of modality i; also ``x_proj``, ``out_proj``
``local_experts_dt_proj.i.bias``    with ``….weight``: the step sizes of modality i
``conv1d.*``, ``A_log``, ``D``      always shared
``block1.norm.weight``              a stack: the norm before the first mixer
``block1.mamba_model.*``            a stack: the first mixer; ``block2.*`` the second
==================================  ===============================================================

Modality i is our modality group i: the i-th of ``Decoder.Config.modalities``.

Where ``dt_proj`` is shared, the public mixture omits its bias in the forward (its dense baseline
and its split projections do not): a defect, since steps begin at 0.69 instead of 0.001 to 0.1. The
paper's function has the bias, so it is loaded and added here; a model trained with that code has it
at its unused initial values.
"""

import re
from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
from torch import nn

from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.mamba import WIDTHS, Mamba
from earlyfuse.models.state_dicts.mamba import MIXER_NAMES, export_map, import_map, refuse_mamba_2
from earlyfuse.models.state_dicts.tensor_map import (
    Entry,
    Mapped,
    Shape,
    StateDict,
    TensorMap,
    TensorMaps,
    check_keys,
    renamed,
)

_EXPERT = re.compile(r"local_experts_(\w+_proj)\.(\d+)\.(\w+)")
_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_NORM, _MIXER = "block{}.norm.weight", "block{}.mamba_model."  # of a stack


def load_mixture_of_mamba(state_dict: Mapping[str, torch.Tensor]) -> Mamba:
    """Returns our mixer from the ``state_dict`` of ``MixtureOfMamba``, with any of its projections
    split, or of ``BaselineDenseMamba``.

    Sizes and modalities follow from the tensors; dtypes and devices stay, values are copied. The
    bias of a shared ``dt_proj`` is added (see above). ``ValueError`` lists every key that is
    missing, unexpected or mis-shaped, and names Mamba-2.
    """
    config = _config({name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    mixer = _on_meta(config)
    _fill(mixer, _import_maps(config, "", ""), state_dict)
    return mixer


def save_mixture_of_mamba(mixer: Mamba) -> dict[str, torch.Tensor]:
    """Inverse of ``load_mixture_of_mamba``: a state dict that the public mixer loads strictly."""
    return _copies(_export_maps(mixer.config, "", ""), mixer)


def load_mixture_of_mamba_stack(state_dict: Mapping[str, torch.Tensor]) -> list[Block]:
    """Returns two blocks of ours from the public example's stack.

    Both have the norm before the mixer, with our epsilon of 1e-5; that of the public norm is in no
    file. Otherwise as ``load_mixture_of_mamba``.
    """
    maps: dict[str, TensorMap] = {}
    blocks: list[Block] = []
    for number in range(2):
        prefix = _MIXER.format(number + 1)
        config = _config(
            {
                name.removeprefix(prefix): tuple(tensor.shape)
                for name, tensor in state_dict.items()
                if name.startswith(prefix)
            }
        )
        norm = renamed(_NORM.format(number + 1), (config.dim,))
        maps[f"{number}.mamba_norm.weight"] = norm
        maps |= _import_maps(config, f"{number}.mamba.", prefix)
        with torch.device("meta"):
            blocks.append(Block.Config(mamba=config).build())
    _fill(nn.ModuleList(blocks), maps, state_dict)
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
            "a public stack is two blocks of a mixer alone, each behind one norm for all "
            "modalities; give two such blocks"
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
    """Maps their tensors to our mixer; ``ours`` and ``theirs`` are prefixes of the names."""
    maps = {}
    for name, public, shape, groups in _parameters(config):
        if groups == 1:
            maps[ours + name] = import_map(name, theirs + public, shape)
        else:
            sources = tuple((theirs + _expert(public, i), shape[1:]) for i in range(groups))
            maps[ours + name] = TensorMap(shape, sources, lambda *experts: torch.stack(experts))
    return maps


def _export_maps(config: Mamba.Config, ours: str, theirs: str) -> dict[str, TensorMap]:
    """Inverse of ``_import_maps``."""
    maps = {}
    for name, public, shape, groups in _parameters(config):
        if groups == 1:
            maps[theirs + public] = export_map(ours + name, shape)
            continue
        for i in range(groups):
            one = TensorMap(shape[1:], ((ours + name, shape),), itemgetter(i))
            maps[theirs + _expert(public, i)] = one
    return maps


def _parameters(config: Mamba.Config) -> list[tuple[str, str, Shape, int]]:
    """Lists our name, public name, shape and modality groups of each parameter."""
    found = []
    for name, parameter in _on_meta(config).named_parameters():
        public = MIXER_NAMES[name]
        projection = public.partition(".")[0]
        groups = getattr(config, f"{projection}_groups") if projection in _PROJECTIONS else 1
        found.append((name, public, tuple(parameter.shape), groups))
    return found


def _expert(public: str, modality: int) -> str:
    projection, leaf = public.split(".")
    return f"local_experts_{projection}.{modality}.{leaf}"


def _config(shapes: Mapping[str, Shape]) -> Mamba.Config:
    """Reads each size from the first tensor that has it; the paper's where none does. Tensors that
    disagree are reported by ``check_keys``.
    """
    groups = dict.fromkeys(_PROJECTIONS, 1)
    public = dict(shapes)
    for name, shape in shapes.items():
        if match := _EXPERT.fullmatch(name):
            public.setdefault(f"{match[1]}.{match[3]}", shape)
            if match[1] in groups:
                groups[match[1]] = max(groups[match[1]], int(match[2]) + 1, 2)

    def size(usual: int, *places: tuple[str, int, int]) -> int:
        for name, rank, dim in places:
            if len(shape := public.get(name, ())) == rank and shape[dim] > 0:
                return shape[dim]
        return usual

    dim = size(1, ("out_proj.weight", 2, 0), ("in_proj.weight", 2, 1))
    width = size(4, ("conv1d.weight", 3, 2))
    modalities = max(groups.values())
    return Mamba.Config(
        dim=dim,
        inner_dim=size(2 * dim, ("A_log", 2, 0), ("x_proj.weight", 2, 1), ("D", 1, 0)),
        dt_rank=size(-(-dim // 16), ("dt_proj.weight", 2, 1)),
        states=size(16, ("A_log", 2, 1)),
        conv_width=width if width in WIDTHS else 4,
        **{f"{name}_groups": modalities if n > 1 else 1 for name, n in groups.items()},
    )


# ---------------------------------------------------------------- modules


def _on_meta(config: Mamba.Config) -> Mamba:
    with torch.device("meta"):
        return config.build()


def _copies(maps: TensorMaps, module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of the tensors that ``maps`` make of the module's."""
    made = Mapped(maps, StateDict(module.state_dict()))
    return {name: made.read(name).clone() for name in made.entries}


def _fill(module: nn.Module, maps: TensorMaps, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Gives ``module`` copies of what ``maps`` make of ``state_dict``, once its keys are right."""
    source = StateDict(state_dict)
    entries: Mapping[str, Entry] = source.entries
    refuse_mamba_2(entries, "the state dict")
    check_keys(
        maps,
        entries,
        "the state dict",
        expected="that of the public Mixture-of-Mamba",
        remedy=f"A mixer has {', '.join(_PROJECTIONS)} (weights without biases, except dt_proj), "
        "each once or as local_experts_… of every modality, conv1d with a bias, A_log and D, and "
        "no norm",
    )
    made = Mapped(maps, source)
    for name in made.entries:
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(made.read(name).clone())
        module.get_submodule(owner).register_parameter(leaf, parameter)
