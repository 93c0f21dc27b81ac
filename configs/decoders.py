"""Model configs by composition: one decoder, differing only in what its feed-forward is made of.

``moe_8x``, ``1t1i``, ``4t4i`` are MoMa's names (arXiv 2407.21770, 4.1): expert choice over all
tokens, one feed-forward per modality, four text and four image experts. All have the same FLOPs per
token as the dense model of the same shape, but for their routers: where a token takes n experts,
shared ones counted, each has an n-th of the shape's inner width.
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.routing.token_choice import TokenChoice
from earlyfuse.models.vocabulary import Modality


@dataclass(frozen=True)
class Shape:
    """What all variants of a size share. ``hidden_dim`` is the width inside one SwiGLU."""

    dim: int
    layers: int
    heads: int
    hidden_dim: int
    vocab_size: int
    kv_heads: int | None = None
    norm_order: Literal["pre", "swin"] = "swin"
    init_std: float = 0.02
    dropout: float = 0.0
    modalities: tuple[Modality, ...] = (Modality.TEXT, Modality.IMAGE)


@dataclass(frozen=True)
class Shared:
    """Experts that every token takes besides its routed ones: ``everyone`` the same for all tokens,
    ``by_modality`` those of its modality.
    """

    everyone: int = 0
    by_modality: int = 0


def dense(shape: Shape) -> Decoder.Config:
    """Chameleon: every token meets the same parameters."""
    return _decoder(shape, lambda: FeedForward.Config(dim=shape.dim, hidden_dim=shape.hidden_dim))


def moe_1t1i(shape: Shape) -> Decoder.Config:
    """One feed-forward per modality, everything else shared."""
    groups = len(shape.modalities)
    return _decoder(
        shape, lambda: FeedForward.Config(dim=shape.dim, hidden_dim=shape.hidden_dim, groups=groups)
    )


def mixture_of_transformers(shape: Shape) -> Decoder.Config:
    """All parameters of a block untied by modality; attention over the whole sequence."""
    groups = len(shape.modalities)
    return _decoder(
        shape,
        lambda: FeedForward.Config(dim=shape.dim, hidden_dim=shape.hidden_dim, groups=groups),
        groups=groups,
    )


def moe(
    shape: Shape, experts: int = 8, *, routing_rows: int = 1, shared: Shared = Shared()
) -> Decoder.Config:
    """Expert choice over all tokens, whatever their modality."""

    def pools(width: int) -> list[ExpertPool.Config]:
        router = ExpertChoice.Config(routing_rows=routing_rows)
        return [_for_all(shape, width, experts, router)]

    return _decoder(shape, lambda: _mixture(shape, 1, pools, shared))


def moma(
    shape: Shape,
    experts: dict[Modality, int],
    shares: dict[Modality, float],
    *,
    routing_rows: int = 1,
    shared: Shared = Shared(),
) -> Decoder.Config:
    """MoMa: experts of each modality choose among the tokens of theirs.

    ``shares``: the part of all tokens that has each modality, from which the static budgets follow.
    Raises ``ValueError`` when the shares do not sum to 1, or experts and modalities do not match.
    """
    if set(experts) != set(shape.modalities) or set(shares) != set(shape.modalities):
        raise ValueError(
            f"experts {_named(experts)} and shares {_named(shares)} must be given for exactly the "
            "modalities "
            f"{[m.label for m in shape.modalities]}"
        )
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(
            f"shares {_named(shares)} must sum to 1, not {sum(shares.values()):.6g}; rescale them"
        )

    def pools(width: int) -> list[ExpertPool.Config]:
        return [
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

    return _decoder(shape, lambda: _mixture(shape, 1, pools, shared))


def with_routers(model: Decoder.Config, **fields: Any) -> Decoder.Config:
    """A copy of ``model`` whose expert-choice routers have these ``fields`` of
    ``ExpertChoice.Config``: causal routers, noise, how weights are made. ``ValueError`` without
    such routers.
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
    ``experts`` says how many each has.

    ``router``: top k, weights and balance; which experts serve what is filled in.
    """
    router = router or TokenChoice.Config()
    if isinstance(experts, int):
        total = experts
    else:
        if set(experts) != set(shape.modalities):
            raise ValueError(
                f"experts {_named(experts)} must be given for exactly the modalities "
                f"{[m.label for m in shape.modalities]}"
            )
        total = sum(experts.values())
        router = replace(router, serves=_spread(experts, shape.modalities))

    def pools(width: int) -> list[ExpertPool.Config]:
        return [_for_all(shape, width, total, router)]

    return _decoder(shape, lambda: _mixture(shape, router.top_k, pools, shared))


def grown(parent: Decoder.Config, form: str, *, routing_rows: int = 1) -> Decoder.Config:
    """What a dense or 1t1i ``parent`` is upcycled to: the same but for its feed-forwards, and for
    attention and norms in "mot".

    ``form``: "1t1i", "mot", "8x" or the like, or experts of each modality by their first letters,
    as "4t4i". Experts start alike, with the routers of the smallest jump (docs/moma.md). Raises
    ``ValueError`` for other forms and parents.
    """
    labels = [Modality(modality).label for modality in parent.modalities]
    counts = re.fullmatch("".join(rf"(\d+){label[0]}" for label in labels), form)
    agnostic = re.fullmatch(r"(\d+)x", form)
    if not (counts or agnostic or form == "mot"):
        raise ValueError(
            f"form ({form!r}) must be mot, a number of experts as 8x, those of each modality, as "
            f"{''.join(f'4{label[0]}' for label in labels)}, or mixture_of_mamba"
        )
    found = counts or agnostic
    numbers = found.groups() if found else ()
    if any(not 1 <= len(number) <= 4 or int(number) == 0 for number in numbers):
        raise ValueError(f"form ({form!r}) must have 1 to 9999 experts; give other numbers")
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
        if (counts is None and agnostic is None) or (counts and set(counts.groups()) == {"1"}):
            layer.feed_forward.groups = len(labels)
            continue
        experts = partial(
            ExpertPool.Config,
            dim=layer.feed_forward.dim,
            hidden_dim=layer.feed_forward.hidden_dim,
            router=ExpertChoice.Config(
                routing_rows=routing_rows, init="centred", weights="normalised"
            ),
        )
        if agnostic:
            pools = [experts(name="all", experts=int(agnostic[1]))]
        else:
            assert counts is not None
            pools = [
                experts(name=label, experts=int(count), groups=(group,), share=1 / len(labels))
                for group, (label, count) in enumerate(zip(labels, counts.groups(), strict=True))
            ]
        layer.feed_forward = MixtureOfExperts.Config(pools=pools)
    return child


def _for_all(
    shape: Shape, width: int, experts: int, router: ExpertChoice.Config | TokenChoice.Config
) -> ExpertPool.Config:
    return ExpertPool.Config(
        name="all", dim=shape.dim, hidden_dim=width, experts=experts, router=router
    )


def _spread(experts: dict[Modality, int], modalities: tuple[Modality, ...]) -> tuple[int, ...]:
    """The modality group of each expert, every group spread evenly over the whole: equal parts of
    all experts, as ranks hold them, are equal parts of each modality's.
    """
    places = [
        ((number + 0.5) / experts[modality], group)
        for group, modality in enumerate(modalities)
        for number in range(experts[modality])
    ]
    return tuple(group for _, group in sorted(places))


def _mixture(
    shape: Shape, routed: int, pools: Callable[[int], list[ExpertPool.Config]], shared: Shared
) -> MixtureOfExperts.Config:
    """``pools`` of a width, and shared experts, that together cost what one feed-forward does."""
    taken = routed + shared.everyone + shared.by_modality
    if shape.hidden_dim % taken:
        raise ValueError(
            f"hidden_dim ({shape.hidden_dim}) must be a multiple of the {taken} experts that a "
            f"token takes ({routed} routed, {shared.everyone} of everyone, {shared.by_modality} of "
            "its modality), which share it; change one of them"
        )
    width = shape.hidden_dim // taken
    sizes = [
        (shared.everyone * width, 1),
        (shared.by_modality * width, len(shape.modalities)),
    ]
    return MixtureOfExperts.Config(
        pools=pools(width),
        shared=[
            FeedForward.Config(dim=shape.dim, hidden_dim=hidden_dim, groups=groups)
            for hidden_dim, groups in sizes
            if hidden_dim
        ],
    )


def _decoder(
    shape: Shape,
    feed_forward: Callable[[], FeedForward.Config | MixtureOfExperts.Config],
    groups: int = 1,
) -> Decoder.Config:
    if shape.dim % shape.heads:
        raise ValueError(
            f"dim ({shape.dim}) must be a multiple of heads ({shape.heads}); change one of them"
        )
    layers = [
        Block.Config(
            attention=Attention.Config(
                dim=shape.dim,
                heads=shape.heads,
                kv_heads=shape.kv_heads or shape.heads,
                head_dim=shape.dim // shape.heads,
                groups=groups,
            ),
            feed_forward=feed_forward(),
            norm_order=shape.norm_order,
            norm_groups=groups,
            dropout=shape.dropout,
        )
        for _ in range(shape.layers)
    ]
    return Decoder.Config(
        dim=shape.dim,
        vocab_size=shape.vocab_size,
        layers=layers,
        modalities=tuple(int(m) for m in shape.modalities),
        init_std=shape.init_std,
    )


def _named(values: Mapping[Modality, float]) -> dict[str, float]:
    return {modality.label: value for modality, value in values.items()}
