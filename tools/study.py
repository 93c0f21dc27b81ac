"""Train configs with several seeds and compare their held-out loss at equal FLOPs.

``python -m earlyfuse.tools.study OUT --configs mamba mixture_of_mamba --seeds 0 1 2 --jobs 2``, and
behind ``--`` any overrides of ``train.py``. A seed is that of the first values (``debug.seed``) and
of the documents' order (``dataloader.seed``). Runs that are finished are not run again; stopped
ones go on. OUT then holds the runs, and of all together ``study.png``, ``study.md`` and
``study.json``. The first config is the baseline.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from earlyfuse.configs.catalogue import catalogue
from earlyfuse.configs.command_line import override
from earlyfuse.data.atomic import atomic_write_bytes, atomic_write_json
from earlyfuse.data.console import printable
from earlyfuse.models.modality import Modality
from earlyfuse.parallel.curves import plot_study
from earlyfuse.parallel.data_set import DataSet
from earlyfuse.parallel.metrics import METRICS_FILE
from earlyfuse.tools.command import run_command

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Run:
    """One config with one seed, in a folder of its own."""

    config: str
    seed: int
    folder: Path
    steps: int
    overrides: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The command line of ``train.py``."""
        seeds = ["--debug.seed", str(self.seed), "--dataloader.seed", str(self.seed)]
        folder = ["--dump_folder", str(self.folder)]
        return [sys.executable, str(TRAIN), self.config, *self.overrides, *seeds, *folder]

    def lines(self) -> list[dict[str, Any]]:
        """What the run has logged; of a step that was repeated after a stop, the last."""
        path = self.folder / METRICS_FILE
        if not path.exists():
            return []
        logged = [json.loads(line) for line in path.read_text().splitlines()]
        return list({(line["kind"], line["step"]): line for line in logged}.values())

    def finished(self) -> bool:
        """Whether its last validation is there."""
        return any(x["kind"] == "validation" and x["step"] == self.steps for x in self.lines())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    kept = "stopped; the same command goes on from here"
    return run_command("error", lambda: _study(given), interrupted=kept, also=(RuntimeError,))


def _study(given: list[str]) -> None:
    split = given.index("--") if "--" in given else len(given)
    options = _parser().parse_args(given[:split])
    logging.getLogger().setLevel(logging.ERROR)  # torchtitan warns of its own defaults
    runs = plan(options.out, options.configs, options.seeds, tuple(given[split + 1 :]))
    train(runs, options.jobs)
    found = {config: curves([r for r in runs if r.config == config]) for config in options.configs}
    report(options.out, found)


def plan(
    out: Path, configs: Sequence[str], seeds: Sequence[int], overrides: tuple[str, ...]
) -> list[Run]:
    """The runs, seed by seed. ``ValueError`` for unknown configs, repeated names, and configs
    without validation.
    """
    known = catalogue()
    for name, values in (("configs", configs), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} ({' '.join(map(str, values))}) must be different ones")
    if unknown := [name for name in configs if name not in known]:
        raise ValueError(f"configs ({' '.join(unknown)}) are unknown; see train.py --list")
    runs = []
    for seed in seeds:
        for name in configs:
            config = override(known[name](), list(overrides))
            if not config.validator.enable:
                raise ValueError(f"validator.enable of {name} is off: there is nothing to compare")
            folder = out / f"{name}-seed{seed}"
            runs.append(Run(name, seed, folder, config.training.steps, overrides))
    DataSet(config.data)  # the embedded corpus is made once, before runs would make it together
    return runs


def train(runs: Sequence[Run], jobs: int) -> None:
    """Train what is not finished, ``jobs`` at a time. ``RuntimeError`` names a run that fails."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ

    def one(run: Run) -> None:
        if run.finished():
            return
        began = perf_counter()
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "console.log"
        with log.open("ab") as console:
            status = subprocess.run(run.command, stdout=console, stderr=console, env=environment)
        if status.returncode or not run.finished():
            raise RuntimeError(
                f"{run.folder.name} ended with status {status.returncode}; see {log}"
            )
        done = f"{run.folder.name}: {perf_counter() - began:.0f} s"
        print(printable(done), flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        results = [pool.submit(one, run) for run in runs]
        try:
            for result in results:
                result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def curves(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """``flops`` (P,) of all modalities at each validation, and losses by modality (seeds, P)."""
    losses: dict[str, list[list[float]]] = defaultdict(list)
    flops = np.zeros(0)
    for run in runs:
        lines = run.lines()
        trained = [line for line in lines if line["kind"] == "train"]
        held_out = [line for line in lines if line["kind"] == "validation"]
        done = [sum(v for k, v in line.items() if k.startswith("flops/")) for line in trained]
        steps = [line["step"] for line in trained]
        flops = np.interp([line["step"] for line in held_out], steps, done)
        for modality in Modality:
            if all(f"loss/{modality.label}" in line for line in held_out):
                losses[modality.label].append([x[f"loss/{modality.label}"] for x in held_out])
    return {"flops": flops} | {label: np.array(seeds) for label, seeds in losses.items()}


def flops_to_reach(curve: dict[str, np.ndarray], label: str, target: float) -> float | None:
    """FLOPs at which the mean held-out loss first is ``target``, between validations linearly;
    None if it never is.
    """
    mean, flops = curve[label].mean(0), curve["flops"]
    below = np.flatnonzero(mean <= target)
    if not len(below):
        return None
    at = below[0]
    if at == 0:
        return float(flops[0])
    share = (mean[at - 1] - target) / (mean[at - 1] - mean[at])
    return float(flops[at - 1] + share * (flops[at] - flops[at - 1]))


def report(out: Path, found: dict[str, dict[str, np.ndarray]]) -> None:
    """Write ``study.json``, ``study.md`` and ``study.png`` into ``out``, and print the table."""
    baseline, *_ = found
    labels = [m.label for m in Modality if m.label in found[baseline]]
    total = found[baseline]["flops"][-1]
    header = ["config"] + [
        cell for label in labels for cell in (f"{label} loss", f"FLOPs to {baseline}'s {label}")
    ]
    rows = [header, ["---"] * len(header)]
    for config, curve in found.items():
        row = [config]
        for label in labels:
            last = curve[label][:, -1]
            reached = flops_to_reach(curve, label, float(found[baseline][label][:, -1].mean()))
            row += [
                f"{last.mean():.3f} ({last.min():.3f}-{last.max():.3f})",
                "not reached" if reached is None else f"{reached / total:.1%}",
            ]
        rows.append(row)
    seeds = len(found[baseline][labels[0]])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = (
        f"Held-out loss in nats per token after {total:.3g} training FLOPs, mean of {seeds} seeds "
        f"(least-most).\n\n{table}\n"
    )
    atomic_write_bytes(out / "study.md", text.encode())
    values = {config: {k: v.tolist() for k, v in curve.items()} for config, curve in found.items()}
    atomic_write_json(out / "study.json", values)
    plot_study(found, labels, out / "study.png")
    print(f"{text}\n{printable(str(out / 'study.png'))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m earlyfuse.tools.study",
        description="Train configs with several seeds; compare held-out loss at equal FLOPs.",
        epilog="Behind -- follow overrides for train.py, as in: -- --training.steps 300",
    )
    parser.add_argument("out", type=Path, help="folder of the runs and of the comparison")
    parser.add_argument("--configs", nargs="+", required=True, help="the first is the baseline")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
