"""Checks all kernels on one GPU, then times them beside their rivals and their floors.

    python benchmarks/gpu.py              all rows in about 8 minutes
    python benchmarks/gpu.py --rows 3 5   these rows, added to the results of an earlier run
    python benchmarks/gpu.py --tiny       checks the rows themselves on any device, untimed

Needs torch 2.11, Triton 3.6 and this tree; neither torchtitan nor an installation. Rivals that are
not importable are named and left out. Each row (``gpu_rows.py``) runs in a process of its own, the
most valuable first, so that a crash or a hang costs that row alone. Every line is checked against
the op's definition before it is timed (``gpu_timing.py``); a line that fails says so, the others
follow, and the exit status is 1. ``gpu_<device>.md`` and ``.jsonl`` are rewritten after every line.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gpu_rows import ORDER, cases
from gpu_timing import Device, Line, Work, check, measure, one_line, still_works
from harness import RESULTS

SECONDS, ROW_SECONDS = 480.0, 240.0  # a row that hangs leaves time for others
GRACE = 40.0  # to finish the line in progress
DIED = "the process of this row died here"

HEADER = (
    "| row | setting | ms (spread) | host ms | floor ms | % of floor | TFLOP/s | GB/s | peak MB "
    "| ours / rival (its peak MB) | goals |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|"
)
NOTES = """\
ms: median over rounds of `triton.testing.do_bench` (median run, L2 cache flushed before each), with
quartile distance over median. host ms: what the host needs to launch a run; where it exceeds ms,
the host sets the pace. floor: the greatest of FLOPs, bytes, exponentials and fp32 operations over
what the device can do; matmul, copy and clock are measured in the same process, 16 exponentials and
256 fp32 operations per clock and processor are assumed. peak MB: memory of a run beside its inputs.
Ratios are of times in the same round, withheld where their quartiles lie more than 15 % apart.
Every run of ours is repeated with host synchronisations turned into errors.
"""


class Results:
    """Lines of one device in two files, each complete whenever this process is killed.

    A figure of an earlier run stays until it is measured again or fails; what an earlier run could
    not measure stays until its row runs again.
    """

    def __init__(self, folder: Path, device: str, rows: Sequence[str]) -> None:
        stem = "gpu_" + "".join(c if c.isalnum() else "_" for c in device.lower())
        self.files = {suffix: folder / f"{stem}.{suffix}" for suffix in ("jsonl", "md")}
        earlier = self.files["jsonl"]
        lines = map(json.loads, earlier.read_text().splitlines() if earlier.exists() else [])
        self.lines: dict[tuple[str, str], Line] = {
            (line["row"], line["setting"]): line
            for line in lines
            if "ms" in line or line["row"][0] not in rows
        }

    def add(self, line: Line) -> None:
        """Takes a line in and rewrites the files."""
        key = line["row"], line["setting"]
        if "missing" not in line or key not in self.lines:
            self.lines[key] = line
        lines = list(self.lines.values())
        settings = {f"- row {x['row'][0]}: {x['setting of the run']}" for x in lines if "ms" in x}
        table = "\n".join([HEADER, *map(shown, lines), "", *sorted(settings)])
        texts = {
            "jsonl": "".join(json.dumps(one) + "\n" for one in lines),
            "md": f"# All kernels on one GPU\n\n{NOTES}\n{table}\n",
        }
        for suffix, file in self.files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".part")
            temporary.write_text(texts[suffix])
            os.replace(temporary, file)


def shown(line: Line) -> str:
    """A line of the Markdown table."""
    head = f"| {line['row']} | {line['setting']} |"
    left_out = [f"{name}: {why}" for name, why in line.get("left out", {}).items()]
    if "ms" not in line:
        words = [f"{what}: {line[what]}" for what in ("failed", "missing") if what in line]
        return f"{head} {_cell([*(words or ['correct']), *left_out])} |" + " |" * 8
    rivals = [
        f"{name} {'too noisy' if (ratio := rival['ours / rival']) is None else f'{ratio:.3f}'} "
        f"({rival['peak MB']:.0f})"
        for name, rival in line["rivals"].items()
    ]
    sync = line["host sync"]
    goals = [*line["goals"], f"no host sync: {'met' if sync is None else f'missed ({sync})'}"]
    return (
        f"{head} {line['ms']:.3f} ({line['spread']:.0%}) | {line['host ms']:.3f} "
        f"| {line['floor ms']:.3f} | {line['% of floor']:.0f} | {line['TFLOP/s']:.0f} "
        f"| {line['GB/s']:.0f} | {line['peak MB']:.0f} | {_cell([*rivals, *left_out])} "
        f"| {_cell(goals)} |"
    )


def _cell(texts: Sequence[str]) -> str:
    return "; ".join(texts).replace("|", "/").replace("\n", " ")


def lines_of(rows: Sequence[str], device: Device | None, deadline: float) -> Iterator[Line]:
    """Lines of ``rows``, with figures if ``device`` is given; each first as a failure, which stands
    if the process dies in it.

    Lines not begun at ``deadline`` (``time.monotonic``) are only named. An error stays in its line,
    unless it left the device unusable: then it is raised again.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    on = {} if device is None else device.environment
    for row in rows:
        for name, case in cases(row, kind, tiny=device is None):
            if time.monotonic() > deadline:
                yield {"row": row, "setting": name, "missing": "out of time"} | on
                continue
            try:
                for work in case():
                    line: Line = {"row": work.row, "setting": work.setting} | on
                    if time.monotonic() > deadline:
                        yield line | {"missing": "out of time"}
                        continue
                    yield line | {"failed": DIED}
                    yield line | _outcome(work, device)
                    still_works()
            except Exception as error:  # inputs cannot be made
                traceback.print_exc()
                yield {"row": row, "setting": name, "failed": one_line(error)} | on
                still_works()
            _release()


