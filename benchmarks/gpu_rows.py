"""The rows of ``gpu.py``: what is run, what it must equal, and what it costs at least.

T tokens, D width, E experts, R routed rows, V vocabulary.
"""

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
if "earlyfuse" not in sys.modules:  # the tree itself, installed or not
    package = types.ModuleType("earlyfuse")
    package.__path__ = [str(ROOT)]
    sys.modules["earlyfuse"] = package

from earlyfuse.kernels.causal_conv1d import causal_conv1d  # noqa: E402
from earlyfuse.kernels.grouped_gemm import grouped_swiglu, op  # noqa: E402
from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k  # noqa: E402
from earlyfuse.kernels.selective_scan import selective_scan  # noqa: E402

Run = Callable[[], Sequence[torch.Tensor]]


@dataclass
class Work:
    """One line of the table. ``same``: which rivals must reproduce our results."""

    row: str
    setting: str
    ours: Run
    rivals: dict[str, Run]
    same: tuple[str, ...]
    tolerance: float
    flops: float = 0.0
    bytes_moved: float = 0.0
    exponentials: float = 0.0
    goal: str = ""


# ---------------------------------------------------------------- rows 1 to 3


def without_tma(run: Run) -> Sequence[torch.Tensor]:
    """Results of ``run`` where the grouped kernels read every tile through pointers."""
    from earlyfuse.kernels.grouped_gemm import triton_impl  # needs Triton

    with mock.patch.object(triton_impl, "has_tma", lambda tensor: False):
        return run()


def pointers(run: Run, kind: str) -> dict[str, Run]:
    """The rival of ``run`` that does not use TMA, where the device has it."""
    if kind != "cuda" or torch.cuda.get_device_capability() < (9, 0):
        return {}
    return {"pointers": partial(without_tma, run)}


