"""Runs with running thresholds: what moves them, what is reported, resumes, and measuring them on a
finished model.
"""

import pytest
import torch
from tiny_runs import MODELS, THRESHOLDS, metrics, moma, run, state, tiny_config
from torch import nn

from earlyfuse.configs import decoders, stages
from earlyfuse.models.routing.router import usable_rules
from earlyfuse.models.routing.running_threshold import RunningThreshold, running_thresholds
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools import generate

STEPS = 4


def config_of(folder, data, model=None, **fields):
    config = tiny_config(folder, data, model or THRESHOLDS["moma_threshold"](), steps=STEPS)
    config.checkpoint.interval = 2
    config.validator.freq = 2
    config.metrics.enable_tensorboard = False
    for name, value in fields.items():
        setattr(config.training, name, value)
    return config


def thresholds(model: nn.Module) -> torch.Tensor:
    return torch.cat([module() for _, module in running_thresholds(model)]).clone()


def lines(folder, kind: str) -> list[dict]:
    return [line for line in metrics(folder) if line["kind"] == kind]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unbroken")
    return run(config_of(folder, data)), folder


def test_losses_agreement_and_slots_are_reported(unbroken, tmp_path, data, capsys):
    _, folder = unbroken
    losses = {"threshold_loss", "threshold_loss/text", "threshold_loss_by_source/pairs"}
    at = "threshold/layer1.pool0"
    for line in lines(folder, "validation"):
        assert losses <= line.keys() and line["threshold_loss"] != line["loss"]
        assert {f"{at}/{name}" for name in ("precision", "recall", "taken")} <= line.keys()
        assert f"{at}/used" not in line and "causal_loss" not in line
    first, *later = lines(folder, "train")
    assert f"{at}/used" not in first, "the first step has no thresholds yet"
    for line in later:
        assert 0.25 <= line[f"{at}/used"] <= 1.6 and 0 <= line[f"{at}/overflow"] < 1
        assert 0 < line["router/layer1.pool0/filled"] <= 1
    run(config_of(tmp_path, data, THRESHOLDS["moma_both"]()))
    last = lines(tmp_path, "validation")[-1]
    assert len({last[f"{rule}loss"] for rule in ("", "causal_", "threshold_")}) == 3
    shown = capsys.readouterr().out.splitlines()[-2]
    assert "| causal loss" in shown and "| threshold loss" in shown
    assert shown.count("threshold loss") == 1


def test_thresholds_for_inference_leave_a_run_as_it_is_bit_for_bit(tmp_path, data):
    model = decoders.with_routers(moma(), threshold=RunningThreshold.Config())
    found = run(config_of(tmp_path / "with", data, model)).model.state_dict()
    expected = run(config_of(tmp_path / "without", data, moma())).model.state_dict()
    assert [name for name, value in expected.items() if not value.equal(found[name])] == []
    assert found.keys() - expected.keys() == {
        f"layers.{layer}.feed_forward.pools.{pool}.router.threshold.{leaf}"
        for layer in range(2)
        for pool in range(2)
        for leaf in ("threshold_E", "weight_E")
    }


def test_micro_batches_make_the_thresholds_of_the_whole_batch(tmp_path, data, unbroken):
    whole = run(config_of(tmp_path, data, local_batch_size=4))
    accumulated = unbroken[0]
    torch.testing.assert_close(thresholds(whole.model), thresholds(accumulated.model))


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, data, unbroken):
    run(config_of(tmp_path, data), stop_after=2)
    resumed = state(run(config_of(tmp_path, data)))
    for name, value in state(unbroken[0]).items():
        assert resumed[name].equal(value), name
    assert metrics(tmp_path) == metrics(unbroken[1])


def test_validation_and_skipped_steps_move_no_threshold(tmp_path, data):
    trainer = config_of(tmp_path, data).build()
    decide, step, seen = trainer.skip.decide, trainer.train_step, []
    trainer.skip.decide = lambda number, *rest: decide(number, *rest) & (number != 3)

    def noting(batches):
        step(batches)
        seen.append(thresholds(trainer.model))

    trainer.train_step = noting
    trainer.train()
    trainer.close()
    first, second, skipped, last = seen
    assert second.equal(skipped) and not first.equal(second) and not skipped.equal(last)
    assert last.equal(thresholds(trainer.model)), "the validation at the end moves none"


def test_thresholds_of_a_finished_model_are_measured_without_training_it(tmp_path, data):
    run(config_of(tmp_path / "finished", data, MODELS["moma"]()))
    parent, _ = load_model(tmp_path / "finished")
    assert parent.default_settings.rule == "batch" and usable_rules(parent) == []
    with pytest.raises(ValueError, match=r"--rule \(threshold\): layers.0.*thresholds_only"):
        generate._rule(parent, "threshold")
    config = config_of(tmp_path / "measured", data, MODELS["moma"]())
    config = stages.thresholds_only(config, str(tmp_path / "finished"), steps=3)
    config.sampler.enable = False
    run(config)
    child, _ = load_model(tmp_path / "measured")
    assert child.default_settings.rule == "threshold"
    for name, value in parent.state_dict().items():
        assert value.equal(child.state_dict()[name]), name
    assert thresholds(child).isfinite().all()
    begun, *later = lines(tmp_path / "measured", "validation")
    assert begun["step"] == 0 and "threshold_loss" not in begun
    assert all("threshold_loss" in line and line["loss"] == begun["loss"] for line in later)
