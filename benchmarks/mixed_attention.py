"""Attention that is causal between items and bidirectional inside images, beside SDPA (row 7).

    python benchmarks/mixed_attention.py

Forward and backward of the attention product, as ``attend`` computes it on a CPU: by SDPA in blocks
of queries, each against the keys that any of its queries sees. The mask is built once a batch and
shared by all layers; its time is given beside one layer's. Rivals: SDPA under one boolean or float
mask, softmax written out, and causal SDPA over the whole row, another function: the goal compares
with it. FlexAttention has no backward on CPUs; its forward, compiled, is timed alone.

B rows, L positions, N heads, H width of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from earlyfuse.models.blocks.attention import attend
from earlyfuse.models.masks import Mask, attention_mask, visible
from harness import Report, Rival, Timing, at_most, compare, differentiated, ours_over

OURS, CAUSAL = "ours", "SDPA, causal over the row"
GOAL = 1.5


@dataclass(frozen=True)
class Setting:
    """Sizes. ``document``, ``span``, ``text``: positions of a document, of an image, and of the
    text before each image.
    """

    rows: int
    tokens: int
    document: int
    span: int
    text: int
    heads: int = 8
    width: int = 64


SETTINGS = (
    Setting(1, 1024, 1024, span=128, text=128),
    Setting(1, 1024, 256, span=64, text=32),
    Setting(4, 256, 256, span=16, text=8),
    Setting(4, 256, 64, span=16, text=8),
    Setting(1, 2048, 2048, span=256, text=256),
)


class Problem:
    """Queries, keys, values, output gradient and mask of one setting; all rivals share them."""

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (setting.rows, setting.tokens, setting.heads, setting.width)
        *leaves, self.dy_BLNH = (torch.randn(*shape, generator=generator) for _ in range(4))
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        place_L = torch.arange(setting.tokens)
        in_document_L, period = place_L % setting.document, setting.span + setting.text
        image_L = in_document_L % period >= setting.text
        # an image at the end of a document that does not fit is text
        image_L &= in_document_L // period * period + period <= setting.document
        document_L, number_L = place_L // setting.document + 1, place_L // period + 1
        self.document_BL = document_L.int().repeat(setting.rows, 1)
        self.span_BL = (number_L * image_L).int().repeat(setting.rows, 1)
        self.mask = self.built()
        numbers = (place_L, document_L, self.span_BL[0])
        self.seen_LL = visible(*(pair for one in numbers for pair in (one[:, None], one)))
        self.bool_mask = self.seen_LL.expand(setting.rows, 1, -1, -1).contiguous()
        self.float_mask = torch.zeros(self.bool_mask.shape).masked_fill(~self.bool_mask, -torch.inf)

    def built(self) -> Mask:
        """The mask, as a forward builds it once for all layers."""
        return attention_mask(self.document_BL, 0, self.span_BL)

    def sdpa(self, *qkv: torch.Tensor, **mask: Any) -> torch.Tensor:
        """(B, L, N, H) under a mask of torch's."""
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv)
        return F.scaled_dot_product_attention(q, k, v, **mask).transpose(1, 2)

    def manual(self, *qkv: torch.Tensor) -> torch.Tensor:
        """Softmax of all scores."""
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv)
        scores_BNLL = q @ k.mT * q.shape[-1] ** -0.5 + self.float_mask
        return (scores_BNLL.softmax(-1) @ v).transpose(1, 2)

    def flex(self) -> Callable[..., torch.Tensor]:
        """FlexAttention, compiled."""
        size, seen_LL = len(self.seen_LL), self.seen_LL
        mask = create_block_mask(lambda b, h, q, k: seen_LL[q, k], None, None, size, size, "cpu")
        compiled = torch.compile(flex_attention)

        def run(*qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = (tensor.transpose(1, 2) for tensor in qkv)
            return compiled(q, k, v, block_mask=mask).transpose(1, 2)

        return run

    def ways(self) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
        """Name and function of each, ours first."""
        yield OURS, lambda q, k, v: attend(q, k, v, self.mask)
        yield f"{OURS}, with building the mask", lambda q, k, v: attend(q, k, v, self.built())
        yield "SDPA, boolean mask", partial(self.sdpa, attn_mask=self.bool_mask)
        yield "SDPA, float mask", partial(self.sdpa, attn_mask=self.float_mask)
        yield "softmax written out", self.manual
        yield CAUSAL, partial(self.sdpa, is_causal=True)

    def run(self, way: Callable[..., torch.Tensor], forward: bool) -> list[torch.Tensor]:
        """Output, and unless ``forward`` the gradients."""
        if forward:
            return [way(*(leaf.detach() for leaf in self.leaves))]
        return differentiated(way(*self.leaves), self.leaves, self.dy_BLNH)

    def rivals(self, forward: bool = False) -> list[Rival]:
        """Ours first; ``forward``: without backward, and with FlexAttention."""
        ways = dict(self.ways())
        if forward:
            ways["FlexAttention, compiled"] = self.flex()
        return [
            Rival(name, partial(self.run, way, forward), None if name in (OURS, CAUSAL) else OURS)
            for name, way in ways.items()
        ]


def shown(setting: Setting, problem: Problem) -> dict[str, object]:
    """The setting's line on the page."""
    spans = problem.span_BL[0].unique().count_nonzero().item()
    seen = problem.seen_LL.float().mean().item()
    return {
        "B": setting.rows,
        "L": setting.tokens,
        "documents of": setting.document,
        "images in a row": f"{spans} of {setting.span}",
        "N": setting.heads,
        "H": setting.width,
        "dtype": "fp32",
        "visible pairs": f"{seen:.3f}",
    }


def verdict(setting: Setting, timings: list[Timing]) -> str:
    """Markdown: our CPU time over causal SDPA's, and whether the goal is met."""
    where = f"B {setting.rows}, L {setting.tokens}, documents of {setting.document}"
    return at_most(f"{where}: ours / causal SDPA", ours_over(timings)[CAUSAL], GOAL)


def main(rounds: int = 15) -> None:
    """Runs all settings and writes ``results/mixed_attention.{jsonl,md}``."""
    report = Report("mixed_attention", "Causal attention, bidirectional inside images (row 7)")
    for setting in SETTINGS:
        problem = Problem(setting)
        for forward in (False, True) if setting == SETTINGS[0] else (False,):
            timings = compare(problem.rivals(forward), rounds=rounds, keep_freed=True)
            work = {"work": "forward" if forward else "forward and backward", "rounds": rounds}
            report.add(shown(setting, problem) | work, timings)
            if not forward:
                report.judge(verdict(setting, timings))
    report.write("FlexAttention's backward is not implemented for CPUs.")


if __name__ == "__main__":
    main()
