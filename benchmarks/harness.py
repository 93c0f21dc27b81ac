"""Times rivals fairly on a machine that other work may share.

All rivals run in one process, round-robin, and each round starts with another one, so that a slow
minute falls on all of them. A ratio is the median over rounds of (rival's time / first rival's time
in the same round); it is withheld when the quartiles of those per-round ratios lie more than 15 %
of it apart. CPU time stands beside wall time: it is the one to read where cores are shared. Nothing
is timed before its results were found equal to those of the rival it claims to reproduce.
"""

import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MAX_SPREAD = 0.15


@dataclass(frozen=True)
class Rival:
    """One way to do the work: ``run`` does it once and returns its results (outputs, gradients).

    ``same_as`` names the rival whose results it must reproduce; none where it computes another
    function of the same cost, such as the dense layer beside an expert layer.
    """

    name: str
    run: Callable[[], Sequence[torch.Tensor]]
    same_as: str | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival: medians, quartile distance over median, and ratios to the first rival.

    A ratio is none where its own quartiles lie further than ``MAX_SPREAD`` apart.
    """

    name: str
    cpu: float
    cpu_spread: float
    wall: float
    wall_spread: float
    cpu_ratio: float | None
    wall_ratio: float | None


def compare(
    rivals: Sequence[Rival],
    *,
    rounds: int = 15,
    warmups: int = 3,
    tolerance: float = 1e-4,
    keep_freed: bool = False,
) -> list[Timing]:
    """Verify the rivals, warm each up, then time ``rounds`` interleaved rounds.

    ``keep_freed``: the process keeps the memory that rivals free. Otherwise the kernel takes large
    blocks back and each run has its pages fetched and zeroed again, as in any program on a CPU:
    a cost of the rival that takes more memory, but one that varies, and hides small differences.

    Raises ``ValueError`` when a rival's result differs from the one it must reproduce by more than
    ``tolerance`` (root mean square of the difference over that of the result), or its name is
    unknown.
    """
    verify(rivals, tolerance)
    with _freed_memory_kept() if keep_freed else nullcontext():
        cpu, wall = _rounds(rivals, rounds, warmups)
    base = rivals[0].name
    return [
        Timing(
            rival.name,
            *median_and_spread(cpu[rival.name]),
            *median_and_spread(wall[rival.name]),
            ratio(cpu[rival.name], cpu[base]),
            ratio(wall[rival.name], wall[base]),
        )
        for rival in rivals
    ]


def _rounds(
    rivals: Sequence[Rival], rounds: int, warmups: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU and wall seconds of each rival, by round."""
    for rival in rivals:
        for _ in range(warmups):
            rival.run()
    cpu: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    wall: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for turn in range(rounds):
        first = turn % len(rivals)
        for rival in (*rivals[first:], *rivals[:first]):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            rival.run()
            cpu[rival.name].append(time.process_time() - cpu_start)
            wall[rival.name].append(time.perf_counter() - wall_start)
    return cpu, wall


@contextmanager
def _freed_memory_kept() -> Iterator[None]:
    """glibc gives no memory back to the kernel inside, and all that it can at the end."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # another C library
        yield
        return
    trim, mmap, default = -1, -3, 128 << 10  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    for threshold in (trim, mmap):
        library.mallopt(threshold, (1 << 31) - 1)
    try:
        yield
    finally:
        for threshold in (trim, mmap):
            library.mallopt(threshold, default)
        library.malloc_trim(0)


def verify(rivals: Sequence[Rival], tolerance: float) -> None:
    """Raise ``ValueError`` where a rival does not reproduce the results it claims to."""
    by_name = {rival.name: rival for rival in rivals}
    for rival in rivals:
        if rival.same_as is None:
            continue
        if rival.same_as not in by_name:
            raise ValueError(
                f"same_as ({rival.same_as!r}) of rival {rival.name!r} must be one of "
                f"{', '.join(by_name)}"
            )
        expected, actual = by_name[rival.same_as].run(), rival.run()
        for number, (want, have) in enumerate(zip(expected, actual, strict=True)):
            error = rms_error(have, want)
            if not error <= tolerance:
                raise ValueError(
                    f"result {number} of {rival.name!r} is off from {rival.same_as!r} by "
                    f"{error:.1e}, more than the tolerance ({tolerance:.1e}); fix it before timing"
                )


def updating(model: torch.nn.Module) -> Callable[[], list[torch.Tensor]]:
    """One AdamW step on the present gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run() -> list[torch.Tensor]:
        optimizer.step()
        return []

    return run


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of ``expected``."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return (difference / expected.detach().double().norm().clamp_min(1e-30)).item()


