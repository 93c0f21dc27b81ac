"""Mamba-1's mixer (arXiv 2312.00752), its projections shared or untied by modality.

With all four untied this is Mixture-of-Mamba (arXiv 2501.16295); convolution, decay rates and skip
are shared by all modalities, so that one recurrent state runs through the mixed sequence. Untied
projections sort tokens by modality inside their kernels; only convolution and scan need the order
of the sequence.

B rows, S positions, T = B·S tokens, D width, I inner width, N states, R rank of the step sizes,
W taps, V = W - 1, G modality groups.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.kernels.causal_conv1d import causal_conv1d
from earlyfuse.kernels.selective_scan import selective_scan
from earlyfuse.kernels.selective_scan.chunks import count_chunks
from earlyfuse.kernels.selective_scan.op import BACKWARD_FLOPS, FORWARD_FLOPS
from earlyfuse.models.blocks.branch import (
    FP32,
    Branch,
    Collective,
    Flops,
    Matrix,
    Microbatch,
    Regrouping,
    Use,
)
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.blocks.linear import Linear, parameter
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.field_checks import check_at_least
from earlyfuse.models.init_weights import Draw, Scales, constant, fill, local_shard, uniform
from earlyfuse.models.precision import wide

WIDTHS = (2, 3, 4)  # of the convolution's kernels
GROUPS = ("in_proj_groups", "x_proj_groups", "dt_proj_groups", "out_proj_groups")
SHORTEST_STEP, LONGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class Mamba(Branch):
    """x, z = in(h); u = silu(conv(x)); Δ, B, C = x_proj(u); out(scan(u, Δ, B, C) · silu(z)).

    Δ is of rank R and widened by dt_proj, whose bias the scan adds in fp32. State and convolution
    restart with each document.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Branch.Config):
        """``…_groups``: sets of a projection, 1 for all tokens, or one for each modality group; the
        four are the ablation of arXiv 2501.16295."""

        inherited_fields: ClassVar[tuple[str, ...]] = (
            *("inner_dim", "states", "dt_rank", "conv_width"),
        )
        supports: ClassVar[tuple[Use, ...]] = ("context_parallel", "decoding")

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
            check_at_least(self, 1, "dim", "inner_dim", "dt_rank", "states", *GROUPS)
            if self.conv_width not in WIDTHS:
                raise ValueError(f"conv_width ({self.conv_width}) must be 2, 3 or 4")

        def check(self, modality_groups: int) -> None:
            for name in GROUPS:
                if getattr(self, name) not in (1, modality_groups):
                    raise ValueError(
                        f"{name} ({getattr(self, name)}) must be 1, for all tokens, or "
                        f"{modality_groups}, one for each modality group"
                    )

        def regrouped(self, to: Regrouping) -> Self:
            return replace(self, **{name: to.sets(getattr(self, name)) for name in GROUPS})

        def matrices(self) -> list[Matrix]:
            """in_proj, x_proj, dt_proj, out_proj."""
            inner, selected = self.inner_dim, self.dt_rank + 2 * self.states
            return [
                Matrix(self.dim, 2 * inner, self.in_proj_groups),
                Matrix(inner, selected, self.x_proj_groups),
                Matrix(self.dt_rank, inner, self.dt_proj_groups),
                Matrix(inner, self.dim, self.out_proj_groups),
            ]

        def vectors(self) -> list[tuple[int, int]]:
            """Convolution with its bias, A and D; the bias of the step sizes."""
            shared = self.inner_dim * (self.conv_width + 1 + self.states + 1)
            return [(shared, 1), (self.inner_dim, self.dt_proj_groups)]

        def flops(self, seq_len: int, group: int) -> Flops:
            """Projections, convolution and scan (kernels/*/README.md)."""
            scan, taps = self.inner_dim * self.states, 2 * self.inner_dim * self.conv_width
            # backward, once each: of the inputs, of the taps, and what SiLU's derivative recomputes
            recurrences = Flops(FORWARD_FLOPS * scan + taps, BACKWARD_FLOPS * scan + 3 * taps)
            return Branch.Config.flops(self, seq_len, group) + recurrences

        def saved(self, batch: Microbatch) -> int:
            """x and z, u, step sizes, the gated output; outputs of x_proj; in fp32, the states
            before each chunk, and the states that other ranks send.
            """
            kept = count_chunks(batch.seq_len) + batch.context_ranks - 1
            states = FP32 // batch.itemsize * self.inner_dim * self.states * kept
            selected = self.dt_rank + 2 * self.states
            return 5 * self.inner_dim + selected + states // batch.seq_len

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            """Inputs of the convolution, and states of the scan, from the ranks before."""
            channels = batch.context_ranks * batch.rows * self.inner_dim
            halo = channels * min(self.conv_width - 1, batch.seq_len) * batch.itemsize
            states = channels * self.states * FP32
            yield Collective("conv halo", "all_gather", "cp", halo, forward=1)
            yield Collective("scan states", "all_gather", "cp", 2 * states, forward=1)
            yield Collective("scan states", "all_gather", "cp", states, backward=1)
            yield Collective("conv halo", "reduce_scatter", "cp", halo, backward=1)

        def refusal(self, use: Use) -> str | None:
            if use == "tensor_parallel":
                return "it is a Mamba block, whose channels all meet in one projection; use FSDP"
            return Branch.Config.refusal(self, use)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        in_proj, x_proj, dt_proj, out_proj = map(Linear, config.matrices())
        self.in_proj = in_proj
        self.conv = Conv(config.inner_dim, config.conv_width)
        self.x_proj, self.dt_proj = x_proj, dt_proj
        self.scan = Scan(config.inner_dim, config.states, config.dt_proj_groups)
        self.out_proj = out_proj

    def draws(self) -> dict[str, Draw]:
        """Uniform, as in arXiv 2312.00752 and its code; ``out_proj`` writes into the residual."""
        inner = dict.fromkeys(("in_proj.weight", "x_proj.weight", "dt_proj.weight"), uniform())
        return inner | {"out_proj.weight": uniform(residual=True)}

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


