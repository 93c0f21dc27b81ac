"""Mamba-1's mixer (arXiv 2312.00752), its projections shared or untied by modality.

With all four untied this is Mixture-of-Mamba (arXiv 2501.16295); convolution, rates of decay and
skip are shared by all modalities, so that one recurrent state runs through the mixed sequence.
Projections sort tokens by modality and put them back inside their kernels; only the convolution
and the scan need the order of the sequence.

B rows, S positions, T = B·S tokens, D width, I inner width, N states, R rank of the step sizes,
W taps, V = W - 1, G modality groups.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.kernels.causal_conv1d import causal_conv1d
from earlyfuse.kernels.selective_scan import selective_scan
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.blocks.linear import Linear
from earlyfuse.models.blocks.wide import wide
from earlyfuse.models.context import ForwardContext

WIDTHS = (2, 3, 4)  # that the kernels of the convolution have


class Mamba(Module):
    """x, z = in(h); u = silu(conv(x)); Δ, B, C = x_proj(u); out(scan(u, Δ, B, C) · silu(z)).

    Δ is of rank R and widened by dt_proj, whose bias the scan adds in fp32. State and convolution
    begin anew with each document.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``…_groups``: how many sets of a projection there are, 1 for all tokens, or one for each
        modality group; the four are the ablation of arXiv 2501.16295."""

        dim: int
        inner_dim: int
        dt_rank: int
        states: int = 16
        conv_width: int = 4
        in_proj_groups: int = 1
        x_proj_groups: int = 1
        dt_proj_groups: int = 1
        out_proj_groups: int = 1

        def __post_init__(self) -> None:
            for name in ("dim", "inner_dim", "dt_rank", "states", *GROUPS):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
            if self.conv_width not in WIDTHS:
                raise ValueError(f"conv_width ({self.conv_width}) must be 2, 3 or 4")

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        inner, rank, states = config.inner_dim, config.dt_rank, config.states
        self.in_proj = _linear(config.dim, 2 * inner, config.in_proj_groups)
        self.conv = Conv(inner, config.conv_width)
        self.x_proj = _linear(inner, rank + 2 * states, config.x_proj_groups)
        self.dt_proj = _linear(rank, inner, config.dt_proj_groups)
        self.scan = Scan(inner, states, config.dt_proj_groups)
        self.out_proj = _linear(inner, config.dim, config.out_proj_groups)

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D)."""
        rank, states = self.config.dt_rank, self.config.states
        sequence = (context.rows, context.seq_len)
        kept = None if context.cache is None else context.cache.state(self, MambaCache)
        x_BSI, z_BSI = self.in_proj(x_TD, context).unflatten(0, sequence).chunk(2, -1)
        u_BSI = self.conv(x_BSI, context, kept)
        selected_TP = self.x_proj(u_BSI.flatten(0, 1), context)
        dt_TR, B_TN, C_TN = selected_TP.split([rank, states, states], -1)
        delta_BSI = self.dt_proj(dt_TR, context).unflatten(0, sequence)
        B_BSN, C_BSN = (t.unflatten(0, sequence) for t in (B_TN, C_TN))
        y_BSI = self.scan(u_BSI, delta_BSI, B_BSN, C_BSN, z_BSI, context, kept)
        return self.out_proj(y_BSI.flatten(0, 1), context)


GROUPS = ("in_proj_groups", "x_proj_groups", "dt_proj_groups", "out_proj_groups")


def _linear(in_features: int, out_features: int, groups: int) -> Linear:
    config = Linear.Config(in_features=in_features, out_features=out_features, groups=groups)
    return config.build()


