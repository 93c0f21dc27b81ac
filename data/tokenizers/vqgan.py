"""The VQ-GAN with which Chameleon encodes images, under the parameter names of its checkpoints.

Esser et al. 2021 (2012.09841), in the form of Gafni et al. 2022 (2203.13131) that Chameleon
(2405.09818, 2.1) uses: a convolutional encoder that halves the side between levels, the nearest
entry of a codebook, and a decoder that mirrors the encoder. Inference only; losses, discriminator
and codebook updates are left out.

``state_dict`` has the keys of both the original files (``vqgan.ckpt``) and Hugging Face's
``model.vqmodel.*``: ``encoder.down.L.block.B.conv1`` and so on, L level (0 the finest), B block.

B images, C channels, H and W pixels, E entries' dimension, K codes, h and w latents, N = B · h · w.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

_GROUPS, _EPSILON = 32, 1e-6


@dataclass(frozen=True)
class VQGANShape:
    """Sizes of the network.

    ``codes`` K entries of ``embed`` values; ``latent`` channels between encoder and codebook;
    ``width`` times ``multipliers[L]`` channels at level L; ``blocks`` residual blocks a level (the
    decoder has one more); ``attention``: the levels with attention; ``middle_attention``: attention
    between the two middle blocks; ``decoder``: build one.
    """

    codes: int
    embed: int
    latent: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    middle_attention: bool
    decoder: bool

    def __post_init__(self) -> None:
        bad = [m for m in (1, *self.multipliers) if m < 1 or self.width * m % _GROUPS]
        if bad or not self.multipliers:
            raise ValueError(
                f"width ({self.width}) times each of multipliers ({list(self.multipliers)}) must "
                f"be a positive multiple of {_GROUPS}, the groups of a norm; correct the config"
            )

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return int(2 ** (len(self.multipliers) - 1))


class VQGAN(nn.Module):
    """Images ↔ codes. Parameters are uninitialised where built under the meta device."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        self.encoder = Encoder(shape)
        self.quantize = Quantizer(shape.codes, shape.embed)
        self.quant_conv = nn.Conv2d(shape.latent, shape.embed, 1)
        self.post_quant_conv = nn.Conv2d(shape.embed, shape.latent, 1)
        if shape.decoder:
            self.decoder = Decoder(shape)

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in about [-1, 1] → int64 (B, h · w), raster order."""
        z_BEhw = self.quant_conv(self.encoder(x_BCHW))
        code_N = self.quantize(z_BEhw.permute(0, 2, 3, 1).flatten(0, 2))
        return code_N.reshape(len(x_BCHW), -1)

    def decode(self, code_Bhw: torch.Tensor) -> torch.Tensor:
        """int64 (B, h, w) → (B, 3, H, W) in about [-1, 1]."""
        z_BEhw = self.quantize.embedding(code_Bhw).permute(0, 3, 1, 2).contiguous()
        return self.decoder(self.post_quant_conv(z_BEhw))


class Quantizer(nn.Module):
    """The codebook."""

    def __init__(self, codes: int, embed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, embed)

    def forward(self, z_NE: torch.Tensor) -> torch.Tensor:
        """(N, E) → (N,) index of the nearest entry, the first among equals."""
        book_KE = self.embedding.weight
        # |z − e|² in full: without the constant |z|² rounding would break near ties differently
        # from the implementations that the codes have to agree with
        squares_NK = z_NE.square().sum(1, keepdim=True) + book_KE.square().sum(1)
        return (squares_NK - 2 * (z_NE @ book_KE.T)).argmin(1)


class Encoder(nn.Module):
    """Levels from fine to coarse, then the middle."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        channels = [shape.width, *(shape.width * m for m in shape.multipliers)]
        coarsest = len(shape.multipliers) - 1
        self.conv_in = _conv3(3, shape.width)
        self.down = nn.ModuleList(
            Level(c_in, c_out, shape.blocks, level in shape.attention, downsample=level != coarsest)
            for level, (c_in, c_out) in enumerate(pairwise(channels))
        )
        self.mid = Middle(channels[-1], shape.middle_attention)
        self.norm_out = _norm(channels[-1])
        self.conv_out = _conv3(channels[-1], shape.latent)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, latent, h, w)."""
        x = self.conv_in(x_BCHW)
        for level in self.down:
            x = level(x)
        return self.conv_out(_swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The middle, then levels from coarse to fine; ``up[L]`` is level L, as in the encoder."""

    def __init__(self, shape: VQGANShape) -> None:
        super().__init__()
        channels = [shape.width * m for m in shape.multipliers]
        self.conv_in = _conv3(shape.latent, channels[-1])
        self.mid = Middle(channels[-1], shape.middle_attention)
        self.up = nn.ModuleList(
            Level(c_in, c_out, shape.blocks + 1, level in shape.attention, upsample=level != 0)
            for level, (c_in, c_out) in enumerate(
                zip([*channels[1:], channels[-1]], channels, strict=True)
            )
        )
        self.norm_out = _norm(channels[0])
        self.conv_out = _conv3(channels[0], 3)

    def forward(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """(B, latent, h, w) → (B, 3, H, W)."""
        x = self.mid(self.conv_in(z_BChw))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_swish(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks with optional attention at one resolution, then a change of resolution."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        blocks: int,
        attention: bool,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(c_in if number == 0 else c_out, c_out) for number in range(blocks)
        )
        self.attn = nn.ModuleList(Attention(c_out) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(c_out) if downsample else nn.Identity()
        self.upsample = Upsample(c_out) if upsample else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) → (B, C_out, H', W')."""
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """Residual block, optional attention, residual block."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) → the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    """Norm, swish and 3×3 convolution, twice; the skip is an identity or a 1×1 convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), _conv3(c_in, c_out)
        self.norm2, self.conv2 = _norm(c_out), _conv3(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) → (B, C_out, H, W)."""
        branch = self.conv1(_swish(self.norm1(x)))
        branch = self.conv2(_swish(self.norm2(branch)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + branch


class Attention(nn.Module):
    """Single-head attention over all positions, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → the same shape."""
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2) for project in (self.q, self.k, self.v))
        weights = torch.softmax((q.mT @ k) * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ weights.mT).view_as(x))


class Downsample(nn.Module):
    """Halves the side by a strided 3×3 convolution, padded to the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side by repetition, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=_EPSILON)


def _conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def _swish(x: torch.Tensor) -> torch.Tensor:
    # not F.silu: codes near a tie depend on the last bit. In place: x is a norm's result
    return x.mul_(torch.sigmoid(x))
