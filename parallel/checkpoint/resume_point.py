"""Chooses the checkpoint to resume from: the one completed last, verified by all ranks together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from earlyfuse.data.json_files import load_json
from earlyfuse.parallel.checkpoint.file_layout import LATEST, PARTIAL, names_in
from earlyfuse.parallel.checkpoint.folder import CheckpointFolder
from earlyfuse.parallel.checkpoint.manifest import EVERYTHING, damage, read_manifest
from earlyfuse.parallel.reporting.metrics_file import METRICS_FILE
from earlyfuse.parallel.reporting.run_folder import CURVES, DESCRIPTION, read_config

_TAIL = 1 << 20  # bytes at the end of a log that are searched for its last line


def choose(
    disk: CheckpointFolder,
    run: Path,
    wanted: int,
    *,
    fallback: bool,
    warn: Callable[[str], None],
    group: dist.ProcessGroup | None,
) -> int:
    """Returns the step to load, -1 if there is no checkpoint; the same on all ranks of ``group``.

    ``wanted``: a step, or -1 for the one completed last. ``fallback``: if that one is damaged, take
    the newest intact one before it. ``ValueError`` names what is wrong.
    """
    candidates = _candidates(disk, run, wanted, group)
    for step in candidates:
        folder = disk.complete(step)
        found = damage_seen_by_all(folder, group)
        if not found:
            if step and read_manifest(folder).holds != EVERYTHING:
                raise ValueError(
                    f"checkpoint {folder} holds only weights (checkpoint.last_save_model_only), so "
                    "a run cannot resume from it. Load an earlier one with --checkpoint.load_step, "
                    "or start a new run from it with --start.model and another "
                    "--dump_folder"
                )
            return step
        if not fallback:
            raise ValueError(
                f"checkpoint {folder} is damaged: {found}. Restore the files, or load the newest "
                "intact one before it with --checkpoint.fallback"
            )
        warn(f"skipped checkpoint {folder}: {found}")
    if candidates:
        raise ValueError(
            f"no checkpoint in {disk.root} is intact (tried steps {candidates}); restore one, or "
            "start a new run with another --dump_folder"
        )
    return -1


def damage_seen_by_all(folder: Path, group: dist.ProcessGroup | None = None) -> str:
    """Describes damage to a checkpoint, "" if intact; each rank of ``group`` verifies a share."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    try:
        if not folder.is_dir():
            there = names_in(folder.parent)
            raise ValueError(f"its folder is not there, though {LATEST} names it (there: {there})")
        files = read_manifest(folder).files
        share = sorted(files)[rank::world]
        found = damage(folder, {name: files[name] for name in share})
    except (ValueError, OSError) as error:
        found = [str(error)]
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, found, group=group)
    lines = sorted({line for share in shares for line in share})
    return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")


def _candidates(
    disk: CheckpointFolder, run: Path, wanted: int, group: dist.ProcessGroup | None
) -> list[int]:
    """Lists steps that may be loaded, the first choice first, as rank 0 sees them."""
    box: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            box = [_candidates_on_disk(disk, run, wanted)]
        except (ValueError, OSError) as error:
            box = [str(error)]
    dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], str):
        raise ValueError(box[0])
    return box[0]


def _candidates_on_disk(disk: CheckpointFolder, run: Path, wanted: int) -> list[int]:
    disk.restore_replaced()
    steps = disk.steps()
    if wanted == -1:
        candidates = disk.to_load()
        if not candidates:
            _check_not_lost(run, disk.root)
        return candidates
    if wanted not in steps:
        raise ValueError(
            f"checkpoint.load_step ({wanted}) must be a step with a checkpoint in {disk.root}: "
            f"{steps or 'there is none'}"
        )
    return [step for step in reversed(steps) if step <= wanted]


def _check_not_lost(run: Path, root: Path) -> None:
    """``ValueError`` if a run without checkpoints must not begin at step 0, because it has had
    some.

    A checkpoint is complete before the next step begins (or its partial folder is still there) and
    before the curves are drawn, so a kill before the first one is told from lost checkpoints.
    """
    trained = _last_logged_step(run / METRICS_FILE)
    interval = 1
    if trained and (run / DESCRIPTION).exists():
        settings = read_config(run).object("checkpoint")
        if not settings.field("enable", bool) or settings.field("load_only", bool, default=False):
            return
        interval = settings.field("interval", int, least=1)
    interrupted = any(root.glob(f"step-*{PARTIAL}"))
    if not trained or (not (run / CURVES).exists() and (trained <= interval or interrupted)):
        return
    raise ValueError(
        f"the run in {run} has been trained to step {trained} ({METRICS_FILE}), but {root} has no "
        "checkpoint of it, and starting at step 0 would erase that log. Restore the checkpoints, "
        "or choose another --dump_folder"
    )


def _last_logged_step(path: Path) -> int:
    """Returns the step of the last whole line of ``metrics.jsonl``; 0 if there is none."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read(_TAIL).split(b"\n")
    for line in reversed(lines):
        try:
            step = load_json(line, str(path), "")["step"]
        except (ValueError, KeyError, TypeError):
            continue  # truncated by a kill, or by the start of the tail
        if type(step) is int:
            return step
    return 0
