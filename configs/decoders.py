"""Model configs by composition: one decoder with different feed-forwards.

``moe_8x``, ``1t1i``, ``4t4i`` are MoMa's names (arXiv 2407.21770, 4.1): expert choice over all
tokens, one feed-forward per modality, four text and four image experts. Apart from routers, all
have the FLOPs per token of the dense model of the same shape: where a token takes n experts, shared
ones included, each has an n-th of the shape's inner width.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.routing.token_choice import TokenChoice
from earlyfuse.models.vocabulary import Modality


@dataclass(frozen=True)
class Shape:
    """Sizes that all variants share. ``hidden_dim`` is the inner width of one SwiGLU."""

    dim: int
    layers: int
    heads: int
    hidden_dim: int
    vocab_size: int
    kv_heads: int | None = None
    norm_order: Literal["pre", "swin"] = "swin"
    init_std: float = 0.02
    dropout: float = 0.0
    qk_norm: bool = True
    modalities: tuple[Modality, ...] = (Modality.TEXT, Modality.IMAGE)


@dataclass(frozen=True)
class Shared:
    """Experts that every token takes besides its routed ones: ``everyone`` the same for all tokens,
    ``by_modality`` those of its modality.
    """

    everyone: int = 0
    by_modality: int = 0


def dense(shape: Shape) -> Decoder.Config:
    """Chameleon: every token uses the same parameters."""
    return _decoder(shape, _feed_forward(shape))


def moe_1t1i(shape: Shape) -> Decoder.Config:
    """One feed-forward per modality, everything else shared."""
    return _decoder(shape, _feed_forward(shape, len(shape.modalities)))


def mixture_of_transformers(shape: Shape) -> Decoder.Config:
    """All parameters of a block untied by modality; attention over the whole sequence."""
    groups = len(shape.modalities)
    return _decoder(shape, _feed_forward(shape, groups), groups)


def moe(
    shape: Shape, experts: int = 8, *, routing_rows: int = 1, shared: Shared = Shared()
) -> Decoder.Config:
    """Expert choice over all tokens, whatever their modality."""
    width = _expert_width(shape, 1, shared)
    pool = _pool_for_all(shape, width, experts, ExpertChoice.Config(routing_rows=routing_rows))
    return _decoder(shape, _mixture(shape, [pool], width, shared))


def moma(
    shape: Shape,
    experts: dict[Modality, int],
    shares: dict[Modality, float],
    *,
    routing_rows: int = 1,
    shared: Shared = Shared(),
) -> Decoder.Config:
    """MoMa: experts of each modality choose among its tokens.

    ``shares``: the part of all tokens that has each modality, from which static budgets follow.
    ``ValueError`` if the shares do not sum to 1, or experts and modalities do not match.
    """
    _check_modalities(shape, experts=experts, shares=shares)
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(
            f"shares {_named(shares)} must sum to 1, not {sum(shares.values()):.6g}; rescale them"
        )
    width = _expert_width(shape, 1, shared)
    pools = [
        ExpertPool.Config(
            name=modality.label,
            dim=shape.dim,
            hidden_dim=width,
            experts=experts[modality],
            groups=(group,),
            share=shares[modality],
            router=ExpertChoice.Config(routing_rows=routing_rows),
        )
        for group, modality in enumerate(shape.modalities)
    ]
    return _decoder(shape, _mixture(shape, pools, width, shared))


def with_routers(model: Decoder.Config, **fields: Any) -> Decoder.Config:
    """A copy of ``model`` with these ``fields`` of ``ExpertChoice.Config`` in all its routers:
    causal routers, noise, weights … ``ValueError`` without such routers.
    """
    model = deepcopy(model)
    pools = [
        pool
        for _, pool, _, _ in model.traverse(ExpertPool.Config)
        if isinstance(pool.router, ExpertChoice.Config)
    ]
    if not pools:
        raise ValueError(
            f"{', '.join(fields)} cannot be set: the model has no experts that choose tokens"
        )
    for pool in pools:
        pool.router = replace(pool.router, **fields)
    return model


def token_choice(
    shape: Shape,
    experts: int | dict[Modality, int],
    *,
    shared: Shared = Shared(),
    router: TokenChoice.Config | None = None,
) -> Decoder.Config:
    """Each token takes its ``router.top_k`` experts: of all, or of those of its modality where
    ``experts`` gives their number for each.

    ``router``: top k, weights and balance; ``serves`` is filled in.
    """
    router = router or TokenChoice.Config()
    if isinstance(experts, dict):
        _check_modalities(shape, experts=experts)
        router = replace(router, serves=_interleaved(experts, shape.modalities))
        experts = sum(experts.values())
    width = _expert_width(shape, router.top_k, shared)
    pool = _pool_for_all(shape, width, experts, router)
    return _decoder(shape, _mixture(shape, [pool], width, shared))


def grown(parent: Decoder.Config, form: str) -> Decoder.Config:
    """The sparse model that a dense or 1t1i ``parent`` is upcycled to: other feed-forwards, and in
    "mot" untied attention and norms.

    ``form``: "1t1i", "mot", "8x" or the like, or experts of each modality by their first letters,
    as "4t4i". Experts start alike, with the routers of the smallest jump (docs/moma.md).
    ``ValueError`` for other forms and parents.
    """
    labels = [Modality(modality).label for modality in parent.modalities]
    number = r"([1-9]\d{0,3})"
    by_modality = re.fullmatch("".join(number + label[0] for label in labels), form)
    for_all = re.fullmatch(number + "x", form)
    if not (by_modality or for_all or form == "mot"):
        raise ValueError(
            f"form ({form!r}) must be mot, mixture_of_mamba, a number of experts as 8x, or those "
            f"of each modality, as {''.join(f'4{label[0]}' for label in labels)}, from 1 to 9999"
        )
    if not any(layer.feed_forward for layer in parent.layers):
        raise ValueError(f"{form} unties feed-forwards, and the parent has none")
    child = deepcopy(parent)
    for layer in child.layers:
        if layer.feed_forward is None:
            continue
        if not isinstance(layer.feed_forward, FeedForward.Config):
            raise ValueError("the parent has experts already; give a dense or 1t1i one")
        if form == "mot":
            if layer.attention is None:
                raise ValueError("mot unties attention, and the parent has a layer without it")
            layer.attention.groups = layer.norm_groups = len(labels)
        if form == "mot" or (by_modality and set(by_modality.groups()) == {"1"}):
            layer.feed_forward.groups = len(labels)
            continue
        experts = partial(
            ExpertPool.Config,
            dim=layer.feed_forward.dim,
            hidden_dim=layer.feed_forward.hidden_dim,
            router=ExpertChoice.Config(init="centred", weights="normalised"),
        )
        if for_all:
            pools = [experts(name="all", experts=int(for_all[1]))]
        else:
            assert by_modality is not None, "the form is one of three"
            pools = [
                experts(name=label, experts=int(count), groups=(group,), share=1 / len(labels))
                for group, (label, count) in enumerate(
                    zip(labels, by_modality.groups(), strict=True)
                )
            ]
        layer.feed_forward = MixtureOfExperts.Config(pools=pools)
    return child


def _check_modalities(shape: Shape, **given: Mapping[Modality, float]) -> None:
    if any(set(values) != set(shape.modalities) for values in given.values()):
        shown = " and ".join(f"{name} {_named(values)}" for name, values in given.items())
        labels = [modality.label for modality in shape.modalities]
        raise ValueError(f"{shown} must be given for exactly the modalities {labels}")


def _named(values: Mapping[Modality, float]) -> dict[str, float]:
    return {modality.label: value for modality, value in values.items()}


def _pool_for_all(
    shape: Shape, width: int, experts: int, router: ExpertChoice.Config | TokenChoice.Config
) -> ExpertPool.Config:
    return ExpertPool.Config(
        name="all", dim=shape.dim, hidden_dim=width, experts=experts, router=router
    )


def _interleaved(experts: dict[Modality, int], modalities: tuple[Modality, ...]) -> tuple[int, ...]:
    """The modality group of each expert, interleaved evenly: equal parts of all experts, as ranks
    have them, are equal parts of each modality's.
    """
    places = [
        ((number + 0.5) / experts[modality], group)
        for group, modality in enumerate(modalities)
        for number in range(experts[modality])
    ]
    return tuple(group for _, group in sorted(places))


def _expert_width(shape: Shape, routed: int, shared: Shared) -> int:
    """Inner width with which all experts of a token together cost what one feed-forward does."""
    taken = routed + shared.everyone + shared.by_modality
    if shape.hidden_dim % taken:
        raise ValueError(
            f"hidden_dim ({shape.hidden_dim}) must be a multiple of the {taken} experts that a "
            f"token takes ({routed} routed, {shared.everyone} of everyone, {shared.by_modality} of "
            "its modality), which share it; change one of them"
        )
    return shape.hidden_dim // taken


def _feed_forward(shape: Shape, groups: int = 1) -> FeedForward.Config:
    return FeedForward.Config(dim=shape.dim, hidden_dim=shape.hidden_dim, groups=groups)


def _mixture(
    shape: Shape, pools: list[ExpertPool.Config], width: int, shared: Shared
) -> MixtureOfExperts.Config:
    sizes = ((shared.everyone, 1), (shared.by_modality, len(shape.modalities)))
    return MixtureOfExperts.Config(
        pools=pools,
        shared=[
            FeedForward.Config(dim=shape.dim, hidden_dim=experts * width, groups=groups)
            for experts, groups in sizes
            if experts
        ],
    )


def _decoder(
    shape: Shape, feed_forward: FeedForward.Config | MixtureOfExperts.Config, groups: int = 1
) -> Decoder.Config:
    if shape.dim % shape.heads:
        raise ValueError(
            f"dim ({shape.dim}) must be a multiple of heads ({shape.heads}); change one of them"
        )
    layer = Block.Config(
        attention=Attention.Config(
            dim=shape.dim,
            heads=shape.heads,
            kv_heads=shape.kv_heads or shape.heads,
            head_dim=shape.dim // shape.heads,
            qk_norm=shape.qk_norm,
            groups=groups,
        ),
        feed_forward=feed_forward,
        norm_order=shape.norm_order,
        norm_groups=groups,
        dropout=shape.dropout,
    )
    return Decoder.Config(
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        layers=[deepcopy(layer) for _ in range(shape.layers)],
        modalities=tuple(int(m) for m in shape.modalities),
        init_std=shape.init_std,
    )
