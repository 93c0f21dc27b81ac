"""Speed and peak memory of conversion on a synthetic checkpoint of 1 GB in one file.

Each conversion runs in a process of its own, whose peak is the kernel's account of it, libraries
included (``imports`` says how much they are). A plain, synced copy of the same file shows what the
disk allows. Wall times depend on what else uses it; read the CPU time.
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

import torch

from earlyfuse.configs import decoders
from earlyfuse.models.state_dicts import huggingface
from earlyfuse.models.state_dicts.plain_decoder import tensor_shapes
from earlyfuse.models.state_dicts.tensor_map import Entry
from earlyfuse.models.vocabulary import Vocabulary
from earlyfuse.parallel.checkpoint.files.safetensors import SINGLE, write_file
from harness import RESULTS, environment

ROUNDS = 3
CONFIG = decoders.dense(
    decoders.Shape(dim=2048, layers=7, heads=16, kv_heads=8, hidden_dim=5632, vocab_size=32768)
)
STEPS = [  # source, target format, type
    ("hf", "earlyfuse", ""),
    ("earlyfuse", "hf", ""),
    ("earlyfuse", "dcp", ""),
    ("dcp", "earlyfuse", ""),
    ("hf", "meta", ""),
    ("meta", "earlyfuse", ""),
    ("hf", "earlyfuse", "float32"),
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
    """Tensors of a Hugging Face checkpoint, created when they are read: bf16, ones for norms."""

    def __init__(self) -> None:
        shapes = tensor_shapes(CONFIG)
        self.entries = {
            huggingface.name_of(name): Entry(shape, torch.bfloat16)
            for name, shape in shapes.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        fill = torch.ones if "norm" in name else torch.rand
        return fill(self.entries[name].shape).bfloat16()


def make(folder: Path) -> int:
    """Write the synthetic checkpoint; returns the bytes of its file."""
    folder.mkdir()
    write_file(folder / SINGLE, source := Random(), list(source.entries))
    vocabulary = Vocabulary(CONFIG.vocab_size, 0, 2, 1)
    fields = huggingface.config_fields(CONFIG, vocabulary, "bfloat16")
    (folder / "config.json").write_text(json.dumps(fields))
    return (folder / SINGLE).stat().st_size


def convert(source: Path, destination: Path, to: str, dtype: str) -> dict[str, float]:
    """One conversion in a new process; its destination replaces an older one."""
    shutil.rmtree(destination, ignore_errors=True)
    command = [sys.executable, "-c", CONVERT, str(source), str(destination), to, dtype]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    files = [path for folder in (source, destination) for path in folder.iterdir()]
    return done | {"largest": max(path.stat().st_size for path in files)}


def copy(source: Path, destination: Path) -> dict[str, float]:
    """The same bytes copied and synced."""
    wall, cpu = time.perf_counter(), time.process_time()
    shutil.copyfile(source, destination)
    with open(destination, "rb+") as file:
        os.fsync(file.fileno())
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(root: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """Bytes of the source, and conversion → medians over rounds; of memory, the largest."""
    size = make(root / "hf")
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        rounds.setdefault("plain copy", []).append(copy(root / "hf" / SINGLE, root / "copy"))
        for source, to, dtype in STEPS:
            name = f"{source} to {to}" + (f", {dtype}" if dtype else "")
            target = root / (f"{to} {dtype}".strip() if to != "hf" else "hf again")
            rounds.setdefault(name, []).append(convert(root / source, target, to, dtype))
            if dtype or to == "hf":
                shutil.rmtree(target)
    of = {"wall": statistics.median, "cpu": statistics.median}
    return size, {
        name: {key: of.get(key, max)(r[key] for r in results) for key in results[0]}
        for name, results in rounds.items()
    }


def table(size: int, rows: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| conversion | wall s | MB/s | CPU s | peak MB | imports MB | largest file MB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        line = f"| {name} | {row['wall']:.2f} | {size / row['wall'] / 1e6:.0f} | {row['cpu']:.2f} |"
        if "peak" in row:
            peak, imports, file = (row[k] / 1e6 for k in ("peak", "imports", "largest"))
            line += f" {peak:.0f} | {imports:.0f} | {file:.0f} | {peak / file:.2f} |"
        else:
            line += " | | | |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Measure and write ``results/conversion.{md,jsonl}``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to create 5 GB of files (the system's temporary)")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    where = environment()
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        size, rows = measure(Path(folder))
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"conversion": name, "source bytes": size, **row, "environment": where})
        for name, row in rows.items()
    ]
    (RESULTS / "conversion.jsonl").write_text("\n".join(lines) + "\n")
    header = ", ".join(f"{key}: {value}" for key, value in where.items())
    title = f"Conversion of a checkpoint of {size / 1e9:.2f} GB (bf16, one file)"
    note = f"Medians of {ROUNDS} rounds, the largest peak. Ratio: peak over largest file."
    page = f"# {title}\n\n{header}\n\n{note}\n\n{table(size, rows)}\n"
    (RESULTS / "conversion.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
