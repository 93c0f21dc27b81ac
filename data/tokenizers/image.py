"""What every image tokenizer offers, its file, and how good it is."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.tokenizers.tokenizer_file import TokenizerFile, pack

FORMAT = "earlyfuse-image-tokenizer/1"
LARGEST_CODEBOOK = 1 << 20


class ImageTokenizer(Protocol):
    """Square images ↔ a fixed number of codes, in raster order.

    ``codes`` K, ``image_size`` pixels a side, ``block`` codes an image, ``decodes`` whether it has
    a decoder, ``settings`` plain values that say how it was made, ``sha256`` of its file: what
    manifests and checkpoints record.
    """

    kind: str
    codes: int
    image_size: int
    block: int
    decodes: bool
    settings: dict[str, Any]
    sha256: str

    def pixels(self, encoded: bytes) -> np.ndarray:
        """An image file → uint8 (image_size, image_size, 3). ``BadSample`` where it is damaged."""
        ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) → int64 (N, block), each in [0, codes)."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (N, block) → uint8 (N, H, W, 3). ``ValueError`` unless it ``decodes``."""
        ...

    def to_bytes(self) -> bytes:
        """The file: safetensors with ``FORMAT``, kind and settings in its metadata."""
        ...


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
    return (
        float("inf")
        if mean_squared_error == 0
        else float(10 * np.log10(255**2 / mean_squared_error))
    )


def code_usage(counts: np.ndarray) -> tuple[int, float]:
    """(codes that occur, perplexity) of how often each code occurs."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return len(shares), float(np.exp(-np.sum(shares * np.log(shares))))


def save_image_tokenizer(tokenizer: ImageTokenizer, path: Path) -> None:
    """Write the tokenizer's file, whole or not at all."""
    atomic_write_bytes(path, tokenizer.to_bytes())


def load_image_tokenizer(path: Path) -> ImageTokenizer:
    """The tokenizer of a file written by ``save_image_tokenizer``; its metadata says which kind.

    Raises ``ValueError`` naming file and field when the file is no such tokenizer.
    """
    # here, not above: the kinds build on this file
    from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer
    from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
    from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer

    kinds: dict[str, type[KMeansTokenizer | VQVAETokenizer | ChameleonTokenizer]] = {
        kind.kind: kind for kind in (KMeansTokenizer, VQVAETokenizer, ChameleonTokenizer)
    }
    file = TokenizerFile.read("image", FORMAT, path, kinds)
    try:
        tokenizer = kinds[file.kind].from_file(file)
    except ValueError as error:
        raise file.refusal(error) from error
    # a newer writer of the file format may order bytes differently: the file's hash is the one to
    # keep
    tokenizer.sha256 = hashlib.sha256(file.content).hexdigest()
    return tokenizer


def pack_tokenizer(kind: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """A tokenizer's file."""
    return pack(FORMAT, kind, settings, tensors)


def check_image_geometry(image_size: int, patch: int, codes: int) -> None:
    """Raises ``ValueError`` unless patches tile the image and the codebook has a sensible size."""
    if patch < 1 or image_size < patch or image_size % patch:
        raise ValueError(
            f"image_size ({image_size}) must be a multiple of patch ({patch}); change one of them"
        )
    if not 2 <= codes <= LARGEST_CODEBOOK:
        raise ValueError(
            f"codes ({codes}) must lie in [2, {LARGEST_CODEBOOK}]; choose another number"
        )
