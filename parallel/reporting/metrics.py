"""Logs a run's metrics to ``metrics.jsonl``, TensorBoard, Weights & Biases and the console.

``metrics.jsonl`` has a JSON object per logged step, of ``kind`` "train" or "validation". Modality
and source are the last part of a name (``loss/image``, ``loss_by_source/pairs``), for every sum of
the objective. A resumed run first drops lines beyond its checkpoint, so the file equals that of an
unbroken run. Losses of a training line are means over the steps since the last one; times are of
training alone. With several ranks, a line also has the times of the slowest (``stragglers.py``).
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, MetricsProcessor, WandBLogger

from earlyfuse.parallel.reliability.stragglers import RankTimes
from earlyfuse.parallel.reporting.console import Console
from earlyfuse.parallel.reporting.metrics_file import (
    METRICS_FILE,
    TRAIN,
    VALIDATION,
    as_line,
    drop_after,
)
from earlyfuse.parallel.reporting.optional_files import append_line, tolerate
from earlyfuse.parallel.reporting.run_folder import CURVES, SAMPLES

if TYPE_CHECKING:
    from earlyfuse.parallel.evaluation.sample_generation import Sample


class RunMetrics(MetricsProcessor):
    """torchtitan's processor (device memory, throughput counters) with this project's outputs."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        log_freq: int = 10
        """Steps between logged steps; the first and last are always logged."""

        enable_tensorboard: bool = True
        """Write TensorBoard events to <run folder>/tb."""

        enable_wandb: bool = False
        """Also log to Weights & Biases, configured by its environment variables (WANDB_PROJECT,
        WANDB_RUN_ID, WANDB_RESUME, WANDB_MODE=offline …)."""

    def __init__(self, config: Config, *, dump_folder: str, **runtime: Any):
        self.folder = Path(dump_folder)
        self.is_main = dist.get_rank() == 0
        super().__init__(config, dump_folder=dump_folder, **runtime)
        self.console: Console | None = None
        self.rank_times = RankTimes()
        self.first_step = self.steps = 0
        self._flops = 0.0
        self._trained, self._trained_seconds = 0, 0.0  # steps timed since the start, their time

    def _build_metric_logger(
        self,
        *,
        config: MetricsProcessor.Config,
        config_dict: dict[str, Any] | None = None,
        **_: Any,
    ) -> BaseLogger:
        if not self.is_main:
            return BaseLogger()
        tensorboard = config.save_tb_folder if config.enable_tensorboard else None
        return RunLogger(self.folder, tensorboard, config_dict if config.enable_wandb else None)

    def start(self, step: int, steps: int, flops: float = 0.0) -> None:
        """Open the outputs at ``step`` of ``steps``, dropping logged lines beyond it.

        ``flops``: those of the run so far.
        """
        self.first_step, self.steps, self._flops = step, steps, flops
        if isinstance(self.logger, RunLogger):
            self.logger.start(step)
        self.console = Console(step, steps) if self.is_main else None
        self.rank_times.start(step)
        self.restart_clock()

    def log_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Log a training step, with throughput since ``restart_clock``; call it on every rank."""
        elapsed = time.perf_counter() - self.time_last_log
        data_wait = sum(self.data_loading_times)
        self._flops = sum(value for name, value in metrics.items() if name.startswith("flops/"))
        metrics = metrics | {
            "data_wait": data_wait / elapsed,
            "memory_gib": self.device_memory_monitor.get_peak_stats().max_active_gib,
        }
        if step == self.first_step + 1:  # it warms up, and may compile
            metrics["first_step_seconds"] = elapsed
        else:
            metrics |= self._throughput(step, elapsed)
        metrics |= self.rank_times.gather(step, data_wait, elapsed)
        self.logger.log({"kind": TRAIN, **metrics}, step)
        if self.console:
            self.console.train(step, metrics, self.seconds_left(step))
        self.restart_clock()

    def _throughput(self, step: int, elapsed: float) -> dict[str, float]:
        """Rates of the steps since ``restart_clock``, which took ``elapsed`` seconds."""
        dims, steps = self.parallel_dims, step - self._clock_step
        self._trained += steps
        self._trained_seconds += elapsed
        # the ranks of a tensor- or context-parallel group read the same tokens
        tokens = self.ntokens_since_last_log * dims.world_size / dims.non_data_parallel_size
        flops_per_rank = (self._flops - self._clock_flops) / elapsed / dims.world_size
        found = {
            "tokens_per_second": tokens / elapsed,
            "step_seconds": elapsed / steps,
            "tflops_per_rank": flops_per_rank / 1e12,
        }
        if self.gpu_peak_flops:
            found["mfu"] = flops_per_rank / self.gpu_peak_flops
        return found

    def seconds_left(self, step: int) -> float | None:
        """Training time of the steps after ``step``, without validation, checkpoints and samples;
        None as long as no step but the first was timed.
        """
        left = self.steps - step
        if not left:
            return 0.0
        return self._trained_seconds / self._trained * left if self._trained else None

    def tick(self, step: int, flops: float = 0.0) -> None:
        """Advance to ``step``; ``flops``: those of the run so far."""
        self.rank_times.step, self._flops = step, flops
        if self.console:
            self.console.tick(step)

    def log_validation_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Log a validation; ``weights`` says which were measured, where a run averages them."""
        self.logger.log({"kind": VALIDATION, **metrics}, step)
        if self.console:
            self.console.validation(step, metrics)

    def log_samples(self, step: int, samples: "Sequence[Sample]", used: dict[str, str]) -> None:
        """Draw samples in samples.png and TensorBoard; nothing without samples (other ranks).

        ``used``: the ``weights`` that generated them, with averages of them.
        """
        if not samples or not isinstance(self.logger, RunLogger):
            return
        with tolerate(self.folder / SAMPLES):
            from earlyfuse.parallel.reporting import sample_grid  # matplotlib, on rank 0 only

            pixels = sample_grid.draw_samples(samples, step, used.get("weights"))
            self.logger.log_samples(step, pixels, sample_grid.as_table(samples))
            sample_grid.write_picture(pixels, self.folder / SAMPLES)

    def draw_curves(self, with_samples: bool) -> str:
        """Draw loss_curves.png at the end of a run; returns the paths of the pictures as text."""
        with tolerate(self.folder / CURVES):
            from earlyfuse.parallel.reporting.plots import plot_curves  # matplotlib

            samples = f", samples: {self.folder / SAMPLES}" if with_samples else ""
            return f"Curves: {plot_curves(self.folder)}{samples}"
        return ""

    def restart_clock(self) -> None:
        """Measure throughput from now on: after a logged step, validation, a checkpoint, and the
        first step.
        """
        self._clock_step, self._clock_flops = self.rank_times.step, self._flops
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.rank_times.restart()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def close(self) -> None:
        """Flush all outputs."""
        if self.console:
            self.console.close()
        super().close()


