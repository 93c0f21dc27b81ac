"""Checks and times one line of ``gpu.py``'s table, and probes the ceilings of the device."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from harness import median_and_spread, ratio, rms_error

Run = Callable[[], Sequence[torch.Tensor]]
Line = dict[str, Any]

OURS = "ours"
LINE_SECONDS, ROUNDS, FEWEST_ROUNDS = 12.0, 15, 5
MEMORY = "peak / (inputs, results, chunk states)"
# per processor and clock, sm_80 to sm_100
EXPONENTIALS_PER_CLOCK, FP32_PER_CLOCK = 16, 256


class Goal(NamedTuple):
    """A bound on one of the figures that ``measure`` finds."""

    figure: str
    bound: float
    at_most: bool = True

    def verdict(self, figures: dict[str, float | None]) -> str:
        """The goal, and whether it was met."""
        goal = f"{self.figure} {'≤' if self.at_most else '≥'} {self.bound:.3g}"
        if self.figure not in figures:
            return f"{goal}: not measured"
        value = figures[self.figure]
        if value is None:
            return f"{goal}: too noisy"
        met = value <= self.bound if self.at_most else value >= self.bound
        return f"{goal}: {'met' if met else 'missed'} ({value:.3g})"


@dataclass
class Work:
    """One line of the table.

    ``expected`` is the definition in fp32, which ``ours`` and the rivals named in ``same`` must
    reproduce (a rival may omit the last results). ``flops`` run on tensor cores, ``fp32_flops`` do
    not. ``held``, where memory has a goal: bytes of the inputs, and bytes of everything that must
    exist at once.
    """

    row: str
    setting: str
    ours: Run
    expected: Run
    tolerance: float
    rivals: dict[str, Run] = field(default_factory=dict)
    same: Sequence[str] = ()
    flops: float = 0.0
    bytes_moved: float = 0.0
    exponentials: float = 0.0
    fp32_flops: float = 0.0
    held: tuple[float, float] | None = None
    goals: Sequence[Goal] = ()


class Device:
    """A CUDA device: its ceilings, probed when this is made, and figures of a run on it."""

    def __init__(self) -> None:
        import triton

        cycles = 20_000_000
        # measured: torch built for CUDA 13 need not know the clock
        self.clock = cycles / self.seconds(lambda: torch.cuda._sleep(cycles))
        self.processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.matmul = 2 * 8192**3 / self.seconds(lambda: a @ b)
        source = torch.ones(1 << 28, device="cuda")
        target = torch.empty_like(source)
        self.copy = 2 * source.nbytes / self.seconds(lambda: target.copy_(source))
        name = torch.cuda.get_device_name()
        setting = (
            f"{name}, torch {torch.__version__}, triton {triton.__version__}, python "
            f"{platform.python_version()}, bf16; matmul {self.matmul / 1e12:.0f} TFLOP/s, copy "
            f"{self.copy / 1e12:.2f} TB/s, {self.processors} processors at {self.clock / 1e9:.2f} "
            f"GHz, load {os.getloadavg()[0]:.1f}"
        )
        self.environment = {"device": name, "setting of the run": setting}

    def seconds(self, run: Callable[[], object]) -> float:
        """Median of some runs, each with a cold L2 cache."""
        from triton.testing import do_bench

        return do_bench(run, warmup=5, rep=25, return_mode="median") / 1e3

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Time of the host to launch a run on an idle device."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a run allocates at its peak, results included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    def host_sync(self, run: Callable[[], object]) -> str | None:
        """torch's error where a run makes the host wait for the device."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            return one_line(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None

    def floor(self, work: Work) -> float:
        """Least seconds that ``work`` can take here."""
        clocks = self.processors * self.clock
        return max(
            work.flops / self.matmul,
            work.bytes_moved / self.copy,
            work.exponentials / (EXPONENTIALS_PER_CLOCK * clocks),
            work.fp32_flops / (FP32_PER_CLOCK * clocks),
        )


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"


