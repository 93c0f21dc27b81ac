"""Image tokenizer of Chameleon checkpoints: their VQ-GAN, their pixels, their order of codes.

Made by ``import_vq`` (imports.py) from a Hugging Face folder or from the original ``vqgan.ckpt``;
not trained here. Pixels are prepared as in the source (resize, centre crop, scale), and a code is
numbered by the place of its token: id = start + code, whatever order the vocabulary has.

B images, H pixels a side, P codes an image, K codes.
"""

from typing import Any, Self

import numpy as np
import torch

from earlyfuse.data.json_files import JsonObject
from earlyfuse.data.tokenizers.image_tokenizer import ImageCodes
from earlyfuse.data.tokenizers.image_vectors import to_pixels
from earlyfuse.data.tokenizers.pixels import image_pixels_whole
from earlyfuse.data.tokenizers.tokenizer_file import (
    LARGEST_CODEBOOK,
    LARGEST_SIDE,
    TokenizerFile,
)
from earlyfuse.data.tokenizers.vqgan import VQGAN, VQGANShape

# values of one activation: an image of Chameleon's, 512² pixels of 128 channels
_ACTIVATION = 1 << 25
_MOST = {
    "image_size": LARGEST_SIDE, "codes": LARGEST_CODEBOOK, "embed": 1 << 14, "latent": 1 << 14,
    "width": 1 << 12, "blocks": 64,
}  # fmt: skip
_MOST_LEVELS = 16
_SHAPE = VQGANShape.__dataclass_fields__.keys()


class ChameleonTokenizer(ImageCodes):
    """Encoder, nearest entry of the codebook and, where the source had one, decoder; in float32.

    ``rank_K``: int64, place of each codebook row's token among the image tokens, a permutation.
    ``settings``: ``image_size``, the fields of ``VQGANShape``, how 8-bit values become the input of
    the network (``(value · scale − mean) / std``), and ``long_side``, "round" or "floor": how the
    longer side is made whole when the shorter becomes ``image_size``.
    """

    kind = "chameleon"

    def __init__(self, net: VQGAN, rank_K: torch.Tensor, settings: dict[str, Any]) -> None:
        shape = shape_of(settings)
        super().__init__(settings, shape.factor, settings["decoder"])
        self.net = net.eval().requires_grad_(False)
        self._batch = max(1, _ACTIVATION // (self.image_size**2 * shape.width))
        if not torch.equal(rank_K.sort().values, torch.arange(self.codes)):
            raise ValueError(
                f"order of the {self.codes} codes must name each of them once; the file is damaged"
            )
        self.rank_K, self.row_K = rank_K, rank_K.argsort()
        # rounded as transformers rounds: scaled in float64, then normalised in float32
        scaled = (np.arange(256) * np.float64(settings["scale"])).astype(np.float32)
        mean, std = np.float32(settings["mean"]), np.float32(settings["std"])
        self._value_256 = torch.from_numpy((scaled - mean) / std)

    @classmethod
    def from_file(cls, file: TokenizerFile) -> Self:
        """See ``FileTokenizer``."""
        _check_settings(file.settings)
        settings = file.settings.values
        with torch.device("meta"):
            net = VQGAN(shape_of(settings))
            rank_K = torch.empty(settings["codes"], dtype=torch.int64)
        weights = file.tensors({**net.state_dict(), "rank": rank_K})
        rank_K = weights.pop("rank")
        net.load_state_dict(weights, assign=True)
        return cls(net, rank_K, settings)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See ``FileTokenizer``."""
        weights = {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        return {**weights, "rank": self.rank_K}

    def features(self, payload: bytes, **limits: Any) -> np.ndarray:
        """See ``ImageTokenizer``; resizes the whole image, then crops, as Chameleon does."""
        return image_pixels_whole(payload, self.image_size, self.settings["long_side"])

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, H, 3) → int64 (B, P)."""
        parts = [
            self.rank_K[self.net.encode(self._floats(part))]
            for part in torch.from_numpy(images).split(self._batch)
        ]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (B, P) → uint8 (B, H, H, 3). Raises ``ValueError`` where there is no decoder."""
        if not self.decodes:
            raise ValueError(
                "image tokenizer (chameleon) has no decoder, which Hugging Face's files lack; put "
                "the original vqgan.ckpt into the source folder and import it again"
            )
        parts = [
            to_pixels(self.net.decode(self.row_K[part].reshape(-1, self.side, self.side)))
            for part in torch.from_numpy(codes).split(self._batch)
        ]
        return torch.cat(parts).numpy()

    def _floats(self, pixels_BHHC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, H, 3) → float32 (B, 3, H, H) as the source scales them."""
        return self._value_256[pixels_BHHC.permute(0, 3, 1, 2).to(torch.int64)]


def _check_settings(settings: JsonObject) -> None:
    """``ValueError`` naming a field of the wrong type, or of a size that no such network has."""
    for name, most in _MOST.items():
        settings.field(name, int, least=1, most=most)
    for name in ("middle_attention", "decoder"):
        settings.field(name, bool)
    for name in ("multipliers", "attention"):
        values = settings.items(name, int)
        if len(values) > _MOST_LEVELS or not all(0 <= value <= _MOST_LEVELS for value in values):
            raise settings.wrong(name, f"must be at most {_MOST_LEVELS} numbers up to that")
    for name, least in (("scale", -1e3), ("mean", -1e3), ("std", 1e-6)):
        settings.field(name, float, least=least, most=1e3)
    settings.field("long_side", str, choices=("round", "floor"))


def shape_of(settings: dict[str, Any]) -> VQGANShape:
    """The network's sizes among ``settings``. ``ValueError`` names an impossible one."""
    fields = {name: settings[name] for name in _SHAPE}
    lists = {name: tuple(fields[name]) for name in ("multipliers", "attention")}
    return VQGANShape(**{**fields, **lists})
