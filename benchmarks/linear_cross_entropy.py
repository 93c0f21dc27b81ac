"""Head and loss, with sums per modality, beside logits held whole or recomputed (row 6).

    python benchmarks/linear_cross_entropy.py

Forward and backward: total, sums of nll per modality (and of log² Z with the z-loss), gradients of
x and of the weight. Rivals hold all logits, or make them a chunk at a time under activation
checkpointing. Peak memory is the growth of the process's resident set over one run. Liger Kernel
and cut-cross-entropy compute in Triton kernels, which need a GPU; what the latter compiles for a
CPU (linear and cross-entropy through Inductor) is run where it is installed.

T tokens, V vocabulary, D width.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from harness import Report, Rival, Timing, compare

IGNORED, MODALITIES, CHUNK = -100, 2, 256
OURS, WHOLE = "ours", "F.linear, F.cross_entropy"
CHECKPOINTED = f"{CHUNK} tokens at a time, checkpointed"
COMPILED = "cut-cross-entropy, torch_compile"
TIME_GOAL, MEMORY_GOAL = 0.90, 0.25


@dataclass(frozen=True)
class Setting:
    """Sizes, the weight of the z-loss, and whether rivals find the memory that they freed (then
    whole logits, too, cost no fresh pages).
    """

    tokens: int
    dim: int
    vocabulary: int
    z_weight: float
    keep_freed: bool

    @property
    def flops(self) -> float:
        """Logits, and their gradient times w and times x."""
        return 6.0 * self.tokens * self.dim * self.vocabulary


class Problem:
    """Hidden states, weight, labels (one in sixteen ignored) and modalities all rivals share."""

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens, dim, vocabulary = setting.tokens, setting.dim, setting.vocabulary
        self.setting = setting
        self.x_TD = torch.randn(tokens, dim, generator=generator).requires_grad_()
        w_VD = torch.randn(vocabulary, dim, generator=generator) * dim**-0.5
        self.w_VD = w_VD.requires_grad_()
        self.labels_T = torch.randint(vocabulary, (tokens,), generator=generator)
        self.labels_T[::16] = IGNORED
        self.modality_T = torch.randint(MODALITIES, (tokens,), generator=generator)

    def gradients(self, total: torch.Tensor, *sums: torch.Tensor) -> list[torch.Tensor]:
        """What every rival returns; the loss is per label."""
        loss = total / (self.labels_T != IGNORED).sum()
        gradients = torch.autograd.grad(loss, [self.x_TD, self.w_VD])
        return [total.detach(), *(s.detach() for s in sums), *gradients]

    def ours(self) -> list[torch.Tensor]:
        """The op."""
        total, nll_M, z_M = linear_cross_entropy(
            self.x_TD,
            self.w_VD,
            self.labels_T,
            self.modality_T,
            modalities=MODALITIES,
            z_weight=self.setting.z_weight,
        )
        return self.gradients(total, nll_M, *([z_M] if self.setting.z_weight else []))

    def whole(self) -> list[torch.Tensor]:
        """All logits at once."""
        return self.from_sums(self.sums(slice(None), self.x_TD, self.w_VD))

    def checkpointed(self) -> list[torch.Tensor]:
        """Chunks whose logits are made again in backward."""
        parts = []
        for start in range(0, self.setting.tokens, CHUNK):
            chunk = slice(start, start + CHUNK)
            parts.append(
                checkpoint(self.sums, chunk, self.x_TD[chunk], self.w_VD, use_reentrant=False)
            )
        return self.from_sums(torch.stack(parts).sum(0))

    def sums(self, chunk: slice, x_CD: torch.Tensor, w_VD: torch.Tensor) -> torch.Tensor:
        """Sums (1 or 2, M) of nll and, with the z-loss, of log² Z by modality."""
        logits_CV = F.linear(x_CD, w_VD)
        labels_C = self.labels_T[chunk]
        values = [F.cross_entropy(logits_CV, labels_C, reduction="none", ignore_index=IGNORED)]
        if self.setting.z_weight:
            values.append(logits_CV.logsumexp(1).square())
        return self.by_modality(torch.stack(values), chunk)

    def by_modality(self, values_SC: torch.Tensor, chunk: slice) -> torch.Tensor:
        """(S, C) → (S, M), without what is ignored."""
        ids_M1 = torch.arange(MODALITIES)[:, None]
        member_MC = (self.modality_T[chunk] == ids_M1) & (self.labels_T[chunk] != IGNORED)
        return torch.where(member_MC, values_SC[:, None], 0.0).sum(2)

    def from_sums(self, sums_SM: torch.Tensor) -> list[torch.Tensor]:
        """The total, the sums and the gradients."""
        total = sums_SM[0].sum()
        if self.setting.z_weight:
            total = total + self.setting.z_weight * sums_SM[1].sum()
        return self.gradients(total, *sums_SM.unbind(0))

    def compiled(self) -> list[torch.Tensor]:
        """What cut-cross-entropy offers without a GPU."""
        import cut_cross_entropy

        nll_T = cut_cross_entropy.linear_cross_entropy(
            self.x_TD,
            self.w_VD,
            self.labels_T,
            ignore_index=IGNORED,
            reduction="none",
            impl="torch_compile",
        )
        return self.from_sums(self.by_modality(nll_T[None], slice(None)))


def rivals_of(problem: Problem) -> list[Rival]:
    """Ours first."""
    rivals = [
        Rival(OURS, problem.ours),
        Rival(WHOLE, problem.whole, OURS),
        Rival(CHECKPOINTED, problem.checkpointed, OURS),
    ]
    # it has no log Z to give
    if importlib.util.find_spec("cut_cross_entropy") and not problem.setting.z_weight:
        rivals.append(Rival(COMPILED, problem.compiled, OURS))
    return rivals


def peak_mb(run: Callable[[], object]) -> float:
    """Growth of the resident set over one run, from Linux's own high-water mark."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # forget the mark
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def goals(setting: Setting, timings: list[Timing], peaks: dict[str, float]) -> str:
    """Markdown: peaks, and our time and memory over the first rival's."""
    name = f"T {setting.tokens}, d {setting.dim}, V {setting.vocabulary}, z {setting.z_weight:g}"
    name += ", freed memory kept" * setting.keep_freed
    ratio = next(t.cpu_ratio for t in timings if t.name == WHOLE)
    time = None if ratio is None else 1 / ratio
    time_verdict = "too noisy" if time is None else "met" if time <= TIME_GOAL else "missed"
    lines = [
        f"- {name}: CPU time ours / {WHOLE} ≤ {TIME_GOAL:.2f}: {time_verdict}"
        + ("" if time is None else f" ({time:.3f})")
    ]
    if not peaks:
        return lines[0]
    memory = peaks[OURS] / peaks[WHOLE]
    lines += [
        f"- {name}: peak memory ours / {WHOLE} ≤ {MEMORY_GOAL:.2f}: "
        f"{'met' if memory <= MEMORY_GOAL else 'missed'} ({memory:.3f})",
    ]
    lines += [f"  - {rival}: {peak:.0f} MB" for rival, peak in peaks.items()]
    return "\n".join(lines)