def _outcome(work: Work, device: Device | None) -> Line:
    try:
        wrong = check(work)
        _release()
        return {"left out": wrong} if device is None else measure(device, work, wrong)
    except Exception as error:
        traceback.print_exc()
        return {"failed": one_line(error)}
    finally:
        _release()


def _release() -> None:
    """Frees device memory that is no longer used, for the next line."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def run_here(rows: Sequence[str], folder: Path, device: Device | None, seconds: float) -> bool:
    """Runs ``rows`` in this process; True if nothing failed."""
    results = None if device is None else Results(folder, device.environment["device"], rows)
    fine = True
    for line in lines_of(rows, device, time.monotonic() + seconds):
        if results is not None:
            results.add(line)
        if line.get("failed") != DIED:
            print(shown(line), flush=True)
            fine = fine and "failed" not in line and line.get("host sync") is None
    return fine


def run_apart(row: str, folder: Path, seconds: float) -> bool:
    """Runs a row in a process of its own; True if nothing failed."""
    options = ["--rows", row, "--folder", str(folder), "--seconds", str(seconds)]
    command = [sys.executable, __file__, *options]
    try:
        status = subprocess.run(command, check=False, timeout=seconds + GRACE).returncode
    except subprocess.TimeoutExpired:
        print(f"row {row}: killed after {seconds + GRACE:.0f} s", flush=True)
        return False
    if status not in (0, 1):
        print(f"row {row}: its process ended with status {status}", flush=True)
    return status == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rows asked for; 1 where anything failed, 3 without a GPU to time them on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="check the rows only, on any device")
    parser.add_argument("--rows", nargs="+", choices=ORDER, default=ORDER, help="default: all")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the table: %(default)s")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # of one row's process
    asked = parser.parse_args(arguments)
    if asked.tiny:
        return int(not run_here(asked.rows, asked.folder, None, SECONDS))
    if not torch.cuda.is_available():
        print("no GPU here: nothing is timed; --tiny checks the rows on this device")
        return 3
    if asked.seconds is not None:
        return int(not run_here(asked.rows, asked.folder, Device(), asked.seconds))
    print(HEADER, flush=True)
    end, fine = time.monotonic() + SECONDS, True
    for row in asked.rows:
        fine &= run_apart(row, asked.folder, min(max(end - time.monotonic(), 0.0), ROW_SECONDS))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
