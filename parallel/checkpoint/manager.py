"""Checkpoints: torchtitan's DCP manager, made safe against kills, full disks and damaged files.

What is on disk, and why a killed save does no harm: ``checkpoint_files``. Here is who does what:

1. rank 0 makes the partial folder;
2. every rank writes its part through DCP, then reads it back for its checksums;
3. rank 0 writes the manifest, renames the folder, replaces ``latest``, and deletes what is old.

After each part all ranks learn how it went everywhere. An error of the disk on any of them gives
this save up: rank 0 says so, older checkpoints stay, training goes on. With ``async_mode`` parts 2
and 3 run in the background, over a process group that nothing else uses, so that their collectives
never meet those of training.

Loading verifies the files first, each rank its share; then a checkpoint of another model, or of a
run on other data, is refused by name before anything is overwritten.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torchtitan.components.checkpointer import MODEL, OPTIMIZER, CheckpointManager
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools import filesystem
from torchtitan.tools.utils import GarbageCollection

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.json_files import read_json
from earlyfuse.models.state_dicts.config_json import CONFIG, REMEDY
from earlyfuse.models.state_dicts.decoder_config import to_dict
from earlyfuse.parallel.checkpoint import initial_load
from earlyfuse.parallel.checkpoint.files.dcp import Writer
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader, load_dcp
from earlyfuse.parallel.checkpoint.folder import CheckpointFolder
from earlyfuse.parallel.checkpoint.identity import (
    refuse_other_function,
    refuse_other_model,
    refuse_other_run,
)
from earlyfuse.parallel.checkpoint.layout import LATEST, names_in, step_of
from earlyfuse.parallel.checkpoint.lost_checkpoints import lost_checkpoints
from earlyfuse.parallel.checkpoint.manifest import (
    EVERYTHING,
    MANIFEST,
    WEIGHTS,
    Manifest,
    damage,
    describe,
    read_manifest,
)
from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.training.resume_settings import Settings
from earlyfuse.parallel.training.skip_step import not_finite


class Checkpoints(CheckpointManager):
    """Writes <run folder>/checkpoint/step-N and loads the one completed last.

    ``newest`` is the step of the last checkpoint that is known to be whole, None before there is
    one; ``gave_up`` that of the last one that could not be written; ``saved`` and ``failed`` count
    saves; ``stall_seconds`` is how long saving has kept the training loop waiting. All ranks agree
    on all but the last. ``description``, if set, becomes the
    ``config.json`` of every checkpoint: what model it is of, for those who find the folder alone.
    ``steps``, if set: how long the run is; a checkpoint from beyond is refused. ``settings``, if
    set, are noted in every checkpoint; one of which a resume would change what is fixed is refused.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        enable: bool = True
        """Save checkpoints, and resume from the latest in the run folder."""

        keep_latest_k: int = 3
        """Checkpoints to keep, at least 2; 0 keeps all."""

        last_save_model_only: bool = False
        """Save only weights at the last step; the run can then not be continued."""

        initial_load_path: str | None = None
        """Folder of a model to begin with, where the run has no checkpoint: a checkpoint, a run, an
        export, or one of Hugging Face's, Meta's or mamba_ssm's (docs/conversion.md)."""

        fallback: bool = False
        """When the checkpoint to load is damaged, take the newest intact one before it."""

        def __post_init__(self) -> None:
            if self.initial_load_path and not filesystem.is_remote(self.initial_load_path):
                self.initial_load_path = os.path.abspath(self.initial_load_path.strip())
            CheckpointManager.Config.__post_init__(self)
            if self.initial_load_in_hf or self.initial_load_in_hf_quantized:
                raise ValueError(
                    "checkpoint.initial_load_in_hf must be off: initial_load_path takes a Hugging "
                    "Face folder as it is (docs/conversion.md)"
                )
            if self.last_save_in_hf:
                raise ValueError(
                    "checkpoint.last_save_in_hf must be off: save a checkpoint, then convert it "
                    "with tools.convert --to hf (docs/conversion.md)"
                )
            if filesystem.is_remote(self.folder):
                raise ValueError(
                    f"checkpoint.folder ({self.folder}) must be on a file system: object stores "
                    "cannot rename a folder in one step. Use a shared folder and copy from there"
                )

    pg: dist.ProcessGroup | None
    stager: DefaultStager | None
    initial_load_path: str | None

    def __init__(self, config: Config, **built: Any):
        pinned = config.enable and config.async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM
        if pinned and not torch.cuda.is_available():
            raise ValueError(
                f"checkpoint.async_mode ({config.async_mode}) must be async or disabled without a "
                "CUDA device: there is no memory to pin for"
            )
        self.newest: int | None = None
        self.gave_up: int | None = None
        self.description: dict[str, Any] | None = None
        self.steps: int | None = None
        self.settings: Settings | None = None
        self.saved, self.failed, self.stall_seconds = 0, 0, 0.0
        self.run = Path(built.get("base_folder", ""))
        super().__init__(config, **built)
        if not self.enable:
            return
        self.fallback, self.disk = config.fallback, CheckpointFolder(Path(self.folder))
        if self.pg is None:
            self.pg = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self.rank = dist.get_rank(self.pg)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._of_this_run: set[int] = set()

    # ---------------------------------------------------------------- save

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """True if a checkpoint was written, or its background write begun.

        Raises ``RuntimeError`` on all ranks if any of them holds a value that is not finite.
        """
        if not self._should_save(curr_step, last_step):
            return False
        begin = time.perf_counter()
        self.maybe_wait_for_saving()
        self._check_finite(curr_step)
        failed = self.failed
        super()._save(curr_step, last_step)
        self.stall_seconds += time.perf_counter() - begin
        return self.failed == failed

    def _check_finite(self, step: int) -> None:
        """A parameter that no token of a step has used spoils no loss, and would be saved."""
        states = self.states[MODEL].state_dict() | self.states[OPTIMIZER].state_dict()
        found: list[Any] = [None] * dist.get_world_size(self.pg)
        dist.all_gather_object(found, not_finite(states), group=self.pg)
        ranks = [rank for rank, names in enumerate(found) if names]
        if not ranks:
            return
        names = list(dict.fromkeys(name for names in found for name in names))
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        good = "none" if self.newest is None else self.disk.complete(self.newest)
        raise RuntimeError(
            f"{', '.join(names[:4])}{more} on ranks {ranks} are not finite at step {step}, so it "
            "is not saved: no later step could be right; resume from the last good checkpoint, "
            f"{good}"
        )

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future | AsyncSaveResponse | None:
        """Save as the checkpoint folder ``checkpoint_id``; torchtitan's futures in async modes.

        An error of the disk is reported and counted, not raised.
        """
        step = step_of(Path(checkpoint_id).name)
        assert step is not None, checkpoint_id
        holds = EVERYTHING if OPTIMIZER in state_dict else WEIGHTS
        partial = self.disk.partial(step)
        _, errors = self._together(lambda: self._prepare(step) if self.rank == 0 else None)
        if errors:
            self._give_up(step, errors)
            return _nothing_begun(async_mode)
        if async_mode == AsyncMode.DISABLED:
            self._finish(step, holds, lambda: self._write(state_dict, partial))
            if enable_garbage_collection:
                GarbageCollection.collect("garbage collection after a checkpoint")
            return None
        begun = self._begin(state_dict, partial, async_mode)
        if isinstance(begun, AsyncSaveResponse):
            upload = begun.upload_completion
            done = self._finisher.submit(self._finish, step, holds, upload.result)
            return AsyncSaveResponse(begun.staging_completion, done)
        return self._finisher.submit(self._finish, step, holds, begun.result)

    def _prepare(self, step: int) -> None:
        self.disk.prepare(step)
        if self.description is not None:
            atomic_write_json(self.disk.partial(step) / CONFIG, self.description)
        if self.settings is not None:
            self.settings.write(self.disk.partial(step))

    def _write(self, state_dict: dict[str, Any], partial: Path) -> None:
        dcp.save(state_dict, storage_writer=Writer(partial), process_group=self.pg)

    def _begin(
        self, state_dict: dict[str, Any], partial: Path, async_mode: AsyncMode
    ) -> Future | AsyncSaveResponse:
        """Copy the state to host memory and let DCP write it in the background."""
        pinned = async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM
        if self.stager is None:  # kept: its buffers serve all saves
            self.stager = DefaultStager(StagingOptions(pinned, pinned, pinned, pinned))
        return dcp.async_save(
            state_dict,
            storage_writer=Writer(partial),
            process_group=self.pg,
            async_checkpointer_type=(
                AsyncCheckpointerType.PROCESS if pinned else AsyncCheckpointerType.THREAD
            ),
            async_stager=self.stager,
        )

    def _finish(self, step: int, holds: str, write: Callable[[], object]) -> None:
        """Parts 2 and 3: ``write`` ends when this rank's files are written."""
        partial = self.disk.partial(step)

        def write_and_describe() -> dict[str, Any]:
            write()
            return describe(partial, self.rank)

        parts, errors = self._together(write_and_describe)
        if not errors:
            files = {name: record for part in parts for name, record in part.items()}
            manifest = Manifest(step, holds, len(parts), files)
            replaced, errors = self._together(
                lambda: self.disk.commit(manifest) if self.rank == 0 else None
            )
        if errors:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self._give_up(step, errors)
            return
        self.saved, self.newest = self.saved + 1, step
        self._of_this_run.add(step)
        if self.rank == 0:
            self._delete(replaced[0])
            self._purge()

    def _together(self, action: Callable[[], Any]) -> tuple[list[Any], dict[int, OSError]]:
        """Run ``action`` on all ranks; returns its values by rank, and the ranks' disk errors.

        Any other error of one rank is raised on all of them: it would come back at every save.
        """
        outcome: Any
        try:
            outcome = action()
        except CheckpointException as error:  # DCP has told all ranks already
            outcome = error.failures.get(self.rank, (None, None))[0]
        except Exception as error:
            outcome = error
        if isinstance(outcome, BaseException) and not isinstance(outcome, OSError):
            outcome = RuntimeError(f"{type(outcome).__name__}: {outcome}")
        outcomes: list[Any] = [None] * dist.get_world_size(self.pg)
        dist.all_gather_object(outcomes, outcome, group=self.pg)
        for rank, result in enumerate(outcomes):
            if isinstance(result, RuntimeError):
                raise RuntimeError(f"checkpoint: rank {rank}: {result}") from result
        return outcomes, {r: v for r, v in enumerate(outcomes) if isinstance(v, OSError)}

    def _give_up(self, step: int, errors: dict[int, OSError]) -> None:
        self.failed += 1
        self.gave_up = step
        causes = "; ".join(f"rank {rank}: {error}" for rank, error in errors.items())
        good = "there is none yet" if self.newest is None else self.disk.complete(self.newest)
        self._warn(
            f"the checkpoint of step {step} could not be written: {causes}. The run goes "
            f"on without it; the newest good one: {good}"
        )

    def _warn(self, line: str) -> None:
        if self.rank == 0:
            rank_log.tell(f"warning: {line}")

    # ---------------------------------------------------------------- keep and delete

    def _purge_stale_checkpoints(self) -> None:
        """Nothing at this point: ``_finish`` purges, once the new checkpoint is complete."""

    def _purge(self) -> None:
        """Delete all but the newest ``keep_latest_k`` of this run's past; an error is only said.

        Steps beyond the one loaded, left by a run that was taken back to it, count as past once
        this run has saved them anew; until then they neither count nor go.
        """
        past = [step for step in self.disk.steps() if step in self._of_this_run]
        for step in past[: -self.keep_latest_k] if self.keep_latest_k else []:
            try:
                self._delete(self.disk.set_aside(step))
            except OSError as error:
                self._warn(f"the old checkpoint of step {step} is still there: {error}")

    def _delete(self, folder: Path | None) -> None:
        if folder is None:
            return
        if self.purge_thread is not None:
            self.purge_queue.put(str(folder))
        else:
            shutil.rmtree(folder, ignore_errors=True)

    # ---------------------------------------------------------------- wait and end

    def _maybe_wait_for_staging(self) -> None:
        begin = time.perf_counter()
        super()._maybe_wait_for_staging()
        self.stall_seconds += time.perf_counter() - begin

    def _close(self) -> None:
        """Wait for the save in the background, if there is one, and for deletions."""
        if hasattr(self, "_finisher"):
            self._finisher.shutdown()
        super()._close()

    # ---------------------------------------------------------------- load

    def _load(self, step: int = -1) -> bool:
        """Load ``step``, or the checkpoint completed last; verifies it before anything is loaded.

        Raises ``ValueError`` naming what is wrong with it, unless ``fallback`` finds another.
        """
        chosen = self._choose(step)
        if self.steps is not None and chosen > self.steps:
            raise ValueError(
                f"training.steps ({self.steps}) must be at least {chosen}, the step of the "
                f"checkpoint in {self.folder}; raise it, load an earlier one with "
                "--checkpoint.load_step, or start anew with another --dump_folder"
            )
        if chosen == -1 and self.initial_load_path:
            begun = initial_load.find(Path(self.initial_load_path))
            if isinstance(begun, OpenModel):
                return self._load_opened(begun)
            if (begun / MANIFEST).is_file() and (found := self._damage(begun)):
                raise ValueError(f"checkpoint.initial_load_path ({begun}) is damaged: {found}")
            self.initial_load_path = str(begun)
        loaded = super()._load(chosen)
        if chosen != -1:
            self.newest = chosen
            self._of_this_run = {step for step in self.disk.steps() if step <= chosen}
        return loaded

    def _load_opened(self, opened: OpenModel) -> bool:
        """Begin with the weights of a model that is no checkpoint."""
        if not self.initial_load_model_only:
            raise ValueError(
                f"checkpoint.initial_load_path ({opened.folder}) holds only weights, and "
                "checkpoint.initial_load_model_only is off; turn it on, or give a checkpoint"
            )
        model = self.states[MODEL].state_dict()
        shapes = {name: entry.shape for name, entry in opened.tensors.entries.items()}
        refuse_other_function(self.description, to_dict(opened.config), opened.folder)
        refuse_other_model(model, model, shapes, opened.folder)
        initial_load.load_whole(model, opened.tensors)
        return True

    def _find_load_step(self, folder: str = "") -> int:
        """torchtitan asks where ``_load`` has found no checkpoint of this run."""
        return -1

    def _choose(self, wanted: int) -> int:
        """The step to load, -1 if there is no checkpoint; the same on all ranks."""
        candidates = self._candidates(wanted)
        for step in candidates:
            folder = self.disk.complete(step)
            found = self._damage(folder)
            if not found:
                self._check_holds_everything(step)
                return step
            if not self.fallback:
                raise ValueError(
                    f"checkpoint {folder} is damaged: {found}. Restore the files, or load the "
                    "newest intact one before it with --checkpoint.fallback"
                )
            self._warn(f"skipped checkpoint {folder}: {found}")
        if candidates:
            raise ValueError(
                f"no checkpoint in {self.folder} is intact (tried steps {candidates}); restore "
                "one, or start anew with another --dump_folder"
            )
        return -1

    def _candidates(self, wanted: int) -> list[int]:
        """Steps that may be loaded, the first choice first: what rank 0 sees decides."""
        box: list[Any] = [self._seen(wanted) if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self.pg)
        if isinstance(box[0], str):
            raise ValueError(box[0])
        return box[0]

    def _seen(self, wanted: int) -> list[int] | str:
        """The candidates, or why there are none; rank 0 only."""
        try:
            self.disk.restore_replaced()
            steps = self.disk.steps()
            if wanted == -1:
                return self.disk.to_load() or lost_checkpoints(self.run, self.disk.root) or []
        except (ValueError, OSError) as error:
            return str(error)
        if wanted not in steps:
            return (
                f"checkpoint.load_step ({wanted}) must be a step with a checkpoint in "
                f"{self.folder}: {steps or 'there is none'}"
            )
        return [step for step in reversed(steps) if step <= wanted]

    def _damage(self, folder: Path) -> str:
        return damage_seen_by_all(folder, self.pg)

    def _check_holds_everything(self, step: int) -> None:
        folder = self.disk.complete(step)
        if step and read_manifest(folder).holds != EVERYTHING:
            raise ValueError(
                f"checkpoint {folder} holds only weights (checkpoint.last_save_model_only): a run "
                "cannot go on from it. Load an earlier one with --checkpoint.load_step, or start "
                "a new run from it with --checkpoint.initial_load_path and another --dump_folder"
            )

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, **options: Any) -> None:
        """Load into ``state_dict``; raises ``ValueError`` if model or data differ from the
        checkpoint's.
        """
        reader = DcpReader(Path(checkpoint_id))
        if (reader.folder / CONFIG).is_file():
            described = read_json(reader.folder / CONFIG, REMEDY).values.get("model")
            refuse_other_function(self.description, described, reader.folder)
        refuse_other_run(self.states, state_dict, reader)
        if self.settings is not None and reader.folder.parent == self.disk.root:
            self.settings.resume(reader.folder, read_manifest(reader.folder).step)
        with warnings.catch_warnings():
            # torchtitan's schedule works out its rate by itself, on purpose
            warnings.filterwarnings("ignore", "To get the last learning rate")
            load_dcp(state_dict, reader)
            self.states[MODEL].load_state_dict(state_dict)


def damage_seen_by_all(folder: Path, group: dist.ProcessGroup | None = None) -> str:
    """What is wrong with a checkpoint, "" if nothing; each rank of ``group`` looks at its share."""
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


def _nothing_begun(async_mode: AsyncMode) -> Future | AsyncSaveResponse | None:
    """What ``dcp_save`` returns when there is nothing to wait for."""
    done: Future[None] = Future()
    done.set_result(None)
    if async_mode == AsyncMode.DISABLED:
        return None
    return AsyncSaveResponse(done, done) if async_mode != AsyncMode.ASYNC else done
