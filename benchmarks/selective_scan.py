"""The selective scan beside other ways to compute it on this device (row 4).

    python benchmarks/selective_scan.py

Forward and backward with bias, softplus, skip and gate, all gradients. The rivals get dt, decays
and inputs written as their users write them: transformers' Mamba without its kernels (a loop that
slices every token, quadratic in backward: short sequences only), mambapy's parallel scan,
accelerated-scan's torch scan (its kernels need a GPU), and our own definition under autograd. Peak
memory is what one forward and backward add to the peak resident set of a fresh process.

B batch, L tokens, D channels, N states.
"""

import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from earlyfuse.kernels.selective_scan import selective_scan
from harness import Report, Rival, at_most, compare, differentiated, ours_over, resident_mb, verify

OURS, REFERENCE = "ours: torch", "ours: definition, autograd"
MAMBAPY, TRANSFORMERS = "mambapy pscan", "transformers, sequential"
ACCELERATED = "accelerated-scan, torch"
GOALS = {MAMBAPY: 0.5, TRANSFORMERS: 0.05}
LONGEST_SLICED = 256
PACKAGES = {MAMBAPY: "mambapy", TRANSFORMERS: "transformers", ACCELERATED: "accelerated_scan"}

Scan = Callable[..., torch.Tensor]
"""y of (u, delta, A, B, C, skip, z, bias)."""


@dataclass(frozen=True)
class Setting:
    """Sizes of one scan."""

    batch: int
    tokens: int
    channels: int
    states: int = 16


class Problem:
    """Inputs and the output's gradient, which all rivals share; rates of decay as Mamba's at first.

    ``document``: tokens of each packed document; None: one document a row.
    """

    def __init__(
        self,
        setting: Setting,
        document: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        batch, tokens, channels = setting.batch, setting.tokens, setting.channels

        def leaf(*shape: int, shift: float = 0.0, dtype: torch.dtype = dtype) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=device) + shift
            return values.to(dtype).requires_grad_()

        rates = torch.arange(1.0, setting.states + 1, device=device).repeat(channels, 1)
        self.inputs = [
            leaf(batch, tokens, channels),
            leaf(batch, tokens, channels, shift=-3.0),
            (-rates).requires_grad_(),
            leaf(batch, tokens, setting.states),
            leaf(batch, tokens, setting.states),
            leaf(channels, dtype=torch.float32),
            leaf(batch, tokens, channels),
            leaf(1, channels, dtype=torch.float32),
        ]
        self.dy_BLD = leaf(batch, tokens, channels).detach()
        self.reset_BL = None
        if document is not None:
            self.reset_BL = torch.arange(tokens, device=device).expand(batch, -1) % document == 0

    def ours(self, *inputs: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The op."""
        u, delta, A, B, C, skip, z, bias = inputs
        reset = self.reset_BL
        return selective_scan(u, delta, A, B, C, skip, z, bias, None, reset, backend=backend)[0]

    def by_states(self, scan: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Scan:
        """Mamba as written around a scan of given decays and inputs (B, L, D, N)."""

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
            if self.reset_BL is not None:
                decay_BLDN = decay_BLDN.masked_fill(self.reset_BL[..., None, None], 0)
            h_BLDN = scan(decay_BLDN, dt.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
            y_BLD = (h_BLDN @ C.unsqueeze(-1)).squeeze(3) + skip * u
            return y_BLD * F.silu(z)

        return run

    def run(self, scan: Scan) -> list[torch.Tensor]:
        """Output and all gradients of a rival, which computes in fp32."""
        y_BLD = scan(*(leaf.float() for leaf in self.inputs))
        return differentiated(y_BLD.to(self.dy_BLD.dtype), self.inputs, self.dy_BLD)

    def scans(self) -> dict[str, Scan]:
        """All ways to compute it."""
        return {
            OURS: lambda *inputs: self.ours(*inputs, backend="torch"),
            REFERENCE: lambda *inputs: self.ours(*inputs, backend="reference"),
            MAMBAPY: self.by_states(scan_of_mambapy),
            ACCELERATED: self.by_states(scan_of_accelerated),
            TRANSFORMERS: by_transformers,
        }


def scan_of_mambapy(decay_BLDN: torch.Tensor, source_BLDN: torch.Tensor) -> torch.Tensor:
    """(B, L, D, N) twice → all states."""
    from mambapy.pscan import pscan

    return pscan(decay_BLDN, source_BLDN)


def scan_of_accelerated(decay_BLDN: torch.Tensor, source_BLDN: torch.Tensor) -> torch.Tensor:
    """The same, by its Triton kernel on a GPU; the package wants (sequences, channels, tokens)."""
    if decay_BLDN.is_cuda:
        from accelerated_scan.scalar import scan
    else:
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


def rivals(setting: Setting) -> list[Rival]:
    """Ours first, then what is installed and fast enough at this length; all verified here."""
    problem = Problem(setting)
    found = [
        Rival(name, partial(problem.run, scan), None if name == REFERENCE else REFERENCE)
        for name, scan in problem.scans().items()
        if (name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]))
        and (name != TRANSFORMERS or setting.tokens <= LONGEST_SLICED)
    ]
    if setting.tokens <= LONGEST_SLICED:
        return found
    verify(found, 1e-5)  # the definition is too slow to time at this length
    return [Rival(r.name, r.run) for r in found if r.name != REFERENCE]


def peak_apart(name: str, setting: Setting) -> float:
    """``measure_peak`` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_peak, name, setting).result()


def measure_peak(name: str, setting: Setting) -> float:
    """MiB that one forward and backward add to the peak resident set of this process."""
    torch.set_num_threads(1)
    for sizes in (Setting(1, 16, 16), setting):  # the first is a warmup
        problem = Problem(sizes)
        before = resident_mb("VmHWM")
        problem.run(problem.scans()[name])
    return resident_mb("VmHWM") - before


def main(rounds: int = 15) -> None:
    """Runs all settings and writes ``results/selective_scan.{jsonl,md}``."""
    packages = ("mambapy", "accelerated-scan", "transformers")
    report = Report("selective_scan", "Selective scan, forward and backward (row 4)", packages)
    lines = ["## Peak memory", "", "| B x L x D x N | rival | peak MB over inputs |"]
    lines += ["|---|---|---:|"]
    for setting in (Setting(2, 1024, 512), Setting(1, 512, 1024), Setting(1, 256, 256)):
        found = rivals(setting)
        timings = compare(found, rounds=rounds, tolerance=1e-5, keep_freed=True)
        sizes = vars(setting)
        elements = setting.batch * setting.tokens * setting.channels * setting.states
        shown = {**sizes, "dtype": "fp32", "elements": elements, "rounds": rounds}
        report.add({**shown, "freed memory": "kept"}, timings)
        size, over = " x ".join(map(str, sizes.values())), ours_over(timings)
        for name, goal in GOALS.items():
            if name in over:
                report.judge(at_most(f"{size}: ours / {name}", over[name], goal))
        for rival in found:
            lines.append(f"| {size} | {rival.name} | {peak_apart(rival.name, setting):.1f} |")
            print(lines[-1], flush=True)
    lines += ["", "Our Triton kernels and accelerated-scan's need a GPU: not run here."]
    report.write("\n".join(lines))


if __name__ == "__main__":
    main()
