"""What all image tokenizers share: pixels in, a fixed number of codes out, in raster order."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.tokenizer_file import pack

FORMAT = "earlyfuse-image-tokenizer/1"
LARGEST_CODEBOOK = 1 << 20
# images encoded at a time
_BATCH, _BATCH_BYTES = 256, 1 << 26
# images of each shard that are decoded again to measure the tokenizer
_MEASURED = 64


class ImageTokenizer:
    """Square images of ``image_size`` pixels a side ↔ ``block`` codes each.

    A ``MediaTokenizer`` (``data/media.py``). Kinds add ``encode``, ``decode`` and ``tensors``.
    """

    kind: str
    vectors = None

    def __init__(self, settings: dict[str, Any], patch: int, decodes: bool = True) -> None:
        self.settings, self.decodes = settings, decodes
        self.image_size: int = settings["image_size"]
        self.codes: int = settings["codes"]
        check_image_geometry(self.image_size, patch, self.codes)
        self.side = self.image_size // patch
        self.block = self.side**2
        self.batch = max(1, min(_BATCH, _BATCH_BYTES // (3 * self.image_size**2)))
        self._sha256: str | None = None

    @property
    def sha256(self) -> str:
        """Hash of the file; a loader sets it, since released files are hundreds of megabytes."""
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(self.to_bytes()).hexdigest()
        return self._sha256

    @sha256.setter
    def sha256(self, value: str) -> None:
        self._sha256 = value

    def pixels(self, encoded: bytes) -> np.ndarray:
        """An image file → uint8 (image_size, image_size, 3). ``BadSample`` where it is damaged."""
        return image_pixels(encoded, self.image_size)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, H, 3) → int64 (N, block), each in [0, codes)."""
        raise NotImplementedError

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (N, block) → uint8 (N, H, H, 3). ``ValueError`` unless it ``decodes``."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of its file."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The file: safetensors with ``FORMAT``, kind and settings in its metadata."""
        return pack(FORMAT, self.kind, self.settings, self.tensors())

    def features(self, payload: bytes, **limits: Any) -> np.ndarray:
        """See ``MediaTokenizer``."""
        return self.pixels(payload)

    def encode_items(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See ``MediaTokenizer``."""
        return list(self.encode(np.stack(items)))

    def error(
        self, items: Sequence[np.ndarray], codes: Sequence[np.ndarray], measured: int
    ) -> tuple[int, int]:
        """Over the first images of a shard alone; nothing without a decoder."""
        if measured or not self.decodes:
            return 0, 0
        images = np.stack(items[:_MEASURED])
        difference = self.decode(np.stack(codes[:_MEASURED])).astype(np.int64) - images
        return int((difference**2).sum()), images.size

    def to_file(self, codes: np.ndarray) -> bytes:
        """A PNG."""
        stream = io.BytesIO()
        Image.fromarray(self.decode(codes[None])[0]).save(stream, "PNG")
        return stream.getvalue()


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
