"""Speed and peak memory of conversion on a synthetic checkpoint of 1 GB in one file.

Each conversion runs in a process of its own, whose peak is the kernel's account of it, libraries
included (``imports`` says how much they are). Beside it a plain copy of the same file, synced: what
the disk allows. Wall times depend on the disk and on what else uses it; read the CPU time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from earlyfuse.models.state_dicts import huggingface
from earlyfuse.models.state_dicts.chameleon import Sizes, tensor_shapes
from earlyfuse.models.state_dicts.tensor_map import Entry
from earlyfuse.models.vocabulary import Vocabulary
from earlyfuse.parallel.checkpoint.files.safetensors import SINGLE, write_file
from harness import RESULTS, environment

ROUNDS = 3
SIZES = Sizes(
    dim=2048,
    layers=7,
    heads=16,
    kv_heads=8,
    hidden_dim=5632,
    vocab_size=32768,
    norm_order="swin",
    rope_theta=10_000.0,
)
# from → to: folder, what is converted, options
STEPS = [
    ("hf", "earlyfuse", {}),
    ("earlyfuse", "hf", {}),
    ("earlyfuse", "dcp", {}),
    ("dcp", "earlyfuse", {}),
    ("hf", "meta", {}),
    ("meta", "earlyfuse", {}),
    ("hf", "earlyfuse", {"dtype": "float32"}),
]
CONVERT = """
import json, re, sys, time
from pathlib import Path
import torch
from earlyfuse.tools.convert import DTYPES, convert

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) * 1024

source, destination, to, dtype = sys.argv[1:]
torch.set_num_threads(1)
imports = memory("VmRSS")
wall, cpu = time.perf_counter(), time.process_time()
convert(Path(source), Path(destination), to, dtype=DTYPES.get(dtype))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({"wall": wall, "cpu": cpu, "peak": memory("VmHWM"), "imports": imports}))
"""


class Random:
    """Tensors of a Hugging Face checkpoint, made when they are read; qk-norms are plain."""

    def __init__(self, sizes: Sizes) -> None:
        shapes = tensor_shapes(sizes.decoder())
        self.entries = {
            huggingface.name_of(name): Entry(shape, torch.bfloat16)
            for name, shape in shapes.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Random bf16 values, ones for norms."""
        shape = self.entries[name].shape
        fill = torch.ones if "norm" in name else torch.rand
        return fill(shape).bfloat16()


def make(folder: Path) -> int:
    """Write the synthetic checkpoint; returns the bytes of its file."""
    folder.mkdir()
    source = Random(SIZES)
    write_file(folder / SINGLE, source, list(source.entries))
    vocabulary = Vocabulary(SIZES.vocab_size, 0, 2, 1)
    config = huggingface.write_config(SIZES, SIZES.decoder(), vocabulary, None, "bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / SINGLE).stat().st_size


def convert(source: Path, destination: Path, to: str, dtype: str) -> dict[str, float]:
    """One conversion in a new process; its destination replaces an older one."""
    shutil.rmtree(destination, ignore_errors=True)
    command = [sys.executable, "-c", CONVERT, str(source), str(destination), to, dtype]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed)


def copy(source: Path, destination: Path) -> dict[str, float]:
    """The same bytes copied and synced."""
    wall, cpu = time.perf_counter(), time.process_time()
    shutil.copyfile(source, destination)
    with open(destination, "rb+") as file:
        os.fsync(file.fileno())
    done = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    destination.unlink()
    return done


def largest_file(*folders: Path) -> int:
    """Bytes of the largest file of tensors in the folders."""
    return max(path.stat().st_size for folder in folders for path in folder.iterdir())


def measure(root: Path) -> list[dict[str, Any]]:
    """Rows of the table: medians over rounds, the largest peak."""
    size = make(root / "hf")
    rounds: dict[str, list[dict[str, float]]] = {}
    largest: dict[str, int] = {"plain copy": size}
    for turn in range(ROUNDS):
        rounds.setdefault("plain copy", []).append(copy(root / "hf" / SINGLE, root / "copy"))
        for source, to, options in STEPS:
            dtype = options.get("dtype", "")
            name = f"{source} to {to}" + (f", {dtype}" if dtype else "")
            target = root / (f"{to} {dtype}".strip() if to != "hf" else "hf again")
            rounds.setdefault(name, []).append(convert(root / source, target, to, dtype))
            largest[name] = largest_file(root / source, target)
            print(f"round {turn + 1}: {name} {rounds[name][-1]}", flush=True)
            if dtype or to == "hf":
                shutil.rmtree(target)
    rows = []
    for name, results in rounds.items():
        row: dict[str, Any] = {"conversion": name, "source bytes": size}
        row |= {key: statistics.median(r[key] for r in results) for key in ("wall", "cpu")}
        row["largest file"] = largest[name]
        if "peak" in results[0]:
            row["imports"] = statistics.median(r["imports"] for r in results)
            row["peak"] = max(r["peak"] for r in results)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| conversion | wall s | MB/s | CPU s | peak MB | imports MB | largest file MB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speed = row["source bytes"] / row["wall"] / 1e6
        line = f"| {row['conversion']} | {row['wall']:.2f} | {speed:.0f} | {row['cpu']:.2f} "
        if "peak" in row:
            peak, imports, file = (row[k] / 1e6 for k in ("peak", "imports", "largest file"))
            line += f"| {peak:.0f} | {imports:.0f} | {file:.0f} | {peak / file:.2f} |"
        else:
            line += "| | | | |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Measure and write ``results/conversion.{md,jsonl}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to make 5 GB of files (the system's temporary one)")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    where = environment()
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        rows = measure(Path(folder))
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row | {"environment": where}) for row in rows]
    (RESULTS / "conversion.jsonl").write_text("\n".join(lines) + "\n")
    header = ", ".join(f"{key}: {value}" for key, value in where.items())
    title = f"Conversion of a checkpoint of {rows[0]['source bytes'] / 1e9:.2f} GB (bf16, one file)"
    note = f"Medians of {ROUNDS} rounds, the largest peak. Ratio: peak over largest file."
    page = f"# {title}\n\n{header}\n\n{note}\n\n{table(rows)}\n"
    (RESULTS / "conversion.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
