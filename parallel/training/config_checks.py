"""Ranges of a config's numbers: outside them a run would end in the middle, or learn nothing.

Here is what the command line can reach; the parts of a model know the ranges of theirs.
"""

import math
from typing import Any, NamedTuple

from earlyfuse.data.json_files import shown


class Range(NamedTuple):
    """Finite numbers from ``least`` to ``most``, or ``also``, which has a meaning of its own.

    ``above``: without ``least`` itself. ``below``: without ``most``.
    """

    least: float
    most: float = math.inf
    also: float | None = None
    above: bool = False
    below: bool = False
    note: str = ""

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed; NaN never is."""
        if not isinstance(value, int | float) or math.isnan(value):
            return False
        low = self.least < value if self.above else self.least <= value
        high = value < self.most if self.below or self.most == math.inf else value <= self.most
        return (low and high) or value == self.also

    def __str__(self) -> str:
        if self.most == math.inf:
            rule = f"{'above' if self.above else 'at least'} {self.least:g}"
        else:
            left, right = "(" if self.above else "[", ")" if self.below else "]"
            rule = f"in {left}{self.least:g}, {self.most:g}{right}"
        if isinstance(self.also, float) and math.isinf(self.also):
            return rule
        return rule if self.also is None else f"{rule}, or {self.also:g}"


COUNT, AMOUNT, SHARE = Range(1), Range(0), Range(0, 1)
_ROWS = Range(1, also=-1, note="-1 is what local_batch_size makes over all ranks")
_SEED = Range(-(10**12), 10**12)  # a million times as much is still a seed of 64 bits
_SECONDS = Range(0, 10**9)

RANGES = {
    "training.steps": COUNT,
    "training.local_batch_size": COUNT,
    "training.global_batch_size": _ROWS,
    "training.seq_len": Range(2),
    "training.max_norm": Range(
        0, also=math.inf, above=True, note="gradients are scaled down to it; inf clips nothing"
    ),
    "training.gc_freq": COUNT,
    "lr_scheduler.warmup_steps": AMOUNT,
    "lr_scheduler.total_steps": COUNT,
    "lr_scheduler.decay_ratio": Range(0, 1, note="the share of the steps in which the rate falls"),
    "lr_scheduler.min_lr_factor": Range(0, 1, note="the part of the rate that is left at the end"),
    "loss.z_loss": Range(0, note="0 turns it off"),
    "skip.max_skipped": COUNT,
    "skip.window": Range(4),
    "skip.deviations": Range(0, above=True),
    "watchdog.timeout_seconds": _SECONDS,
    "watchdog.slow_timeout_seconds": _SECONDS,
    "comm.init_timeout_seconds": Range(1, 10**9),
    "comm.train_timeout_seconds": Range(1, 10**9),
    "comm.trace_buf_size": AMOUNT,
    "validator.freq": COUNT,
    "validator.batch_rows": _ROWS,
    "validator.max_batches": COUNT,
    "sampler.number": AMOUNT,
    "sampler.temperature": AMOUNT,
    "sampler.top_p": Range(0, 1, above=True),
    "sampler.guidance": AMOUNT,
    "sampler.caption_tokens": COUNT,
    "metrics.log_freq": COUNT,
    "checkpoint.interval": COUNT,
    "checkpoint.keep_latest_k": Range(2, also=0, note="0 keeps all"),
    "checkpoint.load_step": Range(0, also=-1, note="-1 is the one completed last"),
    "start.step": Range(0, also=-1, note="-1 is the one completed last"),
    "dataloader.media_share": SHARE,
    "dataloader.prefetch": AMOUNT,
    "debug.seed": _SEED,
    "profiler.profile_freq": COUNT,
    "profiler.profiler_active": COUNT,
    "profiler.profiler_warmup": AMOUNT,
    "profiler.memory_snapshot_max_entries": COUNT,
    "parallelism.data_parallel_replicate_degree": COUNT,
    "parallelism.data_parallel_shard_degree": Range(1, also=-1, note="-1 is all that are left"),
    "parallelism.tensor_parallel_degree": COUNT,
    "parallelism.context_parallel_degree": COUNT,
    "parallelism.pipeline_parallel_degree": COUNT,
    "parallelism.pipeline_parallel_microbatch_size": COUNT,
    "parallelism.expert_parallel_degree": COUNT,
}
HYPERPARAMETERS = {
    "lr": AMOUNT,
    # a value that fp32 rounds to 0 would divide by it where a gradient is 0
    "eps": Range(1e-30),
    "weight_decay": AMOUNT,
}
_BETA = Range(0, 1, below=True)


def check_limits(config: Any) -> None:
    """Refuse such numbers of a ``Trainer.Config`` by ``ValueError``, before anything is made."""
    for field, allowed in RANGES.items():
        value = config
        for name in field.split("."):
            value = getattr(value, name)
        if value is not None:
            _check(field, value, allowed)
    for name, share in config.data.shares.items():
        _check(f"data.shares.{name}", share, SHARE)
    for place, group in enumerate(config.optimizer.param_groups):
        _check_hyperparameters(
            f"optimizer.param_groups.{place}.optimizer_kwargs", group.optimizer_kwargs
        )
    total = config.lr_scheduler.total_steps
    if total is not None and total < config.training.steps:
        raise ValueError(
            f"lr_scheduler.total_steps ({total}) must be at least training.steps "
            f"({config.training.steps}): beyond its end the schedule has no rate; raise it, or "
            "leave it out"
        )
    recompute = config.activation_checkpoint
    dropout = max(layer.dropout for layer in config.model_spec.model.layers)
    if dropout and recompute is not None and not recompute.preserve_rng_state:
        raise ValueError(
            f"activation_checkpoint.preserve_rng_state (False) must be True with dropout ({dropout}"
            "): recomputed blocks would drop other places than those that the loss is of"
        )


def _check_hyperparameters(where: str, values: dict[str, Any]) -> None:
    for name, allowed in HYPERPARAMETERS.items():
        if name in values:
            _check(f"{where}.{name}", values[name], allowed)
    betas = values.get("betas", (0.9, 0.95))
    if len(betas) != 2:
        raise ValueError(f"{where}.betas ({shown(betas)}) must be two numbers; 0.9 0.95 is usual")
    for beta in betas:
        _check(f"{where}.betas", beta, _BETA)


def _check(field: str, value: Any, allowed: Range) -> None:
    if not allowed.holds(value):
        note = f" ({allowed.note})" if allowed.note else ""
        raise ValueError(f"{field} ({shown(value)}) must be {allowed}{note}; change it")
