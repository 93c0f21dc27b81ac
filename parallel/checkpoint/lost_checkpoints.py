"""Detects a run that has lost its checkpoints, so that it is not mistaken for a new one."""

from pathlib import Path

from earlyfuse.data.json_files import load_json
from earlyfuse.parallel.checkpoint.layout import PARTIAL
from earlyfuse.parallel.reporting.metrics_file import METRICS_FILE
from earlyfuse.parallel.reporting.run_folder import CURVES, DESCRIPTION, read_config

_TAIL = 1 << 20  # bytes at the end of a log that are searched for its last line


def lost_checkpoints(folder: Path, root: Path) -> str:
    """Why the run in ``folder``, which has no checkpoint in ``root``, must not begin at step 0; ""
    if a kill before its first checkpoint explains that there is none.

    A checkpoint is complete before the next step begins (or its partial folder is still there) and
    before the curves are drawn.
    """
    trained = _last_logged_step(folder / METRICS_FILE)
    if not trained:
        return ""
    interval = 1
    if (folder / DESCRIPTION).exists():
        settings = read_config(folder).object("checkpoint")
        if not settings.field("enable", bool) or settings.field("load_only", bool, default=False):
            return ""
        interval = settings.field("interval", int, least=1)
    interrupted = any(root.glob(f"step-*{PARTIAL}"))
    if not (folder / CURVES).exists() and (trained <= interval or interrupted):
        return ""
    return (
        f"the run in {folder} has been trained to step {trained}, as its {METRICS_FILE} says, and "
        f"{root} has no checkpoint of it: it was removed, or could not be written. To begin at "
        "step 0 would erase that log. Restore the checkpoints, or choose another --dump_folder"
    )


def _last_logged_step(path: Path) -> int:
    """The step of the last whole line of ``metrics.jsonl``; 0 if there is none."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read(_TAIL).split(b"\n")
    for line in reversed(lines):
        try:
            step = load_json(line, str(path), "")["step"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill, or the end of one that began before the tail
        if type(step) is int:
            return step
    return 0
