"""Image tokenizer by a small convolutional KL-VAE, whose latents are continuous.

Kingma and Welling 2014 (1312.6114), with the convolutions of ``image_vqvae``. Vectors are the means
of the latents, standardised for each channel by mean and standard deviation over training images,
as diffusion models expect them. No adversarial or perceptual loss: it optimises PSNR.

B images, C latent channels, H pixels and h latents a side.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from earlyfuse.data.tokenizers.image_tokenizer import check_tiling
from earlyfuse.data.tokenizers.image_vectors import LatentTokenizer
from earlyfuse.data.tokenizers.image_vqvae import decoder, encoder, fit
from earlyfuse.data.tokenizers.tokenizer_file import LARGEST_SIDE, TokenizerFile

_BATCH, _BATCH_PIXELS = 64, 1 << 22
_MEASURED = 4096  # training images whose latents give mean and standard deviation
_LOG_VARIANCE = (-20.0, 10.0)
_SMALLEST_STD = 1e-4  # of a channel that the KL term has emptied
LARGEST_CHANNELS = 1 << 10
_MOST = {
    "image_size": LARGEST_SIDE, "patch": LARGEST_SIDE, "factor": LARGEST_SIDE,
    "channels": LARGEST_CHANNELS, "width": 1 << 12,
}  # fmt: skip


class VAETokenizer(LatentTokenizer):
    """Patches of standardised latents. ``settings["kl"]``: weight of the KL term."""

    kind = "vae"

    def __init__(
        self, net: "VAE", mean_C: torch.Tensor, std_C: torch.Tensor, settings: dict[str, Any]
    ) -> None:
        batch = max(1, min(_BATCH, _BATCH_PIXELS // settings["image_size"] ** 2))
        super().__init__(settings, settings["factor"], mean_C, std_C, batch)
        if not (std_C > 0).all():
            raise ValueError("tensor std must be positive; the file is damaged")
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def train(
        cls,
        images: np.ndarray,
        *,
        patch: int,
        factor: int = 2,
        channels: int = 4,
        kl: float = 1e-3,
        steps: int = 1500,
        seed: int = 0,
        batch: int = 64,
        width: int = 64,
        learning_rate: float = 5e-3,
        progress: Callable[[int, float], None] | None = None,
    ) -> Self:
        """Fit to ``images``, uint8 (N, H, H, 3). Calls ``progress(step, pixel error)`` each step.

        Deterministic given the seed, the number of threads and the machine's kernels. Raises
        ``ValueError`` for a ``factor`` that is no power of two or does not divide ``patch``.
        """
        settings = {
            "image_size": images.shape[1], "patch": patch, "factor": factor, "channels": channels,
            "kl": kl, "steps": steps, "seed": seed, "width": width,
        }  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build_vae(settings)
        pixels = torch.from_numpy(images)
        fit(
            net, pixels, lambda _, x_BCHH: net.loss(x_BCHH, kl, rng), steps, batch, learning_rate,
            rng, progress,
        )  # fmt: skip
        plain = cls(net, torch.zeros(channels), torch.ones(channels), settings)
        z_NC = plain.to_grid(images[:_MEASURED]).reshape(-1, channels).astype(np.float64)
        std_C = torch.from_numpy(z_NC.std(0)).float().clamp(min=_SMALLEST_STD)
        return cls(net, torch.from_numpy(z_NC.mean(0)).float(), std_C, settings)

    @classmethod
    def from_file(cls, file: TokenizerFile) -> Self:
        """See ``FileTokenizer``."""
        settings = file.settings
        for name, most in _MOST.items():
            settings.field(name, int, least=1, most=most)
        settings.field("kl", float, least=0, most=1e3)
        settings.field("seed", int)
        settings.field("steps", int)
        with torch.device("meta"):  # nothing is allocated before the tensors confirm the sizes
            net = build_vae(settings.values)
            statistics = {
                name: torch.empty(settings.values["channels"]) for name in ("mean", "std")
            }
        tensors = file.tensors({**net.state_dict(), **statistics})
        mean_C, std_C = tensors.pop("mean"), tensors.pop("std")
        net.load_state_dict(tensors, assign=True)
        return cls(net, mean_C, std_C, settings.values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See ``FileTokenizer``."""
        weights = {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}
        return {**weights, "mean": self.mean_C, "std": self.std_C}

    def latents(self, x_BCHH: torch.Tensor) -> torch.Tensor:
        """See ``LatentTokenizer``."""
        return self.net.posterior(x_BCHH)[0]

    def pixels(self, z_BChh: torch.Tensor) -> torch.Tensor:
        """See ``LatentTokenizer``."""
        return self.net.decoder(z_BChh)


class VAE(nn.Module):
    """The network: ``posterior`` and ``decoder``."""

    def __init__(self, channels: int, width: int, halvings: int) -> None:
        super().__init__()
        self.encoder = encoder(2 * channels, width, halvings)
        self.decoder = decoder(channels, width, halvings)

    def posterior(self, x_BCHH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance of the latents, (B, C, h, h) each."""
        mean_BChh, log_variance_BChh = self.encoder(x_BCHH).chunk(2, dim=1)
        return mean_BChh, log_variance_BChh.clamp(*_LOG_VARIANCE)

    def loss(
        self, x_BCHH: torch.Tensor, kl: float, rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(training loss, squared pixel error), both for each pixel value."""
        mean_BChh, log_variance_BChh = self.posterior(x_BCHH)
        noise_BChh = torch.randn(mean_BChh.shape, generator=rng)
        z_BChh = mean_BChh + (log_variance_BChh / 2).exp() * noise_BChh
        reconstruction = F.mse_loss(self.decoder(z_BChh), x_BCHH)
        divergence = mean_BChh.square() + log_variance_BChh.exp() - 1 - log_variance_BChh
        loss = reconstruction + kl * divergence.sum() / 2 / x_BCHH.numel()
        return loss, reconstruction.detach()


def build_vae(settings: dict[str, Any]) -> VAE:
    """The untrained network of ``settings``. ``ValueError`` names a setting that is impossible."""
    factor, width = settings["factor"], settings["width"]
    check_tiling(settings["image_size"], settings["patch"])
    check_factor(settings["patch"], factor)
    if width % 32:
        raise ValueError(f"width ({width}) must be a multiple of 32; choose another")
    return VAE(settings["channels"], width, factor.bit_length() - 1)


def check_factor(patch: int, factor: int, name: str = "factor") -> None:
    """``ValueError`` unless ``factor`` is what halving the side gives, and latents tile a patch."""
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"{name} ({factor}) must be a power of two; choose 2, 4, 8 …")
    check_tiling(patch, factor, ("patch", name))
