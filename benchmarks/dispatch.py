"""Choosing rows and moving them, beside torch's own ops (row 3).

    python benchmarks/dispatch.py

Top-k per expert with ties by lower index, gather, and weighted scatter-add; the two that have
gradients run forward and backward. ``torch.topk`` leaves ties open, so scores have none; its result
must be the same, and so must that of ``index_add_``, which on a CPU adds in order too.

T tokens, E experts, K rows an expert, D width.
"""

import torch

from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k
from harness import Report, Rival, at_most, compare, differentiated, ours_over

TOKENS, DIM = 4096, 512
OURS, TORCH = "ours", "torch"


def rivals(experts: int) -> dict[str, list[Rival]]:
    """Ours and torch's, by op."""
    generator = torch.Generator().manual_seed(0)
    k = TOKENS // experts
    scores_ET = torch.randn(experts, TOKENS, generator=generator)
    row_R = scores_ET.topk(k, dim=1).indices.flatten()
    x_TD = torch.randn(TOKENS, DIM, generator=generator).requires_grad_()
    y_RD = torch.randn(len(row_R), DIM, generator=generator).requires_grad_()
    weight_R = torch.rand(len(row_R), generator=generator).requires_grad_()
    dy_RD = torch.randn(y_RD.shape, generator=generator)
    dx_TD = torch.randn(x_TD.shape, generator=generator)

    def gathered(out_RD: torch.Tensor) -> list[torch.Tensor]:
        return differentiated(out_RD, [x_TD], dy_RD)

    def scattered(out_TD: torch.Tensor) -> list[torch.Tensor]:
        return differentiated(out_TD, [y_RD, weight_R], dx_TD)

    def index_add() -> torch.Tensor:
        return torch.zeros(TOKENS, DIM).index_add(0, row_R, y_RD * weight_R[:, None])

    runs = {
        "top-k": (
            lambda: [select_top_k(scores_ET, k)],
            lambda: [scores_ET.topk(k, dim=1).indices],
        ),
        "gather": (
            lambda: gathered(gather_rows(x_TD, row_R)),
            lambda: gathered(x_TD.index_select(0, row_R)),
        ),
        "scatter": (
            lambda: scattered(scatter_add_rows(y_RD, row_R, TOKENS, weight_R)),
            lambda: scattered(index_add()),
        ),
    }
    return {op: [Rival(OURS, own), Rival(TORCH, other, OURS)] for op, (own, other) in runs.items()}


def main(rounds: int = 99) -> None:
    """Runs all ops and writes ``results/dispatch.{jsonl,md}``."""
    report = Report("dispatch", "Top-k, gather, weighted scatter (row 3)")
    for experts in (8, 64):
        for name, pair in rivals(experts).items():
            timings = compare(pair, rounds=rounds, tolerance=1e-6, keep_freed=True)
            setting = {"op": name, "tokens": TOKENS, "experts": experts, "rows": TOKENS // experts}
            report.add({**setting, "dim": DIM, "dtype": "fp32", "freed memory": "kept"}, timings)
            what = f"{name}, {experts} experts: ours / torch"
            report.judge(at_most(what, ours_over(timings)[TORCH], 1.0))
    report.write()


if __name__ == "__main__":
    main()
