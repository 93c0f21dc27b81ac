"""Checkpoints: torchtitan's DCP manager, made safe against kills, full disks and damaged files.

``folder`` explains why a killed save does no harm. A save has three parts:

1. rank 0 creates the partial folder;
2. every rank writes its shards through DCP, then reads them back for their checksums;
3. rank 0 writes the manifest, renames the folder, replaces ``latest``, and deletes old checkpoints.

After each part all ranks learn the outcome on every rank. After a disk error on any of them the
save is abandoned: rank 0 logs it, older checkpoints stay, training continues. With ``async_mode``
parts 2 and 3 run in the background, over a process group of their own, so that their collectives
never meet those of training.

Loading verifies the files first (``choose``), each rank its share; then a checkpoint of another
model, or of a run on other data, is refused by name before anything is overwritten (``identity``).
"""

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
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torchtitan.components.checkpointer import MODEL, OPTIMIZER, TRAIN_STATE, CheckpointManager
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools import filesystem
from torchtitan.tools.utils import GarbageCollection

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.json_files import read_json
from earlyfuse.models.state_dicts.config_json import CONFIG, REMEDY
from earlyfuse.parallel.checkpoint.file_layout import step_of
from earlyfuse.parallel.checkpoint.files.dcp import EMA, LOSS_MEAN, Writer, averages
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader, load_dcp
from earlyfuse.parallel.checkpoint.folder import CheckpointFolder
from earlyfuse.parallel.checkpoint.identity import (
    refuse_other_function,
    refuse_other_run,
)
from earlyfuse.parallel.checkpoint.manifest import (
    EVERYTHING,
    WEIGHTS,
    Manifest,
    describe,
    read_manifest,
)
from earlyfuse.parallel.checkpoint.rank_agreement import check_finite, run_together
from earlyfuse.parallel.checkpoint.resume_point import choose
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.training.resume_settings import Settings


