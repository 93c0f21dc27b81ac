"""Times rivals fairly on a shared machine, and writes the page of results.

All rivals run round-robin in one process, and each round starts with a different one, so that a
slow minute falls on all of them. A ratio is the median over rounds of (rival's time / first rival's
time in the same round); it is withheld where the quartiles of those ratios lie more than 15 % of it
apart. Read CPU time rather than wall time where cores are shared. A rival is timed only after its
results equal those of the rival it reproduces.
"""

import ctypes
import importlib.metadata
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

    ``same_as`` names the rival whose results it must reproduce; None where it computes a different
    function of the same cost, such as the dense layer beside an expert layer.
    """

    name: str
    run: Callable[[], Sequence[torch.Tensor]]
    same_as: str | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival: medians, quartile distance over median, and ratios to the first rival.

    A ratio is None where its quartiles lie more than ``MAX_SPREAD`` apart.
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
    """Verifies the rivals, warms them up, then times ``rounds`` interleaved rounds.

    ``keep_freed``: the process keeps the memory that rivals free. Otherwise large blocks return to
    the kernel and each run faults its pages in again, as in any program on a CPU: a cost of the
    rival that takes more memory, but a noisy one that hides small differences. Raises
    ``ValueError`` as ``verify`` does.
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
    """Inside, glibc returns no freed memory to the kernel."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # another C library
        yield
        return
    for threshold in _MALLOC_THRESHOLDS:
        library.mallopt(threshold, (1 << 31) - 1)
    try:
        yield
    finally:
        _return_freed_memory()


_MALLOC_THRESHOLDS = (-1, -3)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h


def _return_freed_memory() -> None:
    """Returns freed memory to the kernel, now and from now on."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for threshold in _MALLOC_THRESHOLDS:
            library.mallopt(threshold, 128 << 10)
        library.malloc_trim(0)


def peak_mb(run: Callable[[], object]) -> float:
    """Growth of the resident set over one run in MiB, from Linux's high-water mark."""
    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    before = resident_mb("VmRSS")
    run()
    return resident_mb("VmHWM") - before


def resident_mb(field: str) -> float:
    """Resident set of this process in MiB: now (``VmRSS``) or at its peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def verify(rivals: Sequence[Rival], tolerance: float) -> None:
    """Raises ``ValueError`` where a rival's results differ by more than ``tolerance`` (RMS of the
    difference over RMS of the result) from those of ``same_as``, or no rival has that name.
    """
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


def differentiated(
    y: torch.Tensor, leaves: Sequence[torch.Tensor], dy: torch.Tensor
) -> list[torch.Tensor]:
    """Results of a run: the output, and the gradient of each leaf."""
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of ``expected``."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return (difference / expected.detach().double().norm().clamp_min(1e-30)).item()


def environment(*packages: str) -> dict[str, Any]:
    """Setting of the numbers: versions, processor, load, and two ceilings measured now."""
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
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


class Report:
    """Timings of one benchmark over its settings, written as JSON lines and as a Markdown page."""

    def __init__(self, name: str, title: str, packages: Sequence[str] = ()) -> None:
        """``packages``: rivals whose versions belong to the setting."""
        torch.set_num_threads(1)
        self.name, self.title = name, title
        self.environment = environment(*packages)
        self.entries: list[tuple[dict[str, Any], list[Timing]]] = []
        self.verdicts: list[str] = []

    def add(self, setting: dict[str, Any], timings: list[Timing]) -> None:
        """Keeps the timings of one setting (shapes, dtype, FLOPs …) and prints them."""
        self.entries.append((setting, timings))
        print(_table(setting, timings), flush=True)

    def judge(self, verdict: str) -> None:
        """Keeps a goal's line of the page and prints it."""
        self.verdicts.append(verdict)
        print(verdict, flush=True)

    def write(self, text: str = "") -> None:
        """Writes ``results/<name>.jsonl`` and ``.md``: tables, goals and ``text``."""
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
        goals = "## Goals (CPU time)\n\n" + "\n".join(self.verdicts) if self.verdicts else ""
        parts = [f"# {self.title}", header, tables.strip(), goals, text.strip()]
        page.write_text("\n\n".join(filter(None, parts)) + "\n")


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
    """Median, and distance of the quartiles over it."""
    if len(values) < 2:
        return values[0], 0.0
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, (upper - lower) / median


def ratio(values: Sequence[float], base: Sequence[float]) -> float | None:
    """Median over rounds of the ratio of two runs' times; None where the rounds disagree."""
    median, spread = median_and_spread([a / b for a, b in zip(values, base, strict=True)])
    return median if spread <= MAX_SPREAD else None


def ours_over(timings: Sequence[Timing]) -> dict[str, float | None]:
    """CPU time of the first rival, ours, over that of each rival, by its name."""
    return {t.name: None if t.cpu_ratio is None else 1 / t.cpu_ratio for t in timings}


def at_most(what: str, ratio: float | None, goal: float) -> str:
    """Markdown: a goal, and whether the ratio meets it."""
    return _goal(f"{what} ≤ {goal:.2f}", ratio, ratio is not None and ratio <= goal)


def at_least(what: str, ratio: float | None, goal: float) -> str:
    """Markdown: a goal, and whether the ratio meets it."""
    return _goal(f"{what} ≥ {goal:.2f}", ratio, ratio is not None and ratio >= goal)


def _goal(goal: str, ratio: float | None, met: bool) -> str:
    if ratio is None:
        return f"- {goal}: too noisy"
    return f"- {goal}: {'met' if met else 'missed'} ({ratio:.3f})"


def speed(numerator: Timing, denominator: Timing) -> float | None:
    """Speed of ``numerator`` over that of ``denominator``, in CPU time."""
    if numerator.cpu_ratio is None or denominator.cpu_ratio is None:
        return None
    return denominator.cpu_ratio / numerator.cpu_ratio


def compare_models(
    report: Report,
    setting: dict[str, Any],
    tokens: int,
    models: dict[str, torch.nn.Module],
    training: Callable[[torch.nn.Module], Callable[[], Sequence[torch.Tensor]]],
    *,
    rounds: int,
    same: bool = False,
) -> tuple[str, dict[str, Timing]]:
    """Times whole models: ``training(model)`` is one batch of ``tokens``, forward and backward.

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
    updates = compare([Rival(name, _updating(m)) for name, m in models.items()], rounds=rounds)
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


def _updating(model: torch.nn.Module) -> Callable[[], list[torch.Tensor]]:
    """One AdamW step on the present gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run() -> list[torch.Tensor]:
        optimizer.step()
        return []

    return run


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
    """GB read and written per second by a copy larger than the caches."""
    source, target = torch.ones(2, count)
    return 2e-9 * source.nbytes / _best(lambda: target.copy_(source), repeats)


def _best(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
