"""Checks a config before anything is built: ranges of numbers, fields without effect, combinations.

Covers the fields that the command line offers; the parts of a model check their own.
"""

import math
from dataclasses import MISSING
from functools import reduce
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from earlyfuse.data.json_files import shown


class Range(NamedTuple):
    """Finite numbers from ``least`` to ``most``, or ``also``, a value with a meaning of its own.

    ``above`` excludes ``least``, ``below`` excludes ``most``.
    """

    least: float
    most: float = math.inf
    also: float | None = None
    above: bool = False
    below: bool = False
    note: str = ""

    def __contains__(self, value: Any) -> bool:
        """True if ``value`` is allowed; NaN never is."""
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
        return rule if self.also in (None, math.inf) else f"{rule}, or {self.also:g}"

    def check(self, field: str, value: Any) -> None:
        """``ValueError`` naming ``field`` unless ``value`` is allowed."""
        if value not in self:
            note = f" ({self.note})" if self.note else ""
            raise ValueError(f"{field} ({shown(value)}) must be {self}{note}; change it")


COUNT, AMOUNT, SHARE = Range(1), Range(0), Range(0, 1)
_ROWS = Range(1, also=-1, note="-1: local_batch_size on each data rank")
_LATEST = Range(0, also=-1, note="-1: the latest complete one")
_SEED = Range(-(10**12), 10**12)  # a million times as much is still a seed of 64 bits
_SECONDS = Range(0, 10**9)
_SAMPLES = Range(1, note="--sampler.no-enable turns samples off")

RANGES = {
    "training.steps": COUNT,
    "training.local_batch_size": COUNT,
    "training.global_batch_size": _ROWS,
    "training.seq_len": Range(2),
    "training.max_norm": Range(0, also=math.inf, above=True, note="inf: no clipping"),
    "training.gc_freq": COUNT,
    "lr_scheduler.warmup_steps": AMOUNT,
    "lr_scheduler.total_steps": COUNT,
    "lr_scheduler.decay_ratio": Range(0, 1, note="share of the steps in which the rate decays"),
    "lr_scheduler.min_lr_factor": Range(0, 1, note="final learning rate over its peak"),
    "ema.decay": Range(0, 1, below=True, note="0: off; 0.9999 is usual"),
    "skip.max_skipped": COUNT,
    "skip.window": Range(4, note="128 is usual"),
    "skip.deviations": Range(0, above=True, note="6 is usual"),
    "watchdog.timeout_seconds": _SECONDS,
    "watchdog.slow_timeout_seconds": _SECONDS,
    "comm.init_timeout_seconds": Range(1, 10**9),
    "comm.trace_buf_size": AMOUNT,
    "validator.freq": COUNT,
    "validator.batch_rows": _ROWS,
    "validator.max_batches": COUNT,
    "sampler.number": _SAMPLES,
    "sampler.temperature": AMOUNT,
    "sampler.top_p": Range(0, 1, above=True),
    "sampler.guidance": AMOUNT,
    "sampler.guided_until": Range(0, 1, note="1: guidance is on at all times"),
    "sampler.denoising_steps": _SAMPLES,
    "sampler.checked_images": Range(2, also=0, note="0 turns image checks off"),
    "sampler.caption_tokens": _SAMPLES,
    "metrics.log_freq": COUNT,
    "checkpoint.interval": COUNT,
    "checkpoint.keep_latest_k": Range(2, also=0, note="0 keeps all"),
    "checkpoint.load_step": _LATEST,
    "start.step": _LATEST,
    "dataloader.media_share": SHARE,
    "dataloader.prefetch": AMOUNT,
    "debug.seed": _SEED,
    "profiler.profile_freq": COUNT,
    "profiler.profiler_active": COUNT,
    "profiler.profiler_warmup": AMOUNT,
    "profiler.memory_snapshot_max_entries": COUNT,
    "parallelism.data_parallel_replicate_degree": COUNT,
    "parallelism.data_parallel_shard_degree": Range(1, also=-1, note="-1: all remaining ranks"),
    "parallelism.tensor_parallel_degree": COUNT,
    "parallelism.context_parallel_degree": COUNT,
    "parallelism.pipeline_parallel_degree": COUNT,
    "parallelism.pipeline_parallel_microbatch_size": COUNT,
    "parallelism.expert_parallel_degree": COUNT,
}
HYPERPARAMETERS = {
    "lr": AMOUNT,
    # smaller values are 0 in fp32, and a gradient of 0 would divide by it
    "eps": Range(1e-30),
    "weight_decay": AMOUNT,
}
_BETA = Range(0, 1, below=True)

