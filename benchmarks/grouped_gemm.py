"""One grouped product beside a dense one of the same FLOPs, and other ways to group (row 2).

    python benchmarks/grouped_gemm.py

Forward, gradient of x and gradient of w apart, over eight groups of equal and uneven sizes, twice:
with tokens sorted by group, as ``F.grouped_mm`` wants them, where no rival moves a row; and with
tokens in random order, where every rival but the dense ones gathers its rows and puts them back.
The goal, grouped over dense, is for sorted tokens: products alone. The dense weight is also
multiplied in one call per group, which shows what smaller products cost the BLAS by themselves.

T tokens, D width in, F width out, G groups.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product

import torch
import torch.nn.functional as F

from earlyfuse.kernels.grouped_gemm import op
from harness import Report, Rival, at_least, compare

GROUPS, TOKENS, DIM, WIDTH = 8, 4096, 512, 2048
PARTS = ("forward", "dx", "dw")
OURS, DENSE = "ours: grouped_linear", "dense product"
SIZES = {
    "equal": [TOKENS // GROUPS] * GROUPS,
    "zipf": [1507, 753, 502, 377, 301, 251, 215, 190],
    "one empty": [0, *[586] * 6, 580],
    "one tiny": [3, *[585] * 6, 583],
}


class Problem:
    """Tokens over groups of given sizes, sorted by group or in random order."""

    def __init__(
        self,
        sizes: Sequence[int],
        in_order: bool,
        dim: int = DIM,
        width: int = WIDTH,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        tokens = sum(sizes)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.x_TD, self.dy_TF = normal(tokens, dim).to(dtype), normal(tokens, width).to(dtype)
        self.w_GFD = (normal(len(sizes), width, dim) * dim**-0.5).to(dtype)
        self.in_order, self.backend = in_order, "triton" if device == "cuda" else "torch"
        shuffled_R = torch.randperm(tokens, generator=generator, device=device)
        self.row_R = torch.arange(tokens, device=device) if in_order else shuffled_R
        self.ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        self.offset_G1 = torch.tensor(self.ends, device=device)
        self.stop_G = self.offset_G1[1:].int()

    def ours(self, part: str) -> list[torch.Tensor]:
        """The operator behind ``grouped_linear``, or one of its gradients."""
        routes = (self.row_R, self.offset_G1, None, True)
        if part == "forward":
            return [op.grouped_linear(self.x_TD, self.w_GFD, *routes, self.backend)]
        need = [part == "dx", part == "dw", False, False, False]
        tensors = (self.dy_TF, self.x_TD, self.w_GFD)
        found = op.grouped_linear_backward(*tensors, *routes, need, self.backend)
        return [found[need.index(True)]]

    def loop(self, part: str) -> list[torch.Tensor]:
        """Group by group, results joined at the end."""
        groups = list(enumerate(pairwise(self.ends)))
        if self.in_order:
            xs, dys = (
                [t[begin:end] for _, (begin, end) in groups] for t in (self.x_TD, self.dy_TF)
            )
            if part == "dw":
                return [torch.stack([dy.t() @ x for dy, x in zip(dys, xs, strict=True)])]
            pairs = zip(dys if part == "dx" else xs, self.w_GFD, strict=True)
            return [torch.cat([t @ w if part == "dx" else F.linear(t, w) for t, w in pairs])]
        out = torch.zeros_like(self.dy_TF if part == "forward" else self.x_TD)
        gradients = []
        for group, (begin, end) in groups:
            rows_N = self.row_R[begin:end]
            if part == "dw":
                gradients.append(self.dy_TF[rows_N].t() @ self.x_TD[rows_N])
            elif part == "dx":
                out.index_add_(0, rows_N, self.dy_TF[rows_N] @ self.w_GFD[group])
            else:
                out.index_add_(0, rows_N, F.linear(self.x_TD[rows_N], self.w_GFD[group]))
        return [torch.stack(gradients) if part == "dw" else out]

    def grouped_mm(self, part: str) -> list[torch.Tensor]:
        """One ``F.grouped_mm``, rows gathered before and put back after it unless in order."""

        def gathered(t: torch.Tensor) -> torch.Tensor:
            return t if self.in_order else t[self.row_R]

        def put_back(t: torch.Tensor) -> list[torch.Tensor]:
            return [t if self.in_order else torch.empty_like(t).index_copy_(0, self.row_R, t)]

        if part == "forward":
            w_GDF = self.w_GFD.transpose(1, 2)
            return put_back(F.grouped_mm(gathered(self.x_TD), w_GDF, offs=self.stop_G))
        dy_RF = gathered(self.dy_TF)
        if part == "dx":
            return put_back(F.grouped_mm(dy_RF, self.w_GFD, offs=self.stop_G))
        return [F.grouped_mm(dy_RF.t(), gathered(self.x_TD), offs=self.stop_G)]

    def dense(self, part: str) -> list[torch.Tensor]:
        """One weight for all tokens: the same FLOPs."""
        w_FD = self.w_GFD[0]
        if part == "forward":
            return [F.linear(self.x_TD, w_FD)]
        return [self.dy_TF @ w_FD if part == "dx" else self.dy_TF.t() @ self.x_TD]

    def dense_calls(self, part: str) -> list[torch.Tensor]:
        """The dense product of as many rows at a time as the groups have."""
        w_FD, out = self.w_GFD[0], torch.empty_like(self.dy_TF if part == "forward" else self.x_TD)
        gradient_GFD = torch.empty_like(self.w_GFD) if part == "dw" else None
        for group, (begin, end) in enumerate(pairwise(self.ends)):
            x_ND, dy_NF = self.x_TD[begin:end], self.dy_TF[begin:end]
            if gradient_GFD is not None:
                torch.mm(dy_NF.t(), x_ND, out=gradient_GFD[group])
            elif part == "forward":
                torch.mm(x_ND, w_FD.t(), out=out[begin:end])
            else:
                torch.mm(dy_NF, w_FD, out=out[begin:end])
        return [out if gradient_GFD is None else gradient_GFD]

    def rivals(self, part: str) -> list[Rival]:
        """All ways to compute one part, ours first."""
        return [
            Rival(OURS, partial(self.ours, part)),
            Rival(DENSE, partial(self.dense, part)),
            Rival("dense product, a call per group", partial(self.dense_calls, part)),
            Rival("loop over groups", partial(self.loop, part), OURS),
            Rival("F.grouped_mm", partial(self.grouped_mm, part), OURS),
        ]


def main(rounds: int = 15) -> None:
    """Runs all parts and sizes and writes ``results/grouped_gemm.{jsonl,md}``."""
    report = Report("grouped_gemm", "Grouped product, 8 groups (row 2)")
    shape = {"dim": DIM, "width": WIDTH, "dtype": "fp32", "GFLOP": 2 * TOKENS * DIM * WIDTH / 1e9}
    for order, (name, sizes) in product(("sorted", "random"), SIZES.items()):
        problem = Problem(sizes, order == "sorted")
        for part in PARTS:
            timings = compare(problem.rivals(part), rounds=rounds, tolerance=1e-5, keep_freed=True)
            setting = {"order": order, "sizes": name, "part": part, "tokens": TOKENS}
            report.add(setting | shape, timings)
            if order == "sorted":
                speed = next(t.cpu_ratio for t in timings if t.name == DENSE)
                report.judge(at_least(f"sorted, {name}, {part}: speed over dense", speed, 0.95))
    report.write()


if __name__ == "__main__":
    main()
