"""A tiny run that meets faults at known places: started by ``test_faults.py`` under a launcher.

    … fault_ranks.py HARMED CALM DATA FAULT …

Each FAULT happens once in the life of the run folder HARMED, however often the job is started
again. The start that brings it to its end then does the same run undisturbed, in CALM. In steps 3
and 14 the loss of rank 1 is not a number, always: that is part of the run.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_runs import tiny_config
from torch.distributed.tensor import DTensor

from earlyfuse.models.objectives.sums import LABELS
from earlyfuse.parallel.checkpoint.folder import CheckpointFolder
from earlyfuse.parallel.evaluation.validation import Validation
from earlyfuse.parallel.reliability import preemption
from earlyfuse.parallel.trainer import Trainer

STEPS, NOT_A_NUMBER = 20, (3, 14)


def main(harmed: Path, calm: Path, data: Path, faults: list[str]) -> None:
    preemption.listen()
    if run(harmed, data, faults) == STEPS:
        run(calm, data, [])


def run(folder: Path, data: Path, faults: list[str]) -> int:
    """Train until the end or a stop; returns the step reached."""
    rank = int(os.environ["RANK"])
    config = tiny_config(folder, data, steps=STEPS)
    config.checkpoint.interval, config.validator.batch_rows = 4, 4
    config.watchdog.timeout_seconds, config.watchdog.slow_timeout_seconds = 8.0, 90.0
    trainer = config.build()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 1:
        spoil_losses(trainer)
    with ExitStack() as arranged:
        for name in faults:
            if FAULTS[name][0] == rank:
                arranged.enter_context(arrange(trainer, folder, name))
        trainer.train()
    full = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in (trainer.model.state_dict() | optimizer_state(trainer)).items()
    }
    if rank == 0:
        torch.save(full, folder / "final.pt")
    trainer.close()
    return trainer.step


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.optimizers.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def spoil_losses(trainer: Trainer) -> None:
    loss_of = trainer.loss_fn.loss_of

    def spoiled(*batch: Any) -> Any:
        def loss(*head: torch.Tensor, **shard: Any) -> Any:
            found = loss_of(*batch)(*head, **shard)
            if trainer.step not in NOT_A_NUMBER or not torch.is_grad_enabled():
                return found
            sums = found.sums | {"loss": found.sums["loss"] * torch.nan}
            return found._replace(totals={LABELS: found.total * torch.nan}, sums=sums)

        return loss

    trainer.loss_fn.loss_of = spoiled


def arrange(trainer: Trainer, folder: Path, name: str) -> AbstractContextManager[Any]:
    """Let the fault happen at the entry of its function, in its step, if it has not yet."""
    _, step, owner, function, fault = FAULTS[name]
    marker, whole = folder / f"fault-{name}", getattr(owner, function)

    def faulty(*arguments: Any, **options: Any) -> Any:
        if trainer.step == step and not marker.exists():
            marker.touch()
            fault(folder / f"go-{name}")
        return whole(*arguments, **options)

    return mock.patch.object(owner, function, faulty)


def die(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for(go: Path) -> None:
    while not go.exists():
        time.sleep(0.01)


Fault = tuple[int, int, type, str, Callable[[Path], None]]
FAULTS: dict[str, Fault] = {
    "killed-in-a-step": (1, 6, Trainer, "_forward_backward", die),
    "killed-in-a-checkpoint": (0, 8, CheckpointFolder, "commit", die),
    "killed-in-validation": (1, 9, Validation, "measure", die),
    # the launcher lets rank 0 hold the store through which ranks tell where they stand
    "frozen": (0, 11, Trainer, "_forward_backward", freeze),
    # these wait until the test has sent a signal; steps 12, 16 and 20 are saved anyway
    "launcher-asked": (0, 13, Trainer, "train_step", wait_for),
    "rank-asked": (1, 17, Trainer, "train_step", wait_for),
}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
