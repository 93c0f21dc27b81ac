"""What a training step pays for checkpoints, logging and validation (row 14).

    python benchmarks/step_overheads.py [ROUNDS]

One process on a CPU, 20 M parameters in fp32 with AdamW's states: 240 MB in a checkpoint. In each
round every part is done once between plain steps; medians over the rounds. The stall is how long
the loop waits. A save in the background also slows the steps beside it, most of all on a machine
with few cores: the table has what a save costs in all, until it is on disk. DCP's own save writes
the same states, without manifest, checksums and renaming.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from wire_bytes import SHAPE, Setting, run_config, write_data

from earlyfuse.configs import decoders
from earlyfuse.parallel.trainer import Trainer
from harness import RESULTS, environment

EVERY = 50
GOAL = 0.05
BESIDE = 12  # steps beside a save in the background, or more until it is done
MODEL = decoders.Shape(dim=416, layers=9, heads=8, hidden_dim=1152, vocab_size=SHAPE.vocab_size)


def trainer_of(folder: Path, run: str, async_mode: str) -> Trainer:
    """Our trainer with its outputs open, as in a run."""
    config = run_config(Setting(1, lambda: decoders.dense(MODEL)), folder)
    config.dump_folder = str(folder / run)
    config.checkpoint.enable = config.validator.enable = True
    config.checkpoint.interval, config.checkpoint.keep_latest_k = 1, 2
    config.checkpoint.async_mode = async_mode
    config.validator.batch_rows, config.validator.max_batches = 8, 8
    config.metrics.enable_tensorboard = True
    trainer = Trainer(config)
    trainer.metrics_processor.start(0, config.training.steps)
    trainer.step = 2  # the first one logs
    return trainer


class Clock:
    """Times parts of one trainer's loop."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.batches = trainer.batch_generator(trainer.dataloader)

    def step(self) -> float:
        """Seconds of a plain step."""
        self.trainer.step += 1
        return timed(lambda: self.trainer.train_step(self.batches))

    def logged_step(self) -> float:
        """Seconds of a step that is logged: metrics, TensorBoard, a line."""
        frequency = self.trainer.config.metrics.log_freq
        self.trainer.config.metrics.log_freq = 1
        seconds = self.step()
        self.trainer.config.metrics.log_freq = frequency
        return seconds

    def validation(self) -> float:
        """Seconds of a validation of 8 x 8 rows."""
        return timed(self.trainer._validate)

    def save(self) -> float:
        """Seconds that the loop waits for a save."""
        return timed(lambda: self.trainer.checkpointer.save(self.trainer.step))

    def save_in_all(self, plain: float) -> tuple[float, float]:
        """Seconds that the loop waits for a save in the background, and what it costs in all."""
        saver = self.trainer.checkpointer
        waited, done = saver.stall_seconds, saver.saved
        begin, steps = time.perf_counter(), 0
        saver.save(self.trainer.step)
        while steps < BESIDE or saver.saved == done:
            self.step()
            steps += 1
        cost = time.perf_counter() - begin - steps * plain
        return saver.stall_seconds - waited, max(cost, 0.0)


def timed(run: Callable[[], object]) -> float:
    """Seconds of wall time."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(folder: Path, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Seconds of a plain step, and of each part in each round."""
    write_data(folder)
    here = Clock(trainer_of(folder, "waiting", "disabled"))
    behind = Clock(trainer_of(folder, "background", "async"))
    states = here.trainer.checkpointer.states
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for turn in range(rounds + 1):
        steps = [clock.step() for clock in (here, behind) for _ in range(4)]
        plain = statistics.median(steps)
        copied = {name: state.state_dict() for name, state in states.items()}
        parts = {
            "checkpoint, DCP's own save": timed(
                partial(dcp.save, copied, checkpoint_id=str(folder / "dcp" / str(turn)))
            ),
            "checkpoint, saved while the loop waits": here.save(),
        }
        stall, cost = behind.save_in_all(plain)
        parts["checkpoint, in the background: stall"] = stall
        parts["checkpoint, in the background: in all"] = cost
        parts["logging"] = max(here.logged_step() - plain, 0.0)
        parts["validation, 64 rows"] = here.validation()
        if turn:  # the first round warms up
            note("step", plain)
            for name, value in parts.items():
                note(name, value)
    for clock in (here, behind):
        clock.trainer.close()
    return statistics.median(seconds.pop("step")), seconds


def page(step: float, seconds: dict[str, list[float]], surroundings: dict[str, Any]) -> str:
    """Markdown: a line per part."""
    lines = [
        "# What a step pays for checkpoints, logging and validation (row 14)",
        "",
        ", ".join(f"{key}: {value}" for key, value in surroundings.items()),
        "",
        f"20 M parameters, fp32, one process; a plain step takes {step * 1e3:.0f} ms (wall).",
        "",
        f"| part | ms, median | least | most | share of a step, every {EVERY} steps |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(
            f"| {name} | {median * 1e3:.1f} | {min(values) * 1e3:.1f} | {max(values) * 1e3:.1f} "
            f"| {median / EVERY / step:.1%} |"
        )
    stall = statistics.median(seconds["checkpoint, in the background: stall"]) / EVERY / step
    verdict = "met" if stall <= GOAL else "missed"
    lines += ["", f"Goal, stall of a save at most {GOAL:.0%} of a step: {verdict} ({stall:.1%})."]
    return "\n".join(lines) + "\n"


def main(rounds: int = 7) -> None:
    """Measure and write ``results/step_overheads.{md,jsonl}``."""
    torch.set_num_threads(1)
    surroundings = environment()
    with tempfile.TemporaryDirectory() as place:
        step, seconds = measure(Path(place), rounds)
    text = page(step, seconds, surroundings)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_overheads.md").write_text(text)
    lines = [
        json.dumps({"part": name, "seconds": values, "step": step, "environment": surroundings})
        for name, values in seconds.items()
    ]
    (RESULTS / "step_overheads.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
