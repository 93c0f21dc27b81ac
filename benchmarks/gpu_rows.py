"""Rows of ``gpu.py``: what each line computes, its sizes, rivals and goals.

Problems are those of the CPU scripts, in bf16. Rivals of other packages are imported when they
first run: one that is missing is left out of its line, which names it.
"""

import sys
import types
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

if "earlyfuse" not in sys.modules:  # the tree itself, installed or not
    package = types.ModuleType("earlyfuse")
    package.__path__ = [str(Path(__file__).parent.parent)]
    sys.modules["earlyfuse"] = package

import causal_conv1d
import grouped_gemm
import linear_cross_entropy
from experts import ExpertProblem, torch_top_k

import selective_scan
from earlyfuse.kernels.grouped_gemm import grouped_linear, grouped_swiglu
from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k
from earlyfuse.kernels.selective_scan.chunks import count_chunks
from gpu_timing import MEMORY, Goal, Run, Work
from harness import differentiated

ORDER = ("1", "4", "2", "6", "3", "5")  # by value
HALF = torch.bfloat16
GROUPS = 8
DOCUMENT = 1000  # tokens

Case = tuple[str, Callable[[], Iterator[Work]]]


def cases(row: str, kind: str, tiny: bool) -> list[Case]:
    """Name of each set of inputs of a row and what makes its lines, the most telling first."""
    return [
        (f"{make.__name__}{sizes}", partial(make, kind, *sizes))
        for make, sizes in _sizes(row, tiny)
    ]


def _sizes(row: str, tiny: bool) -> list[tuple[Callable[..., Iterator[Work]], tuple]]:
    if row == "1":
        if tiny:
            return [(moma_layer, (32, 16, 32))]
        return [(moma_layer, (tokens, 2048, 5632)) for tokens in (16384, 32768, 8192)]
    if row == "2":
        shape = (32, 16, 32) if tiny else (16384, 2048, 5632)
        names = ("equal", "zipf", "one empty", "one tiny")
        groups = [(name, True) for name in names] + [("equal", False), ("zipf", False)]
        return [(grouped_products, (*shape, name, order)) for name, order in groups]
    if row == "3":
        tokens, dim = ((64,), 16) if tiny else ((16384, 131072), 2048)
        choices = [(top_k, (n, experts)) for n in tokens for experts in (8, 64)]
        return [*choices, *((moving, (n, dim)) for n in tokens)]
    if row == "4":
        if tiny:
            return [(scans, (2, 24, 32, 10))]
        at, rivals = (4096, 4096, DOCUMENT), ("mambapy", "accelerated-scan")
        return [
            (scans, (4, *at)),
            (scans, (2, *at, rivals)),
            (scans, (8, *at)),
            # a loop over tokens, which knows no documents
            (scans, (2, 256, 4096, 256, (*rivals, "transformers"))),
        ]
    if row == "5":
        if tiny:
            return [(convolutions, (2, 20, 16, length)) for length in (None, 6)]
        runs = ((4, None), (4, DOCUMENT), (8, None), (2, None))
        return [(convolutions, (batch, 4096, 4096, document)) for batch, document in runs]
    return [(heads, (32, 16, 64) if tiny else (16384, 2048, 65536))]


def pointers(run: Run, kind: str) -> dict[str, Run]:
    """The rival of ``run`` whose grouped kernels do not use TMA, where the device has it."""
    if kind != "cuda" or torch.cuda.get_device_capability() < (9, 0):
        return {}
    from earlyfuse.kernels.grouped_gemm import triton_impl  # needs Triton

    return {"pointers": mock.patch.object(triton_impl, "has_tma", lambda tensor: False)(run)}


# ---------------------------------------------------------------- row 1


