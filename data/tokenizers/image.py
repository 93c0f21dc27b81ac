"""Images as a medium: loads and trains their tokenizers, and measures them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from earlyfuse.data.media import Sampling
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_tokenizer import ImageTokenizer, check_image_geometry
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer, check_patch
from earlyfuse.data.tokenizers.kmeans import one_thread
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.tokenizer_file import code_usage, load_tokenizer

if TYPE_CHECKING:
    from earlyfuse.data.prepare.progress import Progress
    from earlyfuse.data.prepare.spec import PrepareSpec

QUALITY = "PSNR dB"
# how much training data a tokenizer sees
_PATCHES = {"kmeans": 1 << 16, "vqvae": 1 << 18}
_PIXEL_BYTES = 1 << 28


def load(path: Path) -> ImageTokenizer:
    """See ``MediumModule``; the file's metadata name the kind."""
    return load_tokenizer("image", path, (KMeansTokenizer, VQVAETokenizer, ChameleonTokenizer))


def check(spec: "PrepareSpec") -> None:
    """See ``MediumModule``."""
    check_image_geometry(spec.image_size, spec.patch, spec.codes)
    if spec.image_tokenizer == "vqvae":
        check_patch(spec.patch)
    if spec.vq_steps < 1:
        raise ValueError(f"vq_steps ({spec.vq_steps}) must be at least 1")


def settings(spec: "PrepareSpec") -> dict[str, Any]:
    """See ``MediumModule``."""
    names = ("image_size", "patch", "codes", "seed")
    steps = {"steps": spec.vq_steps} if spec.image_tokenizer == "vqvae" else {}
    return {name: getattr(spec, name) for name in names} | steps


def limits(spec: "PrepareSpec") -> dict[str, Any]:
    """None: any image is shrunk and cropped to a square."""
    return {}


def sampling(spec: "PrepareSpec") -> Sampling:
    """Number of images to train on: as many as improve the tokenizer, in bounded memory."""
    block = (spec.image_size // spec.patch) ** 2
    wanted = max(1024, _PATCHES[spec.image_tokenizer] // block)
    budget = min(wanted, max(1, _PIXEL_BYTES // (3 * spec.image_size**2)))
    return Sampling(budget, lambda encoded: image_pixels(encoded, spec.image_size), lambda _: 1)


def train(
    items: Sequence[np.ndarray], spec: "PrepareSpec", progress: "Progress"
) -> tuple[ImageTokenizer, str]:
    """See ``MediumModule``."""
    images = np.stack(items)
    progress.tell(
        f"image tokenizer: {spec.image_tokenizer} of {spec.codes} codes from {len(images)} images"
    )
    sizes = {"patch": spec.patch, "codes": spec.codes, "seed": spec.seed}
    tokenizer: ImageTokenizer
    if spec.image_tokenizer == "kmeans":
        with one_thread():
            tokenizer = KMeansTokenizer.train(images, **sizes)
    else:
        with progress.steps("vqvae", spec.vq_steps) as show:
            tokenizer = VQVAETokenizer.train(images, steps=spec.vq_steps, progress=show, **sizes)
    found = measure(tokenizer, images[:4096])
    return tokenizer, (
        f"PSNR {found.psnr:.1f} dB, {found.used} of {spec.codes} codes used, "
        f"perplexity {found.perplexity:.0f}"
    )


class Quality(NamedTuple):
    """``psnr`` in dB over all pixels; ``used`` codes; ``perplexity`` of the codes."""

    psnr: float
    used: int
    perplexity: float


def measure(tokenizer: ImageTokenizer, images: np.ndarray) -> Quality:
    """Encode and decode ``images``, uint8 (N, H, H, 3), N ≥ 1."""
    codes = tokenizer.encode(images)
    difference = tokenizer.decode(codes).astype(np.int64) - images
    counts = np.bincount(codes.ravel(), minlength=tokenizer.codes)
    return Quality(quality(float(np.mean(difference**2))), *code_usage(counts))


def quality(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pixels; infinite without error."""
    if mean_squared_error == 0:
        return float("inf")
    return float(10 * np.log10(255**2 / mean_squared_error))
