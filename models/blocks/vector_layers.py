"""Layers of the vector adapters: matrices with a bias, the embedding of a time, and a small U-Net.

T tokens, P numbers in a vector, D width of the decoder, I images, C channels of latents or pixels,
F channels of the U-Net, H and W sides.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.module import Module, ModuleList

from earlyfuse.kernels.checks import readable
from earlyfuse.models.init_weights import Draw, constant, normal, uniform

FREQUENCIES = 128  # of the embedding of a time; each has a sine and a cosine
NORM_GROUPS = 8
_SLOWEST = 10_000.0


class Affine(Module):
    """x W^T + b."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def draws(self) -> dict[str, Draw]:
        """Uniform in ±1 / sqrt(inputs)."""
        return {"weight": uniform(), "bias": constant(0.0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) → (…, outputs)."""
        return F.linear(x, self.weight, self.bias)


class First(Affine):
    """Projects vectors to the width, with the scale of token embeddings."""

    def draws(self) -> dict[str, Draw]:
        """Outputs of unit variance for vectors of unit variance."""
        weight = normal(std=self.weight.shape[1] ** -0.5)
        return {"weight": weight, "bias": constant(0.0)}


class Last(Affine):
    """Projects hidden states to vectors; zero before training."""

    def draws(self) -> dict[str, Draw]:
        return {"weight": constant(0.0), "bias": constant(0.0)}


class Bottleneck(Module):
    """Low-rank projection: two matrices with a narrow width between them (JiT)."""

    def __init__(self, inputs: int, waist: int, outputs: int):
        super().__init__()
        self.waist, self.out = First(inputs, waist), First(waist, outputs)

    def forward(self, x_TP: torch.Tensor) -> torch.Tensor:
        """(T, P) → (T, D)."""
        return self.out(self.waist(x_TP))


class TimeEmbedding(Module):
    """Sines and cosines of 1000 t, and two matrices, as in diffusion transformers."""

    def __init__(self, dim: int):
        super().__init__()
        self.first = Affine(2 * FREQUENCIES, 2 * FREQUENCIES)
        self.second = Affine(2 * FREQUENCIES, dim)

    def forward(self, time_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(T,) fp32 → (T, D) in ``dtype``."""
        if readable(time_T):  # once for each image rather than for each vector
            time_I, image_T = time_T.unique(return_inverse=True)
            return self._embedded(time_I, dtype).index_select(0, image_T)
        return self._embedded(time_T, dtype)

    def _embedded(self, time_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        index = torch.arange(FREQUENCIES, device=time_T.device, dtype=torch.float32)
        angle = 1000 * time_T[:, None] * _SLOWEST ** (-index / FREQUENCIES)
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(dtype)
        return self.second(F.silu(self.first(waves)))


class Conv(Module):
    """A convolution with a bias that keeps the sides, or divides them by ``stride``."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))

    def draws(self) -> dict[str, Draw]:
        """Uniform in ±1 / sqrt(inputs of an output)."""
        return {"weight": uniform(self.weight[0].numel()), "bias": constant(0.0)}

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one output position."""
        return self.weight.numel()

    def forward(self, x_ICHW: torch.Tensor) -> torch.Tensor:
        """(I, C, H, W) → (I, F, H / stride, W / stride)."""
        padding = (self.weight.shape[-1] - self.stride + 1) // 2
        return F.conv2d(x_ICHW, self.weight, self.bias, self.stride, padding)


class LastConv(Conv):
    """A convolution that is zero before training."""

    def draws(self) -> dict[str, Draw]:
        return {"weight": constant(0.0), "bias": constant(0.0)}


class Norm(Module):
    """Group normalisation with a weight and bias of each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def draws(self) -> dict[str, Draw]:
        return {"weight": constant(1.0), "bias": constant(0.0)}

    def forward(self, x_ICHW: torch.Tensor) -> torch.Tensor:
        """(I, C, H, W) → the same shape."""
        return F.group_norm(x_ICHW, NORM_GROUPS, self.weight, self.bias)


class Residual(Module):
    """x + convolutions of x, scaled and shifted by the time (AdaGN, arXiv 2105.05233)."""

    def __init__(self, inputs: int, outputs: int, time_dim: int):
        super().__init__()
        self.first_norm, self.first = Norm(inputs), Conv(inputs, outputs)
        self.time = Affine(time_dim, 2 * outputs)
        self.second_norm, self.second = Norm(outputs), LastConv(outputs, outputs)
        self.across = None if inputs == outputs else Conv(inputs, outputs, 1)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one position, without the time."""
        across = 0 if self.across is None else self.across.multiply_adds
        return self.first.multiply_adds + self.second.multiply_adds + across

    def forward(self, x_ICHW: torch.Tensor, time_ID: torch.Tensor) -> torch.Tensor:
        """(I, C, H, W) and (I, D) → (I, F, H, W)."""
        h_IFHW = self.first(F.silu(self.first_norm(x_ICHW)))
        scale_IF, shift_IF = self.time(F.silu(time_ID)).chunk(2, -1)
        h_IFHW = self.second_norm(h_IFHW) * (1 + scale_IF[..., None, None])
        h_IFHW = self.second(F.silu(h_IFHW + shift_IF[..., None, None]))
        return h_IFHW + (x_ICHW if self.across is None else self.across(x_ICHW))


class Down(Module):
    """Patches of an image → one vector of width D each; the side is halved log2(patch) times."""

    def __init__(self, channels: int, patch: int, features: int, dim: int):
        super().__init__()
        self.patch, halvings = patch, patch.bit_length() - 1
        self.first = Conv(channels, features)
        self.blocks = ModuleList([Residual(features, features, dim) for _ in range(halvings + 1)])
        self.halvings = ModuleList([Conv(features, features, 4, 2) for _ in range(halvings)])
        self.last = Conv(features, dim, 1)

    def multiply_adds(self) -> int:
        """Multiply-adds of one patch, without the time."""
        found = self.first.multiply_adds * self.patch**2 + self.last.multiply_adds
        for level, block in enumerate(self.blocks):
            found += block.multiply_adds * (self.patch >> level) ** 2
        for level, halve in enumerate(self.halvings, start=1):
            found += halve.multiply_adds * (self.patch >> level) ** 2
        return found

    def forward(
        self, x_IPHW: torch.Tensor, time_ID: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(I, P, H, W) → (I, D, H, W), and the skip connections, the finest first."""
        x = self.first(unpatched(x_IPHW, self.patch))
        skips: list[torch.Tensor] = []
        for level, block in enumerate(self.blocks):
            x = block(x, time_ID)
            skips.append(x)
            if level < len(self.halvings):
                x = self.halvings[level](x)
        return self.last(x), skips


class Up(Module):
    """Vectors of width D and the skip connections of ``Down`` → patches."""

    def __init__(self, channels: int, patch: int, features: int, dim: int):
        super().__init__()
        self.patch, halvings = patch, patch.bit_length() - 1
        self.first = Conv(dim, features, 1)
        blocks = [Residual(2 * features, features, dim) for _ in range(halvings + 1)]
        self.blocks = ModuleList(blocks)
        self.doublings = ModuleList([Conv(features, features) for _ in range(halvings)])
        self.norm, self.last = Norm(features), LastConv(features, channels)

    def multiply_adds(self) -> int:
        """Multiply-adds of one patch, without the time."""
        found = self.first.multiply_adds + self.last.multiply_adds * self.patch**2
        for level, block in enumerate(self.blocks):
            found += block.multiply_adds * (1 << level) ** 2
        for level, double in enumerate(self.doublings, start=1):
            found += double.multiply_adds * (1 << level) ** 2
        return found

    def forward(
        self, x_IDHW: torch.Tensor, time_ID: torch.Tensor, skips: list[torch.Tensor]
    ) -> torch.Tensor:
        """(I, D, H, W) → (I, P, H, W)."""
        x = self.first(x_IDHW)
        for level, block in enumerate(self.blocks):
            x = block(torch.cat([x, skips[-1 - level]], 1), time_ID)
            if level < len(self.doublings):
                x = self.doublings[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return patched(self.last(F.silu(self.norm(x))), self.patch)


def unpatched(x_IPHW: torch.Tensor, patch: int) -> torch.Tensor:
    """(I, P, h, w) → (I, C, h · patch, w · patch); P is (row, column, channel) of a patch."""
    return F.pixel_shuffle(_channels_first(x_IPHW, patch), patch)


def patched(x_ICHW: torch.Tensor, patch: int) -> torch.Tensor:
    """Inverse of ``unpatched``."""
    x_IPhw = F.pixel_unshuffle(x_ICHW, patch)
    grid = x_IPhw.unflatten(1, (-1, patch * patch))
    return grid.transpose(1, 2).flatten(1, 2)


def _channels_first(x_IPHW: torch.Tensor, patch: int) -> torch.Tensor:
    return x_IPHW.unflatten(1, (patch * patch, -1)).transpose(1, 2).flatten(1, 2)