class Checkpoints(CheckpointManager):
    """Writes <run folder>/checkpoint/step-N and loads the one completed last.

    Same on all ranks: ``newest``, step of the last complete checkpoint, or None; ``gave_up``, of
    the last abandoned one; ``saved`` and ``failed``, numbers of saves. ``stall_seconds``: how long
    saves have blocked this rank's training loop. Optional, set by the trainer: ``description``, the
    ``config.json`` of every checkpoint, with which its folder can be moved alone; ``steps``, the
    length of the run, beyond which a checkpoint is refused; ``settings``, recorded in every
    checkpoint and compared on resume.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        enable: bool = True
        """Save checkpoints, and resume from the latest in the run folder."""

        keep_latest_k: int = 3
        """Checkpoints to keep, at least 2; 0 keeps all."""

        last_save_model_only: bool = False
        """Save only weights at the last step; the run can then not be resumed."""

        fallback: bool = False
        """If the checkpoint to load is damaged, take the newest intact one before it."""

        def __post_init__(self) -> None:
            CheckpointManager.Config.__post_init__(self)
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
        """Returns True if a checkpoint was written, or its background write started.

        ``RuntimeError`` on all ranks if any of them has a value that is not finite.
        """
        if not self._should_save(curr_step, last_step):
            return False
        begin = time.perf_counter()
        self.maybe_wait_for_saving()
        states = self.states[MODEL].state_dict() | self.states[OPTIMIZER].state_dict()
        check_finite(states, curr_step, self._last_good("none"), self.pg)
        failed = self.failed
        super()._save(curr_step, last_step)
        self.stall_seconds += time.perf_counter() - begin
        return self.failed == failed

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future | AsyncSaveResponse | None:
        """Saves to the folder ``checkpoint_id``; returns torchtitan's futures in async modes.

        A disk error is logged and counted, not raised.
        """
        step = step_of(Path(checkpoint_id).name)
        assert step is not None, checkpoint_id
        holds = EVERYTHING if OPTIMIZER in state_dict else WEIGHTS
        if holds == WEIGHTS and EMA in self.states:  # weights too, which torchtitan leaves out
            state_dict = state_dict | self._exported_averages()
        writer = Writer(self.disk.partial(step))
        _, errors = self._on_rank_0(lambda: self._prepare(step))
        if errors:
            self._give_up(step, errors)
            return _nothing_begun(async_mode)
        if async_mode == AsyncMode.DISABLED:

            def write() -> object:
                return dcp.save(state_dict, storage_writer=writer, process_group=self.pg)

            self._finish(step, holds, write)
            if enable_garbage_collection:
                GarbageCollection.collect("garbage collection after a checkpoint")
            return None
        begun = self._begin(state_dict, writer, async_mode)
        if isinstance(begun, AsyncSaveResponse):
            done = self._finisher.submit(self._finish, step, holds, begun.upload_completion.result)
            return AsyncSaveResponse(begun.staging_completion, done)
        return self._finisher.submit(self._finish, step, holds, begun.result)

    def _exported_averages(self) -> dict[str, torch.Tensor]:
        """Averaged weights in the dtype of the last save's weights."""
        state = {f"{EMA}.{name}": value for name, value in self.states[EMA].state_dict().items()}
        return {key: state[key].to(self.export_dtype) for key in averages(state).values()}

    def _prepare(self, step: int) -> None:
        self.disk.prepare(step)
        if self.description is not None:
            atomic_write_json(self.disk.partial(step) / CONFIG, self.description)
        if self.settings is not None:
            self.settings.write(self.disk.partial(step))

    def _begin(
        self, state_dict: dict[str, Any], writer: Writer, async_mode: AsyncMode
    ) -> Future | AsyncSaveResponse:
        """Copies the state to host memory; DCP writes it in the background."""
        pinned = async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM
        if self.stager is None:  # its buffers serve all saves
            self.stager = DefaultStager(StagingOptions(pinned, pinned, pinned, pinned))
        kind = AsyncCheckpointerType.PROCESS if pinned else AsyncCheckpointerType.THREAD
        return dcp.async_save(
            state_dict,
            storage_writer=writer,
            process_group=self.pg,
            async_checkpointer_type=kind,
            async_stager=self.stager,
        )

    def _finish(self, step: int, holds: str, write: Callable[[], object]) -> None:
        """Parts 2 and 3; ``write`` returns when this rank's files are written."""
        partial = self.disk.partial(step)

        def write_and_describe() -> dict[str, Any]:
            write()
            return describe(partial, self.rank)

        parts, errors = run_together(write_and_describe, self.pg)
        if not errors:
            files = {name: record for part in parts for name, record in part.items()}
            manifest = Manifest(step, holds, len(parts), files)
            replaced, errors = self._on_rank_0(lambda: self.disk.commit(manifest))
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

    def _on_rank_0(self, action: Callable[[], Any]) -> tuple[list[Any], dict[int, OSError]]:
        return run_together(lambda: action() if self.rank == 0 else None, self.pg)

    def _give_up(self, step: int, errors: dict[int, OSError]) -> None:
        self.failed, self.gave_up = self.failed + 1, step
        causes = "; ".join(f"rank {rank}: {error}" for rank, error in errors.items())
        self._warn(
            f"the checkpoint of step {step} could not be written: {causes}. Training continues "
            f"without it; the newest good one: {self._last_good('there is none yet')}"
        )

    def _last_good(self, none: str) -> str:
        return none if self.newest is None else str(self.disk.complete(self.newest))

    def _warn(self, line: str) -> None:
        if self.rank == 0:
            rank_log.tell(f"warning: {line}")

    # ---------------------------------------------------------------- keep and delete

    def _purge_stale_checkpoints(self) -> None:
        """Does nothing: ``_finish`` purges, once the new checkpoint is complete."""

    def _purge(self) -> None:
        """Deletes all but the newest ``keep_latest_k`` of this run's past; logs disk errors only.

        Steps beyond the one loaded, left by an earlier attempt, count as past once this run has
        saved them again; until then they are neither counted nor deleted.
        """
        past = [step for step in self.disk.steps() if step in self._of_this_run]
        for step in past[: -self.keep_latest_k] if self.keep_latest_k else []:
            try:
                self._delete(self.disk.set_aside(step))
            except OSError as error:
                self._warn(f"the old checkpoint of step {step} could not be deleted: {error}")

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
        """Waits for a save in the background, and for deletions."""
        if hasattr(self, "_finisher"):
            self._finisher.shutdown()
        super()._close()

    # ---------------------------------------------------------------- load

    def _load(self, step: int = -1) -> bool:
        """Loads ``step``, or the checkpoint completed last, after verifying it.

        ``ValueError`` names what is wrong with it, unless ``fallback`` finds another.
        """
        fallback, warn = self.fallback, self._warn
        chosen = choose(self.disk, self.run, step, fallback=fallback, warn=warn, group=self.pg)
        if self.steps is not None and chosen > self.steps:
            raise ValueError(
                f"training.steps ({self.steps}) must be at least {chosen}, the step of the "
                f"checkpoint in {self.folder}; raise it, load an earlier one with "
                "--checkpoint.load_step, or start a new run with another --dump_folder"
            )
        loaded = super()._load(chosen)
        if chosen != -1:
            self.newest = chosen
            self._of_this_run = {step for step in self.disk.steps() if step <= chosen}
        return loaded

    def _find_load_step(self, folder: str = "") -> int:
        """-1: torchtitan asks only after ``_load`` has found no checkpoint of this run."""
        return -1

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, **options: Any) -> None:
        """Loads into ``state_dict``; ``ValueError`` for a checkpoint of another model or data."""
        reader = DcpReader(Path(checkpoint_id))
        if (reader.folder / CONFIG).is_file():
            described = read_json(reader.folder / CONFIG, REMEDY).values.get("model")
            refuse_other_function(self.description, described, reader.folder)
        refuse_other_run(self.states, state_dict, reader)
        resumes = reader.folder.parent == self.disk.root
        if self.settings is not None and resumes:
            self.settings.resume(reader.folder, read_manifest(reader.folder).step)
        stored = averages(reader.read_metadata().state_dict_metadata)
        if EMA in state_dict and not stored:
            del state_dict[EMA]  # they begin with the weights
        trainer: Any = state_dict.get(TRAIN_STATE)
        known = reader.read_metadata().state_dict_metadata
        if trainer is not None and f"{TRAIN_STATE}.{LOSS_MEAN}" not in known:  # of older versions
            state_dict[TRAIN_STATE] = trainer.state_dict()
            state_dict[TRAIN_STATE].pop(LOSS_MEAN, None)
        if stored and resumes and EMA not in self.states:
            self._warn(
                f"checkpoint {reader.folder} has averaged weights, which end here: ema.decay is 0"
            )
        with warnings.catch_warnings():
            # torchtitan's schedule computes its rate itself
            warnings.filterwarnings("ignore", "To get the last learning rate")
            load_dcp(state_dict, reader)
            self.states[MODEL].load_state_dict(state_dict)
        if state_dict.get(TRAIN_STATE) is not trainer:
            trainer.load_state_dict(state_dict[TRAIN_STATE])


def _nothing_begun(async_mode: AsyncMode) -> Future | AsyncSaveResponse | None:
    """Returns what ``dcp_save`` returns for a save that needs no waiting."""
    done: Future[None] = Future()
    done.set_result(None)
    if async_mode == AsyncMode.DISABLED:
        return None
    return AsyncSaveResponse(done, done) if async_mode != AsyncMode.ASYNC else done
