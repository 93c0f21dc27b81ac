"""MoMa, table 1 (arXiv 2407.21770), on data of your own

Three sizes, each dense and in five sparse variants of the same FLOPs per token: moe_8x, eight
experts that choose among all tokens; 1t1i, one feed-forward per modality; 4t4i, 6t2i and 7t1i, so
many text and image experts. With mod, every other block takes a quarter of the tokens, and there
are more blocks, at 1.4B wider ones, of about the same FLOPs. Its predictors are trained in a second
stage (``stages.causal_routers_only``), as in the paper.

From the paper: widths, layers, heads, steps, batches, learning rates (tables 1 and 5), the norms of
Chameleon-34B. Not in the paper: the inner width, two thirds of 4 · dim by its totals, here the
nearest multiple of 16 for matrix units and tensor parallelism; the routing group, here 6 rows, the
local batch of its 256 GPUs, and 2 at 1.4B, so that a step fits more ranks; the share of image
tokens, here half, by the loader's quota; what ``recipe.Recipe`` takes from Chameleon.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from earlyfuse.configs.decoders import Shape, dense, moe, moe_1t1i, moma
from earlyfuse.configs.depth import moma_mod
from earlyfuse.configs.presets.recipe import VOCABULARY, Recipe, preset
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import Modality

IMAGE_SHARE = 0.5
SHARES = {Modality.TEXT: 1 - IMAGE_SHARE, Modality.IMAGE: IMAGE_SHARE}
SIZES = {
    "90m": Shape(dim=512, layers=8, heads=8, hidden_dim=1360, vocab_size=VOCABULARY),
    "435m": Shape(dim=1024, layers=24, heads=16, hidden_dim=2736, vocab_size=VOCABULARY),
    "1_4b": Shape(dim=2048, layers=24, heads=16, hidden_dim=5456, vocab_size=VOCABULARY),
}
# the shapes with Mixture-of-Depths
DEEPER = {
    "90m": replace(SIZES["90m"], layers=14),
    "435m": replace(SIZES["435m"], layers=40),
    "1_4b": Shape(dim=2304, layers=32, heads=18, hidden_dim=6144, vocab_size=VOCABULARY),
}
SMALL = Recipe(steps=160_000, rows=1536, rows_at_once=6, decay="linear")
LARGE = Recipe(steps=120_000, rows=2048, rows_at_once=2, decay="linear", recompute="selective")
RECIPES = {"90m": SMALL, "435m": SMALL, "1_4b": LARGE}


def _variants(
    shape: Shape, routing_rows: int
) -> dict[str, tuple[str, Callable[[], Decoder.Config]]]:
    def by_modality(text: int, image: int) -> Callable[[], Decoder.Config]:
        experts = {Modality.TEXT: text, Modality.IMAGE: image}
        return partial(moma, shape, experts, SHARES, routing_rows=routing_rows)

    return {
        "dense": ("dense", partial(dense, shape)),
        "moe_8x": ("eight experts", partial(moe, shape, 8, routing_rows=routing_rows)),
        "moe_1t1i": ("one feed-forward per modality", partial(moe_1t1i, shape)),
        **{
            f"moe_{text}t{image}i": (
                f"{text} text and {image} image expert{'s' * (image > 1)}",
                by_modality(text, image),
            )
            for text, image in ((4, 4), (6, 2), (7, 1))
        },
    }


def _with_depth(model: Callable[[], Decoder.Config], rows: int) -> Decoder.Config:
    return moma_mod(model(), routing_rows=rows, causal=None)


def _deeper(shape: Shape, routing_rows: int) -> dict[str, tuple[str, Callable[[], Decoder.Config]]]:
    """Variants with Mixture-of-Depths: dense, eight experts, 1t1i, 4t4i."""
    variants = _variants(shape, routing_rows)
    named = {"mod": "dense"} | {f"mod_{name}": name for name in ("moe_8x", "moe_1t1i", "moe_4t4i")}
    return {
        name: (
            f"{variants[of][0]}, Mixture-of-Depths",
            partial(_with_depth, variants[of][1], routing_rows),
        )
        for name, of in named.items()
    }


CONFIGS = {
    f"moma_{size}_{variant}": preset(
        f"moma_{size}_{variant}",
        f"{shape.layers} layers of {shape.dim}, {title}",
        model,
        RECIPES[size],
        media_share=IMAGE_SHARE,
    )
    for size in SIZES
    for shape, variants in ((SIZES[size], _variants), (DEEPER[size], _deeper))
    for variant, (title, model) in variants(shape, RECIPES[size].rows_at_once).items()
}
