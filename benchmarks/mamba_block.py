"""A Mixture-of-Mamba mixer beside a dense one, and beside other ways to write it (row 9).

    python benchmarks/mamba_block.py

Forward and backward of ``Mamba`` with the four projections untied for two modalities. All rivals
run our convolution and scan, so they differ only in how projections meet their tokens: the dense
mixer has one set for all, "both" computes every projection with both sets and selects, and the
public style gathers by a boolean mask and scatters, once for each projection and modality. Outputs
and all gradients of the last two are compared with ours before timing, and those of a mixture of
two copies with the dense mixer's. Modalities come in runs of ``RUN`` tokens, or mixed at random.

The scan's peak memory is measured at several numbers of states: beyond the states before each
chunk, it must not grow with them.

T tokens, D width, I inner width, N states, R rank of the step sizes, G modality groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from earlyfuse.configs.mamba_decoders import PROJECTIONS, MambaShape, mixer
from earlyfuse.kernels.causal_conv1d import causal_conv1d
from earlyfuse.kernels.selective_scan import selective_scan
from earlyfuse.kernels.selective_scan.chunks import count_chunks
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.context import ForwardContext
from harness import Report, Rival, at_most, compare, differentiated, ours_over, verify
from selective_scan import OURS as SCAN
from selective_scan import Setting as ScanSetting
from selective_scan import peak_apart

RUN = 128
ROWS, SEQ_LEN = 2, 1024
TOLERANCE = 1e-5
STATES = (16, 32, 64)

OURS, DENSE = "ours: Mixture-of-Mamba", "ours: dense Mamba"
BOTH, PUBLIC = "both sets computed, then selected", "public style: mask, Linear, scatter"
GOALS = {DENSE: 1.05, BOTH: 0.70, PUBLIC: 1.00}
MEMORY_GOAL = 1.10

# a projection (in, x, dt, out) of (T, …), by name; dt's adds the step bias
Project = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """``order`` of the two modalities: "runs" or "random"."""

    dim: int
    order: str
    rows: int = ROWS
    seq_len: int = SEQ_LEN

    @property
    def projection_flops(self) -> float:
        """Forward and backward of the four projections, one set for each token."""
        config = mixer(MambaShape(self.dim, layers=1, vocab_size=1))
        inner, rank, states = config.inner_dim, config.dt_rank, config.states
        weights = self.dim * 3 * inner + inner * (rank + 2 * states) + rank * inner
        return 3 * 2 * self.rows * self.seq_len * weights


SETTINGS = tuple(Setting(dim, order) for dim in (256, 512) for order in ("runs", "random"))


class Problem:
    """Input, gradient, modalities and our mixer, whose parameters the rivals share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        generator = torch.Generator().manual_seed(0)
        shape = (setting.rows * setting.seq_len, setting.dim)
        self.x_TD = torch.randn(shape, generator=generator).requires_grad_()
        self.dy_TD = torch.randn(shape, generator=generator)
        if setting.order == "runs":
            image_S = torch.arange(setting.seq_len) // RUN % 2
            image_BS = image_S.expand(setting.rows, -1)
        else:
            image_BS = torch.randint(0, 2, (setting.rows, setting.seq_len), generator=generator)
        batch = MixedBatch.of(image_BS, image_BS.to(torch.uint8))
        self.layout = ForwardContext.build(batch, modalities=(0, 1), head_dim=0, rope_theta=1e4)
        self.image_T = image_BS.flatten().bool()
        self.mixture = self.build(PROJECTIONS, generator)
        self.dense = self.build((), generator)

    def build(self, untied: tuple[str, ...], generator: torch.Generator) -> Mamba:
        """A mixer with values at which the scan is most of the output."""
        shape = MambaShape(self.setting.dim, layers=1, vocab_size=1)
        module = mixer(shape, untied).build()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                fan_in = parameter.shape[-1]
                if name.endswith("A_log"):
                    parameter.copy_(torch.arange(1.0, fan_in + 1).log().expand_as(parameter))
                elif name.endswith("scan.D"):
                    parameter.fill_(1.0)
                else:
                    std = 1.0 if parameter.ndim == 1 else fan_in**-0.5
                    parameter.normal_(std=std, generator=generator)
                    if name.endswith("dt_bias"):
                        parameter.clamp_(-2, 2).sub_(3.0)
        return module

    def rival(
        self,
        name: str,
        module: Mamba,
        layer: Callable[[torch.Tensor], torch.Tensor],
        same_as: str | None = None,
    ) -> Rival:
        """Output, gradients of ``x`` and of each parameter of ``module``."""
        leaves = [self.x_TD, *module.parameters()]
        return Rival(name, lambda: differentiated(layer(self.x_TD), leaves, self.dy_TD), same_as)

    def ours(self, name: str, module: Mamba) -> Rival:
        """A mixer as models use it."""
        return self.rival(name, module, lambda x_TD: module(x_TD, self.layout))

    def written(self, name: str, project: Project) -> Rival:
        """Our mixture but for its projections."""
        return self.rival(name, self.mixture, lambda x_TD: self.mix(x_TD, project), OURS)

    def mix(self, x_TD: torch.Tensor, project: Project) -> torch.Tensor:
        """Mamba around given projections, as usually written."""
        module, sequence = self.mixture, (self.setting.rows, self.setting.seq_len)
        rank, states = module.config.dt_rank, module.config.states
        x_BSI, z_BSI = project("in_proj", x_TD).unflatten(0, sequence).chunk(2, -1)
        positions_BS = self.layout.place_BS
        u_BSI, _ = causal_conv1d(
            x_BSI, module.conv.weight, module.conv.bias, positions_BL=positions_BS
        )
        selected_TP = project("x_proj", u_BSI.flatten(0, 1))
        dt_TR, B_TN, C_TN = selected_TP.split([rank, states, states], -1)
        y_BSI, _ = selective_scan(
            u_BSI,
            project("dt_proj", dt_TR).unflatten(0, sequence),
            -torch.exp(module.scan.A_log),
            B_TN.unflatten(0, sequence),
            C_TN.unflatten(0, sequence),
            skip_D=module.scan.D,
            z_BLD=z_BSI,
            reset_BL=positions_BS == 0,
        )
        return project("out_proj", y_BSI.flatten(0, 1))

    def both(self, name: str, x_TK: torch.Tensor) -> torch.Tensor:
        """Every token through both sets."""
        text_TF, image_TF = (F.linear(x_TK, *one) for one in self.sets(name))
        return torch.where(self.image_T[:, None], image_TF, text_TF)

    def public(self, name: str, x_TK: torch.Tensor) -> torch.Tensor:
        """Every token through its own set, gathered and scattered by masks."""
        parts = zip((~self.image_T, self.image_T), self.sets(name), strict=True)
        y_TF = x_TK.new_empty(len(x_TK), getattr(self.mixture, name).weight.shape[1])
        for mask_T, one in parts:
            y_TF[mask_T] = F.linear(x_TK[mask_T], *one)
        return y_TF

    def sets(self, name: str) -> list[tuple[torch.Tensor, ...]]:
        """Weight, and bias if any, of each modality."""
        weights = getattr(self.mixture, name).weight.unbind(0)
        if name == "dt_proj":
            return list(zip(weights, self.mixture.scan.dt_bias.unbind(0), strict=True))
        return [(weight,) for weight in weights]


