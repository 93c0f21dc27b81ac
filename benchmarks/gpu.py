"""All kernels on one GPU: correct first, then timed beside their rivals and their floors.

    python benchmarks/gpu.py              about 8 minutes; writes results/gpu_<device>.{md,jsonl}
    python benchmarks/gpu.py --tiny       checks the rows themselves, on any device, untimed

Needs torch 2.11, Triton 3.6 and this tree; neither torchtitan nor an installation. The rows are in
``gpu_rows.py``; each has a floor from its FLOPs, bytes and exponentials and from ceilings probed in
the same run (matmul and copy), so that 100 % is what this very device can do.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_rows import ROOT, ROWS, Run, Work

SECONDS = 480
REPEATS, WARMUPS = 50, 5
FLUSH_BYTES = 256 << 20  # more than any L2
EXPONENTIALS_PER_CLOCK = 16  # of an SM


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
