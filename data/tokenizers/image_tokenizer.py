"""Base of the image tokenizers: square pixels ↔ a fixed number of codes, in raster order."""

import io
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.tokenizer_file import CodeTokenizer, check_codes

_BATCH, _BATCH_BYTES = 256, 1 << 26  # encoded at a time: images, bytes of their pixels
_MEASURED = 64  # images of each shard that are decoded again to measure the tokenizer


class ImageTokenizer(CodeTokenizer):
    """Square images of ``image_size`` pixels a side ↔ ``block`` codes each."""

    file_format = "earlyfuse-image-tokenizer/1"

    def __init__(self, settings: dict[str, Any], patch: int, decodes: bool = True) -> None:
        super().__init__(settings)
        self.decodes = decodes
        self.image_size: int = settings["image_size"]
        check_image_geometry(self.image_size, patch, self.codes)
        self.side = self.image_size // patch
        self.block = self.side**2
        self.batch = max(1, min(_BATCH, _BATCH_BYTES // (3 * self.image_size**2)))

    @abstractmethod
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → int64 (N, block), each in [0, codes)."""

    @abstractmethod
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (N, block) → uint8 (N, H, H, 3). ``ValueError`` unless it ``decodes``."""

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
        """int64 (block,) → a PNG."""
        stream = io.BytesIO()
        Image.fromarray(self.decode(codes[None])[0]).save(stream, "PNG")
        return stream.getvalue()


def check_image_geometry(image_size: int, patch: int, codes: int) -> None:
    """``ValueError`` unless patches tile the image and the codebook has a sensible size."""
    if patch < 1 or image_size < patch or image_size % patch:
        raise ValueError(
            f"image_size ({image_size}) must be a multiple of patch ({patch}); change one of them"
        )
    check_codes("codes", codes)
