"""SwiGLU feed-forward: dense, or untied by modality (Mixture-of-Transformers; MoMa's 1t1i).

T tokens, D width, F inner width, G groups.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.kernels.grouped_gemm import grouped_swiglu
from earlyfuse.models.blocks.local_shard import held
from earlyfuse.models.context import Layout


class FeedForward(Module):
    """w2(silu(w1 x) · w3 x). Weights (F, D), (F, D), (D, F); with a leading G when untied."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        hidden_dim: int
        groups: int = 1

    def __init__(self, config: Config):
        super().__init__()
        self.untied = config.groups > 1
        lead = (config.groups,) if self.untied else ()
        self.w1 = nn.Parameter(torch.empty(*lead, config.hidden_dim, config.dim))
        self.w3 = nn.Parameter(torch.empty(*lead, config.hidden_dim, config.dim))
        self.w2 = nn.Parameter(torch.empty(*lead, config.dim, config.hidden_dim))

    def forward(self, x_TD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(T, D) → (T, D)."""
        w1, w3, w2 = held(self.w1), held(self.w3), held(self.w2)
        if self.untied:
            return grouped_swiglu(x_TD, w1, w3, w2, *layout.by_group, unique_tokens=True)
        return F.linear(F.silu(F.linear(x_TD, w1)) * F.linear(x_TD, w3), w2)
