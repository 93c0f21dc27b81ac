"""Choosing rows and moving them, beside torch's own ops (row 3).

    python benchmarks/dispatch.py

Top-k per expert with ties by lower index, gather, and weighted scatter-add; forward alone, and
forward with backward for the two that have gradients. ``torch.topk`` leaves ties open, so on scores
without ties it must find the same; ``index_add_`` on CPU adds in order too.

T tokens, E experts, K rows an expert, D width.
"""

import torch

from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k
from harness import Report, Rival, compare

TOKENS, DIM = 4096, 512
OURS, TORCH = "ours", "torch"


class Problem:
    """Scores without ties, and rows chosen by them."""

    def __init__(self, experts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.k = TOKENS // experts
        self.scores_ET = torch.randn(experts, TOKENS, generator=generator)
        self.row_R = self.scores_ET.topk(self.k, dim=1).indices.flatten()
        self.x_TD = torch.randn(TOKENS, DIM, generator=generator).requires_grad_()
        self.y_RD = torch.randn(len(self.row_R), DIM, generator=generator).requires_grad_()
        self.weight_R = torch.rand(len(self.row_R), generator=generator).requires_grad_()
        self.dy_RD = torch.randn(self.y_RD.shape, generator=generator)
        self.dx_TD = torch.randn(self.x_TD.shape, generator=generator)

    def rivals(self, op: str) -> list[Rival]:
        """Ours and torch's."""
        if op == "top-k":
            return [
                Rival(OURS, lambda: [select_top_k(self.scores_ET, self.k)]),
                Rival(TORCH, lambda: [self.scores_ET.topk(self.k, dim=1).indices], OURS),
            ]
        if op == "gather":
            return [
                Rival(OURS, lambda: self._through(gather_rows(self.x_TD, self.row_R))),
                Rival(
                    TORCH,
                    lambda: self._through(self.x_TD.index_select(0, self.row_R)),
                    OURS,
                ),
            ]
        return [
            Rival(
                OURS,
                lambda: self._back(scatter_add_rows(self.y_RD, self.row_R, TOKENS, self.weight_R)),
            ),
            Rival(TORCH, lambda: self._back(self._index_add()), OURS),
        ]

    def _index_add(self) -> torch.Tensor:
        weighted_RD = self.y_RD * self.weight_R[:, None]
        return torch.zeros(TOKENS, DIM).index_add(0, self.row_R, weighted_RD)

    def _through(self, out_RD: torch.Tensor) -> list[torch.Tensor]:
        return [out_RD.detach(), *torch.autograd.grad(out_RD, [self.x_TD], self.dy_RD)]

    def _back(self, out_TD: torch.Tensor) -> list[torch.Tensor]:
        wanted = [self.y_RD, self.weight_R]
        return [out_TD.detach(), *torch.autograd.grad(out_TD, wanted, self.dx_TD)]


def main(rounds: int = 99) -> None:
    """Run all ops and write ``results/dispatch.{jsonl,md}``."""
    torch.set_num_threads(1)
    report = Report("dispatch", "Top-k, gather, weighted scatter (row 3)")
    verdicts = []
    for experts in (8, 64):
        problem = Problem(experts)
        for name in ("top-k", "gather", "scatter"):
            timings = compare(problem.rivals(name), rounds=rounds, tolerance=1e-6, keep_freed=True)
            setting = {"op": name, "tokens": TOKENS, "experts": experts, "rows": problem.k}
            report.add({**setting, "dim": DIM, "dtype": "fp32", "freed memory": "kept"}, timings)
            ratio = timings[1].cpu_ratio
            shown = "too noisy" if ratio is None else f"{1 / ratio:.3f}"
            verdict = "" if ratio is None else ": met" if ratio >= 1 else ": missed"
            verdicts.append(f"- {name}, {experts} experts: ours / torch ≤ 1.00{verdict} ({shown})")
    page = report.write()
    page.write_text(page.read_text() + "\n## Goals (CPU time)\n\n" + "\n".join(verdicts) + "\n")


if __name__ == "__main__":
    main()
