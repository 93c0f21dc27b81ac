"""Train configs with several seeds and compare their held-out loss at equal FLOPs.

``python -m earlyfuse.tools.study OUT --configs mamba mixture_of_mamba --seeds 0 1 2 --jobs 2``, and
behind ``--`` any overrides of ``train.py``. A seed is that of the first values (``debug.seed``) and
of the documents' order (``dataloader.seed``). Runs that are finished are not run again; stopped
ones go on; those that were trained with other settings are refused. OUT then holds the runs, and of
all together ``study.png``, ``study.md`` and ``study.json``. The first config is the baseline.

SIGTERM or Ctrl-C lets the runs save and end; a second Ctrl-C kills them, as they end with this
process.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

from earlyfuse.configs.registry import load_config, split_name
from earlyfuse.data.console import printable
from earlyfuse.data.folder_lock import FolderLock
from earlyfuse.data.json_files import shown
from earlyfuse.parallel.reliability import preemption
from earlyfuse.parallel.reliability.preemption import PARENT_PIPE
from earlyfuse.tools.command import Parser, run_command

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


@dataclass(frozen=True)
class Run:
    """One config with one seed, in a folder of its own; ``settings``: its resolved config."""

    config: str
    seed: int
    folder: Path
    steps: int
    overrides: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Arguments of ``train.py`` after the name of the config."""
        seeds = ["--debug.seed", str(self.seed), "--dataloader.seed", str(self.seed)]
        return [*self.overrides, *seeds, "--dump_folder", str(self.folder)]

    @property
    def command(self) -> list[str]:
        """The command line of ``train.py``."""
        return [sys.executable, "-P", str(TRAIN), self.config, *self.arguments]

    def lines(self) -> list[dict[str, Any]]:
        """Logged lines of the run; the last of a step that was repeated after a resume."""
        from earlyfuse.parallel.reporting.metrics_file import METRICS_FILE, read_metrics

        path = self.folder / METRICS_FILE
        if not path.exists():
            return []
        return list({(line["kind"], line["step"]): line for line in read_metrics(path)}.values())

    def finished(self) -> bool:
        """True if its last validation is logged."""
        from earlyfuse.parallel.reporting.metrics_file import VALIDATION

        return any(x["kind"] == VALIDATION and x["step"] == self.steps for x in self.lines())

    def check_settings(self) -> None:
        """``ValueError`` if the folder holds a run of other settings, or of unknown ones."""
        from earlyfuse.parallel.reporting.metrics_file import METRICS_FILE
        from earlyfuse.parallel.reporting.run_folder import DESCRIPTION, read_description
        from earlyfuse.parallel.training.resume_settings import UNKNOWN, Effect, changes, effect_of

        where = printable(str(self.folder))
        remedy = "compare in another OUT, or remove that folder"
        if not (self.folder / DESCRIPTION).is_file():
            if (self.folder / METRICS_FILE).exists():
                raise ValueError(
                    f"{where} holds a run without {DESCRIPTION}, so its settings are unknown; "
                    f"{remedy}"
                )
            return
        description = read_description(self.folder)
        for name, before, now in changes(description.field("config", dict), self.settings):
            if before is not UNKNOWN and effect_of(name) not in (Effect.NONE, Effect.UNREAD):
                raise ValueError(
                    f"{where} holds a run of other settings: {printable(name)} is {shown(before)} "
                    f"there and {shown(now)} here; {remedy}"
                )
        for change in description.field("changes", list, default=[]):
            raise ValueError(
                f"{where} holds a run whose settings were changed on the way ({shown(change)}); "
                f"{remedy}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    kept = "stopped; the same command goes on from here"
    return run_command("error", lambda: _study(given), interrupted=kept, also=(RuntimeError,))


def _study(given: list[str]) -> None:
    split = given.index("--") if "--" in given else len(given)
    options = _parser().parse_args(given[:split])
    from earlyfuse.tools.study.report import curves, report  # --help does not pay for torch

    logging.getLogger().setLevel(logging.ERROR)  # torchtitan warns of its own defaults
    runs = plan(options.out, options.configs, options.seeds, tuple(given[split + 1 :]))
    for run in runs:
        run.check_settings()
    with _only_one(options.out):
        train(runs, options.jobs)
        found = {
            label(config): curves([run.lines() for run in runs if run.config == config])
            for config in options.configs
        }
        report(options.out, found)


def plan(
    out: Path, configs: Sequence[str], seeds: Sequence[int], overrides: tuple[str, ...]
) -> list[Run]:
    """The runs, seed by seed. ``ValueError`` for unknown configs, repeated names, configs without
    validation, and settings that cannot be right.
    """
    from earlyfuse.configs.command_line import override
    from earlyfuse.parallel.trainer import resolve
    from earlyfuse.parallel.training.resume_settings import plain_config

    for name, values in (("configs", [label(c) for c in configs]), ("seeds", list(seeds))):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} ({' '.join(map(str, values))}) must differ from each other")
    planned = []
    for seed in seeds:
        for name in configs:
            run = Run(name, seed, out / f"{label(name)}-seed{seed}", 0, overrides)
            config = override(load_config(name), run.arguments)
            if not config.validator.enable:
                raise ValueError(f"validator.enable of {name} is off: there is nothing to compare")
            planned.append((run, config))
    runs = []
    for run, config in planned:
        resolved, _ = resolve(config)  # makes the embedded corpus before runs would, together
        steps, settings = config.training.steps, plain_config(resolved)
        runs.append(Run(run.config, run.seed, run.folder, steps, overrides, settings))
    return runs


