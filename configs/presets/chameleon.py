"""Chameleon (arXiv 2405.09818), on data of your own

From the paper: norm orders, dropout, batches, warm-up, 9.2 T tokens. The learning rate decays
exponentially "to 0"; here to a hundredth of its peak. 7B has the shape of the public checkpoint.
34B: grouped queries and the norm order are the paper's; width, layers, heads and inner width are
not published, and those here are chosen because they give 34.3 B parameters.
"""

from functools import partial

from earlyfuse.configs.decoders import Shape, dense
from earlyfuse.configs.presets.recipe import VOCABULARY, Recipe, preset

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

CONFIGS = {
    name: preset(
        name,
        title,
        partial(dense, shape),
        Recipe(
            steps=round(TOKENS / (rows * 4096)),
            rows=rows,
            rows_at_once=rows_at_once,
            decay="exponential",
            recompute="full",
        ),
    )
    for name, title, shape, rows, rows_at_once in (
        ("chameleon_7b", "32 layers of 4096, dropout 0.1", CHAMELEON_7B, 2048, 2),
        ("chameleon_34b", "48 layers of 8192, grouped queries", CHAMELEON_34B, 3072, 1),
    )
}
