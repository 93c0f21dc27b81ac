"""Upcycling: where each tensor of a sparse model comes from in the denser one that it grows out of.

Each feed-forward becomes all experts of its modality group; what is shared becomes one copy for
each modality where the child unties it; routers are new (MoMa, arXiv 2407.21770, 2.5; sparse
upcycling, arXiv 2212.05055). The same map takes a finished model to its second stage, where nothing
but the causal routers is new.

=====================  ===========================================================================
parent                 children
=====================  ===========================================================================
dense                  1t1i, Mixture-of-Transformers, any pools of experts
1t1i                   Mixture-of-Transformers, pools of one modality each
pools of experts       the same with a multiple of the experts, with causal routers
Mamba, hybrids         the same with more projections untied by modality: Mixture-of-Mamba
=====================  ===========================================================================

G groups or experts.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.mamba import GROUPS
from earlyfuse.models.decoder import BRANCHES, Decoder

Shape = tuple[int, ...]
_EXPERTS = re.compile(r"(layers\.(\d+)\.feed_forward)\.pools\.(\d+)\.experts\.(\w+)$")
_SAME = ("dim", "vocab_size")
_SAME_BRANCH = {
    "attention": ("heads", "kv_heads", "head_dim", "qk_norm"),
    "mamba": ("inner_dim", "states", "dt_rank", "conv_width"),
    "feed_forward": (),
}


@dataclass(frozen=True)
class Inherited:
    """A tensor of the child, made of the parent's ``name`` of ``shape``.

    ``parts``: None, the tensor as it is; else for each place along the child's first dimension the
    parent's place along its own, or None for all of the parent's tensor.
    """

    name: str
    shape: Shape
    parts: tuple[int | None, ...] | None = None

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        """The child's tensor, of the parent's."""
        if self.parts is None:
            return tensor
        return torch.stack([tensor if part is None else tensor[part] for part in self.parts])


def upcycle(parent: Decoder.Config, child: Decoder.Config) -> dict[str, Inherited | None]:
    """Parameter of ``child`` → where it comes from in ``parent``; None: fresh, as initialised.

    ``ValueError`` lists what of the parent has no place in the child, or the other way round.
    """
    return inherit(shapes(parent), parent.to_dict(), child)


def inherit(
    parent: Mapping[str, Shape], description: Mapping[str, Any], child: Decoder.Config
) -> dict[str, Inherited | None]:
    """``upcycle`` from what a checkpoint tells: shapes, and ``Decoder.Config.to_dict`` of it."""
    problems = list(_differences(description, child))
    found: dict[str, Inherited | None] = {}
    for name, shape in shapes(child).items():
        try:
            found[name] = _origin(name, shape, parent, description, child)
        except ValueError as error:
            problems.append(str(error))
    used = {origin.name for origin in found.values() if origin}
    dropped = [name for name in parent if name not in used and ".router." not in name]
    if not problems:
        problems += [f"{name} of the parent has no place in the child" for name in dropped]
    if problems:
        shown = "; ".join(problems[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"the parent cannot become this model: {shown}{more}. Give the child the parent's "
            "sizes, or take another parent"
        )
    return found


def shapes(config: Decoder.Config) -> dict[str, Shape]:
    """Name → shape of every parameter of a model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in config.build().named_parameters()}


def _differences(parent: Mapping[str, Any], child: Decoder.Config) -> Iterator[str]:
    """What must be the same for the child to compute what the parent does."""
    fields = child.to_dict()
    if len(parent["layers"]) != len(fields["layers"]):
        yield f"layers ({len(fields['layers'])}) must be those of the parent"
        return
    same = (*_SAME, "rope_theta") if child.head_dim else _SAME
    pairs = [(name, parent[name], fields[name]) for name in same]
    if any(_unties(layer) for layer in parent["layers"]):
        pairs.append(("modalities", list(parent["modalities"]), list(fields["modalities"])))
    for index, (theirs, ours) in enumerate(zip(parent["layers"], fields["layers"], strict=True)):
        at = f"layers[{index}]"
        if _branches(theirs) != _branches(ours):
            yield (
                f"{at} is made of {' and '.join(_branches(ours))}, in the parent of "
                f"{' and '.join(_branches(theirs))}"
            )
            return
        pairs.append((f"{at}.norm_order", theirs["norm_order"], ours["norm_order"]))
        pairs += [
            (f"{at}.{branch}.{name}", theirs[branch][name], ours[branch][name])
            for branch in _branches(ours)
            for name in _SAME_BRANCH[branch]
        ]
    for name, theirs, ours in pairs:
        if theirs != ours:
            yield f"{name} ({ours}) must be that of the parent ({theirs})"


