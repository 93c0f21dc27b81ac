"""Mixture-of-Depths in LLaVA's sizes: p-MoD, γ-MoD, VideoLLM-MoD, on data of your own

The papers fine-tune language models with a vision encoder; here the same rules route the image
tokens of one vocabulary, in decoders of their sizes (Vicuna 7B and 13B, Llama 3 8B) with
Chameleon's recipe (``recipe.Recipe``). To adapt a model that is trained already, start from it
(``--start.model``).

From the papers: schedules over depth, capacities, routers, weights (``configs/depth.py``). Not in
the papers: the share of image tokens, here half, by the loader's quota, and zero as the initial
router, with which training from scratch would begin by keeping the first tokens of each image:
here routers are drawn.
"""

from collections.abc import Callable
from functools import partial

from earlyfuse.configs.decoders import Shape, dense
from earlyfuse.configs.depth import gamma_mod, p_mod, videollm_mod
from earlyfuse.configs.presets.recipe import VOCABULARY, Recipe, preset
from earlyfuse.models.decoder import Decoder

IMAGE_SHARE = 0.5
_7B = Shape(
    dim=4096, layers=32, heads=32, hidden_dim=11008, vocab_size=VOCABULARY, norm_order="pre"
)
_13B = Shape(
    dim=5120, layers=40, heads=40, hidden_dim=13824, vocab_size=VOCABULARY, norm_order="pre"
)
_8B = Shape(
    dim=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    hidden_dim=14336,
    vocab_size=VOCABULARY,
    norm_order="pre",
)
RECIPE = Recipe(steps=120_000, rows=768, rows_at_once=2, decay="linear", recompute="full")


def _routed(shape: Shape, route: Callable[..., Decoder.Config]) -> Decoder.Config:
    return route(dense(shape), media_share=IMAGE_SHARE)


CONFIGS = {
    name: preset(
        name,
        f"{shape.layers} layers of {shape.dim}, {title}",
        partial(_routed, shape, route),
        RECIPE,
        media_share=IMAGE_SHARE,
    )
    for name, shape, title, route in (
        ("p_mod_7b", _7B, "p-MoD", partial(p_mod, init="normal")),
        ("p_mod_13b", _13B, "p-MoD", partial(p_mod, init="normal")),
        ("gamma_mod_7b", _7B, "γ-MoD", gamma_mod),
        ("gamma_mod_13b", _13B, "γ-MoD", gamma_mod),
        ("videollm_mod_8b", _8B, "VideoLLM-MoD", videollm_mod),
    )
}