def verify_copies(problem: Problem) -> None:
    """Raises ``ValueError`` unless a mixture of two copies of the dense mixer equals it in outputs
    and gradients.
    """
    dense = problem.dense
    mixture = problem.build(PROJECTIONS, torch.Generator())
    untied = [p.shape != dense.get_parameter(name).shape for name, p in mixture.named_parameters()]
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            parameter.copy_(dense.get_parameter(name))
    whole = problem.ours("mixture of copies", mixture)

    def summed() -> list[torch.Tensor]:
        y_TD, dx_TD, *gradients = whole.run()
        pairs = zip(gradients, untied, strict=True)
        return [y_TD, dx_TD, *(g.sum(0) if several else g for g, several in pairs)]

    verify([problem.ours(DENSE, dense), Rival(whole.name, summed, DENSE)], TOLERANCE)


def rivals_of(problem: Problem) -> list[Rival]:
    """Ours first."""
    return [
        problem.ours(OURS, problem.mixture),
        problem.ours(DENSE, problem.dense),
        problem.written(BOTH, problem.both),
        problem.written(PUBLIC, problem.public),
    ]


def memory(setting: Setting) -> str:
    """Markdown: peak memory of the mixer's scan by its number of states."""
    inner = 2 * setting.dim
    lines = [
        f"Scan of {setting.rows} x {setting.seq_len} x {inner}, forward and backward, fp32; a "
        "tensor of all states would take the last column. The rest shrinks with more states: fewer "
        "channels are processed together.",
        "",
        "| states | peak MB over inputs | states before chunks, MB | rest, MB | all states, MB |",
        "|---:|---:|---:|---:|---:|",
    ]
    rest = {}
    for states in STATES:
        peak = peak_apart(SCAN, ScanSetting(setting.rows, setting.seq_len, inner, states))
        megabytes = setting.rows * inner * states * 4 / 2**20  # of one token's states
        kept = count_chunks(setting.seq_len) * megabytes
        rest[states] = peak - kept
        everything = setting.seq_len * megabytes
        lines.append(
            f"| {states} | {peak:.1f} | {kept:.1f} | {rest[states]:.1f} | {everything:.0f} |"
        )
    ratio = rest[STATES[-1]] / rest[STATES[0]]
    what = f"rest at {STATES[-1]} states / at {STATES[0]}"
    return "\n".join([*lines, "", at_most(what, ratio, MEMORY_GOAL), ""])


def main(rounds: int = 15) -> None:
    """Runs all settings and writes ``results/mamba_block.{jsonl,md}``."""
    report = Report("mamba_block", "Mixture-of-Mamba mixer, forward and backward (row 9)")
    for setting in SETTINGS:
        problem = Problem(setting)
        verify_copies(problem)
        timings = compare(rivals_of(problem), rounds=rounds, tolerance=TOLERANCE)
        gflop = round(setting.projection_flops / 1e9, 2)
        shown = {"dtype": "fp32", "GFLOP of projections": gflop, "rounds": rounds}
        report.add(vars(setting) | shown, timings)
        over = ours_over(timings)
        for name, goal in GOALS.items():
            what = f"dim {setting.dim}, {setting.order}: ours / {name}"
            report.judge(at_most(what, over[name], goal))
    peaks = memory(Setting(256, "runs"))
    print(peaks)
    report.write(f"## Peak memory\n\n{peaks}")


if __name__ == "__main__":
    main()