@dataclass
class Experts:
    """MoMa's experts on random tokens: half text, half image, capacity factor 1."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    kind: str

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16

        def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, device=self.kind) * scale
            return values.to(dtype).requires_grad_()

        dim, hidden, experts = self.dim, self.hidden, self.experts
        self.x = leaf(self.tokens, dim)
        self.dy = leaf(self.tokens, dim).detach()
        self.router = leaf(experts, dim, scale=dim**-0.5)
        self.w1, self.w3 = (leaf(experts, hidden, dim, scale=dim**-0.5) for _ in range(2))
        self.w2 = leaf(experts, dim, hidden, scale=hidden**-0.5)
        self.k = self.tokens // experts
        self.offset = torch.arange(experts + 1, device=self.kind) * self.k
        image_T = torch.arange(self.tokens, device=self.kind) % 2 == 1
        text_expert_E1 = torch.arange(experts, device=self.kind)[:, None] < experts // 2
        self.foreign_ET = image_T[None, :] == text_expert_E1

    def route(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and weight of each routed row."""
        logits_ET = F.linear(self.router.float(), self.x.float())
        scores_ET = logits_ET.detach().masked_fill(self.foreign_ET, -torch.inf)
        row_EK = select_top_k(scores_ET, self.k)
        return row_EK.flatten(), logits_ET.gather(1, row_EK).sigmoid().flatten()

    def _through(self, y: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
        return [y.detach(), *torch.autograd.grad(y, [self.x, *weights], self.dy)]

    def ours(self) -> list[torch.Tensor]:
        """Routing, experts and dispatch."""
        row, weight = self.route()
        y = grouped_swiglu(self.x, self.w1, self.w3, self.w2, row, self.offset, weight)
        return self._through(y, self.router, self.w1, self.w3, self.w2)

    def torch_grouped(self) -> list[torch.Tensor]:
        """The same with ``F.grouped_mm``, gathered and put back by torch."""
        row, weight = self.route()
        stop = self.offset[1:].int()
        x_RD = self.x.index_select(0, row)
        gate = F.grouped_mm(x_RD, self.w1.transpose(1, 2), offs=stop)
        up = F.grouped_mm(x_RD, self.w3.transpose(1, 2), offs=stop)
        y_RD = F.grouped_mm(F.silu(gate) * up, self.w2.transpose(1, 2), offs=stop)
        y_RD = y_RD.float() * weight[:, None]
        y = torch.zeros(self.x.shape, device=self.kind).index_add(0, row, y_RD).to(self.x.dtype)
        return self._through(y, self.router, self.w1, self.w3, self.w2)

    def dense(self) -> list[torch.Tensor]:
        """One expert of the same FLOPs for all tokens."""
        w1, w3, w2 = self.w1[0], self.w3[0], self.w2[0]
        y = F.linear(F.silu(F.linear(self.x, w1)) * F.linear(self.x, w3), w2)
        return self._through(y, self.w1, self.w3, self.w2)


def moma_layers(kind: str, tiny: bool) -> Iterator[Work]:
    """Row 1: forward and backward of a layer."""
    for tokens in (32,) if tiny else (8192, 16384, 32768):
        layer = Experts(tokens, *((16, 32, 4) if tiny else (2048, 5632, 8)), kind)
        size = layer.dim * layer.hidden
        other = pointers(layer.ours, kind)
        yield Work(
            "1 MoMa layer",
            f"T {tokens} d {layer.dim} f {layer.hidden} 4t4i",
            layer.ours,
            {"dense": layer.dense, "F.grouped_mm": layer.torch_grouped, **other},
            ("F.grouped_mm", *other),
            3e-2,
            flops=18 * tokens * size,
            bytes_moved=6 * 3 * layer.experts * size,
            goal="≤ 1.05 dense, ≤ 0.90 F.grouped_mm",
        )


class Products:
    """One product over groups of given sizes, every token once."""

    def __init__(self, sizes: Sequence[int], dim: int, hidden: int, kind: str) -> None:
        torch.manual_seed(0)
        tokens = sum(sizes)
        offset = torch.tensor([0, *sizes], device=kind).cumsum(0)
        self.row, self.stop = torch.randperm(tokens, device=kind), offset[1:].int()
        self.x, self.dy, self.w = (
            torch.randn(*shape, device=kind).bfloat16()
            for shape in ((tokens, dim), (tokens, hidden), (len(sizes), hidden, dim))
        )
        self.routes = (self.row, offset, None, True)
        self.backend = "triton" if kind == "cuda" else "torch"

    def ours(self, part: str) -> list[torch.Tensor]:
        """The operator behind ``grouped_linear`` and its gradients one at a time."""
        if part == "forward":
            return [op.grouped_linear(self.x, self.w, *self.routes, self.backend)]
        need = [part == "dX", part == "dW", False]
        tensors = (self.dy, self.x, self.w)
        found = op.grouped_linear_backward(*tensors, *self.routes, need, self.backend)
        return [found[need.index(True)]]

    def grouped(self, part: str) -> list[torch.Tensor]:
        """Gathered, one ``F.grouped_mm``, put back."""
        if part == "dW":
            return [F.grouped_mm(self.dy[self.row].t(), self.x[self.row], offs=self.stop)]
        forward = part == "forward"
        a, b = (self.x, self.w.transpose(1, 2)) if forward else (self.dy, self.w)
        product = F.grouped_mm(a[self.row], b, offs=self.stop)
        return [torch.empty_like(product).index_copy_(0, self.row, product)]

    def dense(self, part: str) -> list[torch.Tensor]:
        """One weight for all tokens: the same FLOPs."""
        if part == "dW":
            return [self.dy.t() @ self.x]
        return [F.linear(self.x, self.w[0]) if part == "forward" else self.dy @ self.w[0]]


def grouped_products(kind: str, tiny: bool) -> Iterator[Work]:
    """Row 2: forward, dX and dW of one product over ragged groups."""
    tokens, dim, hidden = (32, 16, 32) if tiny else (16384, 2048, 5632)
    shares = {
        "equal": [1 / 8] * 8,
        "zipf": [0.368, 0.184, 0.123, 0.092, 0.074, 0.061, 0.053, 0.045],
        "one empty": [0.0] + [1 / 7] * 7,
    }
    for name, share in shares.items():
        sizes = [int(part * tokens) for part in share]
        sizes[-1] += tokens - sum(sizes)
        products = Products(sizes, dim, hidden, kind)
        for part in ("forward", "dX", "dW"):
            # both operands of dW are gathered: there is no other path
            other = pointers(partial(products.ours, part), kind) if part != "dW" else {}
            yield Work(
                "2 grouped GEMM",
                f"{part}, {name}, T {tokens} d {dim} f {hidden}",
                partial(products.ours, part),
                {
                    "dense": partial(products.dense, part),
                    "F.grouped_mm": partial(products.grouped, part),
                    **other,
                },
                ("F.grouped_mm", *other),
                2e-2,
                flops=2 * tokens * dim * hidden,
                bytes_moved=2 * (tokens * (dim + hidden) + 8 * dim * hidden),
                goal="≥ 0.90 of dense, ≥ F.grouped_mm",
            )


def listed(function: Callable[..., torch.Tensor], *arguments: Any) -> list[torch.Tensor]:
    """The one result of a function, as a list."""
    return [function(*arguments)]


def index_add(y_RD: torch.Tensor, row_R: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
    """Weighted rows added up by torch, in fp32."""
    out = torch.zeros(y_RD.shape, device=y_RD.device)
    return out.index_add(0, row_R, y_RD.float() * weight_R[:, None]).to(y_RD.dtype)


def torch_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """torch's, which leaves ties open."""
    return scores.topk(k, dim=1).indices


def dispatch(kind: str, tiny: bool) -> Iterator[Work]:
    """Row 3: top-k, gather, weighted scatter."""
    for tokens in (64,) if tiny else (16384, 131072):
        dim, experts = (16, 4) if tiny else (2048, 8)
        scores, k = torch.randn(experts, tokens, device=kind), tokens // experts
        row = torch_top_k(scores, k).flatten()
        x = torch.randn(tokens, dim, device=kind).bfloat16()
        weight = torch.rand(len(row), device=kind)
        at, moved = f"T {tokens} d {dim} E {experts}", 2 * 2 * len(row) * dim
        yield Work(
            "3 top-k", at, partial(listed, select_top_k, scores, k),
            {"torch.topk": partial(listed, torch_top_k, scores, k)},
            ("torch.topk",), 0.0, bytes_moved=4 * experts * tokens, goal="8 groups ≤ 40 us",
        )  # fmt: skip
        yield Work(
            "3 gather", at, partial(listed, gather_rows, x, row),
            {"index_select": partial(listed, torch.index_select, x, 0, row)},
            ("index_select",), 0.0, bytes_moved=moved, goal="≥ 85 % of copy",
        )  # fmt: skip
        yield Work(
            "3 weighted scatter", at, partial(listed, scatter_add_rows, x, row, tokens, weight),
            {"index_add": partial(listed, index_add, x, row, weight)},
            ("index_add",), 2e-2, bytes_moved=moved, goal="≥ 85 % of copy",
        )  # fmt: skip


# ---------------------------------------------------------------- rows 4 to 6


class Scan:
    """A packed row of Mamba-1 at the sizes of a 1.5 B model, or a tiny one."""

    def __init__(self, batch: int, length: int, channels: int, kind: str) -> None:
        torch.manual_seed(0)
        states = 16

        def leaf(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=kind).bfloat16().requires_grad_()

        wide, narrow = (batch, length, channels), (batch, length, states)
        self.data = [leaf(*wide), leaf(*wide), leaf(*narrow), leaf(*narrow), leaf(*wide)]
        self.A = -torch.rand(channels, states, device=kind) * 4 - 0.1
        self.skip, self.bias = torch.randn(2, channels, device=kind)
        self.reset = torch.arange(length, device=kind).expand(batch, -1) % 1000 == 0
        self.dy = torch.randn(*wide, device=kind).bfloat16()

    def forward(self, backend: str) -> list[torch.Tensor]:
        """y, gated."""
        u, delta, B, C, z = self.data
        y, _ = selective_scan(
            u, delta, self.A, B, C, self.skip, z, self.bias[None],
            reset_BL=self.reset, backend=backend,
        )  # fmt: skip
        return [y]

    @torch.no_grad()
    def inference(self, backend: str) -> list[torch.Tensor]:
        """y alone: nothing is kept."""
        return self.forward(backend)

    def both(self, backend: str) -> list[torch.Tensor]:
        """y and the gradients of the data."""
        (y,) = self.forward(backend)
        return [y.detach(), *torch.autograd.grad(y, self.data, self.dy)]


def scans(kind: str, tiny: bool) -> Iterator[Work]:
    """Row 4: forward alone, and with backward, checked against the definition on a short row."""
    check = Scan(1, 24, 32, kind)
    yield Work(
        "4 selective scan", "B 1 L 24 D 32 N 16, correctness", partial(check.both, "auto"),
        {"definition": partial(check.both, "reference")}, ("definition",), 3e-2,
    )  # fmt: skip
    for batch in () if tiny else (2, 4, 8):
        scan = Scan(batch, 4096, 4096, kind)
        elements, at = batch * 4096 * 4096, f"B {batch} L 4096 D 4096 N 16"
        yield Work(
            "4 selective scan", f"{at}, forward", partial(scan.inference, "auto"), {}, (), 0.0,
            bytes_moved=8 * elements, exponentials=16 * elements, goal="≥ 65 % of floor",
        )  # fmt: skip
        yield Work(
            "4 selective scan", f"{at}, forward and backward", partial(scan.both, "auto"), {}, (),
            0.0, flops=0.0, bytes_moved=22 * elements, exponentials=32 * elements,
            goal="backward ≥ 40 % of its floor",
        )  # fmt: skip


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor, ours: bool
) -> list[torch.Tensor]:
    """y and the gradients of x, weight and bias."""
    if ours:
        y, _ = causal_conv1d(x, weight, bias)
    else:
        taps, length = weight.shape[1], x.shape[1]
        padded = F.conv1d(
            x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=x.shape[2]
        )
        y = F.silu(padded[..., :length]).transpose(1, 2)
    return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], dy)]


