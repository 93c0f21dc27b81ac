"""Commits checkpoints to a run's folder; ``layout`` has the names.

A checkpoint is written under its partial name. When all of it and the manifest are on disk, the
folder is renamed and ``latest`` replaced. So ``step-N`` is complete whenever the process is killed,
and ``latest`` names a complete one. ``latest`` need not be the highest step: a run resumed from
step 3 that has saved step 6 resumes from there, not from an earlier attempt's step 9.

The folder must be on a file system that all ranks share and that renames folders atomically.
"""

import os
import shutil
from pathlib import Path

from earlyfuse.data.atomic import atomic_write, remove_temporaries
from earlyfuse.parallel.checkpoint.file_layout import (
    DISCARDED,
    LATEST,
    PARTIAL,
    read_latest,
    step_of,
    steps_in,
)
from earlyfuse.parallel.checkpoint.manifest import MANIFEST, Manifest


class CheckpointFolder:
    """All checkpoints of a run; rank 0 alone writes and deletes."""

    def __init__(self, root: Path):
        self.root = root

    def complete(self, step: int) -> Path:
        """Returns the folder of the complete checkpoint of ``step``."""
        return self.root / f"step-{step}"

    def partial(self, step: int) -> Path:
        """Returns the folder in which the checkpoint of ``step`` is written."""
        return self.root / f"step-{step}{PARTIAL}"

    def steps(self) -> list[int]:
        """Lists the steps of the complete checkpoints, ascending."""
        return steps_in(self.root)

    def to_load(self) -> list[int]:
        """Lists steps to resume from, the first choice first: the one in ``latest``, even if its
        folder is gone, then those before it. Without ``latest``, which is written after the first
        checkpoint, the highest comes first. ``ValueError`` if ``latest`` is damaged.
        """
        steps, latest = self.steps(), read_latest(self.root)
        if latest is None:
            return steps[::-1]
        return [latest, *(step for step in reversed(steps) if step < latest)]

    def restore_replaced(self) -> None:
        """Restores a checkpoint that was set aside for its successor, if the run was killed before
        the successor was renamed.
        """
        for aside in self.root.glob(f"step-*{DISCARDED}"):
            step = step_of(aside.name.removesuffix(DISCARDED))
            if step is None or self.complete(step).exists():
                continue
            if (self.partial(step) / MANIFEST).is_file():
                aside.rename(self.complete(step))

    def prepare(self, step: int) -> None:
        """Creates an empty partial folder; removes leftovers of interrupted saves."""
        self.root.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.root)
        for suffix in (PARTIAL, DISCARDED):
            for leftover in self.root.glob(f"step-*{suffix}"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.partial(step).mkdir()

    def commit(self, manifest: Manifest) -> Path | None:
        """Renames the partial folder to its step, and writes it to ``latest``.

        Returns the folder of a replaced checkpoint of the same step, to be deleted. ``OSError``,
        with everything unchanged, if the disk is full.
        """
        partial, complete = self.partial(manifest.step), self.complete(manifest.step)
        for name, record in manifest.files.items():
            if (partial / name).stat().st_size != record.bytes:
                raise OSError(f"{partial / name} does not have the size that was written")
        manifest.write(partial)
        with atomic_write(self.root / LATEST) as file:
            file.write(f"{complete.name}\n".encode())
            file.flush()
            os.fsync(file.fileno())  # nothing after the renames can run out of space
            replaced = self.set_aside(manifest.step) if complete.exists() else None
            try:
                partial.rename(complete)
            except OSError:
                if replaced is not None:
                    replaced.rename(complete)
                raise
        return replaced

    def set_aside(self, step: int) -> Path:
        """Renames a checkpoint that is to be deleted, so none is half deleted under its name."""
        discarded = self.root / f"step-{step}{DISCARDED}"
        shutil.rmtree(discarded, ignore_errors=True)
        return self.complete(step).rename(discarded)
