"""Logs a run's metrics to ``metrics.jsonl``, TensorBoard, Weights & Biases and the console.

``metrics.jsonl`` has one JSON object per logged step. ``kind`` is "train" or "validation"; modality
names and sources are the last part of a key (``loss/image``, ``loss_by_source/pairs``; so for every
sum of the objective), and null is a number that is not finite (``metrics_file.py``). A resumed run
first drops lines beyond its checkpoint, so the file reads as if the run had never stopped.

With several ranks a logged step also has the times of the slowest (``stragglers.py``).
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, MetricsProcessor, WandBLogger
from tqdm import tqdm

from earlyfuse.data.console import printable
from earlyfuse.parallel.reliability.stragglers import RankTimes
from earlyfuse.parallel.reporting.metrics_file import (
    METRICS_FILE,
    TRAIN,
    VALIDATION,
    as_line,
    drop_after,
)
from earlyfuse.parallel.reporting.optional_files import LineFile, tolerate

CLEARLY_SLOWER = 1.1
QUIET = ("loss", "causal_loss", "z_loss", "causal_z_loss")  # shown before the others, or not at all


class RunMetrics(MetricsProcessor):
    """torchtitan's processor (device memory, throughput counters) with this project's outputs."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        log_freq: int = 10
        """Steps between two logged steps; the first and the last are always logged."""

        enable_tensorboard: bool = True
        """Write TensorBoard events to <run folder>/tb."""

        enable_wandb: bool = False
        """Log to Weights & Biases too; its environment variables choose project, run and mode
        (WANDB_PROJECT, WANDB_RUN_ID, WANDB_RESUME, WANDB_MODE=offline …)."""

    def __init__(self, config: Config, *, dump_folder: str, **runtime: Any):
        self.folder = Path(dump_folder)
        self.is_main = dist.get_rank() == 0
        super().__init__(config, dump_folder=dump_folder, **runtime)
        self.console: Console | None = None
        self.rank_times = RankTimes()

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

    def start(self, step: int, steps: int) -> None:
        """Begin at ``step`` of ``steps``: drop logged lines beyond it and open the console."""
        if isinstance(self.logger, RunLogger):
            self.logger.start(step)
        self.console = Console(step, steps, sys.stdout) if self.is_main else None
        self.rank_times.start(step)
        self.time_last_log = time.perf_counter()

    def log_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Write one training step's metrics with throughput since the last call; on every rank."""
        elapsed = time.perf_counter() - self.time_last_log
        # ranks of one tensor- or sequence-parallel group have read the same tokens
        dims = self.parallel_dims
        tokens_per_second = self.ntokens_since_last_log / elapsed / dims.non_data_parallel_size
        data_wait = sum(self.data_loading_times)
        metrics = metrics | {
            "tokens_per_second": tokens_per_second * dims.world_size,
            "data_wait": data_wait / elapsed,
            "memory_gib": self.device_memory_monitor.get_peak_stats().max_active_gib,
        }
        if self.gpu_peak_flops:
            metrics["mfu"] = self.num_flops_per_token * tokens_per_second / self.gpu_peak_flops
        metrics |= self.rank_times.gather(step, data_wait, elapsed)
        self.logger.log({"kind": TRAIN, **metrics}, step)
        if self.console:
            self.console.train(step, metrics)
        self.restart_clock()

    def tick(self, step: int) -> None:
        """``step`` is done: move the live line of a terminal."""
        self.rank_times.step = step
        if self.console:
            self.console.tick(step)

    def log_validation_step(self, step: int, metrics: dict[str, float]) -> None:
        """Write one validation's metrics; its time does not count as training time."""
        self.logger.log({"kind": VALIDATION, **metrics}, step)
        if self.console:
            self.console.validation(step, metrics)

    def log_samples(self, step: int, pixels: np.ndarray, captions: str) -> None:
        """Show a picture (H, W, 3) uint8 and Markdown text in TensorBoard; rank 0 only."""
        if isinstance(self.logger, RunLogger):
            self.logger.log_samples(step, pixels, captions)

    def restart_clock(self) -> None:
        """Throughput counts from now on."""
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
    """``metrics.jsonl`` and TensorBoard events of one run folder; a full disk costs lines.

    With ``wandb``, the config of the run, Weights & Biases gets the same numbers.
    """

    def __init__(
        self, folder: Path, tensorboard: str | None, wandb: dict[str, Any] | None = None
    ) -> None:
        self.wandb_config, self.wandb = wandb, BaseLogger()
        self.path = folder / METRICS_FILE
        self.lines = LineFile(self.path)
        self.tensorboard_folder = folder / tensorboard if tensorboard else None
        self.writer: SummaryWriter | None = None

    def start(self, step: int) -> None:
        """Open for appending after ``step``; later lines of an interrupted run are dropped.

        ``ValueError`` if the file is damaged.
        """
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
        """One line, and a scalar named ``kind``/name for each number."""
        with tolerate(self.path):
            self.lines.append(as_line(metrics, step))
        kind = metrics["kind"]
        scalars = {f"{kind}/{n}": v for n, v in metrics.items() if not isinstance(v, str)}
        self.wandb.log(scalars, step)
        with self._events() as writer:
            for name, value in scalars.items() if writer else ():
                writer.add_scalar(name, value, step)

    def log_samples(self, step: int, pixels: np.ndarray, captions: str) -> None:
        """A picture (H, W, 3) uint8 and Markdown text, in TensorBoard."""
        with self._events() as writer:
            if writer:
                writer.add_image("samples", pixels, step, dataformats="HWC")
                writer.add_text("samples", captions, step)

    def close(self) -> None:
        """Close all outputs."""
        with suppress(OSError):
            self.lines.close()
        self.wandb.close()
        with self._events() as writer:
            if writer:
                writer.close()

    @contextmanager
    def _events(self) -> Iterator[Any]:
        """The writer, None if there is none; one that has failed cannot write any more."""
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
    """torchtitan's logger, its local files in ``folder``/wandb."""
    import wandb  # config_checks has found it

    try:
        return WandBLogger(str(folder), config)
    except wandb.Error as error:
        raise ValueError(
            f"metrics.enable_wandb (True): {error}; run `wandb login`, set WANDB_MODE=offline, or "
            "leave it off"
        ) from error


