"""Bases of the image tokenizers: square pixels ↔ a fixed number of codes or vectors, one for each
patch, in raster order.

N images, H pixels a side, P patches an image, D values in a patch, channels last.
"""

import io
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from earlyfuse.data.media import VectorType
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.tokenizer_file import LARGEST_SIDE, FileTokenizer, check_codes

_BATCH, _BATCH_BYTES = 256, 1 << 26  # encoded at a time: images, bytes of their pixels
_MEASURED = 64  # images of each shard that are decoded again to measure the tokenizer


class ImageTokenizer(FileTokenizer):
    """Square images of ``image_size`` pixels a side ↔ ``block`` codes or vectors each."""

    file_format = "earlyfuse-image-tokenizer/1"
    codes: int
    vectors: VectorType | None

    def __init__(self, settings: dict[str, Any], patch: int, decodes: bool = True) -> None:
        super().__init__(settings)
        self.decodes = decodes
        self.image_size: int = settings["image_size"]
        check_tiling(self.image_size, patch)
        self.side = self.image_size // patch
        self.block = self.side**2
        self.batch = max(1, min(_BATCH, _BATCH_BYTES // (3 * self.image_size**2)))

    @abstractmethod
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → int64 (N, P) in [0, codes), or float16 (N, P, D) vectors."""

    @abstractmethod
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Inverse of ``encode``. ``ValueError`` unless it ``decodes``."""

    def features(self, payload: bytes, **limits: Any) -> np.ndarray:
        """An image file → uint8 (H, H, 3). ``BadSample`` where it is damaged."""
        return image_pixels(payload, self.image_size)

    def encode_items(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See ``MediaTokenizer``."""
        return list(self.encode(np.stack(items)))

    def error(
        self, items: Sequence[np.ndarray], codes: Sequence[np.ndarray], measured: int
    ) -> tuple[int, int]:
        """See ``MediaTokenizer``; over the first images of a shard, (0, 0) without a decoder."""
        if measured or not self.decodes:
            return 0, 0
        images = np.stack(items[:_MEASURED])
        difference = self.decode(np.stack(codes[:_MEASURED])).astype(np.int64) - images
        return int((difference**2).sum()), images.size

    def to_file(self, codes: np.ndarray) -> bytes:
        """Codes (P,) or vectors (P, D) of an image → a PNG."""
        stream = io.BytesIO()
        Image.fromarray(self.decode(codes[None])[0]).save(stream, "PNG")
        return stream.getvalue()


class ImageCodes(ImageTokenizer):
    """Images as codes; ``settings["codes"]`` is the size of the codebook."""

    vectors = None

    def __init__(self, settings: dict[str, Any], patch: int, decodes: bool = True) -> None:
        super().__init__(settings, patch, decodes)
        self.codes = settings["codes"]
        check_codes("codes", self.codes)


class ImageVectors(ImageTokenizer):
    """Images as vectors: an image is a grid of places with ``channels`` values each (pixels or
    latents), and a vector holds a square of them, row by row, channels last.

    ``factor``: pixels that a place covers, a side. ``grid``: (channels, places in the side of a
    vector's square). Vectors are stored as float16.
    """

    codes = 1

    def __init__(self, settings: dict[str, Any], channels: int, factor: int) -> None:
        check_tiling(settings["patch"], factor, ("patch", "factor"))
        super().__init__(settings, settings["patch"])
        side = settings["patch"] // factor
        self.grid = (channels, side)
        self.vectors = VectorType(channels * side**2, "float16", channels)

    @abstractmethod
    def to_grid(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → float32 (N, h, h, channels) of about unit scale."""

    @abstractmethod
    def from_grid(self, grid: np.ndarray) -> np.ndarray:
        """Inverse of ``to_grid``, for any finite values."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → float16 (N, P, D)."""
        return to_patches(self.to_grid(images), self.grid[1]).astype(np.float16)

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """(N, P, D) in any float dtype → uint8 (N, H, H, 3); values out of range are clipped.

        ``ValueError`` for another shape and for values that are not finite.
        """
        assert self.vectors is not None, "set when it is built"
        expected = (self.block, self.vectors.width)
        if vectors.shape[1:] != expected or not np.isfinite(vectors).all():
            raise ValueError(
                f"image vectors {vectors.shape} must be (images, {expected[0]}, {expected[1]}) and "
                "finite; check the model that sampled them"
            )
        return self.from_grid(from_patches(vectors.astype(np.float32), self.side, self.grid[1]))


def to_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """(N, H, W, C) → (N, P, D), patches in raster order. ``ValueError`` unless they tile."""
    count, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height}×{width} must divide into patches of {patch}; resize them"
        )
    grid = images.reshape(count, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, patch * patch * channels)


def from_patches(patches_NPD: np.ndarray, side: int, patch: int) -> np.ndarray:
    """Inverse of ``to_patches``, for a square of ``side`` × ``side`` patches."""
    grid = patches_NPD.reshape(len(patches_NPD), side, side, patch, patch, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(
        len(patches_NPD), side * patch, side * patch, -1
    )


def check_image_geometry(image_size: int, patch: int, codes: int) -> None:
    """``ValueError`` unless patches tile the image and image and codebook have sensible sizes."""
    if image_size > LARGEST_SIDE:
        raise ValueError(f"image_size ({image_size}) must be at most {LARGEST_SIDE}; lower it")
    check_tiling(image_size, patch)
    check_codes("codes", codes)


def check_tiling(whole: int, part: int, names: tuple[str, str] = ("image_size", "patch")) -> None:
    """``ValueError`` unless ``whole`` is a multiple of ``part``."""
    if part < 1 or whole < part or whole % part:
        raise ValueError(
            f"{names[0]} ({whole}) must be a multiple of {names[1]} ({part}); change one of them"
        )
