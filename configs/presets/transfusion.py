"""Transfusion (arXiv 2408.11039) and its sparse variants, on data of your own

Text and images as latents of a KL-VAE, 8 channels of 32 x 32 for 256 pixels, two by two in a
vector (``prepare --image-tokenizer``, docs/data.md). Each size is dense, as in the paper, and as
Mixture-of-Transformers (arXiv 2411.04996); at 0.16B, 0.76B and 1.4B also as MoMa with four text and
four image experts, dense Mamba and Mixture-of-Mamba (arXiv 2501.16295). With unet, the adapters are
a U-Net of about 0.27 B parameters; with flow, v is predicted along a rectified flow whose shift
follows from the numbers of an image (arXiv 2403.03206, 2510.11690); with pixels, there is no VAE:
16 x 16 pixels are a vector, and the model predicts x (JiT).

From the paper: widths, layers, heads, Llama's blocks without qk-norm, AdamW 0.9/0.95, eps 1e-8,
rate 3e-4 to 1.5e-5 along a cosine, warm-up 4000, rows of 4096 tokens, 2 M tokens a step, 250,000
steps.
Not established: the share of dropped captions, here a tenth; widths of the U-Net, here such that it
has the paper's parameters; the batch of the sparse variants, here the same. Half of the tokens are
vectors, by the loader's quota. A vocabulary has 32,000 ids with sentinels and placeholder.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from earlyfuse.configs.decoders import Shape, dense, mixture_of_transformers, moma
from earlyfuse.configs.mamba_decoders import MambaShape, mamba, mixture_of_mamba
from earlyfuse.configs.presets.recipe import Recipe, preset
from earlyfuse.configs.transfusion import (
    JIT,
    PAPER,
    jit_loss,
    paper_loss,
    shift_of,
    with_vectors,
)
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.trainer import Trainer

VOCABULARY = 32_000
IMAGE_SHARE = 0.5
SHARES = {Modality.TEXT: 1 - IMAGE_SHARE, Modality.IMAGE: IMAGE_SHARE}
CHANNELS, BLOCK = 8, 256  # of latents; vectors of an image
LATENT = 2 * 2 * CHANNELS
PIXEL_PATCH = 16 * 16 * 3
FLOW = Diffusion.Config(schedule="flow", predicts="v", shift=shift_of(BLOCK * LATENT))
# denoising steps, guidance, method: the papers', else Transfusion's
SAMPLING: dict[str, tuple[int, float, Literal["ddim", "heun"]]] = {
    "paper": (250, 5.0, "ddim"),
    "pixels": (50, 3.0, "heun"),
}


def _shape(dim: int, layers: int, heads: int, hidden_dim: int) -> Shape:
    return Shape(
        dim=dim,
        layers=layers,
        heads=heads,
        hidden_dim=hidden_dim,
        vocab_size=VOCABULARY,
        norm_order="pre",
        qk_norm=False,
    )


SIZES = {
    "160m": _shape(768, 16, 12, 2048),
    "370m": _shape(1024, 24, 16, 2816),
    "760m": _shape(1536, 24, 24, 4096),
    "1_4b": _shape(2048, 24, 16, 5632),
    "7b": _shape(4096, 32, 32, 11008),
}
SPARSE = ("160m", "760m", "1_4b")
UNET = "7b"  # the size with a U-Net
UNET_FEATURES = 1344
_ROWS_AT_ONCE = {"160m": 8, "370m": 4, "760m": 4, "1_4b": 4, "7b": 2}
_RECOMPUTE: dict[str, Literal["selective", "full"]] = {
    "760m": "selective",
    "1_4b": "selective",
    "7b": "full",
}
RECIPES = {
    size: Recipe(
        steps=250_000,
        rows=512,
        rows_at_once=_ROWS_AT_ONCE[size],
        decay="cosine",
        lr=3e-4,
        least_lr=1.5e-5,
        eps=1e-8,
        recompute=_RECOMPUTE.get(size, "none"),
    )
    for size in SIZES
}


def _latents(model: Decoder.Config) -> Decoder.Config:
    return with_vectors(model, LATENT, PAPER, block=BLOCK)


def _unet(model: Decoder.Config) -> Decoder.Config:
    return with_vectors(
        model, LATENT, PAPER,
        adapter="unet", block=BLOCK, channels=CHANNELS, features=UNET_FEATURES,
    )  # fmt: skip


def _flow(model: Decoder.Config) -> Decoder.Config:
    return with_vectors(model, LATENT, FLOW, block=BLOCK)


def _pixels(model: Decoder.Config) -> Decoder.Config:
    return with_vectors(model, PIXEL_PATCH, JIT, block=BLOCK, bottleneck=128)


def _variants(size: str) -> dict[str, tuple[str, Callable[[], Decoder.Config]]]:
    """Suffix → title and decoder without vectors."""
    shape, rows = SIZES[size], RECIPES[size].rows_at_once
    found: dict[str, tuple[str, Callable[[], Decoder.Config]]] = {
        "": ("dense", partial(dense, shape)),
        "_mot": ("all parameters by modality", partial(mixture_of_transformers, shape)),
    }
    if size in SPARSE:
        experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
        mambas = MambaShape(dim=shape.dim, layers=shape.layers, vocab_size=VOCABULARY)
        found |= {
            "_moma": (
                "4 text and 4 image experts",
                partial(moma, shape, experts, SHARES, routing_rows=rows),
            ),
            "_mamba": ("dense Mamba, two blocks a layer", partial(mamba, mambas)),
            "_mom": ("Mixture-of-Mamba, two blocks a layer", partial(mixture_of_mamba, mambas)),
        }
    return found


def _composed(
    adapters: Callable[[Decoder.Config], Decoder.Config], model: Callable[[], Decoder.Config]
) -> Decoder.Config:
    return adapters(model())


def _preset(
    name: str,
    title: str,
    size: str,
    model: Callable[[], Decoder.Config],
    adapters: Callable[[Decoder.Config], Decoder.Config] = _latents,
) -> Callable[[], Trainer.Config]:
    shape, loss = SIZES[size], paper_loss()
    if adapters is _pixels:
        loss = jit_loss()
    elif adapters is _flow:
        loss = paper_loss(times="logit_normal")
    whole = preset(
        name,
        f"{shape.layers} layers of {shape.dim}, {title}",
        partial(_composed, adapters, model),
        RECIPES[size],
        media_share=IMAGE_SHARE,
        loss=loss,
    )

    def config() -> Trainer.Config:
        """With the sampler of the paper."""
        found = whole()
        sampler = found.sampler
        steps, guidance, method = SAMPLING["pixels" if adapters is _pixels else "paper"]
        sampler.denoising_steps, sampler.guidance = steps, guidance
        sampler.denoising_method = method
        return found

    config.__name__, config.__doc__ = name, whole.__doc__
    return config


CONFIGS = {
    f"transfusion_{size}{suffix}": _preset(f"transfusion_{size}{suffix}", title, size, model)
    for size in SIZES
    for suffix, (title, model) in _variants(size).items()
} | {
    name: _preset(name, title, size, partial(dense, SIZES[size]), adapters)
    for name, title, size, adapters in (
        (f"transfusion_{UNET}_unet", "dense, U-Net adapters", UNET, _unet),
        ("transfusion_760m_flow", "dense, rectified flow, v-prediction", "760m", _flow),
        ("transfusion_760m_pixels", "dense, patches of 16 pixels, x-prediction", "760m", _pixels),
    )
}