def _expect_full_disks() -> None:
    """Let TensorBoard's thread end without a traceback: its error comes back at the next write."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        thread = type(arguments.thread).__name__
        if not (thread == "_AsyncWriterThread" and isinstance(arguments.exc_value, OSError)):
            usual(arguments)

    threading.excepthook = hook


class Console:
    """One live line with ETA in a terminal; plain lines in a file."""

    def __init__(self, step: int, steps: int, stream: TextIO):
        self.step, self.steps, self.stream = step, steps, stream
        self.started, self.first_step = time.monotonic(), step
        self.bar: tqdm | None = None
        if stream.isatty():
            self.bar = tqdm(total=steps, initial=step, file=stream, unit="step", dynamic_ncols=True)

    def tick(self, step: int) -> None:
        """A step is done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def train(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a training step."""
        text = (
            f"{_losses('loss', metrics)}{_other_sums(metrics)} | grad {metrics['grad_norm']:.2f} | "
            f"lr {metrics['lr']:.1e} | {metrics['tokens_per_second']:,.0f} tok/s"
        )
        if "mfu" in metrics:
            text += f" | mfu {metrics['mfu']:.1%}"
        if "slowest_rank" in metrics:
            text += f" | {_ranks(metrics)}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        else:
            self._print(
                f"step {step:>{len(str(self.steps))}}/{self.steps} | {text} | eta {self._eta(step)}"
            )

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Show a validation."""
        tasks = "".join(
            f" | {name.removeprefix('task/')} {value:.0%}"
            for name, value in metrics.items()
            if name.startswith("task/")
        )
        causal = f" | {_losses('causal_loss', metrics)}" if "causal_loss" in metrics else ""
        losses = _losses("loss", metrics) + _other_sums(metrics)
        self._print(f"validation at step {step} | {losses}{causal}{tasks}")

    def close(self) -> None:
        """Leave the line as it is."""
        if self.bar is not None:
            self.bar.close()

    def _print(self, line: str) -> None:
        line = printable(line)  # names of tasks come from the data
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def _eta(self, step: int) -> str:
        done = max(step - self.first_step, 1)
        seconds = (time.monotonic() - self.started) / done * (self.steps - step)
        return tqdm.format_interval(seconds)


def _losses(prefix: str, metrics: dict[str, float]) -> str:
    """A sum per label, by modality and, where there are several sources, by source."""
    parts = [f"{prefix.replace('_', ' ')} {metrics[prefix]:.3f}"]
    parts += _under(f"{prefix}/", metrics)
    sources = _under(f"{prefix}_by_source/", metrics)
    if len(sources) > 1:
        parts += ["by source", *sources]
    return " ".join(parts)


def _under(prefix: str, metrics: dict[str, float]) -> list[str]:
    return [
        f"{name.removeprefix(prefix)} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith(prefix)
    ]


def _other_sums(metrics: dict[str, float]) -> str:
    """Sums that an objective adds to its loss; the z-loss is too small for a line."""
    names = [name.removesuffix("/text") for name in metrics if name.endswith("/text")]
    shown = (name for name in names if name in metrics and name not in QUIET)
    return "".join(f" | {_losses(name, metrics)}" for name in shown)


def _ranks(metrics: dict[str, Any]) -> str:
    """What the slowest rank saw; it is named where it is clearly slower than the fastest."""
    slow, fast = metrics["rank_seconds/max"], metrics["rank_seconds/min"]
    text = f"data wait {metrics['data_wait']:.0%} | step {fast:.3g}–{slow:.3g} s"
    if slow > CLEARLY_SLOWER * fast:
        text += f", slowest rank {metrics['slowest_rank']} on {metrics['slowest_host']}"
    return text
