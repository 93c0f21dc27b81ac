"""Adapters between continuous vectors (patches of latents or pixels) and the width of a decoder.

"linear": a matrix each way. "unet": the grid of an image goes down to one vector per patch by
residual convolutions with the time in every block, and up again with skip connections, as in
Transfusion (arXiv 2408.11039, 3.2 and table 5). Both add an embedding of the time to what the
decoder reads; a ``bottleneck`` narrows the linear input (JiT, arXiv 2511.13720).

B rows, S positions, T = B·S, P numbers in a vector, D width of the decoder, F channels of a U-Net,
I images (a fixed number for the shape of a batch, the rest of them empty), n vectors of an image, C
channels of latents or pixels, H side of an image in these.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.models.batch import MixedBatch, first_of_spans, vector_spans
from earlyfuse.models.blocks.branch import Flops, products
from earlyfuse.models.blocks.indexed_parameters import embedding
from earlyfuse.models.blocks.vector_layers import (
    FREQUENCIES,
    NORM_GROUPS,
    Bottleneck,
    Down,
    First,
    Last,
    TimeEmbedding,
    Up,
)
from earlyfuse.models.field_checks import check_choices, check_positive
from earlyfuse.models.init_weights import Draw, normal
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.vocabulary import Modality


class VectorAdapters:
    """The pair of adapters of a decoder, described by one config."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``width`` P of a vector; ``modalities`` whose items are vectors. An ``adapter`` "unet"
        needs ``block`` n, the vectors of an image, and ``channels`` C, where P = patch · patch · C,
        channels last; ``features``: F. ``place_embedding``: a learned vector for each place in the
        image is added; needs ``block`` too.

        ``bidirectional``: vectors of an image see one another both ways. ``rotary``: "running", a
        position for each vector, or "shared", one for all of an image. ``later_see``: what tokens
        after an image attend to, its "noised" vectors or a "clean" copy behind them (BAGEL, arXiv
        2505.14683).
        """

        width: int
        modalities: tuple[int, ...] = (Modality.IMAGE,)
        diffusion: Diffusion.Config = field(default_factory=Diffusion.Config)
        adapter: Literal["linear", "unet"] = "linear"
        bottleneck: int = 0
        place_embedding: bool = False
        block: int = 0
        channels: int = 0
        features: int = 128
        bidirectional: bool = True
        rotary: Literal["running", "shared"] = "running"
        later_see: Literal["noised", "clean"] = "noised"

        def __post_init__(self) -> None:
            check_positive(self, "width")
            check_choices(
                self,
                adapter=("linear", "unet"),
                rotary=("running", "shared"),
                later_see=("noised", "clean"),
            )
            if self.place_embedding and self.block < 1:
                raise ValueError(
                    f"block ({self.block}) must be the number of vectors of an image for a "
                    "place_embedding; give it, or turn place_embedding off"
                )
            if self.later_see == "clean" and not self.bidirectional:
                raise ValueError(
                    'later_see ("clean") needs bidirectional (True); set both, or neither'
                )
            if self.adapter == "linear":
                if self.bottleneck < 0:
                    raise ValueError(f"bottleneck ({self.bottleneck}) must be at least 0, off")
                return
            if self.bottleneck:
                raise ValueError(
                    f'bottleneck ({self.bottleneck}) must be 0 with adapter "unet"; it belongs to '
                    '"linear"'
                )
            if self.features < 1 or self.features % NORM_GROUPS:
                raise ValueError(
                    f"features ({self.features}) must be a positive multiple of {NORM_GROUPS}"
                )
            patch = math.isqrt(self.width // self.channels) if self.channels > 0 else 0
            if patch**2 * self.channels != self.width or patch & (patch - 1):
                raise ValueError(
                    f"channels ({self.channels}) must divide width ({self.width}) into a square "
                    "patch whose side is a power of two; give the channels of latents or pixels"
                )
            if self.block < 1 or math.isqrt(self.block) ** 2 != self.block:
                raise ValueError(
                    f"block ({self.block}) must be the square number of vectors of an image for "
                    'adapter "unet"'
                )

        def check(self, modalities: tuple[int, ...]) -> None:
            """``ValueError`` unless the decoder has the modalities of the vectors."""
            unknown = [Modality(m).label for m in self.modalities if m not in modalities]
            if unknown or not self.modalities or Modality.TEXT in self.modalities:
                raise ValueError(
                    f"vectors.modalities {[Modality(m).label for m in self.modalities]} must be "
                    "media of the model's modalities; change one of them"
                )

        @property
        def patch(self) -> int:
            """Side of a patch in latents or pixels, of a U-Net."""
            return math.isqrt(self.width // self.channels)

        def parameters(self, dim: int) -> int:
            """Number of parameters of both adapters."""
            with torch.device("meta"):
                pair = VectorInput(self, dim), VectorOutput(self, dim)
            return sum(p.numel() for one in pair for p in one.parameters())

        def flops(self, dim: int) -> Flops:
            """FLOPs of one vector in both adapters."""
            time = 2 * FREQUENCIES * (2 * FREQUENCIES + dim)
            if self.adapter == "linear":
                narrow = self.bottleneck * (self.width + dim) or self.width * dim
                return products(time + narrow + dim * self.width)
            with torch.device("meta"):
                down, up = Down(*self.unet(dim)), Up(*self.unet(dim))
            return products(time + down.multiply_adds() + up.multiply_adds())

        def saved(self, dim: int) -> int:
            """Elements per position that autograd keeps of both adapters, an estimate; a U-Net's
            images fill the row.
            """
            kept = self.width + 6 * FREQUENCIES + 3 * dim
            if self.adapter == "unet":
                positions = sum(
                    (self.patch >> level) ** 2 for level in range(self.patch.bit_length())
                )
                kept += 16 * self.features * positions  # of eight convolutions and norms a level
            return kept

        def unet(self, dim: int) -> tuple[int, int, int, int]:
            """Arguments of ``Down`` and ``Up``."""
            return self.channels, self.patch, self.features, dim


class Skips(NamedTuple):
    """Skip connections from the input adapter to the output adapter of a batch."""

    grid: "Grid"
    time_ID: torch.Tensor
    levels: list[torch.Tensor]


class VectorInput(Module):
    """Noised vectors and their times → what the decoder reads in place of token embeddings."""

    def __init__(self, config: VectorAdapters.Config, dim: int):
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(dim)
        self.places = PlaceEmbedding(config.block, dim) if config.place_embedding else None
        self.net: nn.Module = First(config.width, dim)
        if config.adapter == "unet":
            self.net = Down(*config.unet(dim))
        elif config.bottleneck:
            self.net = Bottleneck(config.width, config.bottleneck, dim)

    def forward(self, x_TD: torch.Tensor, batch: MixedBatch) -> tuple[torch.Tensor, Skips | None]:
        """``x_TD`` with the vectors of ``batch`` in their places.

        Batches without vectors go through too, as every rank must call every module.
        """
        vectors_TP, has_vector_T, time_T = _flat(batch, self.config.width)
        vectors_TP, time_TD = vectors_TP.to(x_TD.dtype), self.time(time_T, x_TD.dtype)
        skips = None
        if isinstance(self.net, Down):
            grid = Grid.build(batch, self.config.block)
            time_ID = grid.of_images(time_TD)
            at_IDHW, levels = self.net(grid.images(vectors_TP), time_ID)
            at_TD, skips = grid.tokens(at_IDHW), Skips(grid, time_ID, levels)
        else:
            at_TD = self.net(vectors_TP)
        at_TD = at_TD + time_TD
        if self.places is not None:
            at_TD = at_TD + self.places(batch)
        return torch.where(has_vector_T[:, None], at_TD, x_TD), skips


class PlaceEmbedding(Module):
    """A learned vector for each place in an image; weight (n, D)."""

    def __init__(self, block: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block, dim))

    def draws(self) -> dict[str, Draw]:
        """The scale of token embeddings."""
        return {"weight": normal(std=1.0)}

    def forward(self, batch: MixedBatch) -> torch.Tensor:
        """(T, D); that of the first place at positions without a vector."""
        span_BS = vector_spans(batch)
        if span_BS is None:
            span_BS = torch.zeros_like(batch.document_BS)
        place_S = torch.arange(span_BS.shape[1], device=span_BS.device)
        place_BS = (place_S - first_of_spans(span_BS)) * (span_BS != 0)
        return embedding(place_BS.flatten().clamp(max=len(self.weight) - 1), self.weight)


class VectorOutput(Module):
    """Hidden states after the last norm → predictions of vectors, zero before training."""

    def __init__(self, config: VectorAdapters.Config, dim: int):
        super().__init__()
        unet = config.adapter == "unet"
        self.net: nn.Module = Up(*config.unet(dim)) if unet else Last(dim, config.width)

    def forward(self, x_TD: torch.Tensor, skips: Skips | None) -> torch.Tensor:
        """(T, D) → (T, P)."""
        if skips is None:
            return self.net(x_TD)
        grid, time_ID, levels = skips
        return grid.tokens(self.net(grid.images(x_TD), time_ID, levels))


def _flat(batch: MixedBatch, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors (T, P), where there are any (T,), and times (T,)."""
    empty_T = torch.zeros_like(batch.tokens_BS, dtype=torch.float32).flatten()
    if batch.vectors_BSP is None or batch.has_vector_BS is None:
        return empty_T[:, None].expand(-1, width), empty_T.bool(), empty_T
    time_T = empty_T if batch.time_BS is None else batch.time_BS.flatten()
    return batch.vectors_BSP.flatten(0, 1), batch.has_vector_BS.flatten(), time_T


