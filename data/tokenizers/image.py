"""Images as a medium: loads and trains their tokenizers, and measures them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from earlyfuse.data.media import MEDIA, Sampling
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer
from earlyfuse.data.tokenizers.image_diffusers import DiffusersTokenizer, check_folder
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_tokenizer import ImageTokenizer, check_image_geometry
from earlyfuse.data.tokenizers.image_vae import LARGEST_CHANNELS, VAETokenizer, check_factor
from earlyfuse.data.tokenizers.image_vectors import LatentTokenizer, PixelTokenizer
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer, check_patch
from earlyfuse.data.tokenizers.kmeans import one_thread
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.tokenizer_file import code_usage, load_tokenizer

if TYPE_CHECKING:
    from earlyfuse.data.prepare.progress import Progress
    from earlyfuse.data.prepare.spec import PrepareSpec

QUALITY = "PSNR dB"
_KINDS: tuple[type[ImageTokenizer], ...] = (
    KMeansTokenizer, VQVAETokenizer, ChameleonTokenizer, PixelTokenizer, VAETokenizer,
    DiffusersTokenizer,
)  # fmt: skip
# how much training data a tokenizer sees
_PATCHES = {"kmeans": 1 << 16, "vqvae": 1 << 18, "vae": 1 << 18}
_PIXEL_BYTES = 1 << 28
_MEASURED = 4096  # training images
_OF_VAE = ("vae_factor", "vae_channels", "vae_steps", "vae_kl")


def load(path: Path) -> ImageTokenizer:
    """See ``MediumModule``; the file's metadata name the kind."""
    return load_tokenizer("image", path, _KINDS)


def ready(path: Path, spec: "PrepareSpec") -> ImageTokenizer:
    """See ``MediumModule``; imports a folder of diffusers' ``AutoencoderKL``."""
    if path.is_dir():
        return DiffusersTokenizer.from_folder(path, spec.image_size, spec.patch)
    return load(path)


def check(spec: "PrepareSpec") -> None:
    """See ``MediumModule``."""
    kind = spec.image_tokenizer
    check_image_geometry(spec.image_size, spec.patch, spec.codes)
    if kind == "vqvae":
        check_patch(spec.patch)
    if kind == "vae":
        check_factor(spec.patch, spec.vae_factor, "vae_factor")
    folder = kind not in (*MEDIA["image"].kinds, "none") and Path(kind).is_dir()
    if folder:
        check_folder(Path(kind), spec.image_size, spec.patch)
    for name in ("vq_steps", "vae_steps"):
        if getattr(spec, name) < 1:
            raise ValueError(f"{name} ({getattr(spec, name)}) must be at least 1")
    if not 1 <= spec.vae_channels <= LARGEST_CHANNELS:
        raise ValueError(
            f"vae_channels ({spec.vae_channels}) must lie in [1, {LARGEST_CHANNELS}]; 4 is usual"
        )
    if not 0 <= spec.vae_kl <= 1e3:
        raise ValueError(f"vae_kl ({spec.vae_kl}) must lie in [0, 1000]; 0.001 is usual")
    idle: tuple[str, ...] = () if kind == "vae" else _OF_VAE
    idle += () if kind == "vqvae" else ("vq_steps",)
    idle += ("codes",) if folder or kind in ("pixels", "vae") else ()
    for name in idle:
        if (value := getattr(spec, name)) != spec.__dataclass_fields__[name].default:
            raise ValueError(
                f"{name} ({value}) means nothing to image_tokenizer {kind}; leave it out"
            )


def settings(spec: "PrepareSpec") -> dict[str, Any]:
    """See ``MediumModule``."""
    sizes = {"image_size": spec.image_size, "patch": spec.patch}
    match spec.image_tokenizer:
        case "pixels":
            return sizes
        case "vae":
            own = {name.removeprefix("vae_"): getattr(spec, name) for name in _OF_VAE}
        case "vqvae":
            own = {"codes": spec.codes, "steps": spec.vq_steps}
        case _:
            own = {"codes": spec.codes}
    return {**sizes, **own, "seed": spec.seed}


def limits(spec: "PrepareSpec") -> dict[str, Any]:
    """None: any image is shrunk and cropped to a square."""
    return {}


def sampling(spec: "PrepareSpec") -> Sampling:
    """Number of images to train on: as many as improve the tokenizer, in bounded memory."""
    block = (spec.image_size // spec.patch) ** 2
    wanted = max(1024, _PATCHES.get(spec.image_tokenizer, 0) // block)
    budget = min(wanted, max(1, _PIXEL_BYTES // (3 * spec.image_size**2)))
    return Sampling(budget, lambda encoded: image_pixels(encoded, spec.image_size), lambda _: 1)


def train(
    items: Sequence[np.ndarray], spec: "PrepareSpec", progress: "Progress"
) -> tuple[ImageTokenizer, str]:
    """See ``MediumModule``."""
    images, own = np.stack(items), settings(spec)
    del own["image_size"]
    kind, codes = spec.image_tokenizer, f" of {spec.codes} codes" if "codes" in own else ""
    progress.tell(f"image tokenizer: {kind}{codes} from {len(images)} images")
    if kind == "pixels":
        return _measured(PixelTokenizer(settings(spec)), images)
    if kind == "kmeans":
        with one_thread():
            return _measured(KMeansTokenizer.train(images, **own), images)
    trained = VQVAETokenizer if kind == "vqvae" else VAETokenizer
    with progress.steps(kind, own["steps"]) as show:
        tokenizer = trained.train(images, progress=show, **own)
    return _measured(tokenizer, images)


def _measured(tokenizer: ImageTokenizer, images: np.ndarray) -> tuple[ImageTokenizer, str]:
    """The tokenizer, and a line about its quality on training images."""
    found = measure(tokenizer, images[:_MEASURED])
    line = f"PSNR {found.psnr:.1f} dB"
    if isinstance(tokenizer, LatentTokenizer):
        for name, values in (("mean", tokenizer.mean_C), ("std", tokenizer.std_C)):
            line += f", {name} {' '.join(f'{value:.2f}' for value in values.tolist())}"
        line += " of the latents by channel, which are standardised"
    if tokenizer.vectors is None:
        line += f", {found.used} of {tokenizer.codes} codes used, perplexity {found.perplexity:.0f}"
    return tokenizer, line


class Quality(NamedTuple):
    """``psnr`` in dB over all pixels; ``used`` codes, and their ``perplexity``, without vectors."""

    psnr: float
    used: int = 1
    perplexity: float = 1.0


def measure(tokenizer: ImageTokenizer, images: np.ndarray) -> Quality:
    """Encode and decode ``images``, uint8 (N, H, H, 3), N ≥ 1."""
    codes = tokenizer.encode(images)
    difference = tokenizer.decode(codes).astype(np.int64) - images
    psnr = quality(float(np.mean(difference**2)))
    if tokenizer.vectors is not None:
        return Quality(psnr)
    counts = np.bincount(codes.ravel(), minlength=tokenizer.codes)
    return Quality(psnr, *code_usage(counts))


def quality(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pixels; infinite without error."""
    if mean_squared_error == 0:
        return float("inf")
    return float(10 * np.log10(255**2 / mean_squared_error))