def moma_layer(kind: str, tokens: int, dim: int, hidden: int) -> Iterator[Work]:
    """Row 1: forward and backward of a MoMa layer on random tokens, half text, half image."""
    problem = ExpertProblem(tokens, dim, hidden, device=kind, dtype=HALF)
    w1, w3, w2 = weights = problem.parameters[1:]

    def run(layer: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        leaves = [problem.x_TD, *problem.parameters]
        return differentiated(layer(problem.x_TD), leaves, problem.dy_TD)

    def experts(x_TD: torch.Tensor, backend: str) -> torch.Tensor:
        row, offset, weight = problem.routes(x_TD, partial(select_top_k, backend=backend))
        return grouped_swiglu(x_TD, w1, w3, w2, row, offset, weight, backend=backend)

    def dense() -> list[torch.Tensor]:
        """One expert of the same FLOPs for all tokens, with its own gradients."""
        gate, up, down = one = [w[0].detach().requires_grad_() for w in weights]
        y = F.linear(F.silu(F.linear(problem.x_TD, gate)) * F.linear(problem.x_TD, up), down)
        return differentiated(y, [problem.x_TD, *one], problem.dy_TD)

    ours = partial(run, partial(experts, backend="auto"))
    same: dict[str, Run] = {
        "F.grouped_mm": partial(run, problem.grouped),
        "bmm": partial(run, problem.batched),
        "loop": partial(run, problem.loop),
        **pointers(ours, kind),
    }
    yield Work(
        "1 MoMa layer", f"T {tokens} d {dim} f {hidden} 4t4i", ours,
        partial(run, partial(experts, backend="reference")), 3e-2,
        {"dense": dense, **same}, tuple(same),
        flops=18 * tokens * dim * hidden, bytes_moved=6 * 3 * GROUPS * dim * hidden,
        goals=(Goal("ours / dense", 1.05), Goal("ours / F.grouped_mm", 0.90)),
    )  # fmt: skip


# ---------------------------------------------------------------- row 2


def group_sizes(name: str, tokens: int) -> list[int]:
    """Tokens of each group."""
    shares = {
        "equal": [1.0] * GROUPS,
        "zipf": [1 / (group + 1) for group in range(GROUPS)],
        "one empty": [0.0, *[1.0] * (GROUPS - 1)],
        "one tiny": [3 * (GROUPS - 1) / (tokens - 3), *[1.0] * (GROUPS - 1)],
    }[name]
    sizes = [round(share / sum(shares) * tokens) for share in shares]
    return [*sizes[:-1], tokens - sum(sizes[:-1])]


def grouped_products(
    kind: str, tokens: int, dim: int, hidden: int, name: str, in_order: bool
) -> Iterator[Work]:
    """Row 2: forward, dx and dw of one product over groups, each token once."""
    problem = grouped_gemm.Problem(group_sizes(name, tokens), in_order, dim, hidden, kind, HALF)

    def definition(part: str) -> list[torch.Tensor]:
        x, w = (t.detach().requires_grad_() for t in (problem.x_TD, problem.w_GFD))
        y = grouped_linear(x, w, problem.row_R, problem.offset_G1, backend="reference")
        if part == "forward":
            return [y.detach()]
        return list(torch.autograd.grad(y, x if part == "dx" else w, problem.dy_TF))

    for part in grouped_gemm.PARTS:
        run = partial(problem.ours, part)
        same: dict[str, Run] = {
            "F.grouped_mm": partial(problem.grouped_mm, part),
            "loop": partial(problem.loop, part),
            # both operands of dw are gathered: there is no other path
            **(pointers(run, kind) if part != "dw" else {}),
        }
        rivals: dict[str, Run] = {"dense": partial(problem.dense, part), **same}
        goals = [Goal("ours / dense", 1 / 0.9), Goal("ours / F.grouped_mm", 1.0)]
        if part == "forward":
            goals.append(Goal("TFLOP/s", 700, at_most=False))
        if part == "dw":
            rivals["own forward"] = partial(problem.ours, "forward")
            goals.append(Goal("ours / own forward", 1.05))
        order = "sorted" if in_order else "rows moved"
        yield Work(
            "2 grouped GEMM", f"{part}, {name}, {order}, T {tokens} d {dim} f {hidden}", run,
            partial(definition, part), 2e-2, rivals, tuple(same),
            flops=2 * tokens * dim * hidden,
            bytes_moved=2 * (tokens * (dim + hidden) + GROUPS * dim * hidden),
            goals=goals,
        )  # fmt: skip


# ---------------------------------------------------------------- row 3


def top_k(kind: str, tokens: int, experts: int) -> Iterator[Work]:
    """Row 3: the best tokens of each expert."""
    scores, k = torch.randn(experts, tokens, device=kind), tokens // experts
    yield Work(
        "3 top-k", f"T {tokens} E {experts}", lambda: [select_top_k(scores, k)],
        lambda: [select_top_k(scores, k, backend="reference")], 0.0,
        {"torch.topk": lambda: [torch_top_k(scores, k)]},
        bytes_moved=4 * experts * tokens,
        goals=(Goal("ms", 0.040),) if experts == 8 else (),
    )  # fmt: skip


def moving(kind: str, tokens: int, dim: int) -> Iterator[Work]:
    """Row 3: gather and weighted scatter of as many rows as there are tokens."""
    x = torch.randn(tokens, dim, device=kind).to(HALF)
    row = torch_top_k(torch.randn(GROUPS, tokens, device=kind), tokens // GROUPS).flatten()
    weight = torch.rand(len(row), device=kind)

    def index_add() -> list[torch.Tensor]:
        out = torch.zeros(tokens, dim, device=kind)
        return [out.index_add(0, row, x.float() * weight[:, None]).to(HALF)]

    at, moved = f"T {tokens} d {dim}", 2 * 2 * len(row) * dim
    goals = (Goal("% of floor", 85, at_most=False),)
    yield Work(
        "3 gather", at, lambda: [gather_rows(x, row)],
        lambda: [gather_rows(x, row, backend="reference")], 0.0,
        {"index_select": lambda: [x.index_select(0, row)]}, ("index_select",),
        bytes_moved=moved, goals=goals,
    )  # fmt: skip
    yield Work(
        "3 weighted scatter", at, lambda: [scatter_add_rows(x, row, tokens, weight)],
        lambda: [scatter_add_rows(x, row, tokens, weight, backend="reference")], 2e-2,
        {"index_add": index_add}, ("index_add",), bytes_moved=moved, goals=goals,
    )  # fmt: skip


# ---------------------------------------------------------------- row 4


class Scan(selective_scan.Problem):
    """Mamba-1 on packed documents."""

    def forward(self) -> list[torch.Tensor]:
        """y; what backward needs is kept until it is dropped."""
        return [self.ours(*self.inputs).detach()]

    @cached_property
    def _kept(self) -> torch.Tensor:
        return self.ours(*self.inputs)

    def backward(self) -> list[torch.Tensor]:
        """All gradients of one forward pass, which is kept."""
        return list(torch.autograd.grad(self._kept, self.inputs, self.dy_BLD, retain_graph=True))

    def both(self) -> list[torch.Tensor]:
        """y and all gradients."""
        return differentiated(self.ours(*self.inputs), self.inputs, self.dy_BLD)

    @cached_property
    def definition(self) -> list[torch.Tensor]:
        """y and all gradients by the definition, which keeps all states: a sequence at a time."""
        ys, gradients = [], [torch.zeros_like(leaf) for leaf in self.inputs]
        u, delta, A, B, C, skip, z, bias = self.inputs
        assert self.reset_BL is not None
        for row in range(len(u)):
            at = slice(row, row + 1)
            y = selective_scan.selective_scan(
                u[at], delta[at], A, B[at], C[at], skip, z[at], bias,
                reset_BL=self.reset_BL[at], backend="reference",
            )[0]  # fmt: skip
            found = differentiated(y, self.inputs, self.dy_BLD[at])
            ys.append(found[0])
            for total, part in zip(gradients, found[1:], strict=True):
                total += part
        return [torch.cat(ys), *gradients]

    def held(self, states: int) -> tuple[float, float]:
        """Bytes of the inputs; and of inputs, results and the states before each chunk."""
        assert self.reset_BL is not None
        u_BLD = self.inputs[0]
        batch, length, channels = u_BLD.shape
        leaves = sum(leaf.nbytes for leaf in self.inputs)
        inputs = leaves + self.reset_BL.nbytes + self.dy_BLD.nbytes
        kept = 4 * batch * count_chunks(length) * states * channels
        return inputs, inputs + u_BLD.nbytes + leaves + kept


def scans(
    kind: str, batch: int, length: int, channels: int, document: int, rivals: tuple[str, ...] = ()
) -> Iterator[Work]:
    """Row 4: forward, backward, and both with peak memory and the rivals named."""
    setting = selective_scan.Setting(batch, length, channels)
    scan, states = Scan(setting, document, kind, HALF), setting.states
    ways = scan.scans()
    known: dict[str, Run] = {
        "mambapy": partial(scan.run, ways[selective_scan.MAMBAPY]),
        "accelerated-scan": partial(scan.run, ways[selective_scan.ACCELERATED]),
        "transformers": partial(scan.run, ways[selective_scan.TRANSFORMERS]),
    }
    wide = batch * length * channels
    at, row = f"B {batch} L {length} D {channels} N {states}", "4 selective scan"
    # counted per state: 7 operations forward, 20 backward, and one exponential each
    yield Work(
        row, f"{at}, forward and backward", scan.both, lambda: scan.definition, 3e-2,
        {name: known[name] for name in rivals}, rivals,
        bytes_moved=22 * wide, exponentials=2 * states * wide, fp32_flops=27 * states * wide,
        held=scan.held(states),
        goals=[Goal(MEMORY, 1.1)] + [Goal("ours / mambapy", 0.05)] * ("mambapy" in rivals),
    )  # fmt: skip
    yield Work(
        row, f"{at}, forward", scan.forward, lambda: scan.definition[:1], 3e-2,
        bytes_moved=8 * wide, exponentials=states * wide, fp32_flops=7 * states * wide,
        goals=(Goal("% of floor", 65, at_most=False),),
    )  # fmt: skip
    yield Work(
        row, f"{at}, backward", scan.backward, lambda: scan.definition[1:], 3e-2,
        bytes_moved=14 * wide, exponentials=states * wide, fp32_flops=20 * states * wide,
        goals=(Goal("% of floor", 40, at_most=False),),
    )  # fmt: skip


# ---------------------------------------------------------------- row 5


def convolutions(
    kind: str, batch: int, length: int, channels: int, document: int | None
) -> Iterator[Work]:
    """Row 5: forward and backward; the rivals take one document a row."""
    setting = causal_conv1d.Setting(length, channels, document)
    problem = causal_conv1d.Problem(setting, batch, kind, HALF)

    def fla(x_BLD: torch.Tensor) -> torch.Tensor:
        """flash-linear-attention's Triton kernel."""
        from fla.modules.convolution import causal_conv1d as convolve

        return convolve(x_BLD, problem.weight_DW, problem.bias_D, activation="silu")[0]

    at, size = f"B {batch} L {length} D {channels} W 4", batch * length * channels
    goals, rivals = [Goal("% of floor", 85, at_most=False)], dict[str, Run]()
    if document is not None:
        at = f"{at}, documents of {document}"
    else:
        goals.append(Goal("ours / FLA", 1.0))
        rivals["F.conv1d"] = partial(problem.run, problem.views)
        if kind == "cuda":
            rivals["FLA"] = partial(problem.run, fla)
    yield Work(
        "5 causal conv", f"{at}, forward and backward", partial(problem.run, problem.ours),
        partial(problem.run, partial(problem.ours, backend="reference")), 3e-2, rivals,
        tuple(rivals), bytes_moved=10 * size, exponentials=2 * size, goals=goals,
    )  # fmt: skip


# ---------------------------------------------------------------- row 6


class HeadAndLoss(linear_cross_entropy.Problem):
    """Rivals whose kernels need a GPU; their sums are not by modality."""

    def liger(self) -> list[torch.Tensor]:
        """Liger Kernel's."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return self.results(loss(self.w_VD, self.x_TD, self.labels_T))

    def cut(self) -> list[torch.Tensor]:
        """cut-cross-entropy's, which leaves small gradients out."""
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

        inputs = (self.x_TD, self.w_VD, self.labels_T)
        return self.results(cut_cross_entropy(*inputs, reduction="sum", impl="cce"))

    @cached_property
    def _compiled(self) -> Callable[..., torch.Tensor]:
        return torch.compile(self.sums)

    def whole_compiled(self) -> list[torch.Tensor]:
        """All logits at once, compiled."""
        return self.from_sums(self._compiled(slice(None), self.x_TD, self.w_VD))


def heads(kind: str, tokens: int, dim: int, vocabulary: int) -> Iterator[Work]:
    """Row 6: head and loss, forward and backward."""
    problem = HeadAndLoss(linear_cross_entropy.Setting(tokens, dim, vocabulary), kind, HALF)
    rivals: dict[str, Run] = {"F.linear + cross_entropy": problem.whole}
    if kind == "cuda":
        rivals |= {
            "liger": problem.liger,
            "cut-cross-entropy": problem.cut,
            "compiled": problem.whole_compiled,
        }
    yield Work(
        "6 linear cross-entropy", f"T {tokens} d {dim} V {vocabulary}, forward and backward",
        problem.ours, partial(problem.ours, "reference"), 3e-2, rivals, tuple(rivals),
        flops=6 * tokens * dim * vocabulary, bytes_moved=4 * dim * (tokens + vocabulary),
        exponentials=tokens * vocabulary, goals=(Goal("ms", 22.0), Goal("ours / liger", 0.95)),
    )  # fmt: skip