class Grid(NamedTuple):
    """The places of the vectors of a batch in its images.

    ``token_N``: position (of T) of each slot of all images, N = I · n, or T for an empty slot;
    ``slot_T``: slot of each position, or N for one without a vector.
    """

    token_N: torch.Tensor
    slot_T: torch.Tensor
    side: int

    @classmethod
    def build(cls, batch: MixedBatch, block: int) -> "Grid":
        """The grid of images of ``block`` vectors; a row has room for S // block + 1 of them, none
        in a batch without vectors, as in decoding text.
        """
        rows, seq_len = batch.tokens_BS.shape
        span_BS = vector_spans(batch)
        if span_BS is None:
            span_BS = torch.zeros_like(batch.document_BS)
        room = 0 if batch.vectors_BSP is None else seq_len // block + 1
        first_BS = first_of_spans(span_BS)
        place_S = torch.arange(seq_len, device=span_BS.device)
        begins_BS = (first_BS == place_S) & (span_BS != 0)
        image_BS = begins_BS.cumsum(1) - 1
        row_B1 = torch.arange(rows, device=span_BS.device)[:, None]
        slot_BS = (row_B1 * room + image_BS) * block + place_S - first_BS
        slots, tokens = rows * room * block, rows * seq_len
        slot_T = torch.where(span_BS != 0, slot_BS, slots).flatten()
        token_N = torch.full((slots + 1,), tokens, device=slot_T.device)
        token_N = token_N.index_copy(0, slot_T, torch.arange(tokens, device=slot_T.device))
        return cls(token_N[:slots], slot_T, math.isqrt(block))

    def images(self, x_TC: torch.Tensor) -> torch.Tensor:
        """(T, C) → (I, C, side, side); 0 in empty slots."""
        x_NC = F.pad(x_TC, (0, 0, 0, 1)).index_select(0, self.token_N)
        return x_NC.view(-1, self.side, self.side, x_TC.shape[1]).permute(0, 3, 1, 2)

    def of_images(self, x_TC: torch.Tensor) -> torch.Tensor:
        """(T, C) → (I, C): of the first vector of each image."""
        first_I = self.token_N.view(-1, self.side**2)[:, 0]
        return F.pad(x_TC, (0, 0, 0, 1)).index_select(0, first_I)

    def tokens(self, x_ICHH: torch.Tensor) -> torch.Tensor:
        """(I, C, side, side) → (T, C); 0 at positions without a vector."""
        x_NC = x_ICHH.permute(0, 2, 3, 1).flatten(0, 2)
        return F.pad(x_NC, (0, 0, 0, 1)).index_select(0, self.slot_T)
