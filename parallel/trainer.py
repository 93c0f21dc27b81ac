"""Trains a ``Decoder`` on mixed-modal batches: torchtitan's trainer with another step and metrics.

From torchtitan: process groups and meshes, meta-device build, optimizer, schedules, DCP
checkpoints, profiler. Overridden: the step, whose losses are sums per source and label modality,
divided by global counts; metrics per modality; validation on fixed rows. Added: fault handling
(docs/reliability.md) by graceful stops, skipped steps and a watchdog.

N data sources, M modality ids.
"""

import atexit
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed import ParallelDims

from earlyfuse.data.console import printable
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import training_flops
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.objectives.sums import LABELS
from earlyfuse.models.objectives.transfusion import TransfusionObjective
from earlyfuse.models.state_dicts.config_json import describe
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel import compat
from earlyfuse.parallel import torchtitan_run as titan
from earlyfuse.parallel.checkpoint.files.dcp import EMA, LOSS_MEAN
from earlyfuse.parallel.checkpoint.manager import Checkpoints
from earlyfuse.parallel.evaluation.sample_generation import Sampler
from earlyfuse.parallel.evaluation.validation import Validation
from earlyfuse.parallel.plan import check_parallelism
from earlyfuse.parallel.reliability import failure_report, preemption, process_group, tcp_timeouts
from earlyfuse.parallel.reliability.rank_consistency import check_ranks_agree
from earlyfuse.parallel.reliability.watchdog import Phase, Watchdog
from earlyfuse.parallel.reporting import opening, rank_log, run_folder
from earlyfuse.parallel.reporting.metrics import RunMetrics
from earlyfuse.parallel.reporting.optional_files import lost_writes, tolerate
from earlyfuse.parallel.strategies.context import positions_here, sequence_shard
from earlyfuse.parallel.strategies.gradient_clipping import GradientClipping
from earlyfuse.parallel.strategies.pipeline import Pipeline
from earlyfuse.parallel.training.after_step import after_step
from earlyfuse.parallel.training.config_checks import check_config
from earlyfuse.parallel.training.data_config import DataSet, NoTokenizer, fitted
from earlyfuse.parallel.training.dropout_seed import seed_dropout
from earlyfuse.parallel.training.ema import Ema
from earlyfuse.parallel.training.freezing import (
    causal_routers_alone,
    check_optimizer,
    split_router_parameters,
)
from earlyfuse.parallel.training.host_copy import HostCopy
from earlyfuse.parallel.training.lr_schedule import LearningRate
from earlyfuse.parallel.training.rank_sums import is_first_along, sum_over_ranks
from earlyfuse.parallel.training.resume_settings import (
    Settings,
    apply_hyperparameters,
    changed_beside,
    hyperparameters,
    listed,
    plain_config,
)
from earlyfuse.parallel.training.skip_step import SkipRule, step_unless_skipped
from earlyfuse.parallel.training.step_metrics import (
    LossMean,
    ModelStatistics,
    data_read,
    losses,
    work_done,
)
from earlyfuse.parallel.training.warm_start import WarmStart


def resolve(config: "Trainer.Config") -> tuple["Trainer.Config", DataSet]:
    """A copy of ``config`` filled in from other fields and the data, and the data.

    ``ValueError``, before anything is built, for a config that cannot run.
    """
    config = deepcopy(config)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check(fitted(config), ranks)
    assert config.model_spec is not None
    model = config.model_spec.model
    if config.debug.seed is not None:
        model.seed = config.debug.seed
        if isinstance(config.loss, TransfusionObjective.Config) and config.loss.seed is None:
            config.loss.seed = config.debug.seed
    data = DataSet(config.data)
    return data.resolve(config, ranks), data


