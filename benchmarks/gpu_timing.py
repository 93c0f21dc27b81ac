"""How ``gpu.py`` checks and times one line of its table, and what the device can do at most.

A time is the device's own: two events around a run, after 256 MB of other data have been read so
that nothing is in the L2 cache. Before the first event the device is kept busy for longer than the
host needs to launch the run, so that launching is not measured as computing, unless the run itself
waits for the device. What the host needs stands in a column of its own: where that is more than the
device's time, the host sets the pace as soon as nothing runs ahead of it.

Rivals take turns, a different one first in each round; ratios are of times in the same round, and
withheld where their quartiles lie too far apart (``harness.py``).
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from harness import median_and_spread, ratio, rms_error

Run = Callable[[], Sequence[torch.Tensor]]

OURS = "ours"
HELD = "peak / (inputs, results, chunk states)"
WARMUPS, ROUNDS, FEWEST_ROUNDS = 5, 50, 15
LINE_SECONDS = 12.0  # slow rivals get fewer rounds than ROUNDS
LONGEST_COVER = 0.2  # seconds
OTHER_BYTES = 256 << 20  # more than any L2
# of a processor, in a clock: sm_80 to sm_100
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
    reproduce (a rival may leave out the last results). ``flops`` are of products on tensor cores,
    ``fp32_flops`` of all else. ``held`` is (bytes of the inputs, bytes of all that must be there at
    once) where memory has a goal.
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
    """A CUDA device: its ceilings, probed when this is made, and how to time a run on it."""

    def __init__(self) -> None:
        import triton

        self.other = torch.ones(OTHER_BYTES // 4, device="cuda")
        self.clock = 0.0
        cycles = 20_000_000
        # measured, because torch built for CUDA 13 need not know it; the first runs wake the device
        self.clock = cycles / min(
            self.seconds(lambda: torch.cuda._sleep(cycles), 0.0) for _ in range(8)
        )
        self.processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.matmul = 2 * 8192**3 / self._median(lambda: a @ b)
        source = torch.ones(1 << 28, device="cuda")
        target = torch.empty_like(source)
        self.copy = 2 * source.nbytes / self._median(lambda: target.copy_(source))
        name = torch.cuda.get_device_name()
        setting = (
            f"{name}, torch {torch.__version__}, triton {triton.__version__}, python "
            f"{platform.python_version()}, bf16; matmul {self.matmul / 1e12:.0f} TFLOP/s, copy "
            f"{self.copy / 1e12:.2f} TB/s, {self.processors} processors at {self.clock / 1e9:.2f} "
            f"GHz, load {os.getloadavg()[0]:.1f}"
        )
        self.environment = {"device": name, "setting of the run": setting}

    def _median(self, run: Callable[[], object]) -> float:
        return statistics.median([self.seconds(run, 1e-4) for _ in range(30)][5:])

    def seconds(self, run: Callable[[], object], cover: float) -> float:
        """Of one run on the device; the host is ahead of it by ``cover`` seconds."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.sum()
        torch.cuda._sleep(int(cover * self.clock))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, run: Callable[[], object]) -> float:
        """What the host takes to launch a run on an idle device."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a run needs at once, results included, beside those there before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    def host_sync(self, run: Callable[[], object]) -> str | None:
        """torch's word for it where a run makes the host wait for the device."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            return told(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None

    def floor(self, work: Work) -> float:
        """Seconds below which ``work`` cannot be done here."""
        clocks = self.processors * self.clock
        return max(
            work.flops / self.matmul,
            work.bytes_moved / self.copy,
            work.exponentials / (EXPONENTIALS_PER_CLOCK * clocks),
            work.fp32_flops / (FP32_PER_CLOCK * clocks),
        )


def told(error: BaseException) -> str:
    """An error in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"


def still_works() -> None:
    """Raise if an error before has left the device unusable to this process."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def check(work: Work) -> dict[str, str]:
    """Raise ``ValueError`` where ours are not the expected results.

    Returns the rivals named in ``same`` that fail or have other results, with what was wrong.
    """
    expected = work.expected()
    _compare("ours", work.ours(), expected, work.tolerance)
    wrong = {}
    for name in work.same:
        try:
            found = work.rivals[name]()
            _compare(name, found, expected[: len(found)], work.tolerance)
        except Exception as error:  # whatever a rival raises, the others go on
            wrong[name] = told(error)
        still_works()
    return wrong


def _compare(
    name: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> None:
    for number, (have, want) in enumerate(zip(found, expected, strict=True)):
        error = rms_error(have, want)
        if not error <= tolerance:
            raise ValueError(
                f"result {number} of {name} is off from the definition by {error:.1e}, more than "
                f"the tolerance ({tolerance:.0e})"
            )


def measure(device: Device, work: Work, wrong: dict[str, str]) -> dict[str, Any]:
    """A line's figures. Rivals in ``wrong`` are left out, and so is any that fails now."""
    left_out = dict(wrong)
    hosts, peaks, wall = {}, {}, 0.0
    for name, run in {OURS: work.ours, **work.rivals}.items():
        if name in left_out:
            continue
        try:
            hosts[name] = statistics.median([device.host_seconds(run) for _ in range(WARMUPS)][-3:])
            peaks[name] = device.peak(run)
            start = time.perf_counter()
            device.seconds(run, _cover(hosts[name]))
            wall += time.perf_counter() - start
        except Exception as error:
            if name == OURS:
                raise
            left_out[name] = told(error)
            still_works()
    host_sync = device.host_sync(work.ours)
    rounds = max(FEWEST_ROUNDS, min(ROUNDS, int(LINE_SECONDS / max(wall, 1e-9))))
    runs = {name: run for name, run in {OURS: work.ours, **work.rivals}.items() if name in peaks}
    times = _race(device, runs, hosts, rounds, left_out)
    return _line(device, work, times, hosts, peaks, left_out) | {
        "rounds": rounds,
        "host sync": host_sync,
    }


def _cover(host_seconds: float) -> float:
    return min(1.5 * host_seconds + 1e-4, LONGEST_COVER)


def _race(
    device: Device,
    runs: dict[str, Run],
    hosts: dict[str, float],
    rounds: int,
    left_out: dict[str, str],
) -> dict[str, list[float]]:
    """Seconds of each run in each round; a rival that fails is moved to ``left_out``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(times)
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            try:
                times[name].append(device.seconds(runs[name], _cover(hosts[name])))
            except Exception as error:
                if name == OURS:
                    raise
                left_out[name] = told(error)
                del times[name]
                still_works()
    return times


def _line(
    device: Device,
    work: Work,
    times: dict[str, list[float]],
    hosts: dict[str, float],
    peaks: dict[str, int],
    left_out: dict[str, str],
) -> dict[str, Any]:
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
        figures[HELD] = (inputs + peaks[OURS]) / held
    return line | {
        "rivals": rivals,
        "left out": left_out,
        "goals": [goal.verdict(figures) for goal in work.goals],
        "FLOPs": work.flops + work.fp32_flops,
        "bytes": work.bytes_moved,
    }


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.nbytes for tensor in tensors)
