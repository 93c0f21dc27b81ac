"""All kernels on one GPU: correct first, then timed beside their rivals and their floors.

    python benchmarks/gpu.py              all rows in at most 8 minutes
    python benchmarks/gpu.py --rows 3 5   these, beside what an earlier run has measured
    python benchmarks/gpu.py --tiny       checks the rows themselves, on any device, untimed

Needs torch 2.11, Triton 3.6 and this tree; neither torchtitan nor an installation. Rivals that are
not importable are named and left out. Rows come in order of value, each in a process of its own
(``gpu_rows.py``), so that a crash or a kernel that never ends costs that row only. Lines are
checked against the definition before they are timed (``gpu_timing.py``); a line that fails says so,
the others follow, and the exit status is 1. ``gpu_<device>.md`` and ``.jsonl`` are written anew
after every line.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ORDER = ("1", "4", "2", "6", "3", "5")  # by value
SECONDS = 480.0
ROW_SECONDS = 240.0  # so that a row that hangs leaves time for others
GRACE = 40.0  # to finish the line that has begun
NO_GPU = 3

Line = dict[str, Any]

HEADER = (
    "| row | setting | ms (spread) | host ms | floor ms | % of floor | TFLOP/s | GB/s | peak MB "
    "| ours / rival (its peak MB) | goals |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|"
)
NOTES = """\
ms: median of the runs on the device, with quartile distance over median. The L2 cache is cold (it
has read other data since), and the device is kept waiting until the host has launched the run: host
time is not in it. host ms: what the host needs to launch a run; where it is more than ms, the host
sets the pace as soon as it is not ahead. floor: the greatest of FLOPs, bytes, exponentials and fp32
operations over what the device can do; matmul, copy and clock are measured in the same process, 16
exponentials and 256 fp32 operations per clock and processor are assumed. peak MB: memory of a run
beside its inputs. Ratios are of times in the same round, withheld where their quartiles lie more
than 15 % apart. Every run of ours is repeated with host synchronisations made errors.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows asked for; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="check the rows only, on any device")
    parser.add_argument("--rows", nargs="+", choices=ORDER, default=ORDER, help="default: all")
    parser.add_argument(
        "--folder", type=Path, default=HERE / "results", help="where the table goes: %(default)s"
    )
    asked = parser.parse_args(arguments)
    # untimed rows need no device to themselves: one process is enough
    parts = [asked.rows] if asked.tiny else [[row] for row in asked.rows]
    results, started, failed = Results(asked.folder, asked.rows), time.monotonic(), False
    print(HEADER)
    for rows in parts:
        left = min(SECONDS - (time.monotonic() - started), ROW_SECONDS)
        lines: Iterator[Line]
        if left <= 0:
            lines = iter([{"row": row, "setting": "all", "missing": "out of time"} for row in rows])
        else:
            lines = lines_of(rows, ["--tiny"] * asked.tiny, left)
        for line in lines:
            if not asked.tiny:
                results.add(line)
            print(shown(line), flush=True)
            failed = failed or "failed" in line or line.get("host sync") is not None
    return int(failed)


def lines_of(rows: Sequence[str], options: Sequence[str], seconds: float) -> Iterator[Line]:
    """What a process says of its rows; where it dies, a line that names what it was doing."""
    command = [sys.executable, str(HERE / "gpu_rows.py"), *rows, *options]
    child = subprocess.Popen(
        [*command, "--seconds", str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    killer = threading.Timer(seconds + GRACE, child.kill)
    killer.start()
    begun: Line = {"row": rows[0], "setting": "start"}
    try:
        for text in child.stdout:
            if not (text.startswith('{"row"') and text.endswith("\n")):  # a library's own words
                print(text, end="", file=sys.stderr)
                continue
            line = json.loads(text)
            if line.keys() == {"row", "setting"}:
                begun = line
            else:
                yield line
    finally:
        killer.cancel()
        child.kill()
    status = child.wait()
    if status == NO_GPU:
        sys.exit(NO_GPU)
    if status:
        yield begun | {
            "failed": f"the row's process ended here, with status {status} (after "
            f"{seconds + GRACE:.0f} s it is killed)"
        }


class Results:
    """Lines of one device, in two files that are whole whenever this is killed.

    What earlier runs measured stays until it is measured again or fails; what they could not
    measure, until its row is run again.
    """

    def __init__(self, folder: Path, rows: Sequence[str]) -> None:
        self.folder, self.rows, self.stem = folder, rows, ""
        self.lines: dict[tuple[str, str], Line] = {}

    def add(self, line: Line) -> None:
        """Take a line in and write the files, once the device is known."""
        if not self.stem and "device" in line:
            self.stem = "gpu_" + "".join(c if c.isalnum() else "_" for c in line["device"].lower())
            self.lines = self._earlier() | self.lines
        key = line["row"], line["setting"]
        if "missing" not in line or key not in self.lines:
            self.lines[key] = line
        if self.stem:
            self._write()

    def _earlier(self) -> dict[tuple[str, str], Line]:
        file = self.folder / f"{self.stem}.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
        return {
            (line["row"], line["setting"]): line
            for line in lines
            if "ms" in line or line["row"][0] not in self.rows
        }

    def _write(self) -> None:
        lines = list(self.lines.values())
        settings = dict.fromkeys(
            f"- row {line['row'][0]}: {line['setting of the run']}"
            for line in lines
            if "ms" in line
        )
        table = "\n".join([HEADER, *map(shown, lines)])
        page = f"# All kernels on one GPU\n\n{NOTES}\n{table}\n\n" + "\n".join(settings) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (
            ("jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
            ("md", page),
        ):
            temporary = self.folder / f"{self.stem}.{suffix}.part"
            temporary.write_text(text)
            os.replace(temporary, self.folder / f"{self.stem}.{suffix}")


def shown(line: Line) -> str:
    """A line of the Markdown table."""
    head = f"| {line['row']} | {line['setting']} |"
    left_out = [f"{name}: {why}" for name, why in line.get("left out", {}).items()]
    if "ms" not in line:
        words = [f"{what}: {line[what]}" for what in ("failed", "missing") if what in line]
        words = [*(words or ["correct"]), *left_out]
        return f"{head} {_cell('; '.join(words))} |" + " |" * 8
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
        f"| {line['GB/s']:.0f} | {line['peak MB']:.0f} | {_cell('; '.join([*rivals, *left_out]))} "
        f"| {_cell('; '.join(goals))} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
