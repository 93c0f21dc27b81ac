"""A run's folder: what was run (``run.json``), and whether it can be written at all."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

DESCRIPTION, CURVES, SAMPLES = "run.json", "loss_curves.png", "samples.png"
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


def write_description(folder: Path, config: dict[str, Any]) -> None:
    """Write resolved config, source revision and versions to ``run.json``; rank 0 only."""
    if os.environ.get("RANK", "0") != "0":
        return
    description = {
        "command": sys.argv,
        "revision": revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "config": config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps(description, indent=2, default=repr))
    temporary.replace(folder / DESCRIPTION)


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
