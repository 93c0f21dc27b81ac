"""Mixture-of-Mamba and dense Mamba (arXiv 2501.16295), on data of your own

The Chameleon setting (text and discrete image tokens) and the one with speech, five sizes each. Two
Mamba blocks replace a transformer layer of ``mixture_of_transformers``, from which the names of
sizes, batches, steps and rates are taken, since the paper's are not established.

The third setting, text and image patches as vectors, is in ``transfusion``.
"""

from functools import partial

from earlyfuse.configs.mamba_decoders import MambaShape, mamba, mixture_of_mamba
from earlyfuse.configs.presets.mixture_of_transformers import RECIPES as TRANSFORMER_RECIPES
from earlyfuse.configs.presets.recipe import VOCABULARY, Recipe, preset
from earlyfuse.models.vocabulary import Modality

TEXT_IMAGE = (Modality.TEXT, Modality.IMAGE)
TEXT_IMAGE_SPEECH = (*TEXT_IMAGE, Modality.SPEECH)

# dim, pairs of blocks
SIZES = {
    "37m": (256, 4),
    "94m": (512, 8),
    "443m": (1024, 24),
    "880m": (1536, 24),
    "1_5b": (2048, 24),
}
RECIPES = {name: TRANSFORMER_RECIPES[name] for name in ("37m", "94m", "443m", "1_5b")} | {
    "880m": Recipe(steps=120_000, rows=512, rows_at_once=4, decay="linear", recompute="selective")
}


def shape(size: str, modalities: tuple[Modality, ...]) -> MambaShape:
    """The decoder of a size, for these modalities."""
    dim, layers = SIZES[size]
    return MambaShape(dim=dim, layers=layers, vocab_size=VOCABULARY, modalities=modalities)


CONFIGS = {
    f"mom_{size}_{setting}{variant}": preset(
        f"mom_{size}_{setting}{variant}",
        f"{layers} pairs of blocks of {dim}, {title}",
        partial(make, shape(size, modalities)),
        RECIPES[size],
    )
    for setting, modalities, with_speech in (
        ("", TEXT_IMAGE, ""),
        ("speech_", TEXT_IMAGE_SPEECH, ", with speech"),
    )
    for size, (dim, layers) in SIZES.items()
    for variant, title, make in (
        ("dense", f"dense Mamba{with_speech}", mamba),
        ("mom", f"all projections by modality{with_speech}", mixture_of_mamba),
    )
}