_DATA, _SPLIT = "set data.folder and data.shares", "blocks are split evenly; set "
_SPLIT += "pipeline_parallel_first_stage_less_layers or pipeline_parallel_last_stage_less_layers"
_START = "start.model takes the folder of a model in any format (docs/conversion.md)"
# fields of torchtitan's that have no effect on this trainer → what to do instead
UNREAD = {
    "hf_assets_path": "data.folder has the tokenizers, start.model takes weights",
    "metrics.disable_color_printing": "the console has no colours",
    "metrics.save_for_all_ranks": "rank 0 logs sums over all ranks, and times of the slowest",
    "dataloader.dataset": _DATA,
    "dataloader.dataset_path": _DATA,
    "training.disable_cuda_graphs": "steps are not captured as CUDA graphs; use compile.enable",
    "parallelism.enable_fsdp_symm_mem": "FSDP uses torch's default collectives",
    "parallelism.enable_sequence_parallel": "tensor parallelism does not shard activations",
    "parallelism.module_fqns_per_model_part": _SPLIT,
    "parallelism.pipeline_parallel_layers_per_stage": "set pipeline_parallel_degree",
    "parallelism.pipeline_parallel_schedule_csv": "set pipeline_parallel_schedule",
    "parallelism.context_parallel_load_balancer": "each rank has contiguous positions, for scans",
    "parallelism.context_parallel_ptrr_mask_key": "rows are not balanced by their masks",
    "checkpoint.create_seed_checkpoint": (
        "initial values do not depend on the number of ranks; to share them save step 1 "
        "(checkpoint.enable_first_step_checkpoint)"
    ),
    "checkpoint.initial_load_path": _START,
    "checkpoint.initial_load_model_only": _START,
    "checkpoint.initial_load_in_hf": _START,
    "checkpoint.initial_load_in_hf_quantized": _START,
    "compile.enable_async_tensor_parallel": "it does not apply to this decoder",
    "comm.train_timeout_seconds": "set watchdog.timeout_seconds",
    "comm.mode": "use --dry-run to check a layout without its devices",
    "validator.steps": "set validator.max_batches and validator.batch_rows",
    "validator.dataloader": "data.folder has the validation split",
    "debug.spmd_typechecking": "it checks another spmd_backend",
    "debug.moe_force_load_balance": "routers have no such mode",
    "debug.batch_invariant": "no kernel has such a mode",
    "debug.print_config": "run.json has the config; debug.save_config_file writes another copy",
    "debug.enable_structured_logging": "use profiler.enable_profiling for traces",
}
# fields that the run's data and model determine (DataSet.resolve), and that must be left out
FILLED_IN = (
    *("dataloader.sources", "dataloader.order", "dataloader.global_batch_size"),
    *("dataloader.clean_copies", "validator.clean_copies", "validator.sources"),
    *("validator.data_folder", "sampler.data_folder"),
)
_ALLOWED = {"training.disable_cuda_graphs": True}  # where it is not torchtitan's default


def check_config(config: Any) -> None:
    """``ValueError``, before anything is built, for what a ``Trainer.Config`` must not be."""
    for field, allowed in RANGES.items():
        value = reduce(getattr, field.split("."), config)
        if value is not None:
            allowed.check(field, value)
    try:
        getattr(config.loss, "check", lambda: None)()  # an objective may have none
    except ValueError as error:
        raise ValueError(f"loss.{error}") from error
    for name, share in config.data.shares.items():
        SHARE.check(f"data.shares.{name}", share)
    for field, remedy in UNREAD.items():
        *path, name = field.split(".")
        section = reduce(getattr, path, config)
        value, default = getattr(section, name), _ALLOWED.get(field, default_of(section, name))
        if value != default:
            raise ValueError(
                f"{field} ({shown(value)}) must be {shown(default)}, since nothing reads it: "
                f"{remedy}"
            )
    _check_optimizer(config.optimizer)
    for field, right, rule in _combinations(config):
        if not right:
            value = shown(reduce(getattr, field.split("."), config))
            raise ValueError(f"{field} ({value}) {rule}")