def check(config: "Trainer.Config", ranks: int) -> Decoder.Config:
    """The model of ``config``; ``ValueError`` if it cannot run on ``ranks`` ranks with any data."""
    assert config.model_spec is not None, "configs always set model_spec"
    model = config.model_spec.model
    assert isinstance(model, Decoder.Config)
    check_config(config)
    check_parallelism(config.parallelism, config.training, model, ranks)
    config.loss.build().for_model(model)
    if model.vectors is not None and (sampler := config.sampler).enable:
        diffusion = model.vectors.diffusion.build()
        diffusion.check_method(sampler.denoising_method, sampler.denoising_steps)
    ema = config.ema
    if config.sampler.checked_images and ema.decay and ema.validation != ema.samples:
        raise ValueError(
            f"ema.samples ({ema.samples}) must equal ema.validation ({ema.validation}) with "
            "sampler.checked_images, whose scores stand in the line of the validation; set both"
        )
    return model


class Trainer(titan.Trainer):
    """One pretraining run of a ``Decoder`` on a prepared data set."""

    @dataclass(kw_only=True, slots=True)
    class Config(titan.Trainer.Config):
        data: DataSet.Config = field(default_factory=DataSet.Config)
        dataloader: LaneLoader.Config = field(default_factory=LaneLoader.Config)
        tokenizer: Any = field(default_factory=NoTokenizer.Config)
        loss: Any = field(default_factory=ChameleonObjective.Config)
        checkpoint: Checkpoints.Config = field(default_factory=Checkpoints.Config)
        metrics: RunMetrics.Config = field(default_factory=RunMetrics.Config)
        validator: Validation.Config = field(default_factory=Validation.Config)
        lr_scheduler: LearningRate.Config = field(default_factory=LearningRate.Config)
        sampler: Sampler.Config = field(default_factory=Sampler.Config)
        skip: SkipRule.Config = field(default_factory=SkipRule.Config)
        watchdog: Watchdog.Config = field(default_factory=Watchdog.Config)
        start: WarmStart.Config = field(default_factory=WarmStart.Config)
        ema: Ema.Config = field(default_factory=Ema.Config)

        train_only: Literal["everything", "causal_routers"] = "everything"
        """Parameters to train; only the causal routers in a second stage (docs/moma.md)."""

    config: Config
    loss_fn: ChameleonObjective
    metrics_processor: RunMetrics
    validator: Validation
    dataloader: LaneLoader
    checkpointer: Checkpoints
    title = ""
    """Name and description of the config, for the opening lines of a run."""

    @record
    def __init__(self, config: Config):
        compat.apply()
        process_group.leave_at_exit()
        self._alone = compat.join_process_group_alone()
        config, self.data = resolve(config)
        assert config.model_spec is not None, "configs always set model_spec"
        self.vocabulary = self.data.vocabulary
        model = config.model_spec.model
        if config.train_only == "causal_routers":
            check_optimizer(config.optimizer, model)
            parallelize = causal_routers_alone(config.model_spec.parallelize_fn)
            config.model_spec = replace(config.model_spec, parallelize_fn=parallelize)
        run_folder.check_writable(Path(config.dump_folder))
        self.reservation = run_folder.Reservation(Path(config.dump_folder))
        try:
            self._build(config)
        except BaseException:
            self.reservation.release()
            raise

    def _build(self, config: Config) -> None:
        model = config.model_spec.model
        rank_log.start(Path(config.dump_folder))
        failure_report.say_uncaught()
        self.tokens_M = torch.zeros(len(Modality), dtype=torch.int64)  # of the whole run
        self.skip, self.loss_mean = config.skip.build(), LossMean()
        self.stopping = False
        super().__init__(config)
        if self.parallel_dims.dp_enabled:
            self.dataloader.mesh = self.parallel_dims.get_mesh("batch")
        pipelined = self.parallel_dims.pp_enabled
        self.checkpointer.steps = config.training.steps
        self.checkpointer.settings = self.settings = Settings(config)
        self.checkpointer.description = describe(
            config.model_spec.model, self.vocabulary, self._provenance()
        )
        self.loss_fn = self.loss_fn.for_model(model)
        self.model: Decoder | Pipeline = self.pp_schedule if pipelined else self.model_parts[0]
        self.sampler = config.sampler.build(model=self.model, seq_len=config.training.seq_len)
        # the ranks of a context-parallel group read the same rows, each its own positions of them
        self.sequence_shard = sequence_shard(self.parallel_dims)
        self.positions = positions_here(self.sequence_shard, config.training.seq_len)
        # tensor-parallel ranks compute the same sums, and pipeline ranks read the same positions:
        # one of them counts
        self._counts_sums = is_first_along(self.parallel_dims, "tp")
        self._counts_rows = self._counts_sums and is_first_along(self.parallel_dims, "pp")
        self._counts_lanes = self._counts_rows and is_first_along(self.parallel_dims, "cp")
        self._flops_M = torch.zeros(len(Modality), dtype=torch.float64)  # of a token
        self._flops_M[[*model.modalities]] = torch.tensor(
            training_flops(model, config.training.seq_len), dtype=torch.float64
        )
        self.statistics = ModelStatistics(self.model_parts, model, self.parallel_dims)
        if config.validator.enable:
            self.validator.statistics = self.statistics
        self.clipping = GradientClipping(
            split_router_parameters(dict(self.model.named_parameters())),
            config.training.max_norm,
            self.parallel_dims.pp,
        )
        step_tokens = config.training.global_batch_size * config.training.seq_len
        self.ema = config.ema.build(parts=self.model_parts)
        if self.ema and config.checkpoint.enable:
            self.checkpointer.states[EMA] = self.ema
        self.after_step = after_step(self.model_parts, self.parallel_dims, step_tokens, self.ema)
        device = self.metrics_processor.device_memory_monitor.device_name
        narrow = config.training.mixed_precision_param == "bfloat16"  # known peaks are of bf16
        if not (narrow and run_folder.knows_peak(device)):
            self.metrics_processor.gpu_peak_flops = 0

    def init_distributed(self) -> ParallelDims:
        """Join the launcher's process group, or become a job of one rank."""
        config = self.config
        if self._alone:
            self.watchdog = config.watchdog.build(folder=Path(config.dump_folder))
            return ParallelDims.from_config(config.parallelism, 1)
        # the watchdog names the stalled rank; the timeout of collectives must be longer
        longest = int(config.watchdog.slow_timeout_seconds) + 60
        config.comm.init_timeout_seconds = max(config.comm.init_timeout_seconds, longest)
        tcp_timeouts.watch()
        parallel_dims = super().init_distributed()
        self.watchdog = config.watchdog.build(folder=Path(config.dump_folder))
        atexit.register(self.watchdog.close)  # its thread uses the store
        check_ranks_agree(config.to_dict())
        return parallel_dims

    def _provenance(self) -> dict[str, Any]:
        """Origin of a checkpoint's parameters: source revision and data."""
        identity = self.dataloader.identity()
        about_data = {name: identity[name] for name in ("tokenizers", "data", "shares")}
        return {"format": "checkpoint", "revision": run_folder.revision(), **about_data}

    # ---------------------------------------------------------------- one step

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """Forward and backward of all micro-batches, then one optimizer step, taken or skipped.

        No host synchronisation from the first forward to the last update.
        """
        self.watchdog.enter(self.step, Phase.DATA)
        config, step = self.config, self.step
        self.optimizers.zero_grad()
        learning_rate = self.lr_schedulers.schedulers[0].get_last_lr()[-1]
        logging = self.metrics_processor.should_log(step) or step == config.training.steps
        seed_dropout(config.debug.seed or 0, step, self.parallel_dims)
        settings = ForwardSettings(
            step=step,
            # a constant, as the contents of micro-batches vary
            step_tokens=config.training.global_batch_size * config.training.seq_len,
            recording=logging,
            sequence_shard=self.sequence_shard,
        )
        together = self.num_pipeline_parallel_microbatches
        microbatches = [
            self._next_batch(data_iterator, settings)
            for _ in range(self.gradient_accumulation_steps * together)
        ]

        self.watchdog.enter(step, Phase.FORWARD_BACKWARD)
        counts = self._global_counts([batch for batch, _ in microbatches])
        counts_here = {name: HostCopy(count) for name, count in counts.items()}
        shape = counts[LABELS].shape
        sums = {name: torch.zeros(shape, device=self.device) for name in self.loss_fn.sum_names}
        for first in range(0, len(microbatches), together):
            self._forward_backward(microbatches[first : first + together], counts, sums)
            self.watchdog.enter(step, Phase.FORWARD_BACKWARD)

        self.watchdog.enter(step, Phase.OPTIMIZER)
        totals = sum_over_ranks({name: s * self._counts_sums for name, s in sums.items()})
        loss = self.loss_fn.minimised(totals, counts)
        norms = self.clipping()
        # of the trained group; not finite if the norm of either group is not
        grad_norm = norms[int(config.train_only == "causal_routers")] + 0 * norms.sum()
        taken = self.skip.decide(step, loss, grad_norm, sums.values())
        self.checkpointer.maybe_wait_for_staging()
        step_unless_skipped(self.optimizers, taken)
        self.loss_mean.add(totals, {n: counts[n] for n in self.loss_fn.count_names}, taken)
        for update in self.after_step:
            update(taken)
        self.lr_schedulers.step()

        # counted before the forward, so reading does not wait for the step
        self.tokens_M += counts_here["tokens_M"].tensor()
        self.ntokens_seen = int(self.tokens_M.sum())
        self.stopping = bool(counts_here["asked_to_stop"].tensor())
        self._settle(but_last=0 if logging else 1)
        if logging:
            counts = {name: counts_here[name].tensor() for name in self.loss_fn.count_names}
            self._log(self.loss_mean.pop(totals, counts), grad_norm, learning_rate)

    def _next_batch(
        self, data_iterator: Iterator[Any], settings: ForwardSettings
    ) -> tuple[MixedBatch, ForwardSettings]:
        """This rank's positions of the next micro-batch, and the settings of its forward."""
        inputs, _ = next(data_iterator)
        batch: MixedBatch = inputs["batch"]
        return batch.part(self.positions), replace(settings, first_row=inputs["first_row"])

    def _forward_backward(
        self,
        microbatches: list[tuple[MixedBatch, ForwardSettings]],
        counts: dict[str, torch.Tensor],
        sums: dict[str, torch.Tensor],
    ) -> None:
        """Accumulate gradients of a micro-batch, or of all that pass the pipeline together, and on
        ranks with the head add their named sums to ``sums``.
        """

        def arguments(batch: MixedBatch, settings: ForwardSettings) -> dict[str, Any]:
            batch = batch.to(self.device, non_blocking=True)
            batch = self.loss_fn.prepare(batch, settings)
            losses_of = self.loss_fn.loss_of(batch, len(self.dataloader.sources))

            def loss(*head: torch.Tensor, **shard: Any) -> torch.Tensor:
                losses = losses_of(*head, **shard)
                for name, sums_NM in losses.sums.items():
                    sums[name] += sums_NM
                return losses.mean(counts)

            return {"batch": batch, "settings": settings, "loss": loss}

        with self.train_context():
            if isinstance(self.model, Pipeline):
                self.model.step([arguments(*microbatch) for microbatch in microbatches])
            else:
                (only,) = microbatches
                self.model(**arguments(*only)).backward()

    def _global_counts(self, batches: list[MixedBatch]) -> dict[str, torch.Tensor]:
        """Input tokens (M,), counts of the objective (N, M) and stop requests of this step, over
        all ranks.
        """
        modalities, sources = len(Modality), len(self.dataloader.sources)
        tokens_M = torch.zeros(modalities, dtype=torch.int64)
        counts: dict[str, torch.Tensor] = {}
        for batch in batches:
            tokens_M += torch.bincount(batch.modality_BS.flatten(), minlength=modalities)
            for name, count_NM in self.loss_fn.counts(batch, sources).items():
                counts[name] = counts.get(name, 0) + count_NM
        counts = {
            name: n * self._counts_rows for name, n in {"tokens_M": tokens_M, **counts}.items()
        }
        counts["asked_to_stop"] = torch.tensor(preemption.requested(), dtype=torch.int64)
        return sum_over_ranks({name: count.to(self.device) for name, count in counts.items()})

    def _settle(self, but_last: int = 0) -> None:
        """Count and report skipped steps; see ``SkipRule.settle``."""
        self.skip.settle(self.model.parameters(), self._last_checkpoint(), but_last)

    def _last_checkpoint(self) -> str:
        newest = self.checkpointer.newest
        return "none" if newest is None else f"step-{newest}"

    def _log(
        self,
        since_last: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
        grad_norm: torch.Tensor,
        learning_rate: float,
    ) -> None:
        """Log a step: losses ``since_last`` line (sums and counts), all else of this step;
        synchronises the host.
        """
        sums, counts = since_last
        metrics = losses(sums, self.loss_fn.counts_of(counts), self.dataloader.sources)
        metrics |= {"grad_norm": float(grad_norm), "lr": learning_rate}
        metrics |= {"skipped_steps": self.skip.total, **self._seen()}
        metrics |= self.statistics.pop()
        self.metrics_processor.log_step(self.step, metrics)

    def _seen(self) -> dict[str, float]:
        """Tokens and FLOPs of the run by modality, tokens and epochs by source; collective."""
        done = work_done(self.model.config, self.config.training.seq_len, self.tokens_M)
        return done | data_read(self.dataloader, self._counts_lanes, self.device)

    # ---------------------------------------------------------------- the run

    @record
    def train(self) -> None:
        """Train from the latest checkpoint, or from the start, to ``training.steps``.

        On SIGTERM or SIGUSR1 to any rank all ranks finish the step, save and exit.
        """
        try:
            with preemption.listening():
                self._train()
        except BaseException:
            self.reservation.release()
            raise

    def _train(self) -> None:
        config, metrics = self.config, self.metrics_processor
        begun, settings = "", self.settings
        configured = hyperparameters(self.optimizers)
        if not self.checkpointer.load(step=config.checkpoint.load_step):
            begun = self._begin()
        ema_begun = self.ema.begin()
        apply_hyperparameters(self.optimizers, self.lr_schedulers, configured)
        metrics.start(self.step, config.training.steps, self._flops())
        if self.step:
            begun = f"resumed at step {self.step}"
            begun += f", from here with {settings.changed_now}" if settings.changed_now else ""
            begun += ema_begun
        self._open(begun)
        if begun and not self.step and config.validator.enable:
            self._validate()  # the parent's model in this run
        first_step, saved = self.step, False
        profiling = config.profiler.build(global_step=self.step, base_folder=config.dump_folder)
        with profiling as profiler:
            data_iterator = self.batch_generator(self.dataloader)
            while self.should_continue_training() and not self.stopping:
                self.step += 1
                self.gc_handler.run(self.step)
                self.train_step(data_iterator)
                metrics.tick(self.step, self._flops())
                last = self.step == config.training.steps
                if config.validator.enable and (self.validator.should_validate(self.step) or last):
                    self._validate()
                saved = self._save(last)
                if saved or self.step == first_step + 1:
                    metrics.restart_clock()  # leave saving and warm-up out of throughput
                profiler.step()
        self._finish(saved)

    def _open(self, begun: str) -> None:
        """Print what the run is and how it has ``begun``; write run.json and history.jsonl.

        Not earlier: a refused resume must not overwrite them.
        """
        config, metrics = self.config, self.metrics_processor
        read = data_read(self.dataloader, self._counts_lanes, self.device)
        if dist.get_rank() != 0:
            return
        folder, plain = Path(config.dump_folder), plain_config(config)
        hosts, device = metrics.rank_times.hosts, metrics.device_memory_monitor.device_name
        also = changed_beside(folder, plain, len(hosts))
        with tolerate(folder / run_folder.HISTORY):
            changed = [*self.settings.changed, *also]
            run_folder.append_start(folder, self.step, hosts, changed)
        with tolerate(folder / run_folder.DESCRIPTION):
            run_folder.write_description(folder, plain, self.settings.changes)
        place = opening.Place(self.parallel_dims, hosts, device)
        lines = opening.lines(
            config, place, self.dataloader.mixture, self.data.taken, self.step, read
        )
        beside = f"also changed since the last start: {listed(also)}" if also else ""
        for line in filter(None, (self.title, *lines, begun, beside)):
            print(printable(line), flush=True)

    def _flops(self) -> float:
        """Training FLOPs of the run so far, of all ranks."""
        return float(self.tokens_M.double() @ self._flops_M)

    def _begin(self) -> str:
        """Start from another model if the config names one; returns a line about it."""
        start, spec = self.config.start.build(), self.config.model_spec
        assert spec is not None and isinstance(spec.model, Decoder.Config)
        parent = start.find(spec.model, Path(self.config.data.folder))
        return start.take_over(parent, self.model_parts, self.dataloader) if parent else ""

    def _save(self, last: bool) -> bool:
        """Save if due, or at the end; True if saved."""
        self.watchdog.enter(self.step, Phase.CHECKPOINT)
        if self.stopping and not last:
            # the run will resume: it needs a full checkpoint
            self.checkpointer.last_save_model_only = self.checkpointer.last_save_in_hf = False
        return self.checkpointer.save(self.step, last_step=last or self.stopping)

    def _validate(self) -> None:
        self.watchdog.enter(self.step, Phase.VALIDATION)
        self._settle()
        with self.ema.weights(self.config.ema.validation) as measured:
            metrics = self.validator.measure(self.model, self.loss_fn, self.vocabulary)
        if self.sampler.pairs:
            self.watchdog.enter(self.step, Phase.VALIDATION)
            seq_len = self.config.training.seq_len
            with self.ema.weights(self.config.ema.samples) as used:
                samples = self.sampler.write(self.model, self.vocabulary, seq_len)
                self.watchdog.enter(self.step, Phase.VALIDATION)
                metrics |= self.sampler.check(self.model, self.vocabulary)
            self.metrics_processor.log_samples(self.step, samples, used)
        self.metrics_processor.log_validation_step(self.step, metrics | measured | self._seen())
        self.metrics_processor.restart_clock()

    def _finish(self, saved: bool) -> None:
        self.checkpointer.maybe_wait_for_saving()
        saved = saved and self.checkpointer.newest == self.step
        self.metrics_processor.close()
        stopped = self.should_continue_training()
        not_written = self.checkpointer.gave_up == self.step
        if dist.get_rank() == 0:
            folder = Path(self.config.dump_folder)
            if stopped:
                last = self._last_checkpoint()
                where = "saved" if saved else f"not saved, last checkpoint {last}"
                end = f"stopped at step {self.step}, {where}; the same command resumes"
            elif not_written:
                end = f"trained to step {self.step}, not saved"
            else:
                end = f"done: {self.step} steps in {folder}"
            pictures = self.metrics_processor.draw_curves(with_samples=bool(self.sampler.pairs))
            print(printable(f"{end}. {lost_writes(folder)}{pictures}"), flush=True)
        if not_written and not stopped:
            raise OSError(
                f"the last checkpoint, of step {self.step}, could not be written; the latest good "
                f"one: {self._last_checkpoint()}. Free disk space; the same command resumes there"
            )

    def close(self) -> None:
        """Release threads, files and the lock of the run folder."""
        super().close()
        self.dataloader.close()
        self.watchdog.close()
        self.reservation.release()

    def state_dict(self) -> dict[str, Any]:
        """State of the trainer itself in a checkpoint."""
        self._settle()
        tokens_M, skip = self.tokens_M.clone(), self.skip.state_dict()
        mean = self.loss_mean.state_dict()
        return {"step": self.step, "tokens_M": tokens_M, "skip": skip, LOSS_MEAN: mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.step = state_dict["step"]
        self.tokens_M = state_dict["tokens_M"].clone()
        self.skip.load_state_dict(state_dict["skip"])
        if LOSS_MEAN in state_dict:
            shape = len(self.dataloader.sources), len(Modality)
            self.loss_mean.load_state_dict(state_dict[LOSS_MEAN], shape, self.device)