def environment() -> dict[str, Any]:
    """The setting of the numbers: versions, processor, load, and two ceilings measured now."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "load": round(os.getloadavg()[0], 2),
        "matmul GFLOP/s": round(_matmul_gflops(), 1),
        "copy GB/s": round(_copy_gbytes(), 1),
    }


class Report:
    """Timings of one benchmark over its settings, written as JSON lines and as a Markdown table."""

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title
        self.environment = environment()
        self.entries: list[tuple[dict[str, Any], list[Timing]]] = []

    def add(self, setting: dict[str, Any], timings: list[Timing]) -> None:
        """Keep the timings of one setting (shapes, dtype, FLOPs …) and print them."""
        self.entries.append((setting, timings))
        print(_table(setting, timings), flush=True)

    def write(self, conclusion: str = "") -> Path:
        """Write ``results/<name>.jsonl`` and ``.md``, which ends with ``conclusion``; returns the
        latter.
        """
        RESULTS.mkdir(exist_ok=True)
        lines = [
            json.dumps({"setting": setting, **vars(timing), "environment": self.environment})
            for setting, timings in self.entries
            for timing in timings
        ]
        (RESULTS / f"{self.name}.jsonl").write_text("\n".join(lines) + "\n")
        header = ", ".join(f"{key}: {value}" for key, value in self.environment.items())
        tables = "\n".join(_table(setting, timings) for setting, timings in self.entries)
        page = RESULTS / f"{self.name}.md"
        page.write_text(
            f"# {self.title}\n\n{header}\n\n{tables}{conclusion and chr(10)}{conclusion}"
        )
        return page


def _table(setting: dict[str, Any], timings: Sequence[Timing]) -> str:
    lines = [
        ", ".join(f"{key} {value}" for key, value in setting.items()),
        "",
        "| rival | CPU ms | spread | CPU ratio | wall ms | spread | wall ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for t in timings:
        lines.append(
            f"| {t.name} | {t.cpu * 1e3:.2f} | {t.cpu_spread:.0%} | {_shown(t.cpu_ratio)} "
            f"| {t.wall * 1e3:.2f} | {t.wall_spread:.0%} | {_shown(t.wall_ratio)} |"
        )
    return "\n".join(lines) + "\n"


def _shown(ratio: float | None) -> str:
    return "too noisy" if ratio is None else f"{ratio:.3f}"


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the quartiles' distance over it."""
    if len(values) < 2:
        return values[0], 0.0
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, (upper - lower) / median


def ratio(values: Sequence[float], base: Sequence[float]) -> float | None:
    """Median over rounds of the ratio of two runs' times; none where the rounds do not agree."""
    median, spread = median_and_spread([a / b for a, b in zip(values, base, strict=True)])
    return median if spread <= MAX_SPREAD else None


def at_most(what: str, ratio: float | None, goal: float) -> str:
    """Markdown: whether a ratio meets its goal."""
    return _goal(f"{what} ≤ {goal:.2f}", ratio, ratio is not None and ratio <= goal)


def at_least(what: str, ratio: float | None, goal: float) -> str:
    """Markdown: whether a ratio meets its goal."""
    return _goal(f"{what} ≥ {goal:.2f}", ratio, ratio is not None and ratio >= goal)


def _goal(goal: str, ratio: float | None, met: bool) -> str:
    if ratio is None:
        return f"- {goal}: too noisy"
    return f"- {goal}: {'met' if met else 'missed'} ({ratio:.3f})"


def speed(numerator: Timing, denominator: Timing) -> float | None:
    """How many times as fast ``numerator`` is as ``denominator``, in CPU time."""
    if numerator.cpu_ratio is None or denominator.cpu_ratio is None:
        return None
    return denominator.cpu_ratio / numerator.cpu_ratio


def compare_models(
    report: "Report",
    setting: dict[str, Any],
    tokens: int,
    models: dict[str, torch.nn.Module],
    training: Callable[[torch.nn.Module], Callable[[], Sequence[torch.Tensor]]],
    *,
    rounds: int,
    same: bool = False,
) -> tuple[str, dict[str, Timing]]:
    """Whole models: ``training(model)`` is one batch of ``tokens``, forward and backward.

    AdamW is timed by itself. ``same``: all reproduce the first. Returns a Markdown table (speed
    with and without the optimizer) and the timings of forward and backward by name.
    """
    first = next(iter(models))
    rivals = [
        Rival(name, training(model), first if same and name != first else None)
        for name, model in models.items()
    ]
    passes = compare(rivals, rounds=rounds)
    report.add(setting | {"work": "forward and backward"}, passes)
    updates = compare([Rival(name, updating(m)) for name, m in models.items()], rounds=rounds)
    report.add(setting | {"work": "AdamW, fused"}, updates)
    lines = [
        ", ".join(f"{key} {value}" for key, value in setting.items()),
        "",
        "| model | parameters | tokens per CPU-s | relative to the first | with AdamW each batch |",
        "|---|---:|---:|---:|---:|",
    ]
    step = passes[0].cpu + updates[0].cpu
    for passing, update in zip(passes, updates, strict=True):
        count = sum(parameter.numel() for parameter in models[passing.name].parameters())
        lines.append(
            f"| {passing.name} | {count:,} | {tokens / passing.cpu:,.0f} "
            f"| {_shown(speed(passing, passes[0]))} | {step / (passing.cpu + update.cpu):.3f} |"
        )
    return "\n".join(lines) + "\n", {timing.name: timing for timing in passes}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _matmul_gflops(size: int = 1024, repeats: int = 5) -> float:
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)
    return 2e-9 * size**3 / _best(lambda: torch.mm(a, b, out=out), repeats)


def _copy_gbytes(count: int = 1 << 24, repeats: int = 5) -> float:
    """Bytes read and written per second by a copy larger than the caches."""
    source, target = torch.ones(2, count)
    return 2e-9 * source.nbytes / _best(lambda: target.copy_(source), repeats)


def _best(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
