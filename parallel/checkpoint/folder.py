"""Checkpoint folders: which are whole, what is in them, and how a new one takes its place.

================================  =================================================================
name in the folder                what it is
================================  =================================================================
``step-300/``                     a complete checkpoint: DCP's files and ``manifest.json``
``step-600.partial/``             being written, or left by a killed run
``step-100.discarded/``           being deleted, or left by a killed run
``latest``                        the name of the checkpoint completed last
================================  =================================================================

A checkpoint is written under its partial name. When all of it and the manifest (SHA-256 of every
file and of itself) are on disk, the folder is renamed and ``latest`` replaced. So ``step-N`` is
complete whatever moment the process is killed, and ``latest`` names a complete one. ``latest`` need
not be the highest: a run taken back to step 3 that has saved step 6 continues from there, not from
the step 9 of before.

The folder must lie on a file system that all ranks share and that renames folders atomically.
"""

import os
import re
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from earlyfuse.data.atomic import (
    atomic_write,
    remove_temporaries,
    sha256_file,
)
from earlyfuse.parallel.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    FileRecord,
    Files,
    Manifest,
    read_latest,
    step_of,
    steps_in,
)

PARTIAL, DISCARDED = ".partial", ".discarded"


class CheckpointFolder:
    """All checkpoints of a run. Writing and deleting is rank 0's; everybody may read."""

    def __init__(self, root: Path):
        self.root = root

    def complete(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is when it is complete."""
        return self.root / f"step-{step}"

    def partial(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is written."""
        return self.root / f"step-{step}{PARTIAL}"

    def discarded(self, step: int) -> Path:
        """Where the checkpoint of ``step`` waits for its deletion."""
        return self.root / f"step-{step}{DISCARDED}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are here, ascending."""
        return steps_in(self.root)

    def to_load(self) -> list[int]:
        """Steps that a run may continue from, the first choice first: the one that ``latest``
        names, be it there or not, then those before it.

        Without ``latest``, which is written after the first checkpoint, the highest comes first.
        ``ValueError`` if ``latest`` is damaged.
        """
        steps, latest = self.steps(), read_latest(self.root)
        if latest is None:
            return steps[::-1]
        return [latest, *(step for step in reversed(steps) if step < latest)]

    def restore_replaced(self) -> None:
        """Take back a checkpoint that was set aside for its successor, if a kill has come before
        the successor had its place.
        """
        for aside in self.root.glob(f"step-*{DISCARDED}"):
            step = step_of(aside.name.removesuffix(DISCARDED))
            if step is None or self.complete(step).exists():
                continue
            if (self.partial(step) / MANIFEST).is_file():
                aside.rename(self.complete(step))

    def prepare(self, step: int) -> None:
        """Make an empty partial folder; what interrupted saves have left goes."""
        self.root.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.root)
        for suffix in (PARTIAL, DISCARDED):
            for leftover in self.root.glob(f"step-*{suffix}"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.partial(step).mkdir()

    def commit(self, manifest: Manifest) -> Path | None:
        """Let the partial folder become the checkpoint of its step, and ``latest`` name it.

        Returns the folder of an older checkpoint of the same step, to be deleted, if there was one.
        Raises ``OSError`` with everything as it was before if the disk is full.
        """
        partial, complete = self.partial(manifest.step), self.complete(manifest.step)
        for name, record in manifest.files.items():
            if (partial / name).stat().st_size != record.bytes:
                raise OSError(f"{partial / name} has not the size that its writer gave it")
        write_manifest(partial, manifest)
        with atomic_write(self.root / LATEST) as file:
            file.write(f"{complete.name}\n".encode())
            file.flush()
            os.fsync(file.fileno())  # nothing after the renames can want for space
            replaced = self.set_aside(manifest.step) if complete.exists() else None
            try:
                partial.rename(complete)
            except OSError:
                if replaced is not None:
                    replaced.rename(complete)
                raise
        return replaced

    def set_aside(self, step: int) -> Path:
        """Rename a checkpoint that is to be deleted: none is ever half deleted under its name."""
        discarded = self.discarded(step)
        shutil.rmtree(discarded, ignore_errors=True)
        return self.complete(step).rename(discarded)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into a checkpoint's folder."""
    with atomic_write(folder / MANIFEST) as file:
        file.write(manifest.written())


def describe(folder: Path, rank: int) -> Files:
    """Size and checksum of the files that ``rank`` wrote; rank 0 adds those of no rank."""
    files: Files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        writer = re.match(r"__(\d+)_", path.name)
        if rank == (int(writer[1]) if writer else 0):
            name = path.relative_to(folder).as_posix()
            files[name] = FileRecord(path.stat().st_size, sha256_file(path))
    return files


def damage(folder: Path, files: Files) -> list[str]:
    """What is wrong with ``files`` of a checkpoint, a line for each that is not as written."""
    found = []
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != record.bytes:
            found.append(f"{name} has {size} bytes instead of {record.bytes}")
        elif sha256_file(path) != record.sha256:
            found.append(f"{name} has another SHA-256 than when it was written")
    return found


class Writer(dcp.FileSystemWriter):
    """DCP's writer, whose bytes depend on the state and the layout alone, and whose errors tell.

    DCP would note a random id and the folder's path in ``.metadata``, and hide the disk's error
    behind that of the serialiser it interrupted.
    """

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: neither id nor path."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part; raises the ``OSError`` at the root of a failure, if one is."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            root: BaseException | None = error
            while root is not None and not isinstance(root, OSError):
                root = root.__cause__ or root.__context__
            if root is None or root is error:
                raise
            raise OSError(root.errno, root.strerror, str(self.path)) from error