class RunLogger(BaseLogger):
    """``metrics.jsonl`` and TensorBoard events of a run folder; a full disk loses lines.

    With ``wandb``, the config of the run, also Weights & Biases.
    """

    def __init__(
        self, folder: Path, tensorboard: str | None, wandb: dict[str, Any] | None = None
    ) -> None:
        self.wandb_config, self.wandb = wandb, BaseLogger()
        self.path = folder / METRICS_FILE
        self.tensorboard_folder = folder / tensorboard if tensorboard else None
        self.writer: SummaryWriter | None = None

    def start(self, step: int) -> None:
        """Open for appending after ``step``, dropping later lines; ``ValueError`` if damaged."""
        with tolerate(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if step and self.path.exists():
                drop_after(self.path, step)
            elif self.path.exists():
                self.path.write_bytes(b"")
        if self.tensorboard_folder:
            _expect_full_disks()
            with tolerate(self.tensorboard_folder):
                self.writer = SummaryWriter(str(self.tensorboard_folder), purge_step=step + 1)
        if self.wandb_config is not None:
            self.wandb = _wandb(self.path.parent, self.wandb_config)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Write a line, and a scalar ``kind``/name per number."""
        with tolerate(self.path):
            append_line(self.path, as_line(metrics, step))
        kind = metrics["kind"]
        scalars = {f"{kind}/{n}": v for n, v in metrics.items() if not isinstance(v, str)}
        self.wandb.log(scalars, step)
        with self._events() as writer:
            for name, value in scalars.items() if writer else ():
                writer.add_scalar(name, value, step)

    def log_samples(self, step: int, pixels: np.ndarray, captions: str) -> None:
        """Write a picture (H, W, 3) uint8 and Markdown text to TensorBoard."""
        with self._events() as writer:
            if writer:
                writer.add_image("samples", pixels, step, dataformats="HWC")
                writer.add_text("samples", captions, step)

    def close(self) -> None:
        """Close all outputs."""
        self.wandb.close()
        with self._events() as writer:
            if writer:
                writer.close()

    @contextmanager
    def _events(self) -> Iterator[Any]:
        """The TensorBoard writer, or None; a writer that failed once is not used again."""
        if self.writer is None or self.tensorboard_folder is None:
            yield None
            return
        with tolerate(self.tensorboard_folder):
            try:
                yield self.writer
            except OSError:
                self.writer = None
                raise


def _wandb(folder: Path, config: dict[str, Any]) -> BaseLogger:
    """torchtitan's logger, with local files in ``folder``/wandb."""
    import wandb  # config_checks has checked that it is installed

    try:
        return WandBLogger(str(folder), config)
    except wandb.Error as error:
        raise ValueError(
            f"metrics.enable_wandb (True): {error}; run `wandb login`, set WANDB_MODE=offline, or "
            "leave it off"
        ) from error


def _expect_full_disks() -> None:
    """Silence tracebacks of TensorBoard's thread, whose error is raised again at the next write."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        thread = type(arguments.thread).__name__
        if not (thread == "_AsyncWriterThread" and isinstance(arguments.exc_value, OSError)):
            usual(arguments)

    threading.excepthook = hook
