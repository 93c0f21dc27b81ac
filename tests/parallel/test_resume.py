"""What a resume may change: each setting is applied or refused by name, and what the files say is
what was computed.
"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import MODELS, metrics, run, tiny_config
from toy import make_data

from earlyfuse.parallel.trainer import Trainer, resolve
from earlyfuse.parallel.training.resume_settings import (
    SETTINGS,
    Effect,
    Settings,
    compared,
    differences,
    effect_of,
    plain_config,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data) -> Path:
    """A run that has saved step 3 of 6."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(small(folder, data), stop_after=3)
    return folder


def small(folder: Path, data: Path) -> Trainer.Config:
    config = tiny_config(folder, data, MODELS["dense"]())
    config.validator.freq = 100
    return config


def again(stopped: Path, folder: Path, data: Path) -> Trainer.Config:
    shutil.copytree(stopped, folder)
    return small(folder, data)


def parameters(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.state_dict().values()])


def test_the_first_step_of_a_resume_uses_the_hyperparameters_that_the_files_state(
    stopped, tmp_path, data, capsys
):
    config = again(stopped, tmp_path / "run", data)
    config.training.steps = 9
    config.lr_scheduler.warmup_steps = 8
    config.lr_scheduler.decay_type = "linear"
    for group in config.optimizer.param_groups:
        group.optimizer_kwargs |= {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6}
    config.optimizer.param_groups[1].optimizer_kwargs["weight_decay"] = 0.3
    trainer, used = config.build(), []

    def note(optimizer, arguments, options):
        used.append([dict(group) for group in optimizer.param_groups])

    trainer.optimizers.optimizers[0].register_step_pre_hook(note)
    trainer.should_continue_training = lambda: trainer.step < 6
    trainer.train()
    trainer.close()
    used = [groups for groups in used if groups[0]["lr"]]  # making states to load into is at 0
    rates = [line["lr"] for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert rates[3:] == [0.03 * step / 8 for step in (4, 5, 6)]
    assert rates[3:] == [groups[0]["lr"] for groups in used]
    for groups in used:
        assert [(g["betas"], g["eps"]) for g in groups] == [((0.8, 0.9), 1e-6)] * 2
        assert [g["weight_decay"] for g in groups] == [0.0, 0.3]
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    changes = {c["field"]: (c["step"], c["before"], c["now"]) for c in described["changes"]}
    assert changes["training.steps"] == (3, 6, 9)
    kwargs = "optimizer.param_groups[1].optimizer_kwargs"
    assert changes[f"{kwargs}.weight_decay"] == (3, 0.1, 0.3)
    assert changes[f"{kwargs}.betas[0]"] == (3, 0.9, 0.8)
    assert described["config"] == plain_config(trainer.config)
    assert "resumed at step 3, from here with" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "checkpoint" / "step-6" / SETTINGS).read_text())
    assert saved["changes"] == described["changes"]


def test_every_other_setting_that_is_applied_changes_what_is_computed(stopped, tmp_path, data):
    def resumed(name: str, change) -> torch.Tensor:
        config = again(stopped, tmp_path / name, data)
        change(config)
        return parameters(run(config, stop_after=4))

    def drop(config):
        for layer in config.model_spec.model.layers:
            layer.dropout = 0.3

    same = resumed("same", lambda config: None)
    changes = {
        "training.max_norm": lambda config: setattr(config.training, "max_norm", 1e-3),
        "loss.z_loss": lambda config: setattr(config.loss, "z_loss", 1.0),
        "model_spec.model.layers[0].dropout": drop,
    }
    for field, change in changes.items():
        moved = resumed(field, change)
        noted = json.loads((tmp_path / field / "run.json").read_text())["changes"]
        assert field in [change["field"] for change in noted]
        assert not torch.equal(moved, same), field
    assert json.loads((tmp_path / "same" / "run.json").read_text())["changes"] == []


