"""The causal convolution with SiLU beside torch's, on one document and on packed ones (row 5).

    python benchmarks/causal_conv1d.py

Forward and backward, outputs and gradients of x, weight and bias. Inputs and results are (B, L, D)
as the projections around a convolution have them, so a rival that wants channels first transposes,
as models do: by a view, by copies, or, reading the row as an image of one line, not at all. The
rivals convolve packed documents one after another. FLA's kernel is Triton and needs a GPU; it is
not run here.

B rows, L tokens, D channels, W taps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from earlyfuse.kernels.causal_conv1d import causal_conv1d
from harness import Report, Rival, Timing, at_most, compare, differentiated, ours_over

WIDTH = 4
OURS = "ours"
VIEW, COPIES, IMAGE = "F.conv1d, views", "F.conv1d, copies", "F.conv2d, channels last"
GOAL = 0.9


@dataclass(frozen=True)
class Setting:
    """Sizes, and tokens of a document (None: one document a row)."""

    tokens: int
    channels: int
    document: int | None


class Problem:
    """Inputs, parameters and output gradient that all rivals share."""

    def __init__(
        self,
        setting: Setting,
        batch: int = 1,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=device) * std
            return values.to(dtype).requires_grad_()

        self.setting = setting
        shape = (batch, setting.tokens, setting.channels)
        self.x_BLD, self.dy_BLD = normal(*shape), normal(*shape).detach()
        self.weight_DW = normal(setting.channels, WIDTH, std=0.5)
        self.bias_D = normal(setting.channels)
        self.positions_BL = None
        if setting.document is not None:
            positions_L = torch.arange(setting.tokens, device=device) % setting.document
            self.positions_BL = positions_L.repeat(batch, 1)

    def run(self, convolve: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """Output and gradients of one way to convolve."""
        leaves = [self.x_BLD, self.weight_DW, self.bias_D]
        return differentiated(convolve(self.x_BLD), leaves, self.dy_BLD)

    def ours(self, x_BLD: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The op."""
        return causal_conv1d(
            *(x_BLD, self.weight_DW, self.bias_D),
            positions_BL=self.positions_BL,
            backend=backend,
        )[0]

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
        """Convolves each document alone, then joins them."""
        length = self.setting.document or self.setting.tokens
        return lambda x_BLD: torch.cat([convolve(part) for part in x_BLD.split(length, 1)], 1)

    def rivals(self) -> list[Rival]:
        """Ours first."""
        ways: dict[str, Callable[[torch.Tensor], torch.Tensor]]
        ways = {VIEW: self.views, COPIES: self.copies, IMAGE: self.image}
        if self.setting.document is not None:
            ways = {f"{name}, per document": self.by_document(way) for name, way in ways.items()}
        return [
            Rival(OURS, partial(self.run, self.ours)),
            *(Rival(name, partial(self.run, way), OURS) for name, way in ways.items()),
        ]


def verdict(setting: Setting, timings: list[Timing]) -> str:
    """Markdown: our CPU time over that of the fastest F.conv1d, and whether the goal is met."""
    ratios = [r for name, r in ours_over(timings).items() if "conv1d" in name and r is not None]
    shown = f"L {setting.tokens}, documents of {setting.document or 'any length'}"
    return at_most(f"{shown}: ours / best F.conv1d", max(ratios, default=None), GOAL)


def main(rounds: int = 15) -> None:
    """Runs all settings and writes ``results/causal_conv1d.{jsonl,md}``."""
    report = Report("causal_conv1d", "Causal convolution and SiLU, forward and backward (row 5)")
    for tokens in (512, 2048, 4096):
        for document in (None, 200):
            setting = Setting(tokens, 1024, document)
            rivals = Problem(setting).rivals()
            timings = compare(rivals, rounds=rounds, tolerance=1e-5, keep_freed=True)
            gbytes = 5 * 4e-9 * tokens * setting.channels
            shown = {**vars(setting), "width": WIDTH, "dtype": "fp32", "least GB moved": gbytes}
            report.add(shown | {"rounds": rounds, "freed memory": "kept"}, timings)
            report.judge(verdict(setting, timings))
    report.write("FLA's causal convolution is a Triton kernel: not run without a GPU.")


if __name__ == "__main__":
    main()
