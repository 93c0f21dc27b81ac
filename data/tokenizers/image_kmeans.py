"""Image tokenizer by k-means over pixel patches: the deterministic default.

Fitting and encoding give the same bytes on every machine, with any number of threads and any batch
(``kmeans.py``); decoding followed by encoding gives the codes back.

N images, P patches an image, D values in a patch (patch · patch · 3), U distinct patches, K codes.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from earlyfuse.data.tokenizers import kmeans
from earlyfuse.data.tokenizers.image import (
    LARGEST_CODEBOOK,
    check_image_geometry,
    pack_tokenizer,
)
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.tokenizer_file import LARGEST_SIDE, TokenizerFile


class KMeansTokenizer:
    """Nearest codeword for each patch. ``codebook_KD``: distinct rows, uint8."""

    kind = "kmeans"
    decodes = True

    def __init__(self, codebook_KD: np.ndarray, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.image_size, self.patch = settings["image_size"], settings["patch"]
        self.codes = settings["codes"]
        check_image_geometry(self.image_size, self.patch, self.codes)
        expected = (self.codes, self.patch**2 * 3)
        if codebook_KD.shape != expected or codebook_KD.dtype != np.uint8:
            raise ValueError(
                f"codebook ({codebook_KD.dtype} {codebook_KD.shape}) must be uint8 "
                f"{expected} for settings {settings}; the file is damaged"
            )
        self.codebook_KD = codebook_KD
        self.block = (self.image_size // self.patch) ** 2
        self.sha256 = hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def train(
        cls,
        images: np.ndarray,
        *,
        patch: int,
        codes: int,
        seed: int = 0,
        patches: int = 65536,
        iterations: int = 20,
    ) -> "KMeansTokenizer":
        """Fit to ``images``, uint8 (N, H, H, 3), or to ``patches`` of their patches by ``seed``.

        Raises ``ValueError`` when the images hold fewer distinct patches than ``codes``.
        """
        check_image_geometry(images.shape[1], patch, codes)
        rng = np.random.default_rng(seed)
        sample = to_patches(images, patch).reshape(-1, patch**2 * 3)
        if len(sample) > patches:
            sample = sample[np.sort(rng.choice(len(sample), patches, replace=False))]
        distinct_UD, weight_U = kmeans.distinct_rows(sample)
        if len(distinct_UD) < codes:
            raise ValueError(
                f"codes ({codes}) must not exceed the distinct {patch}×{patch} patches of the "
                f"training images ({len(distinct_UD)}); lower codes or give more images"
            )
        codebook_KD = kmeans.fit(distinct_UD, weight_U, codes, rng, iterations)
        settings = {"image_size": images.shape[1], "patch": patch, "codes": codes, "seed": seed}
        return cls(codebook_KD, settings)

    @classmethod
    def from_file(cls, file: TokenizerFile) -> "KMeansTokenizer":
        """Inverse of ``to_bytes``."""
        settings = file.settings
        settings.field("image_size", int, least=1, most=LARGEST_SIDE)
        patch = settings.field("patch", int, least=1, most=LARGEST_SIDE)
        codes = settings.field("codes", int, least=2, most=LARGEST_CODEBOOK)
        settings.field("seed", int)
        codebook = torch.empty(codes, patch**2 * 3, dtype=torch.uint8, device="meta")
        tensors = file.tensors({"codebook": codebook})
        return cls(tensors["codebook"].numpy(), settings.values)

    def to_bytes(self) -> bytes:
        """See ``ImageTokenizer``."""
        return pack_tokenizer(
            self.kind, self.settings, {"codebook": torch.from_numpy(self.codebook_KD)}
        )

    def pixels(self, encoded: bytes) -> np.ndarray:
        """See ``ImageTokenizer``."""
        return image_pixels(encoded, self.image_size)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → int64 (N, P)."""
        patches = to_patches(images, self.patch)
        rows = patches.reshape(-1, self.codebook_KD.shape[1])
        nearest, _ = kmeans.nearest(rows, self.codebook_KD)
        return nearest.reshape(len(images), self.block)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (N, P) → uint8 (N, H, H, 3)."""
        side, patch = self.image_size // self.patch, self.patch
        patches = self.codebook_KD[codes].reshape(-1, side, side, patch, patch, 3)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, self.image_size, self.image_size, 3)


def to_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """(N, H, W, 3) → (N, P, D), patches in raster order. ``ValueError`` unless they tile."""
    count, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height}×{width} must divide into patches of {patch}; resize them"
        )
    grid = images.reshape(count, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, patch * patch * channels)
