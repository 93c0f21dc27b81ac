"""The trainer: torchtitan's, with mixed-modal batches, losses and metrics.

Taken over from torchtitan: process groups and meshes, building on meta, optimizer, schedules, DCP
checkpoints, profiler. Its own here: sums of losses per label modality over global counts, metrics
per modality, validation on a fixed list; and what keeps a run from harm (docs/reliability.md):
graceful stops, skipped steps, a watchdog.

B rows, S positions, M modality ids.
"""

import atexit
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed import ParallelDims

from earlyfuse.data.console import printable
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective, label_members
from earlyfuse.models.routing.causal import normalise_over
from earlyfuse.models.routing.gumbel_noise import router_noises
from earlyfuse.models.state_dicts.config_json import describe
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel import compat
from earlyfuse.parallel import torchtitan_run as titan
from earlyfuse.parallel.checkpoint.manager import Checkpoints
from earlyfuse.parallel.evaluation.sample_generation import Sampler
from earlyfuse.parallel.evaluation.validation import Validation
from earlyfuse.parallel.plan import check_parallelism
from earlyfuse.parallel.reliability import failure_report, preemption, process_group, tcp_timeouts
from earlyfuse.parallel.reliability.rank_consistency import check_ranks_agree
from earlyfuse.parallel.reliability.watchdog import Phase, Watchdog
from earlyfuse.parallel.reporting import rank_log, run_folder
from earlyfuse.parallel.reporting.metrics import RunMetrics
from earlyfuse.parallel.reporting.optional_files import lost_writes, tolerate
from earlyfuse.parallel.reporting.run_folder import CURVES, SAMPLES
from earlyfuse.parallel.strategies.context import positions_here
from earlyfuse.parallel.strategies.gradient_clipping import clip
from earlyfuse.parallel.strategies.pipeline import Pipeline
from earlyfuse.parallel.training.config_checks import check_config
from earlyfuse.parallel.training.data_config import DataSet, NoTokenizer
from earlyfuse.parallel.training.dropout_seed import seed_dropout
from earlyfuse.parallel.training.expert_bias import ExpertBalance
from earlyfuse.parallel.training.freezing import apart, causal_routers_alone, check_optimizer
from earlyfuse.parallel.training.lr_schedule import LearningRate
from earlyfuse.parallel.training.resume_settings import (
    Settings,
    apply_hyperparameters,
    hyperparameters,
    plain_config,
)
from earlyfuse.parallel.training.skip_step import SkipRule
from earlyfuse.parallel.training.step_metrics import (
    StepTotals,
    causal_statistics,
    router_load,
    router_statistics,
    work_done,
)
from earlyfuse.parallel.training.warm_start import WarmStart

MODALITIES = len(Modality)

Microbatch = tuple[dict[str, torch.Tensor], torch.Tensor]


