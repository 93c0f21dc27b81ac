"""Mixture-of-Transformers in the Chameleon setting (arXiv 2411.04996), on data of your own

Five sizes, each dense, as Mixture-of-Transformers (all parameters of a block by modality), and with
the paper's other baseline, four experts that choose among all tokens.

From the paper: widths, layers, 4096 tokens a row, the norm after each branch. Not established:
heads, here of 64 numbers at 37M, else MoMa's; batches and steps, here such that a run takes 0.17 to
0.38 T tokens, the paper's range; all else is Chameleon's recipe (``recipe.Recipe``), with its
learning rate decayed linearly.
"""

from functools import partial

from earlyfuse.configs.decoders import Shape, dense, mixture_of_transformers, moe
from earlyfuse.configs.presets.recipe import VOCABULARY, Recipe, preset

SIZES = {
    "37m": Shape(dim=256, layers=4, heads=4, hidden_dim=768, vocab_size=VOCABULARY),
    "94m": Shape(dim=512, layers=8, heads=8, hidden_dim=1536, vocab_size=VOCABULARY),
    "443m": Shape(dim=1024, layers=24, heads=16, hidden_dim=2816, vocab_size=VOCABULARY),
    "1_5b": Shape(dim=2048, layers=24, heads=16, hidden_dim=5632, vocab_size=VOCABULARY),
    "7b": Shape(dim=4096, layers=32, heads=32, hidden_dim=11008, vocab_size=VOCABULARY),
}
RECIPES = {
    "37m": Recipe(steps=160_000, rows=384, rows_at_once=6, decay="linear"),
    "94m": Recipe(steps=160_000, rows=256, rows_at_once=4, decay="linear"),
    "443m": Recipe(steps=160_000, rows=384, rows_at_once=6, decay="linear"),
    "1_5b": Recipe(steps=120_000, rows=512, rows_at_once=4, decay="linear", recompute="selective"),
    "7b": Recipe(steps=120_000, rows=768, rows_at_once=2, decay="linear", recompute="full"),
}

CONFIGS = {
    f"mot_{size}_{variant}": preset(
        f"mot_{size}_{variant}",
        f"{shape.layers} layers of {shape.dim}, {title}",
        model,
        RECIPES[size],
    )
    for size, shape in SIZES.items()
    for variant, title, model in (
        ("dense", "dense", partial(dense, shape)),
        ("mot", "all parameters by modality", partial(mixture_of_transformers, shape)),
        (
            "moe_4x",
            "four experts",
            partial(moe, shape, 4, routing_rows=RECIPES[size].rows_at_once),
        ),
    )
}
