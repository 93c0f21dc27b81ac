"""Chooses the checkpoint to resume from: the one completed last, verified by all ranks together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from earlyfuse.parallel.checkpoint.folder import CheckpointFolder
from earlyfuse.parallel.checkpoint.layout import LATEST, names_in
from earlyfuse.parallel.checkpoint.lost_checkpoints import lost_checkpoints
from earlyfuse.parallel.checkpoint.manifest import EVERYTHING, damage, read_manifest


def choose(
    disk: CheckpointFolder,
    run: Path,
    wanted: int,
    *,
    fallback: bool,
    warn: Callable[[str], None],
    group: dist.ProcessGroup | None,
) -> int:
    """The step to load, -1 if there is no checkpoint; the same on all ranks of ``group``.

    ``wanted``: a step, or -1 for the one completed last. ``fallback``: if that one is damaged, take
    the newest intact one before it. ``ValueError`` names what is wrong.
    """
    candidates = _candidates(disk, run, wanted, group)
    for step in candidates:
        folder = disk.complete(step)
        found = damage_seen_by_all(folder, group)
        if not found:
            _check_holds_everything(folder, step)
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


def _candidates(
    disk: CheckpointFolder, run: Path, wanted: int, group: dist.ProcessGroup | None
) -> list[int]:
    """Steps that may be loaded, the first choice first, as rank 0 sees them."""
    found = _candidates_here(disk, run, wanted) if dist.get_rank(group) == 0 else None
    box: list[Any] = [found]
    dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], str):
        raise ValueError(box[0])
    return box[0]


def _candidates_here(disk: CheckpointFolder, run: Path, wanted: int) -> list[int] | str:
    """The candidates, or why there are none."""
    try:
        disk.restore_replaced()
        steps = disk.steps()
        if wanted == -1:
            return disk.to_load() or lost_checkpoints(run, disk.root) or []
    except (ValueError, OSError) as error:
        return str(error)
    if wanted not in steps:
        return (
            f"checkpoint.load_step ({wanted}) must be a step with a checkpoint in {disk.root}: "
            f"{steps or 'there is none'}"
        )
    return [step for step in reversed(steps) if step <= wanted]


def _check_holds_everything(folder: Path, step: int) -> None:
    if step and read_manifest(folder).holds != EVERYTHING:
        raise ValueError(
            f"checkpoint {folder} holds only weights (checkpoint.last_save_model_only), so a run "
            "cannot resume from it. Load an earlier one with --checkpoint.load_step, or start a "
            "new run from it with --checkpoint.initial_load_path and another --dump_folder"
        )


def damage_seen_by_all(folder: Path, group: dist.ProcessGroup | None = None) -> str:
    """Damage of a checkpoint, "" if it is intact; each rank of ``group`` verifies its share."""
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