class Conv(Module):
    """Causal depthwise convolution and SiLU. Weight (I, W), the last tap the token's own; bias
    (I,).
    """

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, width))
        self.bias = nn.Parameter(torch.empty(inner))

    def forward(
        self, x_BSI: torch.Tensor, context: ForwardContext, kept: "MambaCache | None"
    ) -> torch.Tensor:
        """(B, S, I) → (B, S, I)."""
        inputs_before = context.sequence_shard.inputs_before if kept is None else kept.inputs
        before_BVI = inputs_before(x_BSI, self.weight.shape[1] - 1)
        u_BSI, _ = causal_conv1d(
            x_BSI,
            self.weight,
            self.bias,
            positions_BL=context.place_BS,
            initial_state_BVD=before_BVI,
        )
        return u_BSI


class Scan(Module):
    """The selective scan, skip and gate, with its fp32 parameters: ``A_log`` (I, N), ``D`` (I,),
    ``dt_bias`` (I,), or (G, I) untied by modality.

    A module of its own, so that they can be kept in fp32 where all else computes in bf16.
    """

    def __init__(self, inner: int, states: int, groups: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.untied = groups > 1
        self.dt_bias = nn.Parameter(
            torch.empty(groups, inner) if self.untied else torch.empty(inner)
        )

    def forward(
        self,
        u_BSI: torch.Tensor,
        delta_BSI: torch.Tensor,
        B_BSN: torch.Tensor,
        C_BSN: torch.Tensor,
        z_BSI: torch.Tensor,
        context: ForwardContext,
        kept: "MambaCache | None",
    ) -> torch.Tensor:
        """(B, S, I) → (B, S, I)."""
        if kept is not None:
            delta_BSI = kept.steps(delta_BSI)
        bias = wide(self.dt_bias)
        inputs = (  # of ``selective_scan``, in its order
            *(u_BSI, delta_BSI, -torch.exp(wide(self.A_log)), B_BSN, C_BSN, wide(self.D), z_BSI),
            bias if self.untied else bias.unsqueeze(0),
            context.group_T.view(context.rows, context.seq_len) if self.untied else None,
            context.place_BS == 0,
        )
        if kept is None:
            return context.sequence_shard.scan(*inputs)
        y_BSI, kept.state_BIN = selective_scan(*inputs, kept.state_BIN)
        return y_BSI


class MambaCache:
    """What a mixer keeps of the tokens read: the convolution's last inputs and the scan's state.

    Both hold what the last *real* token of each row left behind.
    """

    def __init__(self, cache: DecodeCache):
        self.cache = cache
        self.inputs_BVI: torch.Tensor | None = None
        self.state_BIN: torch.Tensor | None = None

    def inputs(self, x_BSI: torch.Tensor, taps: int) -> torch.Tensor:
        """The convolution's ``taps`` inputs before this call, (B, V, I); takes in ``x_BSI``."""
        if self.inputs_BVI is None:
            self.inputs_BVI = x_BSI.new_zeros(x_BSI.shape[0], taps, x_BSI.shape[2])
        before_BVI, real_B = self.inputs_BVI, self.cache.real_B
        assert real_B is not None, "start_step comes before a forward"
        row_B1 = torch.arange(len(real_B), device=real_B.device).unsqueeze(1)
        last_BV = real_B.unsqueeze(1) + torch.arange(taps, device=real_B.device)
        self.inputs_BVI = torch.cat([before_BVI, x_BSI], 1)[row_B1, last_BV]
        return before_BVI

    def steps(self, delta_BSI: torch.Tensor) -> torch.Tensor:
        """Step sizes that are 0 behind the real tokens, where the state must stay as it is."""
        seq_len, real_B = delta_BSI.shape[1], self.cache.real_B
        if seq_len == 1 or real_B is None:
            return delta_BSI
        behind_BS = torch.arange(seq_len, device=real_B.device) >= real_B.unsqueeze(1)
        return delta_BSI.masked_fill(behind_BS.unsqueeze(-1), -torch.inf)

    def select(self, row_R: torch.Tensor) -> None:
        """See ``cache.State``."""
        if self.inputs_BVI is not None and self.state_BIN is not None:
            self.inputs_BVI, self.state_BIN = self.inputs_BVI[row_R], self.state_BIN[row_R]