def _branches(layer: Mapping[str, Any]) -> list[str]:
    # checkpoints from before there were others lack their names
    return [name for name in BRANCHES if layer.get(name) is not None]


def _unties(layer: Mapping[str, Any]) -> bool:
    branches = {name: layer[name] for name in _branches(layer)}
    mamba = branches.get("mamba", {})
    counts = [branch.get("groups", 1) for branch in branches.values()]
    counts += [mamba.get(name, 1) for name in GROUPS]
    pools = branches.get("feed_forward", {}).get("pools", ())
    return max(counts) > 1 or any(pool["groups"] for pool in pools)


def _origin(
    name: str,
    shape: Shape,
    parent: Mapping[str, Shape],
    description: Mapping[str, Any],
    child: Decoder.Config,
) -> Inherited | None:
    """Where one parameter comes from; ``ValueError`` if that is nowhere."""
    if match := _EXPERTS.match(name):
        feed_forward, layer, pool, leaf = match[1], int(match[2]), int(match[3]), match[4]
        block = child.layers[layer].feed_forward
        assert isinstance(block, MixtureOfExperts.Config)
        above = description["layers"][layer]["feed_forward"].get("pools")
        if above is None:
            return _from_feed_forward(
                name, f"{feed_forward}.{leaf}", shape, parent, block.pools[pool], child
            )
        return _from_experts(name, shape, parent, above, block.pools, pool)
    theirs = parent.get(name)
    if ".router." in name:
        return Inherited(name, shape) if theirs == shape else None
    if theirs is None:
        raise ValueError(f"{name} is not in the parent")
    if theirs == shape:
        return Inherited(name, shape)
    if theirs == shape[1:]:
        return Inherited(name, theirs, (None,) * shape[0])
    raise ValueError(f"{name} is {shape}, in the parent {theirs}")


def _from_feed_forward(
    name: str,
    source: str,
    shape: Shape,
    parent: Mapping[str, Shape],
    pool: ExpertPool.Config,
    child: Decoder.Config,
) -> Inherited:
    """All experts of a pool from one feed-forward: the only one, or that of their modality."""
    theirs = parent.get(source)
    if theirs is None:
        raise ValueError(f"{source}, from which {name} would come, is not in the parent")
    if theirs == shape[1:]:
        return Inherited(source, theirs, (None,) * shape[0])
    if theirs[1:] != shape[1:]:
        raise ValueError(f"an expert of {name} is {shape[1:]}, {source} of the parent {theirs}")
    served = pool.groups or tuple(range(len(child.modalities)))
    if len(served) > 1:
        raise ValueError(
            f"the {pool.name} experts of {name} serve {len(served)} modalities, and {source} of "
            "the parent has a feed-forward for each; begin with a dense parent"
        )
    return Inherited(source, theirs, (served[0],) * shape[0])


def _from_experts(
    name: str,
    shape: Shape,
    parent: Mapping[str, Shape],
    above: list[Mapping[str, Any]],
    pools: list[ExpertPool.Config],
    pool: int,
) -> Inherited:
    """Experts from experts of the same pool, each to the same number of children."""
    served = [[tuple(one["groups"]) for one in above], [one.groups for one in pools]]
    if served[0] != served[1]:
        raise ValueError(
            f"the pools of {name} serve the groups {served[1]}, those of the parent {served[0]}"
        )
    theirs = parent[name]
    if theirs[1:] != shape[1:] or shape[0] % theirs[0]:
        raise ValueError(f"{name} is {shape}, in the parent {theirs}")
    if theirs == shape:
        return Inherited(name, theirs)
    copies = shape[0] // theirs[0]
    return Inherited(name, theirs, tuple(place // copies for place in range(shape[0])))
