"""Images as a medium: which tokenizers there are, how one is loaded or trained, how good it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.media import Sampling
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_tokenizer import (
    FORMAT,
    ImageTokenizer,
    check_image_geometry,
)
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer
from earlyfuse.data.tokenizers.kmeans import one_thread
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.tokenizer_file import load_tokenizer

if TYPE_CHECKING:
    from earlyfuse.data.prepare.progress import Progress
    from earlyfuse.data.prepare.spec import PrepareSpec

QUALITY = "PSNR dB"
# how much training data a tokenizer sees
_PATCHES = {"kmeans": 1 << 16, "vqvae": 1 << 18}
_PIXEL_BYTES = 1 << 28


def load_image_tokenizer(path: Path) -> ImageTokenizer:
    """The tokenizer of a file written by ``save_image_tokenizer``; its metadata say which kind.

    Raises ``ValueError`` naming file and field when the file is no such tokenizer.
    """
    kinds = (KMeansTokenizer, VQVAETokenizer, ChameleonTokenizer)
    return load_tokenizer("image", FORMAT, path, {kind.kind: kind.from_file for kind in kinds})


load = load_image_tokenizer


def save_image_tokenizer(tokenizer: ImageTokenizer, path: Path) -> None:
    """Write the tokenizer's file, whole or not at all."""
    atomic_write_bytes(path, tokenizer.to_bytes())


def check(spec: "PrepareSpec") -> None:
    """See ``MediumModule``."""
    check_image_geometry(spec.image_size, spec.patch, spec.codes)
    if spec.image_tokenizer == "vqvae" and (spec.patch < 2 or spec.patch & (spec.patch - 1)):
        raise ValueError(
            f"patch ({spec.patch}) must be a power of two for a vqvae; choose 2, 4, 8 …"
        )
    if spec.vq_steps < 1:
        raise ValueError(f"vq_steps ({spec.vq_steps}) must be at least 1")


def settings(spec: "PrepareSpec") -> dict[str, Any]:
    """See ``MediumModule``."""
    wanted = {
        "image_size": spec.image_size,
        "patch": spec.patch,
        "codes": spec.codes,
        "seed": spec.seed,
    }
    return wanted | ({"steps": spec.vq_steps} if spec.image_tokenizer == "vqvae" else {})


def limits(spec: "PrepareSpec") -> dict[str, Any]:
    """None: any image is shrunk and cropped to a square."""
    return {}


def sampling(spec: "PrepareSpec") -> Sampling:
    """As many images as the tokenizer profits from, in bounded memory."""
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
    tokenizer: ImageTokenizer
    if spec.image_tokenizer == "kmeans":
        with one_thread():
            tokenizer = KMeansTokenizer.train(
                images, patch=spec.patch, codes=spec.codes, seed=spec.seed
            )
    else:
        with progress.steps("vqvae", spec.vq_steps) as show:
            tokenizer = VQVAETokenizer.train(
                images,
                patch=spec.patch,
                codes=spec.codes,
                steps=spec.vq_steps,
                seed=spec.seed,
                progress=show,
            )
    found = measure(tokenizer, images[:4096])
    return tokenizer, (
        f"PSNR {found.psnr:.1f} dB, {found.used} of {spec.codes} codes used, "
        f"perplexity {found.perplexity:.0f}"
    )


@dataclass(frozen=True)
class Quality:
    """``psnr`` in dB over all pixels; ``used`` codes; ``perplexity`` of the codes."""

    psnr: float
    used: int
    perplexity: float


def measure(tokenizer: ImageTokenizer, images: np.ndarray) -> Quality:
    """Encode and decode ``images``, uint8 (N, H, W, 3), N ≥ 1."""
    codes = tokenizer.encode(images)
    difference = tokenizer.decode(codes).astype(np.int64) - images
    used, perplexity = code_usage(np.bincount(codes.ravel(), minlength=tokenizer.codes))
    return Quality(psnr(float(np.mean(difference**2))), used, perplexity)


def psnr(mean_squared_error: float) -> float:
    """Peak signal to noise in dB of 8-bit pixels; infinite without error."""
    if mean_squared_error == 0:
        return float("inf")
    return float(10 * np.log10(255**2 / mean_squared_error))


quality = psnr


def code_usage(counts: np.ndarray) -> tuple[int, float]:
    """(codes that occur, perplexity) of how often each code occurs."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return len(shares), float(np.exp(-np.sum(shares * np.log(shares))))
