"""Image tokenizer by a small convolutional VQ-VAE: slower to train than k-means, and better.

van den Oord et al. 2017 (1711.00937): straight-through gradient, commitment loss, codebook by
exponential moving averages (their appendix A). Two additions keep most codes in use: dead codes are
re-seeded from the batch, and the codebook starts from k-means over the latents of a network warmed
up without quantiser. No adversarial or perceptual loss: it optimises PSNR.

B images, C channels, H pixels a side, N latents (B · block), E latent dimension, K codes.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from earlyfuse.data.tokenizers.image_tokenizer import ImageCodes, check_image_geometry
from earlyfuse.data.tokenizers.image_vectors import to_floats, to_pixels
from earlyfuse.data.tokenizers.tokenizer_file import (
    LARGEST_CODEBOOK,
    LARGEST_SIDE,
    TokenizerFile,
)

_ENCODE_BATCH, _ENCODE_PIXELS = 64, 1 << 22
_COMMITMENT = 0.25
_CODEBOOK_DECAY = 0.98
# a code is dead when the moving average of its latents falls below this share of an even use
_DEAD_SHARE = 0.05
# share of the steps that train encoder and decoder alone, before there is a codebook
_WARM_UP = 0.1
_MOST = {
    "image_size": LARGEST_SIDE, "patch": LARGEST_SIDE, "codes": LARGEST_CODEBOOK,
    "width": 1 << 12, "latent": 1 << 12,
}  # fmt: skip


class VQVAETokenizer(ImageCodes):
    """Encoder, nearest entry of the codebook, decoder."""

    kind = "vqvae"

    def __init__(self, net: "VQVAE", settings: dict[str, Any]) -> None:
        super().__init__(settings, settings["patch"])
        self.net = net.eval().requires_grad_(False)
        self._batch = max(1, min(_ENCODE_BATCH, _ENCODE_PIXELS // self.image_size**2))

    @classmethod
    def train(
        cls,
        images: np.ndarray,
        *,
        patch: int,
        codes: int,
        steps: int = 1500,
        seed: int = 0,
        batch: int = 64,
        width: int = 64,
        latent: int = 16,
        learning_rate: float = 5e-3,
        progress: Callable[[int, float], None] | None = None,
    ) -> Self:
        """Fit to ``images``, uint8 (N, H, H, 3). Calls ``progress(step, pixel error)`` each step.

        Deterministic given the seed, the number of threads and the machine's kernels. Raises
        ``ValueError`` when ``patch`` is no power of two that divides H.
        """
        settings = {
            "image_size": images.shape[1], "patch": patch, "codes": codes, "steps": steps,
            "seed": seed, "width": width, "latent": latent,
        }  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build_vqvae(settings)
        warm_up = round(_WARM_UP * steps)
        pixels = torch.from_numpy(images)

        def loss_of(step: int, x_BCHH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if step == warm_up:
                wanted = max(batch, 8 * codes // (images.shape[1] // patch) ** 2)
                seen = torch.randint(len(pixels), (wanted,), generator=rng)
                net.seed_codebook(to_floats(pixels[seen]), rng)
            return net.loss(x_BCHH, quantise=step >= warm_up, rng=rng)

        fit(net, pixels, loss_of, steps, batch, learning_rate, rng, progress)
        return cls(net, settings)

    @classmethod
    def from_file(cls, file: TokenizerFile) -> Self:
        """See ``FileTokenizer``."""
        settings = file.settings
        for name, most in _MOST.items():
            settings.field(name, int, least=1, most=most)
        settings.field("seed", int)
        settings.field("steps", int)
        with torch.device("meta"):  # nothing is allocated before the tensors confirm the sizes
            expected = build_vqvae(settings.values).state_dict()
        tensors = file.tensors(expected)
        net = build_vqvae(settings.values)
        net.load_state_dict(tensors)
        return cls(net, settings.values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See ``FileTokenizer``."""
        return {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, H, 3) → int64 (B, block)."""
        parts = [
            self.net.nearest(self.net.latents(to_floats(part))).reshape(len(part), self.block)
            for part in torch.from_numpy(images).split(self._batch)
        ]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 (B, block) → uint8 (B, H, H, 3)."""
        parts = []
        for part in torch.from_numpy(codes).split(self._batch):
            latent_BEhh = self.net.codebook_KE[part].reshape(len(part), self.side, self.side, -1)
            parts.append(to_pixels(self.net.decoder(latent_BEhh.permute(0, 3, 1, 2))))
        return torch.cat(parts).numpy()


