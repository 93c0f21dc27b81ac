"""Rows 4 to 6 of ``gpu.py``: selective scan, causal convolution, linear cross-entropy.

Rivals of other packages are imported when they are first run: one that is missing is left out of
its line, which names it.

B batch, L tokens, D channels, N states, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
import torch.nn.functional as F

from earlyfuse.kernels.causal_conv1d import causal_conv1d
from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from earlyfuse.kernels.selective_scan import selective_scan
from earlyfuse.kernels.selective_scan.chunks import count_chunks
from gpu_timing import HELD, Goal, Run, Work, size_of
from selective_scan import by_states, by_transformers, scan_of_mambapy

STATES = 16

# ---------------------------------------------------------------- row 4


class Scan:
    """Mamba-1 on packed documents, with its initial rates: some states forget at once, not all."""

    def __init__(self, batch: int, length: int, channels: int, document: int, kind: str) -> None:
        torch.manual_seed(0)

        def leaf(*shape: int, shift: float = 0.0) -> torch.Tensor:
            values = torch.randn(*shape, device=kind) + shift
            return values.bfloat16().requires_grad_()

        wide, narrow = (batch, length, channels), (batch, length, STATES)
        self.u, self.delta, self.z = leaf(*wide), leaf(*wide, shift=-3.0), leaf(*wide)
        self.B, self.C = leaf(*narrow), leaf(*narrow)
        rates = torch.arange(1.0, STATES + 1, device=kind).repeat(channels, 1)
        self.A = (-rates).requires_grad_()
        self.skip, self.bias = (
            torch.randn(n, device=kind).requires_grad_() for n in [channels] * 2
        )
        self.reset = torch.arange(length, device=kind).expand(batch, -1) % document == 0
        self.dy = torch.randn(*wide, device=kind).bfloat16()
        self.leaves = [*(self.u, self.delta, self.A, self.B, self.C, self.skip, self.z, self.bias)]

    def output(self, backend: str = "auto", rows: slice | None = None) -> torch.Tensor:
        """y of all sequences or of some, gated."""
        u, delta, B, C, z, reset = (
            t if rows is None else t[rows]
            for t in (self.u, self.delta, self.B, self.C, self.z, self.reset)
        )
        return selective_scan(
            u, delta, self.A, B, C, self.skip, z, self.bias[None],
            reset_BL=reset, backend=backend,
        )[0]  # fmt: skip

    def forward(self) -> list[torch.Tensor]:
        """y, with what backward needs kept until it is dropped."""
        return [self.output().detach()]

    @cached_property
    def _kept(self) -> torch.Tensor:
        return self.output()

    def backward(self) -> list[torch.Tensor]:
        """All gradients of one forward pass, which is kept."""
        return list(torch.autograd.grad(self._kept, self.leaves, self.dy, retain_graph=True))

    def both(self) -> list[torch.Tensor]:
        """y and all gradients."""
        y = self.output()
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]

    @cached_property
    def definition(self) -> list[torch.Tensor]:
        """y and all gradients by the definition, which keeps all states: a sequence at a time."""
        ys = []
        gradients = [torch.zeros_like(leaf) for leaf in self.leaves]
        for row in range(len(self.u)):
            rows = slice(row, row + 1)
            y = self.output("reference", rows)
            ys.append(y.detach())
            parts = torch.autograd.grad(y, self.leaves, self.dy[rows])
            for total, part in zip(gradients, parts, strict=True):
                total += part
        return [torch.cat(ys), *gradients]

    def rival(self, scan: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        """Another's scan of (u, delta, A, B, C, skip, z, bias), in fp32, and all gradients."""
        inputs = [leaf.float() for leaf in self.leaves]
        y = scan(*inputs[:-1], inputs[-1][None]).bfloat16()
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]

    def by_decays(self, scan: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        """The same for a scan of decays and inputs (B, L, D, N)."""

        def packed(decay_BLDN: torch.Tensor, source_BLDN: torch.Tensor) -> torch.Tensor:
            return scan(decay_BLDN.masked_fill(self.reset[..., None, None], 0), source_BLDN)

        return self.rival(by_states(packed))

    def held(self) -> tuple[float, float]:
        """Bytes of the inputs; and of inputs, results and the states before each chunk."""
        inputs = size_of([*self.leaves, self.reset, self.dy])
        batch, length, channels = self.u.shape
        states = 4 * batch * count_chunks(length) * STATES * channels
        return inputs, inputs + size_of([self.u, *self.leaves]) + states


def scan_of_accelerated(decay_BLDN: torch.Tensor, source_BLDN: torch.Tensor) -> torch.Tensor:
    """accelerated-scan's Triton kernel, which wants (sequences, channels, tokens)."""
    from accelerated_scan.scalar import scan

    gates, tokens = (t.flatten(2).mT.contiguous() for t in (decay_BLDN, source_BLDN))
    return scan(gates, tokens).mT.unflatten(2, decay_BLDN.shape[2:])


def scans(
    kind: str, batch: int, length: int, channels: int, document: int, rivals: tuple[str, ...] = ()
) -> Iterator[Work]:
    """Row 4: forward, backward, and both with peak memory and the rivals named."""
    scan = Scan(batch, length, channels, document, kind)
    known: dict[str, Run] = {
        "mambapy": partial(scan.by_decays, scan_of_mambapy),
        "accelerated-scan": partial(scan.by_decays, scan_of_accelerated),
        "transformers": partial(scan.rival, by_transformers),
    }
    wide = batch * length * channels
    at, row = f"B {batch} L {length} D {channels} N {STATES}", "4 selective scan"
    # counted per state: 7 operations forward, 20 backward, and one exponential each
    yield Work(
        row, f"{at}, forward and backward", scan.both, lambda: scan.definition, 3e-2,
        {name: known[name] for name in rivals}, rivals,
        bytes_moved=22 * wide, exponentials=2 * STATES * wide, fp32_flops=27 * STATES * wide,
        held=scan.held(),
        goals=[Goal(HELD, 1.1)] + [Goal("ours / mambapy", 0.05)] * ("mambapy" in rivals),
    )  # fmt: skip
    yield Work(
        row, f"{at}, forward", scan.forward, lambda: scan.definition[:1], 3e-2,
        bytes_moved=8 * wide, exponentials=STATES * wide, fp32_flops=7 * STATES * wide,
        goals=(Goal("% of floor", 65, at_most=False),),
    )  # fmt: skip
    yield Work(
        row, f"{at}, backward", scan.backward, lambda: scan.definition[1:], 3e-2,
        bytes_moved=14 * wide, exponentials=STATES * wide, fp32_flops=20 * STATES * wide,
        goals=(Goal("% of floor", 40, at_most=False),),
    )  # fmt: skip


# ---------------------------------------------------------------- row 5


class Convolution:
    """Width 4 with bias and SiLU; documents of so many tokens, or one a row."""

    def __init__(
        self, batch: int, length: int, channels: int, document: int | None, kind: str
    ) -> None:
        torch.manual_seed(0)

        def leaf(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=kind).bfloat16().requires_grad_()

        self.x, self.dy = leaf(batch, length, channels), leaf(batch, length, channels).detach()
        self.weight, self.bias = leaf(channels, 4), leaf(channels)
        self.positions = None
        if document is not None:
            self.positions = (torch.arange(length, device=kind) % document).repeat(batch, 1)

    def _through(self, y: torch.Tensor) -> list[torch.Tensor]:
        leaves = [self.x, self.weight, self.bias]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def ours(self, backend: str = "auto") -> list[torch.Tensor]:
        """The output and all gradients."""
        y, _ = causal_conv1d(
            self.x, self.weight, self.bias, positions_BL=self.positions, backend=backend
        )
        return self._through(y)

    def conv1d(self) -> list[torch.Tensor]:
        """torch's, which wants channels before tokens."""
        x_BDL, channels = self.x.transpose(1, 2), self.x.shape[2]
        padded = F.conv1d(x_BDL, self.weight[:, None], self.bias, padding=3, groups=channels)
        return self._through(F.silu(padded[..., : self.x.shape[1]]).transpose(1, 2))

    def fla(self) -> list[torch.Tensor]:
        """flash-linear-attention's Triton kernel."""
        from fla.modules.convolution import causal_conv1d as convolve

        y, _ = convolve(self.x, self.weight, self.bias, activation="silu")
        return self._through(y)


def convolutions(
    kind: str, batch: int, length: int, channels: int, document: int | None
) -> Iterator[Work]:
    """Row 5: forward and backward; the rivals take one document a row."""
    convolution = Convolution(batch, length, channels, document, kind)
    at, size = f"B {batch} L {length} D {channels} W 4", batch * length * channels
    goals, rivals = [Goal("% of floor", 85, at_most=False)], dict[str, Run]()
    if document is not None:
        at = f"{at}, documents of {document}"
    else:
        goals.append(Goal("ours / FLA", 1.0))
        rivals["F.conv1d"] = convolution.conv1d
        if kind == "cuda":
            rivals["FLA"] = convolution.fla
    yield Work(
        "5 causal conv", f"{at}, forward and backward", convolution.ours,
        partial(convolution.ours, "reference"), 3e-2, rivals, tuple(rivals),
        bytes_moved=10 * size, exponentials=2 * size, goals=goals,
    )  # fmt: skip


# ---------------------------------------------------------------- row 6


class HeadAndLoss:
    """Hidden states of text and image tokens in turn, and labels."""

    def __init__(self, tokens: int, dim: int, vocabulary: int, kind: str) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(tokens, dim, device=kind).bfloat16().requires_grad_()
        weight = torch.randn(vocabulary, dim, device=kind) * dim**-0.5
        self.w = weight.bfloat16().requires_grad_()
        self.labels = torch.randint(vocabulary, (tokens,), device=kind)
        self.modality = torch.arange(tokens, device=kind) % 2

    def _gradients(self, total: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(total, [self.x, self.w]))

    def ours(self, backend: str = "auto") -> list[torch.Tensor]:
        """Gradients, and sums by modality; logits a chunk at a time."""
        sums = linear_cross_entropy(
            self.x, self.w, self.labels, self.modality, modalities=2, backend=backend
        )
        return [*self._gradients(sums.total), sums.nll_M.detach()]

    def _losses(self) -> torch.Tensor:
        logits_TV = F.linear(self.x, self.w).float()
        nll_T = F.cross_entropy(logits_TV, self.labels, reduction="none")
        return torch.zeros(2, device=nll_T.device).index_add(0, self.modality, nll_T)

    @cached_property
    def _compiled(self) -> Callable[[], torch.Tensor]:
        return torch.compile(self._losses)

    def whole(self, compiled: bool = False) -> list[torch.Tensor]:
        """All logits, in fp32 for the loss, as it is usually written."""
        nll_2 = self._compiled() if compiled else self._losses()
        return [*self._gradients(nll_2.sum()), nll_2.detach()]

    def liger(self) -> list[torch.Tensor]:
        """Liger Kernel's, whose sum is not by modality."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return self._gradients(loss(self.w, self.x, self.labels))

    def cut(self) -> list[torch.Tensor]:
        """cut-cross-entropy's, whose sum is not by modality; it leaves small gradients out."""
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

        return self._gradients(
            cut_cross_entropy(self.x, self.w, self.labels, reduction="sum", impl="cce")
        )


def heads(kind: str, tokens: int, dim: int, vocabulary: int) -> Iterator[Work]:
    """Row 6: head and loss, forward and backward."""
    problem = HeadAndLoss(tokens, dim, vocabulary, kind)
    rivals: dict[str, Run] = {"F.linear + cross_entropy": problem.whole}
    if kind == "cuda":
        rivals |= {
            "liger": problem.liger,
            "cut-cross-entropy": problem.cut,
            "compiled": partial(problem.whole, compiled=True),
        }
    yield Work(
        "6 linear cross-entropy", f"T {tokens} d {dim} V {vocabulary}, forward and backward",
        problem.ours, partial(problem.ours, "reference"), 3e-2, rivals, tuple(rivals),
        flops=6 * tokens * dim * vocabulary, bytes_moved=4 * dim * (tokens + vocabulary),
        exponentials=tokens * vocabulary, goals=(Goal("ms", 22.0), Goal("ours / liger", 0.95)),
    )  # fmt: skip
