"""Checks a config before anything is built: ranges of its numbers, and fields that nothing reads.

These are the fields that the command line offers; a model's parts check their own.
"""

import math
from dataclasses import MISSING
from functools import reduce
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

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

# fields of torchtitan's that have no effect on this trainer, and what to do instead
UNREAD = {
    "hf_assets_path": "data.folder has the tokenizers, checkpoint.initial_load_path takes weights",
    "metrics.disable_color_printing": "the console has no colours",
    "metrics.save_for_all_ranks": (
        "what rank 0 logs is about all ranks: sums over them, and times of the slowest"
    ),
    "dataloader.dataset": "set data.folder and data.shares",
    "dataloader.dataset_path": "set data.folder",
    "training.disable_cuda_graphs": "steps are not captured as CUDA graphs; compile.enable is",
    "parallelism.enable_fsdp_symm_mem": "FSDP communicates as torch does by default",
    "parallelism.enable_sequence_parallel": "tensor parallelism keeps whole activations",
    "parallelism.module_fqns_per_model_part": (
        "blocks are split evenly; set pipeline_parallel_first_stage_less_layers or "
        "pipeline_parallel_last_stage_less_layers"
    ),
    "parallelism.pipeline_parallel_layers_per_stage": "pipeline_parallel_degree decides it",
    "parallelism.pipeline_parallel_schedule_csv": "choose by pipeline_parallel_schedule",
    "parallelism.context_parallel_load_balancer": (
        "each rank takes a contiguous part of a row, as a scan needs it"
    ),
    "parallelism.context_parallel_ptrr_mask_key": "rows are not balanced by their masks",
    "checkpoint.create_seed_checkpoint": (
        "initial values are the same on any number of ranks; to share them save step 1 "
        "(checkpoint.enable_first_step_checkpoint)"
    ),
    "compile.enable_async_tensor_parallel": "it is not applied to this decoder",
    "comm.train_timeout_seconds": "the watchdog ends stalls; set watchdog.timeout_seconds",
    "comm.mode": "use --dry-run to check a layout without its devices",
    "validator.steps": "set validator.max_batches and validator.batch_rows",
    "validator.dataloader": "data.folder has the validation split",
    "debug.spmd_typechecking": "it checks another spmd_backend",
    "debug.moe_force_load_balance": "routers have no such mode",
    "debug.batch_invariant": "no kernel has such a mode",
    "debug.print_config": "run.json has the config; debug.save_config_file writes another copy",
    "debug.enable_structured_logging": "use profiler.enable_profiling for traces",
}
_ALLOWED = {"training.disable_cuda_graphs": True}  # where it is not torchtitan's default


def check_config(config: Any) -> None:
    """Refuse what a ``Trainer.Config`` must not be by ``ValueError``, before anything is built."""
    for field, allowed in RANGES.items():
        value = reduce(getattr, field.split("."), config)
        if value is not None:
            _check(field, value, allowed)
    for field, reason in UNREAD.items():
        *path, name = field.split(".")
        section = reduce(getattr, path, config)
        value, default = getattr(section, name), _ALLOWED.get(field, default_of(section, name))
        if value != default:
            raise ValueError(
                f"{field} ({shown(value)}) must be {shown(default)}, since nothing reads it: "
                f"{reason}"
            )
    _check_metrics_and_profiler(config)
    _check_compile(config.compile)
    _check_optimizer(config.optimizer)
    for name, share in config.data.shares.items():
        _check(f"data.shares.{name}", share, SHARE)
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


def default_of(section: Any, name: str) -> Any:
    """The default of field ``name`` in a config's class."""
    field = section.__dataclass_fields__[name]
    return field.default if field.default is not MISSING else field.default_factory()


def _check_metrics_and_profiler(config: Any) -> None:
    if config.metrics.enable_wandb and find_spec("wandb") is None:
        raise ValueError(
            "metrics.enable_wandb (True) needs the package wandb, which is not installed; run "
            "`pip install -c constraints.txt wandb`, or leave it off"
        )
    profiler = config.profiler
    if profiler.enable_memory_snapshot and not torch.cuda.is_available():
        raise ValueError(
            "profiler.enable_memory_snapshot (True) must be False without a CUDA device, whose "
            "allocator it records"
        )
    least = profiler.profiler_warmup + profiler.profiler_active
    if profiler.enable_profiling and profiler.profile_freq < least:
        raise ValueError(
            f"profiler.profile_freq ({profiler.profile_freq}) must be at least profiler_warmup "
            f"({profiler.profiler_warmup}) + profiler_active ({profiler.profiler_active}); change "
            "one of them"
        )


def _check_compile(compile: Any) -> None:
    unknown = sorted(set(compile.components) - {"model", "loss"})
    if unknown or (compile.enable and "model" not in compile.components):
        raise ValueError(
            f"compile.components ({shown(compile.components)}) must include model, and may include "
            "loss, which a kernel of its own computes; nothing else is compiled"
        )


def _check_optimizer(optimizer: Any) -> None:
    names = {group.optimizer_name for group in optimizer.param_groups}
    if unused := sorted(set(optimizer.optimizer_factory_kwargs_by_name) - names):
        raise ValueError(
            f"optimizer.optimizer_factory_kwargs_by_name ({shown(unused)}) must name optimizers of "
            f"param_groups ({', '.join(sorted(names))}); remove what is not among them"
        )
    if optimizer.implementation == "fused_opt_states_bf16" and not torch.cuda.is_available():
        raise ValueError(
            "optimizer.implementation (fused_opt_states_bf16) needs a CUDA device; use fused"
        )
    for place, group in enumerate(optimizer.param_groups):
        _check_hyperparameters(
            f"optimizer.param_groups.{place}.optimizer_kwargs", group.optimizer_kwargs
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
