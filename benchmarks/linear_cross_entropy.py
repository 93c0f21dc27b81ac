"""Head and loss, with sums per modality, beside logits kept whole or recomputed (row 6).

    python benchmarks/linear_cross_entropy.py

Forward and backward: total, sums of nll per modality (and of log² Z with the z-loss), gradients of
x and of the weight. Rivals keep all logits, or make them a chunk at a time under activation
checkpointing. Peak memory is the growth of the process's resident set over one run. The kernels of
Liger Kernel and cut-cross-entropy are Triton and need a GPU; what the latter compiles for a CPU
(linear and cross-entropy through Inductor) is run where it is installed.

T tokens, V vocabulary, D width.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from harness import Report, Rival, at_most, compare, ours_over, peak_mb

IGNORED, MODALITIES, CHUNK = -100, 2, 256
OURS, WHOLE = "ours", "F.linear, F.cross_entropy"
CHECKPOINTED = f"{CHUNK} tokens at a time, checkpointed"
COMPILED = "cut-cross-entropy, torch_compile"
TIME_GOAL, MEMORY_GOAL = 0.90, 0.25


@dataclass(frozen=True)
class Setting:
    """Sizes, and the weight of the z-loss. ``keep_freed``: rivals reuse the memory that they freed,
    so that whole logits cost no fresh pages either.
    """

    tokens: int
    dim: int
    vocabulary: int
    z_weight: float = 0.0
    keep_freed: bool = False


class Problem:
    """Hidden states, weight, labels (one in sixteen ignored) and modalities all rivals share."""

    def __init__(
        self, setting: Setting, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        on: dict[str, Any] = {"generator": generator, "device": device}
        tokens, dim, vocabulary = setting.tokens, setting.dim, setting.vocabulary
        self.setting = setting
        self.x_TD = torch.randn(tokens, dim, **on).to(dtype).requires_grad_()
        w_VD = torch.randn(vocabulary, dim, **on) * dim**-0.5
        self.w_VD = w_VD.to(dtype).requires_grad_()
        self.labels_T = torch.randint(vocabulary, (tokens,), **on)
        self.labels_T[::16] = IGNORED
        self.counted = tokens - len(range(0, tokens, 16))
        self.modality_T = torch.randint(MODALITIES, (tokens,), **on)

    def results(self, total: torch.Tensor, *sums: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the loss per label, the total and the sums, as every rival returns them."""
        gradients = torch.autograd.grad(total / self.counted, [self.x_TD, self.w_VD])
        return [*gradients, total.detach(), *(s.detach() for s in sums)]

    def ours(self, backend: str = "auto") -> list[torch.Tensor]:
        """The op."""
        total, nll_M, z_M = linear_cross_entropy(
            *(self.x_TD, self.w_VD, self.labels_T, self.modality_T),
            modalities=MODALITIES,
            z_weight=self.setting.z_weight,
            backend=backend,
        )
        return self.results(total, nll_M, *([z_M] if self.setting.z_weight else []))

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
        """Sums (1 or 2, M) of nll and, with the z-loss, of log² Z by modality; losses in fp32."""
        logits_CV = F.linear(x_CD, w_VD).float()
        labels_C = self.labels_T[chunk]
        values = [F.cross_entropy(logits_CV, labels_C, reduction="none", ignore_index=IGNORED)]
        if self.setting.z_weight:
            values.append(logits_CV.logsumexp(1).square())
        return self.by_modality(torch.stack(values), chunk)

    def by_modality(self, values_SC: torch.Tensor, chunk: slice) -> torch.Tensor:
        """(S, C) → (S, M), without ignored labels."""
        ids_M1 = torch.arange(MODALITIES, device=values_SC.device)[:, None]
        member_MC = (self.modality_T[chunk] == ids_M1) & (self.labels_T[chunk] != IGNORED)
        return torch.where(member_MC, values_SC[:, None], 0.0).sum(2)

    def from_sums(self, sums_SM: torch.Tensor) -> list[torch.Tensor]:
        """Results of given sums."""
        total = sums_SM[0].sum()
        if self.setting.z_weight:
            total = total + self.setting.z_weight * sums_SM[1].sum()
        return self.results(total, *sums_SM.unbind(0))

    def compiled(self) -> list[torch.Tensor]:
        """cut-cross-entropy without a GPU."""
        import cut_cross_entropy

        options: dict[str, Any] = {
            "ignore_index": IGNORED,
            "reduction": "none",
            "impl": "torch_compile",
        }
        nll_T = cut_cross_entropy.linear_cross_entropy(
            self.x_TD, self.w_VD, self.labels_T, **options
        )
        return self.from_sums(self.by_modality(nll_T[None], slice(None)))

    def rivals(self) -> list[Rival]:
        """Ours first."""
        found = [
            Rival(OURS, self.ours),
            Rival(WHOLE, self.whole, OURS),
            Rival(CHECKPOINTED, self.checkpointed, OURS),
        ]
        # it returns no log Z
        if importlib.util.find_spec("cut_cross_entropy") and not self.setting.z_weight:
            found.append(Rival(COMPILED, self.compiled, OURS))
        return found


def main(rounds: int = 15) -> None:
    """Runs all settings and writes ``results/linear_cross_entropy.{jsonl,md}``."""
    report = Report(
        "linear_cross_entropy",
        "Head and cross-entropy, forward and backward (row 6)",
        ("liger-kernel", "cut-cross-entropy"),
    )
    for z_weight, keep_freed in ((0.0, False), (1e-5, False), (0.0, True)):
        setting = Setting(1024, 256, 65536, z_weight, keep_freed)
        rivals = Problem(setting).rivals()
        timings = compare(rivals, rounds=rounds, warmups=1, tolerance=1e-5, keep_freed=keep_freed)
        peaks = {} if keep_freed else {rival.name: peak_mb(rival.run) for rival in rivals}
        gflop = 6e-9 * setting.tokens * setting.dim * setting.vocabulary
        shown = {**vars(setting), "dtype": "fp32", "GFLOP": gflop, "rounds": rounds}
        report.add(shown | {f"peak MB of {n}": round(mb) for n, mb in peaks.items()}, timings)
        name = f"T {setting.tokens}, d {setting.dim}, V {setting.vocabulary}, z {z_weight:g}"
        name += ", freed memory kept" * keep_freed
        over = ours_over(timings)[WHOLE]
        report.judge(at_most(f"{name}: CPU time ours / {WHOLE}", over, TIME_GOAL))
        if peaks:
            memory = peaks[OURS] / peaks[WHOLE]
            report.judge(at_most(f"{name}: peak memory ours / {WHOLE}", memory, MEMORY_GOAL))
    report.write("Not run without a GPU: the Triton kernels of Liger Kernel and cut-cross-entropy.")


if __name__ == "__main__":
    main()
