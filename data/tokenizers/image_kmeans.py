"""Image tokenizer by k-means over pixel patches: the deterministic default.

Fitting and encoding give the same bytes on every machine, with any number of threads and any batch
(``kmeans.py``); decoding followed by encoding gives the codes back.

N images, P patches an image, D values in a patch (patch · patch · 3), K codes.
"""

from typing import Any, Self

import numpy as np
import torch

from earlyfuse.data.tokenizers import kmeans
from earlyfuse.data.tokenizers.image_tokenizer import (
    ImageCodes,
    check_image_geometry,
    from_patches,
    to_patches,
)
from earlyfuse.data.tokenizers.tokenizer_file import (
    LARGEST_CODEBOOK,
    LARGEST_SIDE,
    TokenizerFile,
)


class KMeansTokenizer(ImageCodes):
    """Nearest codeword for each patch. ``codebook_KD``: distinct rows, uint8."""

    kind = "kmeans"

    def __init__(self, codebook_KD: np.ndarray, settings: dict[str, Any]) -> None:
        self.patch = settings["patch"]
        super().__init__(settings, self.patch)
        kmeans.check_codebook(codebook_KD, self.codes, self.patch**2 * 3)
        self.codebook_KD = codebook_KD

    @classmethod
    def train(cls, images: np.ndarray, *, patch: int, codes: int, seed: int = 0) -> Self:
        """Fit to ``images``, uint8 (N, H, H, 3), or to 2^16 of their patches by ``seed``.

        Raises ``ValueError`` when the images hold fewer distinct patches than ``codes``.
        """
        check_image_geometry(images.shape[1], patch, codes)
        codebook_KD = kmeans.learn(
            to_patches(images, patch).reshape(-1, patch**2 * 3),
            codes,
            seed=seed,
            most=1 << 16,
            option="codes",
            rows=f"{patch}×{patch} patches of the training images",
        )
        settings = {"image_size": images.shape[1], "patch": patch, "codes": codes, "seed": seed}
        return cls(codebook_KD, settings)

    @classmethod
    def from_file(cls, file: TokenizerFile) -> Self:
        """See ``FileTokenizer``."""
        settings = file.settings
        settings.field("image_size", int, least=1, most=LARGEST_SIDE)
        patch = settings.field("patch", int, least=1, most=LARGEST_SIDE)
        codes = settings.field("codes", int, least=2, most=LARGEST_CODEBOOK)
        settings.field("seed", int)
        codebook = torch.empty(codes, patch**2 * 3, dtype=torch.uint8, device="meta")
        tensors = file.tensors({"codebook": codebook})
        return cls(tensors["codebook"].numpy(), settings.values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See ``FileTokenizer``."""
        return {"codebook": torch.from_numpy(self.codebook_KD)}

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → int64 (N, P)."""
        patches = to_patches(images, self.patch)
        rows = patches.reshape(-1, self.codebook_KD.shape[1])
        nearest, _ = kmeans.nearest(rows, self.codebook_KD)
        return nearest.reshape(len(images), self.block)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (N, P) → uint8 (N, H, H, 3)."""
        return from_patches(self.codebook_KD[codes], self.side, self.patch)
