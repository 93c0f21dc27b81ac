"""Images as vectors: raw pixels, and the base of autoencoders whose latents are continuous.

To add a frozen encoder with a decoder (SigLIP or DINO features, as in a RAE): subclass
``LatentTokenizer`` in a file of its own, give it a ``kind``, and name it in ``image.py``.

B images, C channels, H pixels and h places a side.
"""

from abc import abstractmethod
from typing import Any, Self

import numpy as np
import torch

from earlyfuse.data.tokenizers.image_tokenizer import ImageVectors
from earlyfuse.data.tokenizers.kmeans import one_thread
from earlyfuse.data.tokenizers.tokenizer_file import LARGEST_SIDE, TokenizerFile

# standard deviations: further out, sampled latents are clipped
_LARGEST_LATENT = 100.0


class PixelTokenizer(ImageVectors):
    """Patches of pixels in [-1, 1], exact there and back: 1/127.5 between two 8-bit values is 16
    times the spacing of float16 below 1.
    """

    kind = "pixels"

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings, channels=3, factor=1)

    @classmethod
    def from_file(cls, file: TokenizerFile) -> Self:
        """See ``FileTokenizer``."""
        for name in ("image_size", "patch"):
            file.settings.field(name, int, least=1, most=LARGEST_SIDE)
        file.tensors({})
        return cls(file.settings.values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See ``FileTokenizer``: there are none."""
        return {}

    def to_grid(self, images: np.ndarray) -> np.ndarray:
        """See ``ImageVectors``."""
        return images.astype(np.float32) / 127.5 - 1

    def from_grid(self, grid: np.ndarray) -> np.ndarray:
        """See ``ImageVectors``."""
        return ((grid.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


class LatentTokenizer(ImageVectors):
    """Latents of a frozen autoencoder, standardised for each channel: (z - mean_C) / std_C.

    ``factor``: pixels that a latent covers, a side. ``batch``: images that go through the network
    together.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        factor: int,
        mean_C: torch.Tensor,
        std_C: torch.Tensor,
        batch: int,
    ) -> None:
        super().__init__(settings, len(mean_C), factor)
        self.mean_C, self.std_C, self._batch = mean_C, std_C, batch

    @abstractmethod
    def latents(self, x_BCHH: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] → the latents' mean, float32 (B, C, h, h)."""

    @abstractmethod
    def pixels(self, z_BChh: torch.Tensor) -> torch.Tensor:
        """Inverse of ``latents``."""

    @torch.no_grad()
    def to_grid(self, images: np.ndarray) -> np.ndarray:
        """See ``ImageVectors``. On one thread, so that any number of workers gives equal bytes."""
        with one_thread():
            parts = [
                (self.latents(to_floats(part)).movedim(1, 3) - self.mean_C) / self.std_C
                for part in torch.from_numpy(images).split(self._batch)
            ]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def from_grid(self, grid: np.ndarray) -> np.ndarray:
        """See ``ImageVectors``."""
        inside = torch.from_numpy(grid).clamp(-_LARGEST_LATENT, _LARGEST_LATENT)
        parts = [
            to_pixels(self.pixels((part * self.std_C + self.mean_C).movedim(3, 1).contiguous()))
            for part in inside.split(self._batch)
        ]
        return torch.cat(parts).numpy()


def to_floats(pixels_BHHC: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, H, 3) → float32 (B, 3, H, H) in [-1, 1]."""
    return pixels_BHHC.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_pixels(x_BCHH: torch.Tensor) -> torch.Tensor:
    """Inverse of ``to_floats``, rounded and clipped."""
    return ((x_BCHH + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
