"""One grouped product beside a dense one of the same FLOPs, and other ways to group (row 2).

    python benchmarks/grouped_gemm.py

Forward, gradient of x and gradient of w apart, over eight groups of equal and of uneven sizes.
Every rival but the dense one gathers its rows, multiplies and puts them back; the dense product
moves no rows.

T tokens, D width in, F width out, G groups.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from earlyfuse.kernels.grouped_gemm import op
from harness import Report, Rival, compare

GROUPS, TOKENS, DIM, WIDTH = 8, 4096, 512, 2048
OURS, DENSE = "ours: grouped_linear", "dense product"
SIZES = {
    "equal": [TOKENS // GROUPS] * GROUPS,
    "zipf": [1507, 753, 502, 377, 301, 251, 215, 190],
    "one empty": [0, *[586] * 6, 580],
    "one tiny": [3, *[585] * 6, 583],
}


class Problem:
    """Tokens in random order over groups of given sizes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x_TD = torch.randn(TOKENS, DIM, generator=generator)
        self.dy_TF = torch.randn(TOKENS, WIDTH, generator=generator)
        self.w_GFD = torch.randn(GROUPS, WIDTH, DIM, generator=generator) * DIM**-0.5
        self.row_R = torch.randperm(TOKENS, generator=generator)
        self.sizes = list(sizes)
        self.offset_G1 = torch.tensor([0, *sizes]).cumsum(0)
        self.stop_G = self.offset_G1[1:].int()

    def ours(self, part: str) -> list[torch.Tensor]:
        """The operator behind ``grouped_linear`` and its gradients one at a time."""
        routes = (self.row_R, self.offset_G1, None, True)
        if part == "forward":
            return [op.grouped_linear(self.x_TD, self.w_GFD, *routes, "torch")]
        need = [part == "dx", part == "dw", False]
        tensors = (self.dy_TF, self.x_TD, self.w_GFD)
        found = op.grouped_linear_backward(*tensors, *routes, need, "torch")
        return [found[need.index(True)]]

    def loop(self, part: str) -> list[torch.Tensor]:
        """Group by group, the weight's gradients stacked at the end."""
        out = torch.zeros_like(self.dy_TF if part == "forward" else self.x_TD)
        gradients = []
        for group, (begin, end) in enumerate(pairwise(self.offset_G1.tolist())):
            rows_N = self.row_R[begin:end]
            if part == "dw":
                gradients.append(self.dy_TF[rows_N].t() @ self.x_TD[rows_N])
            elif part == "dx":
                out.index_add_(0, rows_N, self.dy_TF[rows_N] @ self.w_GFD[group])
            else:
                out.index_add_(0, rows_N, F.linear(self.x_TD[rows_N], self.w_GFD[group]))
        return [torch.stack(gradients) if part == "dw" else out]

    def grouped_mm(self, part: str) -> list[torch.Tensor]:
        """Rows gathered once, one ``F.grouped_mm``, rows put back once."""
        if part == "forward":
            x_RD = self.x_TD[self.row_R]
            y_RF = F.grouped_mm(x_RD, self.w_GFD.transpose(1, 2), offs=self.stop_G)
            return [torch.empty_like(y_RF).index_copy_(0, self.row_R, y_RF)]
        dy_RF = self.dy_TF[self.row_R]
        if part == "dx":
            dx_RD = F.grouped_mm(dy_RF, self.w_GFD, offs=self.stop_G)
            return [torch.empty_like(dx_RD).index_copy_(0, self.row_R, dx_RD)]
        return [F.grouped_mm(dy_RF.t(), self.x_TD[self.row_R], offs=self.stop_G)]

    def dense(self, part: str) -> list[torch.Tensor]:
        """One weight for all tokens: the same FLOPs."""
        w_FD = self.w_GFD[0]
        if part == "forward":
            return [F.linear(self.x_TD, w_FD)]
        return [self.dy_TF @ w_FD if part == "dx" else self.dy_TF.t() @ self.x_TD]

    def rivals(self, part: str) -> list[Rival]:
        """All ways to compute one part."""

        def rival(name: str, run: Callable[[str], list[torch.Tensor]], same: str | None) -> Rival:
            return Rival(name, lambda: run(part), same)

        return [
            rival(OURS, self.ours, None),
            rival(DENSE, self.dense, None),
            rival("loop over groups", self.loop, OURS),
            rival("gather, F.grouped_mm, put back", self.grouped_mm, OURS),
        ]


def main(rounds: int = 15) -> None:
    """Run all parts and sizes and write ``results/grouped_gemm.{jsonl,md}``."""
    torch.set_num_threads(1)
    report = Report("grouped_gemm", "Grouped product, 8 groups (row 2)")
    verdicts = []
    for name, sizes in SIZES.items():
        problem = Problem(sizes)
        for part in ("forward", "dx", "dw"):
            timings = compare(problem.rivals(part), rounds=rounds, tolerance=1e-5)
            flops = 2 * TOKENS * DIM * WIDTH
            setting = {"sizes": name, "part": part, "tokens": TOKENS, "dim": DIM, "width": WIDTH}
            report.add({**setting, "dtype": "fp32", "GFLOP": flops / 1e9}, timings)
            dense = next(t.cpu_ratio for t in timings if t.name == DENSE)
            verdict = "too noisy" if dense is None else "met" if dense >= 0.95 else "missed"
            shown = "" if dense is None else f" ({dense:.3f})"
            verdicts.append(f"- {name}, {part}: speed over dense ≥ 0.95: {verdict}{shown}")
    page = report.write()
    page.write_text(page.read_text() + "\n## Goals (CPU time)\n\n" + "\n".join(verdicts) + "\n")


if __name__ == "__main__":
    main()
