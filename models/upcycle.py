"""Upcycling: where each tensor of a sparse model comes from in its denser parent.

Each feed-forward becomes all experts of its modality group; shared parameters become one copy per
modality where the child unties them; routers are new (MoMa, arXiv 2407.21770, 2.5; sparse
upcycling, arXiv 2212.05055). The same map starts the second stage, in which only causal routers are
new. Each branch maps its own tensors (``Branch.Config.inherit``).

=====================  ===========================================================================
parent                 children
=====================  ===========================================================================
dense                  1t1i, Mixture-of-Transformers, any pools of experts
1t1i                   Mixture-of-Transformers, pools of one modality each
pools of experts       the same with a multiple of the experts, with causal routers
Mamba, hybrids         the same with more projections untied by modality: Mixture-of-Mamba
all of these           the same with depth-routed blocks, whose routers are new; other
                       token ids; vectors
=====================  ===========================================================================
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from earlyfuse.models.blocks.block import EXTRA
from earlyfuse.models.blocks.branch import Inherited, Parent, Shape, same_or_untied
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary_growth import EMBEDDING, HEAD, grown_rows

_NO_BRANCH = (
    *("norm_order", "norm_groups", "dropout", "depth", "kind"),
    *("param_init", "sharding_config"),
)

_ADAPTERS = ("vector_input", "vector_output")  # new in a child of a model without vectors


def upcycle(parent: Decoder.Config, child: Decoder.Config) -> dict[str, Inherited | None]:
    """Parameter of ``child`` → its origin in ``parent``; None: as initialised.

    ``ValueError`` lists tensors of either that have no counterpart in the other.
    """
    return inherit(shapes(parent), parent.to_dict(), child)


def inherit(
    parent: Mapping[str, Shape],
    description: Mapping[str, Any],
    child: Decoder.Config,
    row_V: Sequence[int | None] | None = None,
) -> dict[str, Inherited | None]:
    """``upcycle`` from the contents of a checkpoint: shapes, and ``Decoder.Config.to_dict``.

    ``row_V``: the parent's row of each id of the child, None for a new id; None: ids are the same.
    """
    if row_V is not None:
        description = {**description, "vocab_size": child.vocab_size}
    problems = list(_differences(description, child))
    found: dict[str, Inherited | None] = {}
    for name, shape in shapes(child).items():
        try:
            if row_V is not None and name in (EMBEDDING, HEAD) and name in parent:
                found[name] = grown_rows(name, shape, parent[name], row_V, child.seed)
                continue
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
    """Fields that must be equal for the child to compute what the parent does, and are not."""
    fields = child.to_dict()
    if len(parent["layers"]) != len(fields["layers"]):
        yield f"layers ({len(fields['layers'])}) must be those of the parent"
        return
    same = ("dim", "vocab_size", "rope_theta") if child.head_dim else ("dim", "vocab_size")
    pairs = [(name, parent[name], fields[name]) for name in same]
    if unties(parent["layers"]):
        pairs.append(("modalities", list(parent["modalities"]), list(fields["modalities"])))
    for index, (theirs, layer) in enumerate(zip(parent["layers"], child.layers, strict=True)):
        at, above = f"layers[{index}]", _branches(theirs)
        if above.keys() != layer.branches.keys():
            yield (
                f"{at} is made of {' and '.join(layer.branches)}, in the parent of "
                f"{' and '.join(above)}"
            )
            return
        pairs.append((f"{at}.norm_order", theirs["norm_order"], layer.norm_order))
        pairs += [
            (f"{at}.{name}.{field}", above[name][field], getattr(branch, field))
            for name, branch in layer.branches.items()
            for field in branch.inherited_fields
        ]
    if parent.get("vectors") and child.vectors is not None:
        pairs += _flat_pairs("vectors", parent["vectors"], fields["vectors"])
    for name, theirs, ours in pairs:
        if theirs != ours:
            yield f"{name} ({ours}) must be that of the parent ({theirs})"


def _flat_pairs(
    place: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each field of two descriptions of one kind, nested ones too."""
    for name in (*ours, *(name for name in theirs if name not in ours)):
        their, our = theirs.get(name), ours.get(name)
        if isinstance(their, Mapping) and isinstance(our, Mapping):
            yield from _flat_pairs(f"{place}.{name}", their, our)
        else:
            yield f"{place}.{name}", their, our


def _branches(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Name → fields of the branches of a layer, in order."""
    found: dict[str, Any] = {}
    for name, fields in layer.items():
        if name == EXTRA:
            found |= fields
        elif isinstance(fields, Mapping) and name not in _NO_BRANCH:
            found[name] = fields
    return found


def unties(value: Any) -> bool:
    """True if any part of a description unties parameters by modality: ``groups``, ``norm_groups``
    … above 1, or a pool of some groups.
    """
    if isinstance(value, Mapping):
        return any(
            (name.endswith("groups") and bool(inner) and inner != 1) or unties(inner)
            for name, inner in value.items()
        )
    return isinstance(value, list | tuple) and any(map(unties, value))


def _origin(
    name: str,
    shape: Shape,
    parent: Mapping[str, Shape],
    description: Mapping[str, Any],
    child: Decoder.Config,
) -> Inherited | None:
    """The origin of one parameter; ``ValueError`` if it has none."""
    first, *path = name.split(".")
    if first == "depth_projection" or (first == "layers" and path[1] == "depth"):
        return Inherited(name, shape) if parent.get(name) == shape else None
    if first in _ADAPTERS and not description.get("vectors"):
        return None
    branch = child.layers[int(path[0])].branches.get(path[1]) if first == "layers" else None
    if branch is None:
        return same_or_untied(name, shape, parent)
    layers = description["layers"][int(path[0]) :]
    above = _branches(layers[0]).get(path[1]) if layers else None
    if above is None:
        raise ValueError(f"{name} is not in the parent")
    return branch.inherit(name, shape, Parent(parent, above), len(child.modalities))