def missing() -> str:
    """Which kernel libraries were there, and why they are not in the table."""
    found = []
    for package in ("liger-kernel", "cut-cross-entropy"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} (not installed)")
    return f"Not run without a GPU: the Triton kernels of {' and '.join(found)}."


def main(rounds: int = 15) -> None:
    """Run all settings and write ``results/linear_cross_entropy.{jsonl,md}``."""
    torch.set_num_threads(1)
    report = Report("linear_cross_entropy", "Head and cross-entropy, forward and backward (row 6)")
    verdicts = []
    for z_weight, keep_freed in ((0.0, False), (1e-5, False), (0.0, True)):
        setting = Setting(1024, 256, 65536, z_weight, keep_freed)
        rivals = rivals_of(Problem(setting))
        timings = compare(rivals, rounds=rounds, warmups=1, tolerance=1e-5, keep_freed=keep_freed)
        peaks = {} if keep_freed else {rival.name: peak_mb(rival.run) for rival in rivals}
        shown = {**vars(setting), "dtype": "fp32", "GFLOP": setting.flops / 1e9}
        peak = {f"peak MB of {name}": round(mb) for name, mb in peaks.items()}
        report.add(shown | {"rounds": rounds} | peak, timings)
        verdicts.append(goals(setting, timings, peaks))
        print(verdicts[-1], flush=True)
    page = report.write()
    text = "\n".join(verdicts)
    page.write_text(f"{page.read_text()}\n{missing()}\n\n## Goals\n\n{text}\n")


if __name__ == "__main__":
    main()
