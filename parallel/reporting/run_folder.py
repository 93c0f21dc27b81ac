"""Manages a run's folder: its description (``run.json``), the history of its starts
(``history.jsonl``), its lock, and whether it is writable.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from earlyfuse.data.console import printable
from earlyfuse.data.folder_lock import FolderLock
from earlyfuse.data.json_files import JsonObject, load_json, read_json
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.reporting.optional_files import append_line

DESCRIPTION, HISTORY = "run.json", "history.jsonl"
CURVES, SAMPLES = "loss_curves.png", "samples.png"
# time for the processes of a killed run to end: of another run, or, after a restart by the
# launcher, of the previous attempt, whose host may be gone
ENDING_SECONDS, RESTART_SECONDS = 10.0, 120.0
# as torchtitan 0.3.0 finds them; its "l40s" is in no device's name
PEAKS_KNOWN = (
    *("A100", "A6000", "H100", "H200", "H20", "B200", "B300", "GB300"),
    *("MI250X", "MI300X", "MI325X", "MI355X"),
)
_LONGEST_START = 1 << 20  # bytes of a line of the history


def check_writable(folder: Path) -> None:
    """``ValueError`` if ``folder`` cannot be created or written. Creates nothing."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"dump_folder ({folder}) must be writable, but {existing} is "
            f"{'read-only' if existing.is_dir() else 'a file'}; choose another with --dump_folder"
        )


class Reservation:
    """Locks ``folder`` against other runs until ``release`` or the end of this process.

    Rank 0 locks for the whole job. Creates the folder; ``ValueError`` if another run keeps it
    locked for longer than a killed run needs to end.
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
                f"dump_folder ({printable(str(folder))}) is in use by another run; wait for it to "
                "end, stop it, or choose another with --dump_folder"
            )

    def release(self) -> None:
        """Unlock; remove folders created here that are still empty."""
        if self.lock is not None:
            with suppress(OSError):  # not empty
                for path in self.created:
                    path.rmdir()
            self.lock.release()


def write_description(
    folder: Path, config: dict[str, Any], changes: Sequence[dict[str, Any]] = ()
) -> None:
    """Write ``run.json``: resolved config, its changes by resumes, revision, versions. Rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    description = {
        "command": sys.argv,
        **_source(),
        "config": config,
        "changes": list(changes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps(description, indent=2, default=repr))
    temporary.replace(folder / DESCRIPTION)


def _source() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"revision": revision(), "versions": versions}


def append_start(
    folder: Path, step: int, hosts: Sequence[str], changed: Sequence[dict[str, Any]]
) -> None:
    """Append a start after ``step`` to the history: time, command, ranks, and the fields that
    changed since the last one. ``hosts``: of each rank.
    """
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,
        "ranks": len(hosts),
        "hosts": sorted(set(hosts)),
        **_source(),
        "changed": list(changed),
    }
    folder.mkdir(parents=True, exist_ok=True)
    append_line(folder / HISTORY, json.dumps(start, default=repr))


def last_start(folder: Path) -> JsonObject | None:
    """The last whole line of the history, None without any; ``ValueError`` if it is damaged."""
    path, remedy = folder / HISTORY, "remove that line"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_START))
        *whole, _ = file.read().split(b"\n")
    where = f"last line of {path}"
    return JsonObject.of(load_json(whole[-1], where, remedy), where, remedy) if whole else None


def read_description(folder: Path) -> JsonObject:
    """``run.json`` of a run; ``ValueError`` if it is damaged."""
    path = folder / DESCRIPTION
    return read_json(path, "restore it, or start in another folder")


def read_config(folder: Path) -> JsonObject:
    """The resolved config of the run in ``folder``; ``ValueError`` if damaged."""
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
    """True if torchtitan knows this device's peak FLOP/s; it assumes an A100 for others."""
    return any(name in device_name for name in PEAKS_KNOWN)
