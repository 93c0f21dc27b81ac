"""The selective scan beside other ways to compute it on this device (row 4).

    python benchmarks/selective_scan.py

Forward and backward with bias, softplus, skip and gate, all gradients. The rivals get dt, decays
and inputs written as their users write them: transformers' Mamba without its kernels (a loop that
slices every token, quadratic in backward: short sequences only), mambapy's parallel scan,
accelerated-scan's torch scan (its kernels need a GPU), and our own definition under autograd. Peak
memory is what a fresh process adds to its resident size over one forward and backward.

B batch, L tokens, D channels, N states.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from earlyfuse.kernels.selective_scan import selective_scan
from harness import Report, Rival, Timing, compare, verify

OURS, REFERENCE = "ours: torch", "ours: definition, autograd"
MAMBAPY, TRANSFORMERS = "mambapy pscan", "transformers, sequential"
ACCELERATED = "accelerated-scan, torch"
GOALS = {MAMBAPY: 0.5, TRANSFORMERS: 0.05}
LONGEST_SLICED = 256
PACKAGES = {
    MAMBAPY: "mambapy",
    TRANSFORMERS: "transformers",
    ACCELERATED: "accelerated_scan",
}
OPTIONAL = ("mambapy", "accelerated-scan", "transformers")


@dataclass(frozen=True)
class Setting:
    """Sizes of one scan."""

    batch: int
    tokens: int
    channels: int
    states: int = 16

    @property
    def elements(self) -> int:
        return self.batch * self.tokens * self.channels * self.states


class Problem:
    """Inputs and the output's gradient, which all rivals share."""

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)
        batch, tokens, channels = setting.batch, setting.tokens, setting.channels

        def leaf(*shape: int, shift: float = 0.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) + shift).requires_grad_()

        rates = torch.arange(1.0, setting.states + 1).repeat(channels, 1)  # as Mamba begins
        self.inputs = [
            leaf(batch, tokens, channels),
            leaf(batch, tokens, channels, shift=-3.0),
            (-rates).requires_grad_(),
            leaf(batch, tokens, setting.states),
            leaf(batch, tokens, setting.states),
            leaf(channels),
            leaf(batch, tokens, channels),
            leaf(1, channels),
        ]
        self.dy_BLD = torch.randn(batch, tokens, channels, generator=generator)

    def rival(
        self, name: str, scan: Callable[..., torch.Tensor], same_as: str | None = None
    ) -> Rival:
        """The output and all gradients of ``scan(*inputs)``."""

        def run() -> list[torch.Tensor]:
            y_BLD = scan(*self.inputs)
            return [y_BLD.detach(), *torch.autograd.grad(y_BLD, self.inputs, self.dy_BLD)]

        return Rival(name, run, same_as)