def still_works() -> None:
    """Raises if an earlier error has left the device unusable to this process."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def check(work: Work) -> dict[str, str]:
    """Raises ``ValueError`` where ours differ from the expected results.

    Returns the error of each rival named in ``same`` that fails or has other results.
    """
    expected = work.expected()
    _compare(OURS, work.ours(), expected, work.tolerance)
    wrong = {}
    for name in work.same:
        try:
            found = work.rivals[name]()
            _compare(name, found, expected[: len(found)], work.tolerance)
        except Exception as error:  # whatever a rival raises, the others go on
            wrong[name] = one_line(error)
        still_works()
    return wrong


def _compare(
    name: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> None:
    for number, (have, want) in enumerate(zip(found, expected, strict=True)):
        error = rms_error(have, want)
        if not error <= tolerance:
            raise ValueError(
                f"result {number} of {name} differs from the definition by {error:.1e}, more than "
                f"the tolerance ({tolerance:.0e})"
            )


def measure(device: Device, work: Work, wrong: dict[str, str]) -> Line:
    """A line's figures. Rivals in ``wrong`` are left out, and so is any that fails now."""
    left_out, runs = dict(wrong), {OURS: work.ours, **work.rivals}
    hosts: dict[str, float] = {}
    peaks: dict[str, int] = {}
    times: dict[str, list[float]] = {}

    def attempt(name: str, figures: Callable[[str], None]) -> None:
        if name in left_out:
            return
        try:
            figures(name)
        except Exception as error:
            if name == OURS:
                raise
            left_out[name] = one_line(error)
            still_works()

    def first(name: str) -> None:
        hosts[name] = statistics.median([device.host_seconds(runs[name]) for _ in range(5)][-3:])
        peaks[name] = device.peak(runs[name])
        times[name] = []

    def again(name: str) -> None:
        times[name].append(device.seconds(runs[name]))

    start = time.perf_counter()
    for name in runs:
        attempt(name, first)
    host_sync = device.host_sync(work.ours)
    rounds, names = ROUNDS, list(times)
    for turn in range(ROUNDS):
        if turn >= FEWEST_ROUNDS and time.perf_counter() - start > LINE_SECONDS:
            rounds = turn
            break
        at = turn % len(names)
        for name in (*names[at:], *names[:at]):
            attempt(name, again)
    timed = {name: of_run for name, of_run in times.items() if name not in left_out}
    return {
        **_figures(device, work, timed, hosts, peaks),
        "left out": left_out,
        "rounds": rounds,
        "host sync": host_sync,
    }


def _figures(
    device: Device,
    work: Work,
    times: dict[str, list[float]],
    hosts: dict[str, float],
    peaks: dict[str, int],
) -> Line:
    seconds, spread = median_and_spread(times[OURS])
    floor = device.floor(work)
    rivals = {
        name: {
            "ms": median_and_spread(of_rival)[0] * 1e3,
            "ours / rival": ratio(times[OURS], of_rival),
            "host ms": hosts[name] * 1e3,
            "peak MB": peaks[name] / 1e6,
        }
        for name, of_rival in times.items()
        if name != OURS
    }
    line = {
        "ms": seconds * 1e3,
        "spread": spread,
        "host ms": hosts[OURS] * 1e3,
        "floor ms": floor * 1e3,
        "% of floor": 100 * floor / seconds,
        "TFLOP/s": (work.flops + work.fp32_flops) / seconds / 1e12,
        "GB/s": work.bytes_moved / seconds / 1e9,
        "peak MB": peaks[OURS] / 1e6,
    }
    figures: dict[str, float | None] = dict(line)
    figures |= {f"ours / {name}": rival["ours / rival"] for name, rival in rivals.items()}
    if work.held is not None:
        inputs, held = work.held
        figures[MEMORY] = (inputs + peaks[OURS]) / held
    return line | {
        "rivals": rivals,
        "goals": [goal.verdict(figures) for goal in work.goals],
        "FLOPs": work.flops + work.fp32_flops,
        "bytes": work.bytes_moved,
    }
