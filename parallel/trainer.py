"""The trainer: torchtitan's, with mixed-modal batches, losses and metrics.

Taken over from torchtitan: process groups and meshes, building on meta, optimizer, schedules, DCP
checkpoints, profiler. Its own here: sums of losses per label modality over global counts, metrics
per modality, validation on a fixed list, a graceful stop on SIGTERM.

B rows, S positions, M modality ids.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torchtitan.trainer as titan
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from earlyfuse.data.loader import LaneLoader
from earlyfuse.models.blocks.experts import RouterStats
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import training_flops
from earlyfuse.models.modality import Modality
from earlyfuse.models.objectives.chameleon import ChameleonObjective, label_members
from earlyfuse.parallel import compat, run_folder
from earlyfuse.parallel.checkpoint import Checkpoints
from earlyfuse.parallel.curves import plot_curves
from earlyfuse.parallel.data_set import DataSet, NoTokenizer
from earlyfuse.parallel.metrics import RunMetrics
from earlyfuse.parallel.plan import check_parallelism
from earlyfuse.parallel.validate import Validation

MODALITIES = len(Modality)
Microbatch = tuple[dict[str, torch.Tensor], torch.Tensor]


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

    config: Config
    loss_fn: ChameleonObjective
    metrics_processor: RunMetrics
    validator: Validation
    dataloader: LaneLoader

    @record
    def __init__(self, config: Config):
        compat.apply()
        self._alone = compat.join_process_group_alone()
        check_parallelism(config.parallelism)
        assert config.model_spec is not None, "configs always set model_spec"
        self.data = DataSet(config.data)
        self.data.connect(config)
        self.vocabulary = self.data.vocabulary
        run_folder.check_writable(Path(config.dump_folder))
        # totals of the whole run, saved in every checkpoint
        self.tokens_M = torch.zeros(MODALITIES, dtype=torch.int64)
        super().__init__(config)
        if self.parallel_dims.dp_enabled:
            self.dataloader.mesh = self.parallel_dims.get_mesh("batch")
        self.model: Decoder = self.model_parts[0]
        self.statistics = [m for m in self.model.modules() if isinstance(m, RouterStats)]
        self._stop_requested = False
        if not run_folder.knows_peak(self.metrics_processor.device_memory_monitor.device_name):
            self.metrics_processor.gpu_peak_flops = 0

    def init_distributed(self) -> ParallelDims:
        """Join the launcher's process group, or be a job of one process."""
        if self._alone:
            return ParallelDims.from_config(self.config.parallelism, 1)
        return super().init_distributed()

    # ---------------------------------------------------------------- one step

    def train_step(self, data_iterator: Iterator[Microbatch]) -> None:
        """Forward and backward over all micro-batches, then one optimizer step."""
        self.optimizers.zero_grad()
        learning_rate = self.lr_schedulers.schedulers[0].get_last_lr()[-1]
        logging = (
            self.metrics_processor.should_log(self.step) or self.step == self.config.training.steps
        )
        self._record_statistics(logging)
        # dropout depends on the step alone, so that a resumed run draws what the unbroken one would
        torch.manual_seed((self.config.debug.seed or 0) * 1_000_003 + self.step)

        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        tokens_M, labels_M = self._global_counts(microbatches)
        sums_2M = torch.zeros(2, MODALITIES, device=self.device)
        for inputs, labels in microbatches:
            sums_2M += self._forward_backward(inputs, labels, labels_M.sum())
        saving = self.config.checkpoint.enable and self.step % self.config.checkpoint.interval == 0
        if logging or saving:
            sums_2M = self._reduce(sums_2M)
            self._require_finite(sums_2M)
        grad_norm = dist_utils.clip_grad_norm_(
            list(self.model.parameters()), self.config.training.max_norm, foreach=True
        )
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.lr_schedulers.step()
        self.tokens_M += tokens_M.cpu()
        self.ntokens_seen = int(self.tokens_M.sum())
        if logging:
            self._log(sums_2M, labels_M, grad_norm, learning_rate)

    def _forward_backward(
        self, inputs: dict[str, torch.Tensor], labels_BS: torch.Tensor, global_labels: torch.Tensor
    ) -> torch.Tensor:
        """Add one micro-batch's gradients; returns (2, M) sums of nll and log² Z."""
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        labels_BS = labels_BS.to(self.device)
        label_modality_BS = self.vocabulary.modality_of(labels_BS)
        with self.train_context():
            logits_BSV = self.model(inputs.pop("input"), **inputs)
            sums = self.loss_fn.sums(logits_BSV, labels_BS, label_modality_BS)
            self.loss_fn.total(sums, global_labels).backward()
        return torch.stack([sums.nll_M, sums.z_M]).detach()

    def _global_counts(self, microbatches: list[Microbatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """(M,) input tokens and (M,) labels of this step over all ranks."""
        counts_2M = torch.zeros(2, MODALITIES, dtype=torch.int64)
        for inputs, labels_BS in microbatches:
            labels_T = labels_BS.reshape(-1)
            counts_2M[0] += torch.bincount(inputs["modality_BS"].reshape(-1), minlength=MODALITIES)
            counts_2M[1] += label_members(labels_T, self.vocabulary.modality_of(labels_T)).sum(1)
        tokens_M, labels_M = self._reduce(counts_2M.to(self.device))
        return tokens_M, labels_M

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.parallel_dims.dp_enabled:
            group = self.parallel_dims.get_mesh("batch").get_group()
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def _require_finite(self, sums_2M: torch.Tensor) -> None:
        """Stop before the optimizer spreads a NaN; looked at in every step that logs or saves."""
        if not bool(sums_2M.isfinite().all()):
            raise RuntimeError(
                f"loss sums {sums_2M.tolist()} at step {self.step} are not finite; no checkpoint "
                "holds such a step: resume from the last with a lower learning rate or other data"
            )

    # ---------------------------------------------------------------- metrics

    def _record_statistics(self, recording: bool) -> None:
        self.model.recording = recording
        for statistics in self.statistics:
            statistics.recording = recording

    def _log(
        self,
        sums_2M: torch.Tensor,
        labels_M: torch.Tensor,
        grad_norm: torch.Tensor,
        learning_rate: float,
    ) -> None:
        nll_M, z_M = sums_2M.tolist()
        counts_M = labels_M.tolist()
        loss = sum(nll_M) / sum(counts_M)
        metrics = {"loss": loss}
        present = self.vocabulary.modalities
        metrics |= {
            f"loss/{m.label}": nll_M[m] / max(counts_M[m], 1) for m in present if counts_M[m]
        }
        metrics["z_loss"] = self.loss_fn.z_loss * sum(z_M) / sum(counts_M)
        metrics |= {"grad_norm": float(grad_norm), "lr": learning_rate}
        metrics["output_norm"] = self.model.take_output_norm()
        flops = training_flops(self.model.config, self.config.training.seq_len)
        for group, modality in enumerate(self.model.config.modalities):
            tokens = int(self.tokens_M[modality])
            label = Modality(modality).label
            metrics |= {f"tokens/{label}": tokens, f"flops/{label}": tokens * flops[group]}
        for name, module in self.model.named_modules():
            if isinstance(module, RouterStats):
                metrics |= {
                    f"router/{_short(name)}/{key}": value for key, value in module.take().items()
                }
        self.metrics_processor.log_step(self.step, metrics)

    # ---------------------------------------------------------------- the run

    @record
    def train(self) -> None:
        """Train from the last checkpoint, or from the start, to ``training.steps``; SIGTERM saves
        and ends.
        """
        config, metrics = self.config, self.metrics_processor
        previous = signal.signal(signal.SIGTERM, self._request_stop)
        self.checkpointer.load(step=config.checkpoint.load_step)
        # only now: a refused checkpoint leaves the folder's own description in place
        run_folder.write_description(Path(config.dump_folder), config.to_dict())
        metrics.start(self.step, config.training.steps)
        if self.step and torch.distributed.get_rank() == 0:
            print(f"resumed at step {self.step}", flush=True)
        first_step, saved = self.step, False
        with config.profiler.build(
            global_step=self.step, base_folder=config.dump_folder
        ) as profiler:
            data_iterator = self.batch_generator(self.dataloader)
            while self.should_continue_training() and not self._stop_requested:
                self.step += 1
                self.gc_handler.run(self.step)
                self.train_step(data_iterator)
                metrics.tick(self.step)
                last = self.step == config.training.steps
                if config.validator.enable and (self.validator.should_validate(self.step) or last):
                    self._validate()
                saved = self.checkpointer.save(self.step, last_step=last)
                if (
                    saved or self.step == first_step + 1
                ):  # neither saving nor warming up is throughput
                    metrics.restart_clock()
                profiler.step()
        if self._stop_requested and not saved and self.step > first_step:
            self.checkpointer.save(self.step, last_step=True)
        signal.signal(signal.SIGTERM, previous)
        self._finish()

    def _validate(self) -> None:
        self._record_statistics(False)
        self.metrics_processor.log_validation_step(
            self.step, self.validator.measure(self.model, self.loss_fn, self.vocabulary)
        )
        self.metrics_processor.restart_clock()

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _finish(self) -> None:
        self.metrics_processor.close()
        if torch.distributed.get_rank() != 0:
            return
        picture = plot_curves(Path(self.config.dump_folder))
        if self._stop_requested:
            print(
                f"stopped at step {self.step}, saved; the same command resumes. Curves: {picture}"
            )
        else:
            print(f"done: {self.step} steps in {self.config.dump_folder}. Curves: {picture}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trainer itself."""
        return {"step": self.step, "tokens_M": self.tokens_M.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.step = state_dict["step"]
        self.tokens_M = state_dict["tokens_M"].clone()


def _short(name: str) -> str:
    """layers.3.feed_forward.pools.1.stats → layer3.pool1."""
    parts = name.split(".")
    return f"layer{parts[parts.index('layers') + 1]}.pool{parts[-2]}"