@pytest.mark.parametrize(
    ("section", "name", "value", "before"),
    [
        ("debug", "seed", 1, "None"),
        ("training", "seq_len", 16, "32"),
        ("training", "dtype", "bfloat16", "'float32'"),
        ("optimizer", "implementation", "foreach", "'fused'"),
        ("checkpoint", "initial_load_path", "/elsewhere", "None"),
        ("start", "run", "elsewhere", "''"),
    ],
)
def test_what_a_resume_cannot_change_is_refused_with_both_values(
    stopped, tmp_path, data, section, name, value, before
):
    config = again(stopped, tmp_path / "run", data)
    setattr(getattr(config, section), name, value)
    files = [tmp_path / "run" / name for name in ("run.json", "metrics.jsonl")]
    as_it_was = [file.read_bytes() for file in files]
    rule = rf"^{section}.{name} \({value!r}\) must stay {before}, as it is in checkpoint .*step-3"
    with pytest.raises(ValueError, match=rule) as refusal:
        run(config)
    assert "use the value of the run" in str(refusal.value)
    assert [file.read_bytes() for file in files] == as_it_was


def leaves(value, field: str = "") -> list[str]:
    """Every field of a plain config, as ``differences`` names it."""
    if isinstance(value, dict) and value and field not in ("data.shares", "dataloader.sources"):
        pairs = [(f"{field}.{name}" if field else name, inner) for name, inner in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{field}[{place}]", inner) for place, inner in enumerate(value)]
    else:
        return [field]
    return [leaf for name, inner in pairs for leaf in leaves(inner, name)]


def with_another(value, field: str):
    """``value`` with another leaf at ``field``."""
    name, _, rest = re.sub(r"\[(\d+)\]", r".\1", field).partition(".")
    key = int(name) if isinstance(value, list) else name
    changed = value.copy()
    changed[key] = with_another(value[key], rest) if rest else "another"
    return changed


def test_every_field_of_a_config_is_applied_or_refused_or_without_effect(stopped, tmp_path, data):
    config = tiny_config(tmp_path / "unused", data, MODELS["moma_causal"]())
    config, _ = resolve(config)
    settings = Settings(config)
    settings.write(tmp_path)
    seen = set()
    for field in leaves(settings.config):
        effect = effect_of(field)
        seen.add(effect)
        changed = Settings(config)
        changed.config = with_another(settings.config, field)
        assert [found for found, _, _ in differences(settings.config, changed.config)] == [field]
        if effect is Effect.FIXED:
            with pytest.raises(ValueError, match=rf"^{re.escape(field)} \("):
                changed.resume(tmp_path, 3)
        else:
            changed.resume(tmp_path, 3)
            assert [change["field"] for change in changed.changes] == [field]
    plain = plain_config(config)
    for field in leaves(plain):
        effect = effect_of(field)
        if effect in (Effect.NONE, Effect.DATA, Effect.UNREAD):
            seen.add(effect)
            assert compared(with_another(plain, field)) == compared(plain), field
    assert seen == set(Effect)


def test_parts_of_another_kind_and_fields_of_another_version():
    part, other = {"x": {"top_k": 1, "dim": 2}}, {"x": {"capacity": 1.0, "dim": 2}}
    assert [d[0] for d in differences(part, other)] == ["x.capacity", "x.top_k"]
    older, newer = {"x": {"dim": 2}}, {"x": {"dim": 2, "later": 5}}
    ((field, before, now),) = differences(older, newer)
    assert (field, now) == ("x.later", 5) and before is not None
    assert list(differences(newer, older)) == [("x.later", 5, None)]
    assert effect_of("section_of_a_later_version.field") is Effect.FIXED


def test_a_checkpoint_that_does_not_note_its_settings_is_said(stopped, tmp_path, data, capsys):
    settings = Settings(small(tmp_path, data))
    settings.resume(tmp_path, 3)
    assert "was written by a version that did not note its settings" in capsys.readouterr().err
    assert settings.changes == []
    (tmp_path / SETTINGS).write_text("[[[")
    with pytest.raises(ValueError, match=rf"{SETTINGS} is not valid JSON"):
        settings.resume(tmp_path, 3)


def test_infinity_is_a_word_in_the_files_of_a_run(tmp_path, data):
    config = small(tmp_path, data)
    config.training.max_norm = math.inf
    assert plain_config(config)["training"]["max_norm"] == "inf"