def by_states(
    scan: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """As Mamba is written around a scan of given decays and inputs (B, L, D, N)."""

    def run(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        skip: torch.Tensor,
        z: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        dt = F.softplus(delta + bias[0])
        decay_BLDN = torch.exp(dt.unsqueeze(-1) * A)
        h_BLDN = scan(decay_BLDN, dt.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
        y_BLD = (h_BLDN @ C.unsqueeze(-1)).squeeze(3) + skip * u
        return y_BLD * F.silu(z)

    return run


def scan_of_mambapy(decay_BLDN: torch.Tensor, source_BLDN: torch.Tensor) -> torch.Tensor:
    """(B, L, D, N) twice → all states."""
    from mambapy.pscan import pscan

    return pscan(decay_BLDN, source_BLDN)


def scan_of_accelerated(decay_BLDN: torch.Tensor, source_BLDN: torch.Tensor) -> torch.Tensor:
    """The same; the package wants (sequences, channels, tokens)."""
    from accelerated_scan.ref import scan

    gates, tokens = (t.flatten(2).mT.contiguous() for t in (decay_BLDN, source_BLDN))
    return scan(gates, tokens).mT.unflatten(2, decay_BLDN.shape[2:])


def by_transformers(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    skip: torch.Tensor,
    z: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """transformers' own loop; it wants channels before tokens."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    y_BDL = mamba_selective_scan(
        *(u.mT, delta.mT, A, B.mT, C.mT, skip, z.mT, bias[0]), delta_softplus=True
    )
    return y_BDL.mT


SCANS: dict[str, Callable[..., torch.Tensor]] = {
    OURS: lambda *inputs: selective_scan(*inputs, backend="torch")[0],
    REFERENCE: lambda *inputs: selective_scan(*inputs, backend="reference")[0],
    MAMBAPY: by_states(scan_of_mambapy),
    ACCELERATED: by_states(scan_of_accelerated),
    TRANSFORMERS: by_transformers,
}


def names_for(setting: Setting) -> list[str]:
    """Rivals that are installed and that can be waited for at this length."""
    return [
        name
        for name in SCANS
        if (name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]))
        and (name != TRANSFORMERS or setting.tokens <= LONGEST_SLICED)
    ]


def peak_megabytes(name: str, setting: Setting) -> float:
    """What one forward and backward add to the peak resident size of a fresh process."""
    sizes = [str(n) for n in (setting.batch, setting.tokens, setting.channels, setting.states)]
    command = [sys.executable, __file__, "--peak", name, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_peak(name: str, setting: Setting) -> None:
    """In that process: warm up at a small size, then print what the real one adds."""
    torch.set_num_threads(1)
    Problem(Setting(1, 16, 16)).rival(name, SCANS[name]).run()
    problem = Problem(setting)
    before = _peak_kilobytes()
    problem.rival(name, SCANS[name]).run()
    print((_peak_kilobytes() - before) / 1024)


def _peak_kilobytes() -> int:
    # not getrusage: its peak is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def goals(setting: Setting, timings: list[Timing]) -> str:
    """Markdown: our CPU time over each goal's rival, and whether the goal is met."""
    ours_over = {t.name: t.cpu_ratio for t in timings}
    size = f"{setting.batch} x {setting.tokens} x {setting.channels} x {setting.states}"
    lines = []
    for name, goal in GOALS.items():
        if name not in ours_over:
            continue
        ratio = ours_over[name]
        verdict = "too noisy" if ratio is None else "met" if 1 / ratio <= goal else "missed"
        shown = "" if ratio is None else f" ({1 / ratio:.3f})"
        lines.append(f"- {size}: ours / {name} ≤ {goal:.2f}: {verdict}{shown}")
    return "\n".join(lines)


def main(rounds: int = 15) -> None:
    """Run all settings and write ``results/selective_scan.{jsonl,md}``."""
    torch.set_num_threads(1)
    report = Report("selective_scan", "Selective scan, forward and backward (row 4)")
    report.environment |= {
        name: version(name) if importlib.util.find_spec(name.replace("-", "_")) else "missing"
        for name in OPTIONAL
    }
    verdicts, peaks = [], []
    for setting in (Setting(2, 1024, 512), Setting(1, 512, 1024), Setting(1, 256, 256)):
        names = names_for(setting)
        problem = Problem(setting)
        rivals = [
            problem.rival(name, SCANS[name], None if name == REFERENCE else REFERENCE)
            for name in names
        ]
        if setting.tokens > LONGEST_SLICED:  # the definition is verified against, not waited for
            verify(rivals, 1e-5)
            rivals = [Rival(r.name, r.run) for r in rivals if r.name != REFERENCE]
        timings = compare(rivals, rounds=rounds, tolerance=1e-5, keep_freed=True)
        shown = {**vars(setting), "dtype": "fp32", "elements": setting.elements}
        report.add({**shown, "rounds": rounds, "freed memory": "kept"}, timings)
        verdicts.append(goals(setting, timings))
        print(verdicts[-1])
        for name in (r.name for r in rivals):
            peaks.append((vars(setting), name, peak_megabytes(name, setting)))
            print(f"peak of {name}: {peaks[-1][2]:.1f} MB")
    page = report.write()
    lines = ["| B x L x D x N | rival | peak MB over inputs |", "|---|---|---:|"]
    lines += [
        f"| {' x '.join(map(str, sizes.values()))} | {name} | {peak:.1f} |"
        for sizes, name, peak in peaks
    ]
    page.write_text(
        page.read_text()
        + "\n## Goals (CPU time)\n\n"
        + "\n".join(verdicts)
        + "\n\n## Peak memory\n\n"
        + "\n".join(lines)
        + "\n\nOur Triton kernels and accelerated-scan's need a GPU: not run here.\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        measure_peak(sys.argv[2], Setting(*map(int, sys.argv[3:])))
    else:
        main()
