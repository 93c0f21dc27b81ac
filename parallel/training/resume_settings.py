"""Compares settings at a resume: a changed one is applied from the next step on, or refused.

Every checkpoint records in ``settings.json`` the settings that determine the computation, without
paths, and the changes by earlier resumes. A resume compares them with its config by the table
below, so that ``run.json`` always describes what is computed.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.json_files import read_json, shown
from earlyfuse.models.state_dicts import decoder_config
from earlyfuse.parallel.reporting import rank_log, run_folder
from earlyfuse.parallel.training.config_checks import UNREAD

SETTINGS = "settings.json"
_PARAMETERS = ("params", "param_names")


class Effect(Enum):
    """Effect of a changed setting at a resume."""

    NONE = "affects placement, speed or logging, not the computation"
    APPLIED = "applied from the next step on, and noted in run.json and history.jsonl"
    DATA = "compared by the loader, which knows the data"
    FIXED = "refused"
    UNREAD = "must have its default at any start (config_checks.UNREAD)"


# every field of a config by its section ("" is the config itself); fields inside model_spec, loss
# and hyperparameters depend on the chosen class and take the effect of the whole
_FIELDS: dict[Effect, dict[str, str]] = {
    Effect.FIXED: {
        "": "model_spec train_only",
        "start": "model upcycle step data weights",
        "override": "imports",
        "debug": "seed",
        "optimizer": "implementation optimizer_factory_kwargs_by_name",
        "optimizer.param_groups": "pattern optimizer_name optimizer_kwargs",
        "training": "seq_len dtype",
    },
    Effect.APPLIED: {
        "model_spec.model.layers": "dropout",
        "model_spec.model.layers.feed_forward.pools.router": "noise bias_rate",
        "model_spec.model.layers.feed_forward.pools.router.threshold": (
            "half_life chooses slack floor"
        ),
        "model_spec.model.layers.depth.router": "bce",
        "model_spec.model.layers.depth.router.threshold": "half_life chooses slack floor",
        "": "loss",
        "optimizer.param_groups.optimizer_kwargs": "lr betas eps weight_decay",
        "lr_scheduler": "warmup_steps total_steps decay_ratio decay_type min_lr_factor",
        "training": "steps max_norm mixed_precision_param mixed_precision_reduce",
        "validator": "freq enable batch_rows max_batches tasks",
        "sampler": (
            "enable number temperature top_p guidance guided_until denoising_steps "
            "denoising_method caption_tokens checked_images"
        ),
        "ema": "decay validation samples",
        "skip": "max_skipped spike_guard window deviations",
        "checkpoint": "exclude_from_loading",
    },
    Effect.DATA: {
        "data": "folder shares embedded speech clips vectors",
        "dataloader": "sources order global_batch_size seed media_share clean_copies",
        "training": "global_batch_size",
    },
    Effect.NONE: {
        "": "dump_folder tokenizer activation_checkpoint",
        "model_spec": "name flavor",
        "debug": "deterministic deterministic_warn_only detect_anomaly save_config_file",
        "training": "local_batch_size enable_cpu_offload gc_freq gc_debug",
        "dataloader": "prefetch",
        "validator": "sources data_folder clean_copies",
        "sampler": "data_folder",
        "checkpoint": (
            "enable folder interval last_save_model_only last_save_in_hf export_dtype "
            "keep_latest_k load_step enable_first_step_checkpoint load_only async_mode fallback"
        ),
        "parallelism": (
            "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward "
            "tensor_parallel_degree spmd_backend pipeline_parallel_degree "
            "pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers "
            "pipeline_parallel_schedule pipeline_parallel_microbatch_size context_parallel_degree "
            "expert_parallel_degree"
        ),
        "activation_checkpoint": (
            "preserve_rng_state determinism_check debug force_recompute_mm_shapes_by_fqns "
            "memory_budget visualize_memory_budget_pareto"
        ),
        "compile": "enable components backend",
        "comm": "init_timeout_seconds trace_buf_size save_traces_folder save_traces_file_prefix",
        "watchdog": "timeout_seconds slow_timeout_seconds",
        "metrics": "log_freq enable_tensorboard save_tb_folder enable_wandb",
        "profiler": (
            "enable_profiling save_traces_folder profile_freq profiler_repeat profiler_skip_first "
            "profiler_skip_first_wait profiler_active profiler_warmup enable_memory_snapshot "
            "memory_snapshot_freq save_memory_snapshot_folder memory_snapshot_max_entries "
            "trace_post_processor"
        ),
    },
}
EFFECTS = {
    f"{section}.{name}".lstrip("."): effect
    for effect, sections in _FIELDS.items()
    for section, names in sections.items()
    for name in names.split()
} | dict.fromkeys(UNREAD, Effect.UNREAD)

# dicts with names chosen by users, compared as values
_NAMED_BY_USERS = (
    "data.shares",
    "dataloader.sources",
    "optimizer.optimizer_factory_kwargs_by_name",
)
_DERIVED = ("model_spec", "dataloader.sources", "dataloader.global_batch_size", "validator.")
_BY_RANKS = "comm.init_timeout_seconds"  # the trainer raises it with several ranks
UNKNOWN: Any = object()
Difference = tuple[str, Any, Any]  # field, before, now


def effect_of(field: str) -> Effect:
    """The effect of a change of ``field``, such as ``model_spec.model.layers[0].dropout``.

    The longest prefix in the table decides; fields that are not in the table are ``FIXED``.
    """
    path = re.sub(r"\[\d+\]", "", field)
    while path and path not in EFFECTS:
        path = path.rpartition(".")[0]
    return EFFECTS.get(path, Effect.FIXED)


def plain_config(config: Any) -> dict[str, Any]:
    """A ``Trainer.Config`` as plain JSON values; infinity and NaN are strings."""
    return _finite(json.loads(json.dumps(config.to_dict(), default=repr)))


def compared(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plain config that are fixed or applied."""

    def matters(field: str) -> bool:
        path = re.sub(r"\[\d+\]", "", field)
        inner = [effect for name, effect in EFFECTS.items() if name.startswith(f"{path}.")]
        return bool({effect_of(field), *inner} & {Effect.FIXED, Effect.APPLIED})

    def part(value: Any, field: str) -> Any:
        if isinstance(value, dict) and field not in _NAMED_BY_USERS:
            names = {name: f"{field}.{name}" if field else name for name in value}
            parts = {n: part(value[n], inner) for n, inner in names.items() if matters(inner)}
            # leave out sections that became empty
            return {n: kept for n, kept in parts.items() if kept != {} or value[n] == {}}
        if isinstance(value, list):
            return [part(inner, f"{field}[{place}]") for place, inner in enumerate(value)]
        return value

    return part(config, "")


