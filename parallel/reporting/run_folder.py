"""Manages a run's folder: its description (``run.json``), its lock, and whether it is writable."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from earlyfuse.data.console import printable
from earlyfuse.data.folder_lock import FolderLock
from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.parallel.reporting import rank_log

DESCRIPTION, CURVES, SAMPLES = "run.json", "loss_curves.png", "samples.png"
# how long the processes of a run that was killed may need to be gone: of another one, or, for ranks
# that a launcher has started again, of the attempt before, which may be on a host that went away
ENDING_SECONDS, RESTART_SECONDS = 10.0, 120.0
PEAKS_KNOWN = ("A100", "H100", "H200", "B200", "A6000", "MI250", "MI300", "MI325", "MI355", "L40S")


def check_writable(folder: Path) -> None:
    """``ValueError`` if ``folder`` cannot be created or written; creates nothing."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"dump_folder ({folder}) must be a folder that can be written, but {existing} is "
            f"{'read-only' if existing.is_dir() else 'a file'}; choose another with --dump_folder"
        )


class Reservation:
    """Keeps other runs out of ``folder`` until ``release``, or until this process ends.

    One for a job: rank 0 takes it, the others take none. Creates the folder and writes nothing;
    ``ValueError`` if another run has it, and not only because it was killed and still ends.
    """

    def __init__(self, folder: Path):
        self.created: list[Path] = []
        self.lock: FolderLock | None = None
        if os.environ.get("RANK", "0") != "0":
            return
        self.created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(folder, rank_log.tell)
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if not self.lock.acquire(RESTART_SECONDS if restarted else ENDING_SECONDS):
            raise ValueError(
                f"dump_folder ({printable(str(folder))}) is in use by another run, and two would "
                "overwrite each other's checkpoints; wait for it to end, stop it, or choose "
                "another with --dump_folder"
            )

    def release(self) -> None:
        """Let other runs in; folders that were made for a run that has written nothing go."""
        if self.lock is not None:
            with suppress(OSError):  # they are no longer empty
                for path in self.created:
                    path.rmdir()
            self.lock.release()


def write_description(
    folder: Path, config: dict[str, Any], changes: Sequence[dict[str, Any]] = ()
) -> None:
    """Write resolved config, what resumes have changed in it, source revision and versions to
    ``run.json``; rank 0 only.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    description = {
        "command": sys.argv,
        "revision": revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "config": config,
        "changes": list(changes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps(description, indent=2, default=repr))
    temporary.replace(folder / DESCRIPTION)


def read_description(folder: Path) -> JsonObject:
    """``run.json`` of a run; ``ValueError`` if it is damaged."""
    path = folder / DESCRIPTION
    return read_json(path, "restore it, or begin anew in another folder")


def read_config(folder: Path) -> JsonObject:
    """The resolved config of the run in ``folder``; ``ValueError`` if that is damaged."""
    return read_description(folder).object("config")


def revision() -> str:
    """Git revision of this source tree, "-dirty" with local changes; "unknown" outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def knows_peak(device_name: str) -> bool:
    """Whether torchtitan knows this device's peak FLOP/s; it takes others for an A100."""
    return any(name in device_name for name in PEAKS_KNOWN)