class Conv(Module):
    """Causal depthwise convolution and SiLU. Weight (I, W), the token's own tap last; bias (I,)."""

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, width))
        self.bias = nn.Parameter(torch.empty(inner))

    def draws(self) -> dict[str, Draw]:
        """The bias too is uniform in ±1 / sqrt(taps)."""
        return {"weight": uniform(), "bias": uniform(self.weight.shape[1])}

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

    A separate module, so that they stay in fp32 in a bf16 model: rates are exponents, and their
    errors accumulate over a document.
    """

    keeps_fp32 = True

    def __init__(self, inner: int, states: int, groups: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.untied = groups > 1
        self.dt_bias = parameter(groups, inner)

    def draws(self) -> dict[str, Draw]:
        """Mamba's: rates -1 … -N for each channel, skip 1, step sizes log-uniform."""
        return {"A_log": _draw_rates, "D": constant(1.0), "dt_bias": _draw_step_bias}

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
        y_BSI, state_BIN = selective_scan(*inputs, kept.state_BIN)
        if kept.cache.kept:
            kept.state_BIN = state_BIN
        return y_BSI


def _draw_rates(parameter: torch.Tensor, seed: str, scales: Scales) -> None:
    """log(1 … N), the same for each channel."""
    local, (*_, first) = local_shard(parameter)
    local.copy_(torch.arange(first + 1, first + 1 + local.shape[-1]).log())


def _draw_step_bias(parameter: torch.Tensor, seed: str, scales: Scales) -> None:
    """softplus⁻¹ of step sizes log-uniform in [0.001, 0.1], at least 1e-4."""

    def values(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        low, high = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
        step = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
        step.clamp_(min=STEP_FLOOR)
        return step + torch.log(-torch.expm1(-step))

    fill(parameter, values, seed, vector=True)


class MambaCache:
    """Decode state of a mixer: the convolution's last inputs and the scan's state, both after the
    last *real* token of each row.
    """

    def __init__(self, cache: DecodeCache):
        self.cache = cache
        self.inputs_BVI: torch.Tensor | None = None
        self.state_BIN: torch.Tensor | None = None

    def inputs(self, x_BSI: torch.Tensor, taps: int) -> torch.Tensor:
        """The convolution's ``taps`` inputs before this call, (B, V, I); appends ``x_BSI``, if the
        call is kept.
        """
        if self.inputs_BVI is None:
            self.inputs_BVI = x_BSI.new_zeros(x_BSI.shape[0], taps, x_BSI.shape[2])
        before_BVI, real_B = self.inputs_BVI, self.cache.real_B
        assert real_B is not None, "start_step comes before a forward"
        if not self.cache.kept:
            return before_BVI
        row_B1 = torch.arange(len(real_B), device=real_B.device).unsqueeze(1)
        last_BV = real_B.unsqueeze(1) + torch.arange(taps, device=real_B.device)
        self.inputs_BVI = torch.cat([before_BVI, x_BSI], 1)[row_B1, last_BV]
        return before_BVI

    def steps(self, delta_BSI: torch.Tensor) -> torch.Tensor:
        """Step sizes, 0 after the last real token, so that the state does not change there."""
        seq_len, real_B = delta_BSI.shape[1], self.cache.real_B
        assert real_B is not None, "start_step comes before a forward"
        behind_BS = torch.arange(seq_len, device=real_B.device) >= real_B.unsqueeze(1)
        return delta_BSI.masked_fill(behind_BS.unsqueeze(-1), -torch.inf)

    @property
    def nbytes(self) -> int:
        """See ``cache.State``."""
        return sum(t.nbytes for t in (self.inputs_BVI, self.state_BIN) if t is not None)

    def select(self, row_R: torch.Tensor) -> None:
        """See ``cache.State``."""
        if self.inputs_BVI is not None and self.state_BIN is not None:
            self.inputs_BVI, self.state_BIN = self.inputs_BVI[row_R], self.state_BIN[row_R]