class VQVAE(nn.Module):
    """The network and its codebook; its stages are ``latents``, ``nearest`` and ``decoder``."""

    codebook_KE: torch.Tensor
    count_K: torch.Tensor
    total_KE: torch.Tensor

    def __init__(self, codes: int, latent: int, width: int, halvings: int) -> None:
        super().__init__()
        self.encoder = encoder(latent, width, halvings)
        self.decoder = decoder(latent, width, halvings)
        self.register_buffer("codebook_KE", torch.zeros(codes, latent))
        # moving averages, for training, of the number of latents that chose a code and of their sum
        self.register_buffer("count_K", torch.ones(codes), persistent=False)
        self.register_buffer("total_KE", torch.zeros(codes, latent), persistent=False)

    def latents(self, x_BCHH: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, H) → (N, E), images and then positions in raster order."""
        return self.encoder(x_BCHH).permute(0, 2, 3, 1).flatten(0, 2)

    def nearest(self, z_NE: torch.Tensor) -> torch.Tensor:
        """(N, E) → (N,) index of the nearest code."""
        score_NK = 2 * z_NE @ self.codebook_KE.T - self.codebook_KE.square().sum(1)
        return score_NK.argmax(1)

    def loss(
        self, x_BCHH: torch.Tensor, quantise: bool, rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(training loss, squared pixel error); updates the codebook when ``quantise``."""
        z_NE = self.latents(x_BCHH)
        commitment = z_NE.new_zeros(())
        q_NE = z_NE
        if quantise:
            code_N = self.nearest(z_NE.detach())
            q_NE = self.codebook_KE[code_N]
            commitment = F.mse_loss(z_NE, q_NE)
            q_NE = z_NE + (q_NE - z_NE).detach()  # straight-through
            self._follow(z_NE.detach(), code_N, rng)
        side = math.isqrt(len(z_NE) // len(x_BCHH))
        q_BEhh = q_NE.reshape(len(x_BCHH), side, side, -1).permute(0, 3, 1, 2)
        reconstruction = F.mse_loss(self.decoder(q_BEhh), x_BCHH)
        return reconstruction + _COMMITMENT * commitment, reconstruction.detach()

    @torch.no_grad()
    def seed_codebook(self, x_BCHH: torch.Tensor, rng: torch.Generator) -> None:
        """Run k-means over the latents of ``x_BCHH``, from latents drawn at random."""
        z_NE = self.latents(x_BCHH)
        codes = len(self.codebook_KE)
        self._put(torch.arange(codes), z_NE, rng)
        for _ in range(10):
            choice_NK = F.one_hot(self.nearest(z_NE), codes).to(z_NE.dtype)
            count_K, total_KE = choice_NK.sum(0), choice_NK.T @ z_NE
            self.codebook_KE.copy_(total_KE / count_K.clamp(min=1)[:, None])
            self._put((count_K == 0).nonzero().flatten(), z_NE, rng)
        self.count_K.fill_(len(z_NE) / codes)
        self.total_KE.copy_(self.codebook_KE * self.count_K[:, None])

    @torch.no_grad()
    def _follow(self, z_NE: torch.Tensor, code_N: torch.Tensor, rng: torch.Generator) -> None:
        """Move codes towards the latents that chose them; re-seed dead ones from the batch."""
        codes = len(self.codebook_KE)
        choice_NK = F.one_hot(code_N, codes).to(z_NE.dtype)
        self.count_K.lerp_(choice_NK.sum(0), 1 - _CODEBOOK_DECAY)
        self.total_KE.lerp_(choice_NK.T @ z_NE, 1 - _CODEBOOK_DECAY)
        self.codebook_KE.copy_(self.total_KE / self.count_K.clamp(min=1e-6)[:, None])
        even = len(z_NE) / codes
        dead = (self.count_K < _DEAD_SHARE * even).nonzero().flatten()
        self._put(dead, z_NE, rng)
        self.count_K[dead] = even
        self.total_KE[dead] = self.codebook_KE[dead] * even

    def _put(self, codes: torch.Tensor, z_NE: torch.Tensor, rng: torch.Generator) -> None:
        """Set ``codes`` to latents drawn at random, with a little noise that separates repeats."""
        drawn = z_NE[torch.randint(len(z_NE), (len(codes),), generator=rng)]
        noise = torch.randn(drawn.shape, generator=rng) * z_NE.std(0) * 0.01
        self.codebook_KE[codes] = drawn + noise


def fit(
    net: nn.Module,
    images: torch.Tensor,
    loss_of: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    batch: int,
    learning_rate: float,
    rng: torch.Generator,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Minimise ``loss_of(step, x_BCHH) -> (loss, pixel error)`` on batches that ``rng`` draws from
    ``images``, uint8 (N, H, H, 3); Adam with one cycle of the learning rate.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(2, steps), pct_start=0.1
    )
    for step in range(steps):
        picked = torch.randint(len(images), (batch,), generator=rng)
        loss, reconstruction = loss_of(step, to_floats(images[picked]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, float(reconstruction))


class ResidualBlock(nn.Module):
    """Residual branch: a 3×3 convolution to half the channels and a 1×1 back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.GroupNorm(8, channels // 2), nn.SiLU(), nn.Conv2d(channels // 2, channels, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, H) → the same shape."""
        return x + self.body(x)


def build_vqvae(settings: dict[str, Any]) -> VQVAE:
    """The untrained network of ``settings``. ``ValueError`` names a setting that is impossible."""
    patch, width = settings["patch"], settings["width"]
    check_image_geometry(settings["image_size"], patch, settings["codes"])
    check_patch(patch)
    if width % 32:
        raise ValueError(f"width ({width}) must be a multiple of 32; choose another")
    return VQVAE(settings["codes"], settings["latent"], width, patch.bit_length() - 1)


def check_patch(patch: int) -> None:
    """``ValueError`` unless the encoder can halve the side down to ``patch``."""
    if patch < 2 or patch & (patch - 1):
        raise ValueError(f"patch ({patch}) must be a power of two for a vqvae; choose 2, 4, 8 …")


def encoder(latent: int, width: int, halvings: int) -> nn.Sequential:
    """Halves the side ``halvings`` times; half the width at the first, finest, level."""
    layers: list[nn.Module] = []
    channels = 3
    for level in range(halvings):
        wider = width // 2 if level == 0 and halvings > 1 else width
        layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), ResidualBlock(wider)]
        channels = wider
    layers += [ResidualBlock(width), nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, latent, 1)]
    return nn.Sequential(*layers)


def decoder(latent: int, width: int, halvings: int) -> nn.Sequential:
    """The encoder mirrored."""
    layers: list[nn.Module] = [nn.Conv2d(latent, width, 3, padding=1), ResidualBlock(width)]
    channels = width
    for level in reversed(range(halvings)):
        layers.append(ResidualBlock(channels))
        out = 3 if level == 0 else (width // 2 if level == 1 else width)
        layers.append(nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1))
        channels = out
    return nn.Sequential(*layers)
