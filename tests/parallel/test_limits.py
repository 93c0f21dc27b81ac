"""Every field of a config is applied or refused by name; so are numbers outside their ranges."""

import math
import sys
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from pathlib import Path

import pytest
from tiny_runs import changed, tiny_config
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC

from earlyfuse.parallel.training.config_checks import (
    HYPERPARAMETERS,
    RANGES,
    UNREAD,
    check_config,
)
from earlyfuse.parallel.training.resume_settings import EFFECTS, Effect


@dataclass
class NoNumbers:
    """The config of an objective without weights to check."""


def config(fields: dict | None = None):
    return changed(tiny_config(Path("unused"), Path("unused")), fields or {})


def outside(allowed) -> list[float]:
    """Values just outside a range, and what no range has."""
    step = 1e-3 if allowed.most == 1 or allowed.above else 1
    values = [math.nan, -math.inf, -1e-3 if allowed.least == 0 else allowed.least - step]
    values += [allowed.least] if allowed.above else []
    values += [allowed.most] if allowed.below else []
    values += [math.inf] if allowed.also != math.inf else []
    values += [allowed.most + step] if allowed.most < math.inf else []
    return [value for value in values if value != allowed.also]


def test_an_objective_checks_its_own_numbers():
    wrong = config()
    wrong.loss.z_loss = -1.0
    with pytest.raises(ValueError, match=r"^loss.z_loss \(-1.0\) must not be negative"):
        check_config(wrong)
    other = config()
    other.loss = NoNumbers()
    check_config(other)


@pytest.mark.parametrize("field", RANGES)
def test_a_number_outside_its_range_is_refused_by_field_and_value(field):
    for value in outside(RANGES[field]):
        with pytest.raises(ValueError, match=rf"^{field} \({value}\) must be") as refusal:
            check_config(config({field: value}))
        assert str(refusal.value).endswith("change it")
    allowed = RANGES[field]
    ends = [allowed.also, None if allowed.above else allowed.least]
    ends += [allowed.most] if allowed.most < math.inf and not allowed.below else []
    for value in ends:
        if value is not None and field != "lr_scheduler.total_steps":
            check_config(config({field: value}))


@pytest.mark.parametrize("name", [*HYPERPARAMETERS, "betas"])
def test_hyperparameters_of_each_group_are_in_their_range(name):
    wrong = {"lr": [-1e-3, math.inf], "eps": [0.0, -1.0], "weight_decay": [-0.1, math.nan]}
    wrong["betas"] = [(0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), (0.9,), (0.9, 0.95, 0.99)]
    for group in (0, 1):
        for value in wrong[name]:
            found = config()
            found.optimizer.param_groups[group].optimizer_kwargs[name] = value
            field = rf"optimizer.param_groups.{group}.optimizer_kwargs.{name} \("
            with pytest.raises(ValueError, match=field):
                check_config(found)


def test_a_schedule_that_ends_before_the_run_is_refused():
    with pytest.raises(ValueError, match=r"total_steps \(5\) must be at least training.steps \(6"):
        check_config(config({"lr_scheduler.total_steps": 5}))
    check_config(config({"lr_scheduler.total_steps": 6}))


@pytest.mark.parametrize("share", [-0.5, 1.5, math.nan])
def test_a_share_of_the_data_lies_between_0_and_1(share):
    with pytest.raises(ValueError, match=rf"data.shares.text \({share}\) must be in \[0, 1\]"):
        check_config(config({"data.shares": {"text": share, "pairs": 1 - share}}))


def test_the_configs_of_the_catalogue_are_within():
    from earlyfuse.configs.registry import catalogue

    for make in catalogue().values():
        check_config(make())


# ---------------------------------------------------------------- fields


def leaves(value, field=""):
    """Field → value of all that the command line offers of a config."""
    if field in UNREAD or field in ("model_spec", "loss", "tokenizer"):
        return {field: value}
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return leaves(value[0], field)
    if not is_dataclass(value):
        return {field: value}
    inner = [leaves(getattr(value, f.name), f"{field}.{f.name}".lstrip(".")) for f in fields(value)]
    return {name: leaf for part in inner for name, leaf in part.items()}


@pytest.mark.parametrize("recompute", [None, FullAC, SelectiveAC, MemoryBudgetAC])
def test_every_field_is_known_to_be_applied_or_refused(recompute):
    """A later torchtitan cannot add one that is accepted in silence."""
    found = config()
    found.activation_checkpoint = recompute and recompute.Config()
    unknown = leaves(found).keys() - EFFECTS.keys()
    assert not unknown, "find out what reads them: enter an effect, or config_checks.UNREAD"


def test_the_table_names_no_field_that_is_gone():
    policies = (FullAC, SelectiveAC, MemoryBudgetAC)
    known = set(leaves(config()))
    for policy in policies:
        known |= leaves(policy.Config(), "activation_checkpoint").keys()
    inside = ("model_spec.", "optimizer.param_groups.optimizer_kwargs.")
    assert {name for name in EFFECTS if not name.startswith(inside)} <= known


OTHER = {
    "hf_assets_path": "elsewhere",
    "dataloader.dataset": "c4",
    "dataloader.dataset_path": "c4",
    "parallelism.module_fqns_per_model_part": [["layers.0"]],
    "parallelism.pipeline_parallel_layers_per_stage": 1,
    "parallelism.pipeline_parallel_schedule_csv": "schedule.csv",
    "parallelism.context_parallel_load_balancer": None,
    "parallelism.context_parallel_ptrr_mask_key": "full",
    "checkpoint.initial_load_path": "runs/other",
    "comm.train_timeout_seconds": 600,
    "comm.mode": "torchcomms",
    "validator.steps": 3,
    "validator.dataloader": None,
}


@pytest.mark.parametrize("field", UNREAD)
def test_a_field_that_nothing_reads_is_refused_with_what_to_do_instead(field):
    now = reduce(getattr, field.split("."), config())
    other = OTHER.get(field, not now if isinstance(now, bool) else None)
    assert other != now, "the test needs another value"
    with pytest.raises(ValueError, match=rf"^{field} \(.* must be .*, since nothing reads it: \w"):
        check_config(config({field: other}))
    assert EFFECTS[field] is Effect.UNREAD


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"profiler.enable_profiling": True, "profiler.profile_freq": 3}, r"freq \(3\) must be at"),
        ({"profiler.enable_memory_snapshot": True}, "without a CUDA device"),
        ({"optimizer.implementation": "fused_opt_states_bf16"}, "needs a CUDA device"),
        ({"optimizer.optimizer_factory_kwargs_by_name": {"Foo": {}}}, r"\(\['Foo'\]\) must name"),
        ({"compile.components": ["model", "head"]}, r"\(\['model', 'head'\]\) must include model"),
        ({"compile.enable": True, "compile.components": ["loss"]}, r"\(\['loss'\]\) must include"),
    ],
)
def test_what_would_be_ignored_or_end_a_run_later_is_refused(changes, rule, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=rule):
        check_config(config(changes))


def test_without_the_package_wandb_logging_to_it_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"enable_wandb \(True\) needs .* `pip install .* wandb`"):
        check_config(config({"metrics.enable_wandb": True}))