def resolve(config: "Trainer.Config") -> tuple["Trainer.Config", DataSet]:
    """A copy of ``config`` with what follows from other fields and the data, and the data.

    Raises ``ValueError`` for what cannot be right, before anything is built.
    """
    config = deepcopy(config)
    assert config.model_spec is not None, "configs always set model_spec"
    model, ranks = config.model_spec.model, int(os.environ.get("WORLD_SIZE", "1"))
    assert isinstance(model, Decoder.Config)
    if config.debug.seed is not None:
        model.seed = config.debug.seed
    check_config(config)
    check_parallelism(config.parallelism, config.training, model, ranks)
    data = DataSet(config.data)
    return data.resolve(config, ranks), data


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

        train_only: Literal["everything", "causal_routers"] = "everything"
        """Leave all but the causal routers as they are: the second stage (docs/moma.md)."""

    config: Config
    loss_fn: ChameleonObjective
    metrics_processor: RunMetrics
    validator: Validation
    dataloader: LaneLoader
    checkpointer: Checkpoints

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
            spread = causal_routers_alone(config.model_spec.parallelize_fn)
            config.model_spec = replace(config.model_spec, parallelize_fn=spread)
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
        # saved in every checkpoint: totals of the whole run
        self.tokens_M = torch.zeros(MODALITIES, dtype=torch.int64)
        self.skip = config.skip.build()
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
        self.model: Decoder | Pipeline = self.pp_schedule if pipelined else self.model_parts[0]
        self.sampler = config.sampler.build(model=self.model, seq_len=config.training.seq_len)
        # ranks of one sequence-parallel group read the same rows, each its own positions of them
        self.positions = positions_here(self.parallel_dims, config.training.seq_len)
        # ranks of one tensor-parallel group compute the same sums, and those of one pipeline read
        # the same positions: one of them counts
        self._counts_sums = self._is_first_along("tp")
        self._counts_rows = self._counts_sums and self._is_first_along("pp")
        self.statistics = router_statistics(self.model_parts, model, self.device)
        self.causal_statistics = causal_statistics(self.model_parts, model, self.device)
        if config.validator.enable:
            self.validator.causal_statistics = self.causal_statistics
        # rows of a step over all ranks: a constant, as micro-batches differ in what they hold
        rows = config.training.global_batch_size
        normalise_over(self.model_parts, rows * config.training.seq_len)
        self.router_noises = router_noises(self.model_parts)
        self.balance = ExpertBalance(self.model_parts, model, self.device)
        if not run_folder.knows_peak(self.metrics_processor.device_memory_monitor.device_name):
            self.metrics_processor.gpu_peak_flops = 0

    def init_distributed(self) -> ParallelDims:
        """Join the launcher's process group, or be a job of one process."""
        config = self.config
        if self._alone:
            self.watchdog = config.watchdog.build(folder=Path(config.dump_folder))
            return ParallelDims.from_config(config.parallelism, 1)
        # the watchdog can name who is stalled; the collectives' own timeout must come after it
        longest = int(config.watchdog.slow_timeout_seconds) + 60
        config.comm.init_timeout_seconds = max(config.comm.init_timeout_seconds, longest)
        tcp_timeouts.watch()
        parallel_dims = super().init_distributed()
        self.watchdog = config.watchdog.build(folder=Path(config.dump_folder))
        atexit.register(self.watchdog.close)  # its thread is in the store, as gloo's in the group
        check_ranks_agree(config.to_dict())
        return parallel_dims

    def _provenance(self) -> dict[str, Any]:
        """Where a checkpoint's parameters are from: source revision and data."""
        identity = self.dataloader.identity()
        about_data = {name: identity[name] for name in ("tokenizers", "data", "shares")}
        return {"format": "checkpoint", "revision": run_folder.revision(), **about_data}

    def _is_first_along(self, axis: str) -> bool:
        mesh = self.parallel_dims.get_optional_mesh(axis)
        return mesh is None or mesh.get_local_rank() == 0

    # ---------------------------------------------------------------- one step

    def train_step(self, data_iterator: Iterator[Microbatch]) -> None:
        """Forward and backward over all micro-batches, then one optimizer step or a skipped one."""
        self.watchdog.enter(self.step, Phase.DATA)
        self.optimizers.zero_grad()
        learning_rate = self.lr_schedulers.schedulers[0].get_last_lr()[-1]
        logging = (
            self.metrics_processor.should_log(self.step) or self.step == self.config.training.steps
        )
        self._record_statistics(logging)
        for name, noise in self.router_noises.items():
            noise.set_step(name, self.step)
        seed_dropout(self.config.debug.seed or 0, self.step, self.parallel_dims)

        together = self.num_pipeline_parallel_microbatches
        microbatches = [
            self._part(*next(data_iterator))
            for _ in range(self.gradient_accumulation_steps * together)
        ]
        self.watchdog.enter(self.step, Phase.FORWARD_BACKWARD)
        counts = self._global_counts(microbatches)
        labels = counts[MODALITIES:-1].sum()
        own_sums_2M = torch.zeros(2, MODALITIES, device=self.device)
        for first in range(0, len(microbatches), together):
            own_sums_2M += self._forward_backward(microbatches[first : first + together], labels)
            self.watchdog.enter(self.step, Phase.FORWARD_BACKWARD)

        self.watchdog.enter(self.step, Phase.OPTIMIZER)
        sums_2M = self._sum_over_ranks(own_sums_2M * self._counts_sums)
        groups = apart(dict(self.model.named_parameters()))
        norms = clip(groups, self.config.training.max_norm, self.parallel_dims.pp)
        # the main model's, or in a second stage the causal routers'; not finite if either is not
        alone = self.config.train_only == "causal_routers"
        grad_norm = norms[int(alone)] + 0 * norms.sum()
        totals = StepTotals.read(counts, sums_2M, grad_norm)
        sound = self.skip.check(
            self.step, totals, own_sums_2M, self.model.parameters(), self._last_checkpoint()
        )
        if sound:
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.step()
        else:
            self.optimizers.zero_grad()
        self.balance.update(self._sum_over_ranks, self._counts_sums, taken=sound)
        self.lr_schedulers.step()
        self.tokens_M += torch.tensor(totals.tokens_M)
        self.ntokens_seen = int(self.tokens_M.sum())
        self.stopping = totals.asked_to_stop > 0
        if logging:
            self._log(totals, learning_rate)

    def _part(self, inputs: dict[str, torch.Tensor], labels_BS: torch.Tensor) -> Microbatch:
        """What this rank has of a micro-batch: ``row_B`` is of whole rows."""
        here = {
            name: tensor if name == "row_B" else tensor[:, self.positions]
            for name, tensor in inputs.items()
        }
        return here, labels_BS[:, self.positions]

    def _forward_backward(
        self, microbatches: list[Microbatch], global_labels: torch.Tensor
    ) -> torch.Tensor:
        """Add the gradients of one micro-batch, or of those that go through the pipeline together;
        returns (2, M) sums of nll and log² Z, zero where the last stage is not.
        """
        sums_2M = torch.zeros(2, MODALITIES, device=self.device)

        def arguments(inputs: dict[str, torch.Tensor], labels_BS: torch.Tensor) -> dict[str, Any]:
            here = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            labels_BS = labels_BS.to(self.device)
            sums_of = self.loss_fn.loss_of(labels_BS, self.vocabulary.modality_of(labels_BS))

            def loss(*head: torch.Tensor, **shard: Any) -> torch.Tensor:
                sums = sums_of(*head, **shard)
                sums_2M.add_(torch.stack([sums.nll_M, sums.z_M]))
                return sums.total / global_labels

            return {"tokens_BS": here.pop("input"), **here, "loss": loss}

        calls = [arguments(*microbatch) for microbatch in microbatches]
        with self.train_context():
            if isinstance(self.model, Pipeline):
                self.model.step(calls)
            else:
                (only,) = calls
                self.model(**only).backward()
        return sums_2M

    def _global_counts(self, microbatches: list[Microbatch]) -> torch.Tensor:
        """Input tokens (M), labels (M) of this step and ranks asked to stop (1) over all ranks."""
        counts = torch.zeros(2 * MODALITIES + 1, dtype=torch.int64)
        counts_2M = counts[:-1].view(2, MODALITIES)
        for inputs, labels_BS in microbatches:
            labels_T = labels_BS.reshape(-1)
            counts_2M[0] += torch.bincount(inputs["modality_BS"].reshape(-1), minlength=MODALITIES)
            counts_2M[1] += label_members(labels_T, self.vocabulary.modality_of(labels_T)).sum(1)
        counts_2M *= self._counts_rows
        counts[-1] = preemption.requested()
        return self._sum_over_ranks(counts.to(self.device))

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.parallel_dims.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _last_checkpoint(self) -> str:
        newest = self.checkpointer.newest
        return "none" if newest is None else f"step-{newest}"

    # ---------------------------------------------------------------- metrics

    def _record_statistics(self, recording: bool) -> None:
        routers = (*self.statistics.values(), *self.causal_statistics.values())
        for counting in (*self.model_parts, *routers):
            counting.recording = recording

    def _sum_statistics(self) -> None:
        """Add up over ranks what routers and the last block counted."""
        counted = [b for s in self.statistics.values() for b in (s.load_E, s.sums_6)]
        counted += [s.sums_5 for s in self.causal_statistics.values()]
        counted.append(self.model_parts[-1].output_norm_2)
        total = self._sum_over_ranks(torch.cat(counted) * self._counts_sums)
        for buffer, part in zip(counted, total.split([len(b) for b in counted]), strict=True):
            buffer.copy_(part)

    def _log(self, totals: StepTotals, learning_rate: float) -> None:
        self._sum_statistics()
        metrics = totals.losses(self.loss_fn.z_loss)
        metrics |= {"grad_norm": totals.grad_norm, "lr": learning_rate}
        output_norm = self.model_parts[-1].take_output_norm()
        metrics |= {"skipped_steps": self.skip.total, "output_norm": output_norm}
        metrics |= work_done(self.model.config, self.config.training.seq_len, self.tokens_M)
        metrics |= router_load("router", self.statistics)
        metrics |= router_load("causal", self.causal_statistics)
        self.metrics_processor.log_step(self.step, metrics)

    # ---------------------------------------------------------------- the run

    @record
    def train(self) -> None:
        """Train from the last checkpoint, or from the start, to ``training.steps``.

        SIGTERM or SIGUSR1 to any rank lets all of them finish their step, save, and end.
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
        apply_hyperparameters(self.optimizers, self.lr_schedulers, configured)
        metrics.start(self.step, config.training.steps)
        # only now: whatever was refused has left the folder's own description in place
        description = plain_config(config)
        folder = Path(config.dump_folder)
        with tolerate(folder / run_folder.DESCRIPTION):
            run_folder.write_description(folder, description, settings.changes)
        if self.step:
            begun = f"resumed at step {self.step}"
            begun += f", from here with {settings.changed_now}" if settings.changed_now else ""
        if begun and torch.distributed.get_rank() == 0:
            print(begun, flush=True)
        if begun and not self.step and config.validator.enable:
            self._validate()  # what the other run's model is worth in this one
        first_step, saved = self.step, False
        profiling = config.profiler.build(global_step=self.step, base_folder=config.dump_folder)
        with profiling as profiler:
            data_iterator = self.batch_generator(self.dataloader)
            while self.should_continue_training() and not self.stopping:
                self.step += 1
                self.gc_handler.run(self.step)
                self.train_step(data_iterator)
                metrics.tick(self.step)
                last = self.step == config.training.steps
                if config.validator.enable and (self.validator.should_validate(self.step) or last):
                    self._validate()
                saved = self._save(last)
                if saved or self.step == first_step + 1:
                    metrics.restart_clock()  # neither saving nor warming up is throughput
                profiler.step()
        self._finish(saved)

    def _begin(self) -> str:
        """Take over from another run, if the config says so; returns what was done."""
        start, spec = self.config.start.build(), self.config.model_spec
        assert spec is not None and isinstance(spec.model, Decoder.Config)
        seed = start.find(spec.model)
        if seed is None:
            return ""
        if self.config.checkpoint.initial_load_path:
            raise ValueError(
                f"start.run ({start.config.run}) and checkpoint.initial_load_path "
                f"({self.config.checkpoint.initial_load_path}) both say what to begin with; give "
                "one of them"
            )
        return start.take_over(seed, spec.model, self.model_parts, self.dataloader)

    def _save(self, last: bool) -> bool:
        """Save if it is time to, or the last opportunity; whether it was done."""
        self.watchdog.enter(self.step, Phase.CHECKPOINT)
        if self.stopping and not last:
            # the run is to be continued, whatever its last checkpoint is to be
            self.checkpointer.last_save_model_only = self.checkpointer.last_save_in_hf = False
        return self.checkpointer.save(self.step, last_step=last or self.stopping)

    def _validate(self) -> None:
        self.watchdog.enter(self.step, Phase.VALIDATION)
        self._record_statistics(False)
        self.metrics_processor.log_validation_step(
            self.step, self.validator.measure(self.model, self.loss_fn, self.vocabulary)
        )
        if self.sampler.pairs:
            self._sample()
        self.metrics_processor.restart_clock()

    def _sample(self) -> None:
        """Let the model write, and show it in TensorBoard and samples.png."""
        self.watchdog.enter(self.step, Phase.VALIDATION)
        seq_len = self.config.training.seq_len
        samples = self.sampler.write(self.model, self.vocabulary, seq_len)
        folder = Path(self.config.dump_folder)
        if samples:
            with tolerate(folder / SAMPLES):
                from earlyfuse.parallel.reporting import sample_grid  # matplotlib: for one rank

                pixels = sample_grid.draw_samples(samples, self.step)
                captions = sample_grid.as_table(samples)
                self.metrics_processor.log_samples(self.step, pixels, captions)
                sample_grid.write_picture(pixels, folder / SAMPLES)

    def _finish(self, saved: bool) -> None:
        self.checkpointer.maybe_wait_for_saving()
        saved = saved and self.checkpointer.newest == self.step
        self.metrics_processor.close()
        stopped = self.should_continue_training()
        if torch.distributed.get_rank() == 0:
            self._say_end(stopped, saved)
        if not stopped and self.checkpointer.gave_up == self.step:
            raise OSError(
                f"the last checkpoint, of step {self.step}, could not be written; the newest good "
                f"one: {self._last_checkpoint()}. Make room, and the same command goes on there"
            )

    def _say_end(self, stopped: bool, saved: bool) -> None:
        folder = Path(self.config.dump_folder)
        shown = ""
        with tolerate(folder / CURVES):
            from earlyfuse.parallel.reporting.plots import (
                plot_curves,  # matplotlib: for one rank, once
            )

            shown = f"Curves: {plot_curves(folder)}"
            shown += f", samples: {folder / SAMPLES}" if self.sampler.pairs else ""
        if stopped:
            found = "saved" if saved else f"not saved, last checkpoint {self._last_checkpoint()}"
            words = f"stopped at step {self.step}, {found}; the same command resumes"
        elif self.checkpointer.gave_up == self.step:
            words = f"trained to step {self.step}, not saved"
        else:
            words = f"done: {self.step} steps in {folder}"
        print(printable(f"{words}. {lost_writes(folder)}{shown}"), flush=True)

    def close(self) -> None:
        """Release everything; the other ranks no longer wait for this one."""
        super().close()
        self.watchdog.close()
        self.reservation.release()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trainer itself."""
        return {
            "step": self.step,
            "tokens_M": self.tokens_M.clone(),
            "skip": self.skip.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.step = state_dict["step"]
        self.tokens_M = state_dict["tokens_M"].clone()
        self.skip.load_state_dict(state_dict["skip"])
