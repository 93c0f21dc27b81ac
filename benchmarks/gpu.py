"""All kernels on one GPU: correct first, then timed beside their rivals and their floors.

    python benchmarks/gpu.py              about 8 minutes; writes results/gpu_<device>.{md,jsonl}
    python benchmarks/gpu.py --tiny       checks the rows themselves, on any device, untimed

Needs torch 2.11, Triton 3.6 and this tree; neither torchtitan nor an installation. Each row is a
``Work``: what is run, what it must equal, the rivals, and the FLOPs, bytes and exponentials from
which its floor follows. The floor uses ceilings probed in the same run (matmul and copy), so that
100 % is what this very device can do.
"""

import argparse
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
if "earlyfuse" not in sys.modules:  # the tree itself, installed or not
    package = types.ModuleType("earlyfuse")
    package.__path__ = [str(ROOT)]
    sys.modules["earlyfuse"] = package

from earlyfuse.kernels.grouped_gemm import grouped_swiglu, op  # noqa: E402
from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k  # noqa: E402

SECONDS = 480
REPEATS, WARMUPS = 50, 5
FLUSH_BYTES = 256 << 20  # more than any L2
EXPONENTIALS_PER_CLOCK = 16  # of an SM

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


@dataclass
class Device:
    """Ceilings of the device at hand."""

    kind: str
    matmul: float = 0.0  # FLOP/s
    copy: float = 0.0  # bytes/s, read and written
    exponential: float = 0.0  # 1/s
    flush: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def probe(cls, kind: str) -> "Device":
        """Measure them; on a CPU, nothing."""
        device = cls(kind)
        if kind != "cuda":
            return device
        device.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=kind)
        a, b = torch.randn(2, 8192, 8192, device=kind, dtype=torch.bfloat16)
        device.matmul = 2 * 8192**3 / device.seconds(lambda: [a @ b])[0]
        source = torch.empty(1 << 30, dtype=torch.int8, device=kind)
        target = torch.empty_like(source)
        device.copy = 2 * (1 << 30) / device.seconds(lambda: [target.copy_(source)])[0]
        properties = torch.cuda.get_device_properties(kind)
        clock = getattr(properties, "clock_rate", 1_830_000) * 1e3
        device.exponential = EXPONENTIALS_PER_CLOCK * properties.multi_processor_count * clock
        return device

    def seconds(self, run: Run, repeats: int = REPEATS) -> tuple[float, float]:
        """Median of ``repeats`` runs with a cold L2, and quartile distance over median."""
        for _ in range(WARMUPS):
            run()
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        lower, median, upper = statistics.quantiles(times, n=4)
        return median, (upper - lower) / median

    def floor(self, work: Work) -> float:
        """Seconds below which ``work`` cannot be done here."""
        return max(
            work.flops / self.matmul,
            work.bytes_moved / self.copy,
            work.exponentials / self.exponential,
        )


def check(work: Work) -> None:
    """Raise ``ValueError`` where a rival that must reproduce our results does not."""
    found = work.ours()
    for name in work.same:
        for number, (have, want) in enumerate(zip(found, work.rivals[name](), strict=True)):
            error = (have.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
            if not error <= work.tolerance:
                raise ValueError(
                    f"{work.row} ({work.setting}): result {number} differs from {name} by "
                    f"{error:.1e}, more than {work.tolerance:.0e}; mend it before timing"
                )


# ---------------------------------------------------------------- rows 1 to 3


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
        yield Work(
            "1 MoMa layer",
            f"T {tokens} d {layer.dim} f {layer.hidden} 4t4i",
            layer.ours,
            {"dense": layer.dense, "F.grouped_mm": layer.torch_grouped},
            ("F.grouped_mm",),
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
            yield Work(
                "2 grouped GEMM",
                f"{part}, {name}, T {tokens} d {dim} f {hidden}",
                partial(products.ours, part),
                {
                    "dense": partial(products.dense, part),
                    "F.grouped_mm": partial(products.grouped, part),
                },
                ("F.grouped_mm",),
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


ROWS = (moma_layers, grouped_products, dispatch)


# ---------------------------------------------------------------- the table


def measure(device: Device, work: Work) -> dict[str, Any]:
    """One line: milliseconds, share of the floor, and ratios to the rivals."""
    seconds, spread = device.seconds(work.ours)
    floor = device.floor(work)
    line = {
        "row": work.row, "setting": work.setting, "ms": seconds * 1e3, "spread": spread,
        "floor ms": floor * 1e3, "% of floor": 100 * floor / seconds,
        "TFLOP/s": work.flops / seconds / 1e12, "GB/s": work.bytes_moved / seconds / 1e9,
        "ours / rival": {
            name: seconds / device.seconds(run)[0] for name, run in work.rivals.items()
        },
        "goal": work.goal,
    }  # fmt: skip
    torch.cuda.synchronize()
    return line


def shown(line: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    rivals = ", ".join(f"{name} {ratio:.2f}" for name, ratio in line["ours / rival"].items())
    return (
        f"| {line['row']} | {line['setting']} | {line['ms']:.3f} ({line['spread']:.0%}) "
        f"| {line['floor ms']:.3f} | {line['% of floor']:.0f} | {line['TFLOP/s']:.0f} "
        f"| {line['GB/s']:.0f} | {rivals} | {line['goal']} |"
    )


HEADER = (
    "| row | setting | ms (spread) | floor ms | % of floor | TFLOP/s | GB/s "
    "| ours / rival | goal |\n|---|---|---:|---:|---:|---:|---:|---|---|"
)


def main() -> None:
    """Check every row; on a GPU, time it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="check the rows only, on any device")
    parser.add_argument("--rows", default="", help="only rows whose name begins so: --rows 2")
    tiny, wanted = (arguments := parser.parse_args()).tiny, arguments.rows
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and not tiny:
        sys.exit("no GPU here: nothing is timed; --tiny checks the rows on this device")
    device, started = Device.probe("cpu" if tiny else kind), time.monotonic()
    lines: list[dict[str, Any]] = []
    for work in (work for row in ROWS for work in row(kind, tiny)):
        if not work.row.startswith(wanted):
            continue
        check(work)
        if tiny:
            print(f"{work.row}, {work.setting}: correct")
        elif time.monotonic() - started > SECONDS:
            print(f"| {work.row} | {work.setting} | not measured: out of time |")
        else:
            lines.append(measure(device, work))
            print(*([HEADER] if len(lines) == 1 else []), shown(lines[-1]), sep="\n", flush=True)
    if lines:
        _write(device, lines)


def _write(device: Device, lines: list[dict[str, Any]]) -> None:
    import triton

    name = torch.cuda.get_device_name()
    setting = (
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, bf16, matmul "
        f"{device.matmul / 1e12:.0f} TFLOP/s, copy {device.copy / 1e12:.2f} TB/s, "
        f"{REPEATS} runs with a cold L2: python {' '.join(sys.argv)}"
    )
    stem = "gpu_" + "".join(c if c.isalnum() else "_" for c in name.lower())
    results = ROOT / "benchmarks" / "results"
    page = "\n".join([f"# All kernels on one GPU\n\n{setting}\n", HEADER, *map(shown, lines)])
    (results / f"{stem}.md").write_text(page + "\n")
    rows = [json.dumps({**line, "setting of the run": setting}) for line in lines]
    (results / f"{stem}.jsonl").write_text("\n".join(rows) + "\n")
    print(f"\n{setting}")


if __name__ == "__main__":
    main()
