"""A Mixture-of-Mamba mixer beside a dense one, and beside other ways to write it (row 9).

    python benchmarks/mamba_block.py

Forward and backward of ``Mamba`` with the four projections untied for two modalities. All rivals
run our convolution and scan, so that what differs is how the projections meet their tokens: the
dense mixer has one set for all, "both" computes every projection with both sets and selects, and
the public style gathers by a boolean mask and scatters, once for each projection and modality.
Outputs and all gradients of the two are compared with ours before timing, and those of a mixture of
two copies with the dense mixer's. Modalities come in runs of ``RUN`` tokens, or mixed at random.

The scan's peak memory is measured at several numbers of states: what it takes beside the states
before each chunk must not grow with them.

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
from harness import Report, Rival, Timing, at_most, compare, verify
from selective_scan import OURS as SCAN
from selective_scan import Setting as ScanSetting
from selective_scan import peak_megabytes

RUN = 128
ROWS, SEQ_LEN = 2, 1024
TOLERANCE = 1e-5
STATES = (16, 32, 64)

OURS, DENSE = "ours: Mixture-of-Mamba", "ours: dense Mamba"
BOTH, PUBLIC = "both sets computed, then selected", "public style: mask, Linear, scatter"
GOALS = {DENSE: 1.05, BOTH: 0.70, PUBLIC: 1.00}
MEMORY_GOAL = 1.10

# projections (in, x, dt, out) of (T, …) under the name of each; the step bias is dt's
Project = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """``order``: how the two modalities follow each other, "runs" or "random"."""

    dim: int
    order: str
    rows: int = ROWS
    seq_len: int = SEQ_LEN

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def projection_flops(self) -> float:
        """Forward and backward of the four projections, one set for each token."""
        config = mixer(MambaShape(self.dim, layers=1, vocab_size=1))
        inner, rank, states = config.inner_dim, config.dt_rank, config.states
        weights = self.dim * 3 * inner + inner * (rank + 2 * states) + rank * inner
        return 3 * 2 * self.tokens * weights


SETTINGS = tuple(Setting(dim, order) for dim in (256, 512) for order in ("runs", "random"))


class Problem:
    """Input, gradient, modalities and our mixer, whose parameters the rivals share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        generator = torch.Generator().manual_seed(0)
        shape = (setting.tokens, setting.dim)
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
        """A mixer with values under which the scan is most of the output."""
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
        parameters = list(module.parameters())

        def run() -> list[torch.Tensor]:
            y_TD = layer(self.x_TD)
            return [
                y_TD.detach(),
                *torch.autograd.grad(y_TD, [self.x_TD, *parameters], self.dy_TD),
            ]

        return Rival(name, run, same_as)

    def ours(self, name: str, module: Mamba) -> Rival:
        """A mixer as the models use it."""
        return self.rival(name, module, lambda x_TD: module(x_TD, self.layout))

    def written(self, name: str, project: Project) -> Rival:
        """The mixture with other projections, and all else of ours."""
        module = self.mixture
        return self.rival(name, module, lambda x_TD: self.mix(x_TD, project), OURS)

    def mix(self, x_TD: torch.Tensor, project: Project) -> torch.Tensor:
        """Mamba around given projections, as it is usually written."""
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
        """Weight, and bias where there is one, of each modality."""
        weights = getattr(self.mixture, name).weight.unbind(0)
        if name == "dt_proj":
            return list(zip(weights, self.mixture.scan.dt_bias.unbind(0), strict=True))
        return [(weight,) for weight in weights]


def verify_copies(problem: Problem) -> None:
    """A mixture of two copies of the dense mixer has its outputs and gradients.

    Raises ``ValueError`` where it does not.
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


def goals(setting: Setting, timings: list[Timing]) -> list[str]:
    """Markdown: our CPU time over each goal's rival."""
    over = {t.name: t.cpu_ratio and 1 / t.cpu_ratio for t in timings}
    return [
        at_most(f"dim {setting.dim}, {setting.order}: ours / {name}", over[name], goal)
        for name, goal in GOALS.items()
    ]


def memory(setting: Setting) -> str:
    """Markdown: peak memory of the scan inside such a mixer by its number of states."""
    inner = 2 * setting.dim
    lines = [
        f"Scan of {setting.rows} x {setting.seq_len} x {inner}, forward and backward, fp32; a "
        "tensor of all states would take the last column. The rest shrinks with more states: "
        "fewer channels are handled together.",
        "",
        "| states | peak MB over inputs | states before chunks, MB | rest, MB | all states, MB |",
        "|---:|---:|---:|---:|---:|",
    ]
    rest = {}
    for states in STATES:
        peak = peak_megabytes(SCAN, ScanSetting(setting.rows, setting.seq_len, inner, states))
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
    """Run all settings and write ``results/mamba_block.{jsonl,md}``."""
    torch.set_num_threads(1)
    report = Report("mamba_block", "Mixture-of-Mamba mixer, forward and backward (row 9)")
    verdicts = []
    for setting in SETTINGS:
        problem = Problem(setting)
        verify_copies(problem)
        timings = compare(rivals_of(problem), rounds=rounds, tolerance=TOLERANCE)
        shown = {
            **vars(setting),
            "dtype": "fp32",
            "GFLOP of projections": round(setting.projection_flops / 1e9, 2),
            "rounds": rounds,
        }
        report.add(shown, timings)
        verdicts += goals(setting, timings)
    peaks = memory(Setting(256, "runs"))
    conclusion = "\n".join(["## Goals (CPU time)", "", *verdicts, "", "## Peak memory", "", peaks])
    print(conclusion)
    report.write(conclusion)


if __name__ == "__main__":
    main()