def label(config: str) -> str:
    """A config's name in folders and tables: of FILE.py:NAME the function's."""
    return split_name(config)[1]


def train(runs: Sequence[Run], jobs: int) -> None:
    """Train what is not finished, ``jobs`` at a time. ``RuntimeError`` names a run that fails."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    read, write = os.pipe()  # closes when this process ends, and its runs see it
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {PARENT_PIPE: str(read)}
    training: set[subprocess.Popen[bytes]] = set()
    stopping = interrupted = False

    def stop(number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        nonlocal stopping
        stopping = True
        for process in list(training):
            process.terminate()

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        preemption.tell("stopping when the runs have saved; Ctrl-C again kills them")
        stop()

    def one(run: Run) -> None:
        if stopping or run.finished():
            return
        began = perf_counter()
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "console.log"
        with log.open("ab") as console:
            process = subprocess.Popen(
                run.command, stdout=console, stderr=console, env=environment, pass_fds=(read,)
            )
            training.add(process)
            if stopping:
                process.terminate()
            status = process.wait()
            training.remove(process)
        if not stopping and (status or not run.finished()):
            raise RuntimeError(
                f"{run.folder.name} ended with status {status}; see {printable(str(log))}"
            )
        done = f"{run.folder.name}: {perf_counter() - began:.0f} s"
        print(printable(done), flush=True)

    before = signal.signal(signal.SIGTERM, stop), signal.getsignal(signal.SIGINT)
    preemption.on_interrupt(interrupt)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            results = [pool.submit(one, run) for run in runs]
            try:
                for result in results:
                    result.result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
        os.close(read)
        os.close(write)
    if interrupted:
        raise KeyboardInterrupt
    if stopping:
        raise RuntimeError("stopped by SIGTERM; the same command goes on")


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Refuse a second study in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out, lambda line: print(f"warning: {line}", file=sys.stderr))
    if not lock.acquire():
        raise ValueError(f"out ({out}) is in use by another study; wait for it to end, or stop it")
    try:
        yield
    finally:
        lock.release()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="study",
        description="Train configs with several seeds; compare held-out loss at equal FLOPs.",
        epilog="Behind -- follow overrides for train.py, as in: -- --training.steps 300",
    )
    parser.add_argument("out", type=Path, help="folder of the runs and of the comparison")
    parser.add_argument(
        "--configs",
        nargs="+",
        required=True,
        help="names, or FILE.py:NAME; the first is the baseline",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
