"""The causal convolution with SiLU beside torch's, on one document and on packed ones (row 5).

    python benchmarks/causal_conv1d.py

Forward and backward, outputs and gradients of x, weight and bias. Inputs and results are (B, L, D)
as the projections around a convolution have them, so a rival that wants channels first transposes,
as models do: by a view, by copies, or, with the width as an image of one line, without either.
Packed documents are convolved one after another by the rivals. FLA's kernel is Triton and needs a
GPU; it is not run here.

B rows, L tokens, D channels, W taps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from earlyfuse.kernels.causal_conv1d import causal_conv1d
from harness import Report, Rival, Timing, compare

WIDTH = 4
OURS = "ours"
VIEW, COPIES, IMAGE = "F.conv1d, views", "F.conv1d, copies", "F.conv2d, channels last"
GOAL = 0.9


@dataclass(frozen=True)
class Setting:
    """Sizes, and the lengths of documents (none: one document)."""

    tokens: int
    channels: int
    document: int | None

    @property
    def lengths(self) -> list[int]:
        """Documents of ``document`` tokens; the last takes what is left."""
        if self.document is None:
            return [self.tokens]
        whole, rest = divmod(self.tokens, self.document)
        return [self.document] * whole + [rest] * (rest > 0)


class Problem:
    """Inputs, parameters and output gradient that all rivals share."""

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.setting = setting
        self.x_BLD = normal(1, setting.tokens, setting.channels).requires_grad_()
        self.dy_BLD = normal(1, setting.tokens, setting.channels)
        self.weight_DW = normal(setting.channels, WIDTH).mul(0.5).requires_grad_()
        self.bias_D = normal(setting.channels).requires_grad_()
        self.positions_BL = None
        if setting.document is not None:
            self.positions_BL = torch.cat([torch.arange(n) for n in setting.lengths])[None]

    def rival(self, name: str, convolve: Callable[[torch.Tensor], torch.Tensor]) -> Rival:
        """Output and gradients of one way to convolve."""

        def run() -> list[torch.Tensor]:
            y_BLD = convolve(self.x_BLD)
            inputs = [self.x_BLD, self.weight_DW, self.bias_D]
            return [y_BLD.detach(), *torch.autograd.grad(y_BLD, inputs, self.dy_BLD)]

        return Rival(name, run, None if name == OURS else OURS)

    def ours(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """The op."""
        return causal_conv1d(x_BLD, self.weight_DW, self.bias_D, positions_BL=self.positions_BL)[0]

    def views(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """As Mamba's slow path writes it: padded on both sides, the surplus cut off."""
        y_BDL = F.conv1d(
            x_BLD.transpose(1, 2),
            self.weight_DW[:, None],
            self.bias_D,
            padding=WIDTH - 1,
            groups=x_BLD.shape[2],
        )
        return F.silu(y_BDL[..., : x_BLD.shape[1]]).transpose(1, 2)

    def copies(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Contiguous in the layout that ``conv1d`` asks for, and back."""
        x_BDL = F.pad(x_BLD.transpose(1, 2).contiguous(), (WIDTH - 1, 0))
        y_BDL = F.conv1d(x_BDL, self.weight_DW[:, None], self.bias_D, groups=x_BLD.shape[2])
        return F.silu(y_BDL).transpose(1, 2).contiguous()

    def image(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, D) read as an image (B, D, 1, L) whose channels come last: no transposition."""
        x_BDHL = F.pad(x_BLD, (0, 0, WIDTH - 1, 0)).transpose(1, 2).unsqueeze(2)
        weight = self.weight_DW[:, None, None].contiguous(memory_format=torch.channels_last)
        y_BDHL = F.conv2d(x_BDHL, weight, self.bias_D, groups=x_BLD.shape[2])
        return F.silu(y_BDHL).squeeze(2).transpose(1, 2)

    def by_document(
        self, convolve: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Each document alone, side by side again afterwards."""
        lengths = self.setting.lengths
        return lambda x_BLD: torch.cat([convolve(part) for part in x_BLD.split(lengths, 1)], 1)


def rivals_of(problem: Problem) -> list[Rival]:
    """Ours first."""
    ways = {VIEW: problem.views, COPIES: problem.copies, IMAGE: problem.image}
    if problem.setting.document is not None:
        return [
            problem.rival(OURS, problem.ours),
            *(
                problem.rival(f"{name}, per document", problem.by_document(way))
                for name, way in ways.items()
            ),
        ]
    return [
        problem.rival(OURS, problem.ours),
        *(problem.rival(name, way) for name, way in ways.items()),
    ]


def verdict(setting: Setting, timings: list[Timing]) -> str:
    """Markdown: our CPU time over that of the fastest F.conv1d, and whether the goal is met."""
    ratios = [1 / t.cpu_ratio for t in timings if "conv1d" in t.name and t.cpu_ratio is not None]
    shown = f"L {setting.tokens}, documents of {setting.document or 'any length'}"
    if not ratios:
        return f"- {shown}: too noisy"
    met = "met" if max(ratios) <= GOAL else "missed"
    return f"- {shown}: ours / best F.conv1d ≤ {GOAL}: {met} ({max(ratios):.3f})"


def main(rounds: int = 15) -> None:
    """Run all settings and write ``results/causal_conv1d.{jsonl,md}``."""
    torch.set_num_threads(1)
    report = Report("causal_conv1d", "Causal convolution and SiLU, forward and backward (row 5)")
    verdicts = []
    for tokens in (512, 2048, 4096):
        for document in (None, 200):
            setting = Setting(tokens, 1024, document)
            timings = compare(
                rivals_of(Problem(setting)), rounds=rounds, tolerance=1e-5, keep_freed=True
            )
            gbytes = 5 * 4e-9 * tokens * setting.channels
            shown = {**vars(setting), "width": WIDTH, "dtype": "fp32", "least GB moved": gbytes}
            report.add(shown | {"rounds": rounds, "freed memory": "kept"}, timings)
            verdicts.append(verdict(setting, timings))
            print(verdicts[-1], flush=True)
    page = report.write()
    missing = "FLA's causal convolution is a Triton kernel: not run without a GPU."
    goals = "\n".join(verdicts)
    page.write_text(f"{page.read_text()}\n{missing}\n\n## Goals (CPU time)\n\n{goals}\n")


if __name__ == "__main__":
    main()
