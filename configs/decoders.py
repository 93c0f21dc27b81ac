"""Model configs by composition: one decoder, differing only in what its feed-forward is made of.

``moe_8x``, ``1t1i``, ``4t4i`` are MoMa's names (arXiv 2407.21770, 4.1): expert choice over all
tokens, one feed-forward per modality, four text and four image experts. All have the same FLOPs per
token as the dense model of the same shape.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.decoder import Block, Decoder
from earlyfuse.models.modality import Modality
from earlyfuse.models.routing.expert_choice import ExpertChoice


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
    modalities: tuple[Modality, ...] = (Modality.TEXT, Modality.IMAGE)


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


def moe(shape: Shape, experts: int = 8, *, routing_rows: int = 1) -> Decoder.Config:
    """Expert choice over all tokens, whatever their modality."""
    return _decoder(
        shape,
        lambda: MixtureOfExperts.Config(
            pools=[
                ExpertPool.Config(
                    name="all",
                    dim=shape.dim,
                    hidden_dim=shape.hidden_dim,
                    experts=experts,
                    router=ExpertChoice.Config(routing_rows=routing_rows),
                )
            ]
        ),
    )


def moma(
    shape: Shape,
    experts: dict[Modality, int],
    shares: dict[Modality, float],
    *,
    routing_rows: int = 1,
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

    def feed_forward() -> MixtureOfExperts.Config:
        return MixtureOfExperts.Config(
            pools=[
                ExpertPool.Config(
                    name=modality.label,
                    dim=shape.dim,
                    hidden_dim=shape.hidden_dim,
                    experts=experts[modality],
                    groups=(group,),
                    share=shares[modality],
                    router=ExpertChoice.Config(routing_rows=routing_rows),
                )
                for group, modality in enumerate(shape.modalities)
            ]
        )

    return _decoder(shape, feed_forward)


def with_routers(model: Decoder.Config, **fields: Any) -> Decoder.Config:
    """A copy of ``model`` whose expert-choice routers have these ``fields`` of
    ``ExpertChoice.Config``: causal routers, noise, how weights are made. ``ValueError`` without
    such routers.
    """
    model = deepcopy(model)
    pools = [pool for _, pool, _, _ in model.traverse(ExpertPool.Config)]
    if not pools:
        raise ValueError(f"{', '.join(fields)} cannot be set: the model has no routed experts")
    for pool in pools:
        pool.router = replace(pool.router, **fields)
    return model


def moma_1_4b() -> Decoder.Config:
    """MoMa 1.4B 4t4i (arXiv 2407.21770, table 1): 7.3 B parameters, 1.4 B of them for a token.

    Inner widths are two thirds of 4 · dim, rounded up to 256 as in public Chameleon code.
    """
    return _moma_4t4i(Shape(dim=2048, layers=24, heads=16, hidden_dim=5632, vocab_size=65536))


def moma_7b() -> Decoder.Config:
    """MoMa 4t4i in the shape of Chameleon-7B: 37 B parameters, 7 B of them for a token."""
    return _moma_4t4i(Shape(dim=4096, layers=32, heads=32, hidden_dim=11008, vocab_size=65536))


def _moma_4t4i(shape: Shape) -> Decoder.Config:
    experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
    return moma(shape, experts, {Modality.TEXT: 0.5, Modality.IMAGE: 0.5})


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