def differences(before: Any, now: Any, field: str = "") -> Iterator[Difference]:
    """Fields in which two plain configs differ.

    ``before`` is ``UNKNOWN`` for a field that only ``now`` has: an earlier version lacked it.
    """
    if isinstance(before, dict) and isinstance(now, dict) and field not in _NAMED_BY_USERS:
        gone = sorted(before.keys() - now.keys())
        # if fields are also gone, the class of the part changed
        missing = None if gone else UNKNOWN
        for name in [*now, *gone]:
            inner = f"{field}.{name}" if field else name
            yield from differences(before.get(name, missing), now.get(name), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{field}[{place}]")
    elif before != now:
        yield field, before, now


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """``differences`` of two whole configs, with derived fields last."""
    return sorted(differences(before, now), key=lambda found: found[0].startswith(_DERIVED))


class Settings:
    """Settings of a run: the present ``config`` (``compared``), and ``changes`` by resumes.

    A change is ``{"step", "field", "before", "now"}``: ``now`` holds for the steps after ``step``.
    """

    def __init__(self, config: Any):
        plain = plain_config(config)
        # with class names, as different parts may have the same fields
        plain["model_spec"]["model"] = decoder_config.to_dict(config.model_spec.model)
        self.config = compared(plain)
        self.changes: list[dict[str, Any]] = []
        self.changed: list[dict[str, Any]] = []  # by this resume
        self.changed_now = ""

    def write(self, folder: Path) -> None:
        """Write ``settings.json`` into a checkpoint's folder."""
        atomic_write_json(folder / SETTINGS, {"config": self.config, "changes": self.changes})

    def resume(self, folder: Path, step: int) -> None:
        """Compare with the checkpoint of ``step`` in ``folder``, and take over its ``changes``.

        ``ValueError`` for a change that cannot be applied: field, both values and remedy.
        """
        if not (folder / SETTINGS).is_file():
            _warn(
                f"checkpoint {folder} is of a version that did not record settings: only model and "
                "data are compared"
            )
            return
        saved = read_json(folder / SETTINGS, "restore the checkpoint")
        changed = []
        for field, before, now in changes(saved.field("config", dict), self.config):
            effect = effect_of(field)
            if before is UNKNOWN:
                _warn(f"checkpoint {folder} does not record {field}; it is now {shown(now)}")
            elif effect is Effect.FIXED and not _same_seed(field, before, now):
                raise ValueError(_refusal(field, before, now, folder))
            elif effect is Effect.APPLIED:
                changed.append({"step": step, "field": field, "before": before, "now": now})
        self.changes, self.changed = saved.field("changes", list) + changed, changed
        self.changed_now = listed(changed)


def changed_beside(folder: Path, config: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Fields without effect on the computation (ranks, layout, intervals, paths) that differ from
    the last start in ``folder``; [] at the first, or if its files are damaged.
    """
    with suppress(ValueError):
        last = run_folder.last_start(folder)
        if last is None or not (folder / run_folder.DESCRIPTION).is_file():
            return []
        found = changes(run_folder.read_config(folder).values, config)
        beside = [
            {"field": field, "before": before, "now": now}
            for field, before, now in found
            if before is not UNKNOWN
            and effect_of(field) in (Effect.NONE, Effect.DATA)
            and not field.startswith((*_DERIVED, _BY_RANKS))
        ]
        before = last.field("ranks", int)
        return [{"field": "ranks", "before": before, "now": ranks}] * (before != ranks) + beside
    return []


def listed(changed: Sequence[dict[str, Any]]) -> str:
    """The first changes as "field before → now"."""
    lines = [f"{c['field']} {shown(c['before'])} → {shown(c['now'])}" for c in changed]
    more = f" and {len(lines) - 4} more in {run_folder.HISTORY}" if len(lines) > 4 else ""
    return ", ".join(lines[:4]) + more


def _same_seed(field: str, before: Any, now: Any) -> bool:
    """True for ``debug.seed`` None and 0, which seed alike."""
    return field == "debug.seed" and (before or 0) == (now or 0)


def _refusal(field: str, before: Any, now: Any, folder: Path) -> str:
    remedy = "start a new run with another --dump_folder"
    if not field.startswith("start."):
        remedy += ", which can begin with this one's parameters by --start.model"
    return (
        f"{field} ({shown(now)}) must stay {shown(before)}, as it is in checkpoint {folder}: a "
        f"resume cannot change it; use the value of the run, or {remedy}"
    )


def _warn(line: str) -> None:
    if dist.get_rank() == 0:
        rank_log.tell(f"warning: {line}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def hyperparameters(optimizers: Iterable[Optimizer]) -> list[list[dict[str, Any]]]:
    """Hyperparameters of each parameter group as configured, before loading overwrites them."""
    return [
        [
            {name: value for name, value in group.items() if name not in _PARAMETERS}
            for group in optimizer.param_groups
        ]
        for optimizer in optimizers
    ]


def apply_hyperparameters(
    optimizers: Iterable[Optimizer],
    schedulers: Iterable[LRScheduler],
    configured: list[list[dict[str, Any]]],
) -> None:
    """Restore ``hyperparameters`` after loading, with the scheduled learning rate of the step."""
    for optimizer, scheduler, groups in zip(optimizers, schedulers, configured, strict=True):
        rates = scheduler.get_last_lr()
        for group, values, rate in zip(optimizer.param_groups, groups, rates, strict=True):
            group.update(values | {"lr": rate})