def accumulation_steps(training: Any, data_ranks: int) -> int:
    """Micro-batches of a step; ``ValueError`` unless they make up the global batch."""
    rows = training.local_batch_size * data_ranks
    total = training.global_batch_size if training.global_batch_size > 0 else rows
    if total % rows:
        raise ValueError(
            f"training.global_batch_size ({total}) must be a multiple of local_batch_size times "
            f"the data ranks ({rows}); change one of them"
        )
    return total // rows


def default_of(section: Any, name: str) -> Any:
    """The default of field ``name`` in a config's class."""
    field = section.__dataclass_fields__[name]
    return field.default if field.default is not MISSING else field.default_factory()


def _combinations(config: Any) -> list[tuple[str, bool, str]]:
    """Field, whether it is right, and else the rule and the remedy."""
    profiler, compiled = config.profiler, {*config.compile.components}
    cuda, steps = torch.cuda.is_available(), config.training.steps
    total_steps = config.lr_scheduler.total_steps
    active = profiler.profiler_warmup + profiler.profiler_active
    recompute = config.activation_checkpoint
    dropout = max(layer.dropout for layer in config.model_spec.model.layers)
    return [
        (
            "metrics.enable_wandb",
            not config.metrics.enable_wandb or find_spec("wandb") is not None,
            "needs the package wandb; run `pip install -c constraints.txt wandb`, or leave it off",
        ),
        (
            "profiler.enable_memory_snapshot",
            cuda or not profiler.enable_memory_snapshot,
            "must be False without a CUDA device, whose allocator it records",
        ),
        (
            "profiler.profile_freq",
            not profiler.enable_profiling or profiler.profile_freq >= active,
            f"must be at least profiler_warmup ({profiler.profiler_warmup}) + profiler_active "
            f"({profiler.profiler_active}); change one of them",
        ),
        (
            "compile.components",
            compiled <= {"model", "loss"} and (not config.compile.enable or "model" in compiled),
            "must include model, and may include loss, which has a kernel; change them",
        ),
        (
            "optimizer.implementation",
            cuda or config.optimizer.implementation != "fused_opt_states_bf16",
            "needs a CUDA device; use fused",
        ),
        (
            "lr_scheduler.total_steps",
            total_steps is None or total_steps >= steps,
            f"must be at least training.steps ({steps}), as the schedule has no rate beyond its "
            "end; raise it, or leave it out",
        ),
        (
            "activation_checkpoint",
            not dropout or recompute is None or recompute.preserve_rng_state,
            f"needs preserve_rng_state with dropout ({dropout}), or recomputed blocks would drop "
            "other places; set activation_checkpoint.preserve_rng_state",
        ),
    ]


def _check_optimizer(optimizer: Any) -> None:
    names = {group.optimizer_name for group in optimizer.param_groups}
    if unused := sorted(set(optimizer.optimizer_factory_kwargs_by_name) - names):
        raise ValueError(
            f"optimizer.optimizer_factory_kwargs_by_name ({shown(unused)}) must name optimizers of "
            f"param_groups ({', '.join(sorted(names))}); remove the others"
        )
    for place, group in enumerate(optimizer.param_groups):
        field, values = f"optimizer.param_groups.{place}.optimizer_kwargs", group.optimizer_kwargs
        for name in HYPERPARAMETERS.keys() & values.keys():
            HYPERPARAMETERS[name].check(f"{field}.{name}", values[name])
        betas = values.get("betas", (0.9, 0.95))
        if len(betas) != 2:
            raise ValueError(f"{field}.betas ({shown(betas)}) must be two numbers; try 0.9 0.95")
        for beta in betas:
            _BETA.check(f"{field}.betas", beta)