def convolutions(kind: str, tiny: bool) -> Iterator[Work]:
    """Row 5: forward and backward, one document a row."""
    for batch in (2,) if tiny else (2, 4, 8):
        length, channels = (20, 16) if tiny else (4096, 4096)
        torch.manual_seed(0)
        x, dy = (
            torch.randn(batch, length, channels, device=kind).bfloat16().requires_grad_()
            for _ in range(2)
        )
        weight = torch.randn(channels, 4, device=kind).bfloat16().requires_grad_()
        bias = torch.randn(channels, device=kind).bfloat16().requires_grad_()
        run = partial(convolution, x, weight, bias, dy.detach())
        yield Work(
            "5 causal conv", f"B {batch} L {length} D {channels} W 4, forward and backward",
            partial(run, True), {"F.conv1d": partial(run, False)}, ("F.conv1d",), 3e-2,
            bytes_moved=10 * x.numel(), exponentials=2 * x.numel(), goal="≥ 85 % of copy",
        )  # fmt: skip


class HeadAndLoss:
    """Hidden states of text and image tokens in turn, and labels."""

    def __init__(self, tokens: int, dim: int, vocabulary: int, kind: str) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(tokens, dim, device=kind).bfloat16().requires_grad_()
        weight = torch.randn(vocabulary, dim, device=kind) * dim**-0.5
        self.w = weight.bfloat16().requires_grad_()
        self.labels = torch.randint(vocabulary, (tokens,), device=kind)
        self.modality = torch.arange(tokens, device=kind) % 2

    def _through(self, total: torch.Tensor, nll_2: torch.Tensor) -> list[torch.Tensor]:
        return [nll_2.detach(), *torch.autograd.grad(total, [self.x, self.w])]

    def ours(self) -> list[torch.Tensor]:
        """Sums by modality and gradients, logits a chunk at a time."""
        sums = linear_cross_entropy(self.x, self.w, self.labels, self.modality, modalities=2)
        return self._through(sums.total, sums.nll_M)

    def whole_logits(self) -> list[torch.Tensor]:
        """All logits in fp32, as it is usually written."""
        logits_TV = F.linear(self.x, self.w).float()
        nll_T = F.cross_entropy(logits_TV, self.labels, reduction="none")
        nll_2 = torch.zeros(2, device=nll_T.device).index_add(0, self.modality, nll_T)
        return self._through(nll_2.sum(), nll_2)


def heads(kind: str, tiny: bool) -> Iterator[Work]:
    """Row 6: head and loss, forward and backward."""
    sizes = (32, 16, 64) if tiny else (16384, 2048, 65536)
    problem = HeadAndLoss(*sizes, kind)
    tokens, dim, vocabulary = sizes
    yield Work(
        "6 linear cross-entropy", f"T {tokens} d {dim} V {vocabulary}, forward and backward",
        problem.ours, {"F.linear + cross_entropy": problem.whole_logits},
        ("F.linear + cross_entropy",), 3e-2, flops=6 * tokens * dim * vocabulary,
        bytes_moved=4 * dim * (tokens + vocabulary), exponentials=tokens * vocabulary,
        goal="≤ 22 ms",
    )  # fmt: skip


ROWS = (moma_layers, grouped_products, dispatch, scans, convolutions, heads)
