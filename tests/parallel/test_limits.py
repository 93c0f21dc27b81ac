"""Numbers of a config that cannot be right: every field of the table, and what it lets through."""

import math
from functools import reduce
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from earlyfuse.parallel.training.config_checks import HYPERPARAMETERS, RANGES, check_limits


def config():
    return tiny_config(Path("unused"), Path("unused"))


def changed(field: str, value):
    found = config()
    *sections, name = field.split(".")
    setattr(reduce(getattr, sections, found), name, value)
    return found


def outside(allowed) -> list[float]:
    """Values just outside a range, and what no range has."""
    step = 1e-3 if allowed.most == 1 or allowed.above else 1
    values = [math.nan, -math.inf, -1e-3 if allowed.least == 0 else allowed.least - step]
    values += [allowed.least] if allowed.above else []
    values += [math.inf] if allowed.also != math.inf else []
    values += [allowed.most + step] if allowed.most < math.inf else []
    return [value for value in values if value != allowed.also]


@pytest.mark.parametrize("field", RANGES)
def test_a_number_outside_its_range_is_refused_by_field_and_value(field):
    for value in outside(RANGES[field]):
        with pytest.raises(ValueError, match=rf"^{field} \({value}\) must be") as refusal:
            check_limits(changed(field, value))
        assert str(refusal.value).endswith("change it")
    ends = [RANGES[field].also, None if RANGES[field].above else RANGES[field].least]
    ends += [RANGES[field].most] if RANGES[field].most < math.inf else []
    for value in ends:
        if value is not None and field != "lr_scheduler.total_steps":
            check_limits(changed(field, value))


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
                check_limits(found)


def test_a_schedule_that_ends_before_the_run_is_refused():
    with pytest.raises(ValueError, match=r"total_steps \(5\) must be at least training.steps \(6"):
        check_limits(changed("lr_scheduler.total_steps", 5))
    check_limits(changed("lr_scheduler.total_steps", 6))


@pytest.mark.parametrize("share", [-0.5, 1.5, math.nan])
def test_a_share_of_the_data_lies_between_0_and_1(share):
    with pytest.raises(ValueError, match=rf"data.shares.text \({share}\) must be in \[0, 1\]"):
        check_limits(changed("data.shares", {"text": share, "pairs": 1 - share}))


def test_the_configs_of_the_catalogue_are_within():
    from earlyfuse.configs.registry import catalogue

    for make in catalogue().values():
        check_limits(make())
