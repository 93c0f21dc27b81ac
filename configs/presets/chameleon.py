"""Chameleon (arXiv 2405.09818), on data of your own

From the paper: norm orders, dropout, batches, warm-up, 9.2 T tokens. The learning rate decays
exponentially "to 0"; here to a hundredth of its peak. 7B has the shape of the public checkpoint.
34B: grouped queries and the norm order are the paper's; width, layers, heads and inner width are
not published, and those here are chosen because they give 34.3 B parameters. 7B with experts is
MoMa's upcycling (arXiv 2407.21770, 2.5) of the public checkpoint; by the loader's
quota half of its tokens are image codes.
"""

from functools import partial

from earlyfuse.configs.decoders import Shape, dense
from earlyfuse.configs.forms import in_form
from earlyfuse.configs.presets.recipe import VOCABULARY, Recipe, preset
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import Modality

CHAMELEON_7B = Shape(
    dim=4096,
    layers=32,
    heads=32,
    hidden_dim=11008,
    vocab_size=VOCABULARY,
    norm_order="pre",
    dropout=0.1,
)
CHAMELEON_34B = Shape(
    dim=8192, layers=48, heads=64, kv_heads=8, hidden_dim=22016, vocab_size=VOCABULARY
)
TOKENS = 9.2e12


def _moma_of(shape: Shape, experts: dict[Modality, int], routing_rows: int) -> Decoder.Config:
    """As ``--start.upcycle 4t4i``: experts as wide as the feed-forward that they begin as."""
    form = "".join(f"{count}{modality.label[0]}" for modality, count in experts.items())
    model = in_form(dense(shape), form)
    for _, pool, _, _ in model.traverse(ExpertPool.Config):
        pool.router.routing_rows = routing_rows
    return model


def _recipe(rows: int, rows_at_once: int) -> Recipe:
    return Recipe(
        steps=round(TOKENS / (rows * 4096)),
        rows=rows,
        rows_at_once=rows_at_once,
        decay="exponential",
        recompute="full",
    )


_EXPERTS = {Modality.TEXT: 4, Modality.IMAGE: 4}
CONFIGS = {
    "chameleon_7b": preset(
        "chameleon_7b",
        "32 layers of 4096, dropout 0.1",
        partial(dense, CHAMELEON_7B),
        _recipe(2048, 2),
    ),
    "chameleon_34b": preset(
        "chameleon_34b",
        "48 layers of 8192, grouped queries",
        partial(dense, CHAMELEON_34B),
        _recipe(3072, 1),
    ),
    "chameleon_7b_4t4i": preset(
        "chameleon_7b_4t4i",
        "chameleon_7b upcycled to four text and four image experts (--start.model)",
        partial(_moma_of, CHAMELEON_7B, _EXPERTS, routing_rows=2),
        _recipe(2048, 2),
        media_share=0.5,
    ),
}
