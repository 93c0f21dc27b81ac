"""What a resume may change: each setting is applied or refused by name, and what the files say is
what was computed.
"""

import json
import math
import re
import shutil
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_runs import MODELS, SHAPE, VECTORS, changed, metrics, moma, run, tiny_config
from toy import VECTOR_VOCABULARY, make_data

from earlyfuse.configs import decoders
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.state_dicts.decoder_config import to_dict
from earlyfuse.parallel.checkpoint.identity import refuse_other_function
from earlyfuse.parallel.reliability.watchdog import Watchdog
from earlyfuse.parallel.trainer import resolve
from earlyfuse.parallel.training.resume_settings import (
    SETTINGS,
    Effect,
    Settings,
    compared,
    differences,
    effect_of,
    plain_config,
)


def small(folder, data, model=None, **fields):
    config = tiny_config(folder, data, model or MODELS["dense"]())
    return changed(config, {"validator.freq": 100} | fields)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """A run that has saved step 3 of 6."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(small(folder, data), stop_after=3)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of the stopped run."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_the_first_step_of_a_resume_uses_the_hyperparameters_that_the_files_state(
    folder, data, capsys
):
    config = small(folder, data, **{"training.steps": 9, "lr_scheduler.warmup_steps": 8})
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
    rates = [line["lr"] for line in metrics(folder) if line["kind"] == "train"][3:]
    assert rates == [0.03 * step / 8 for step in (4, 5, 6)] == [groups[0]["lr"] for groups in used]
    for groups in used:
        assert [(g["betas"], g["eps"]) for g in groups] == [((0.8, 0.9), 1e-6)] * 2
        assert [g["weight_decay"] for g in groups] == [0.0, 0.3]
    described = json.loads((folder / "run.json").read_text())
    changes = {c["field"]: (c["step"], c["before"], c["now"]) for c in described["changes"]}
    kwargs = "optimizer.param_groups[1].optimizer_kwargs"
    assert changes["training.steps"] == (3, 6, 9)
    assert changes[f"{kwargs}.weight_decay"] == (3, 0.1, 0.3)
    assert changes[f"{kwargs}.betas[0]"] == (3, 0.9, 0.8)
    assert described["config"] == plain_config(trainer.config)
    assert "resumed at step 3, from here with" in capsys.readouterr().out
    saved = json.loads((folder / "checkpoint" / "step-6" / SETTINGS).read_text())
    assert saved["changes"] == described["changes"]


def test_every_other_setting_that_is_applied_changes_what_is_computed(stopped, tmp_path, data):
    def resumed(name: str, **fields):
        """Parameters after the next step, and the changes noted."""
        dropout = fields.pop("dropout", 0.0)
        folder = shutil.copytree(stopped, tmp_path / name)
        config = small(folder, data, **fields)
        for layer in config.model_spec.model.layers:
            layer.dropout = dropout
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            trainer = run(config, stop_after=4)
        noted = json.loads((folder / "run.json").read_text())["changes"]
        parameters = [p.detach().flatten() for p in trainer.model.state_dict().values()]
        return torch.cat(parameters), [change["field"] for change in noted]

    same, noted = resumed("same")
    assert noted == []
    for field, name, value in (
        ("training.max_norm", "training.max_norm", 1e-3),
        ("loss.z_loss", "loss.z_loss", 1.0),
        ("model_spec.model.layers[0].dropout", "dropout", 0.3),
    ):
        moved, noted = resumed(field, **{name: value})
        assert field in noted and not torch.equal(moved, same), field


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"debug.seed": 1}, r"debug.seed \(1\) must stay None, as it is in checkpoint .*step-3"),
        ({"training.seq_len": 16}, r"training.seq_len \(16\) must stay 32"),
        ({"training.dtype": "bfloat16"}, r"training.dtype \('bfloat16'\) must stay 'float32'"),
        ({"optimizer.implementation": "foreach"}, r"\('foreach'\) must stay 'fused'"),
        ({"checkpoint.initial_load_path": "/a"}, r"initial_load_path \('/a'\) must be None"),
        ({"start.model": "elsewhere"}, r"start.model \('elsewhere'\) must stay ''"),
        ({"training.steps": 2}, r"steps \(2\) must be at least 3, the step of the checkpoint in"),
        ({"model": moma()}, "of another model: layers.0.feed_forward.pools.0.router.weight: not"),
        (
            {"model": decoders.dense(replace(SHAPE, hidden_dim=64))},
            r"feed_forward.w1: \(64, 32\) here, \(48, 32\) in the checkpoint",
        ),
        ({"data": {"tokenizer": "cc"}}, "tokenizers of the data .*cc.* must be that of the check"),
        ({"data": {"seed": 1}}, "data of the data|data .* must be that of the checkpoint"),
    ],
)
def test_what_a_resume_cannot_change_is_refused_with_both_values(
    folder, tmp_path, data, fields, rule
):
    if "data" in fields:
        data = make_data(tmp_path / "other", **fields.pop("data"))
    files = [folder / name for name in ("run.json", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(ValueError, match=rule) as refusal:
        run(small(folder, data, **fields))
    if "must stay" in rule:
        assert "use the value of the run" in str(refusal.value)
    assert [file.read_bytes() for file in files] == before


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
    copied = value.copy()
    copied[key] = with_another(value[key], rest) if rest else "another"
    return copied


def test_every_field_of_a_config_is_applied_or_refused_or_without_effect(tmp_path, data):
    config, _ = resolve(tiny_config(tmp_path / "unused", data, MODELS["moma_causal"]()))
    settings, plain, seen = Settings(config), plain_config(config), set()
    settings.write(tmp_path)
    for field in leaves(settings.config):
        effect = effect_of(field)
        seen.add(effect)
        other = Settings(config)
        other.config = with_another(settings.config, field)
        assert [found for found, _, _ in differences(settings.config, other.config)] == [field]
        if effect is Effect.FIXED:
            with pytest.raises(ValueError, match=rf"^{re.escape(field)} \("):
                other.resume(tmp_path, 3)
        else:
            other.resume(tmp_path, 3)
            assert [change["field"] for change in other.changes] == [field]
    for field in leaves(plain):
        effect = effect_of(field)
        if effect in (Effect.NONE, Effect.DATA, Effect.UNREAD):
            seen.add(effect)
            assert compared(with_another(plain, field)) == compared(plain), field
    assert seen == set(Effect)


def test_a_field_that_the_table_does_not_know_is_compared_and_refused(tmp_path, data):
    @dataclass(kw_only=True, slots=True)
    class Invented(Watchdog.Config):
        invented: int = 0

    def settings(value):
        return Settings(small(tmp_path, data, watchdog=Invented(invented=value)))

    settings(1).write(tmp_path)
    settings(1).resume(tmp_path, 3)
    with pytest.raises(ValueError, match=r"^watchdog.invented \(2\) must stay 1"):
        settings(2).resume(tmp_path, 3)


def test_parts_of_another_class_and_fields_of_another_version():
    part, other = {"x": {"top_k": 1, "dim": 2}}, {"x": {"capacity": 1.0, "dim": 2}}
    assert [d[0] for d in differences(part, other)] == ["x.capacity", "x.top_k"]
    older, newer = {"x": {"dim": 2}}, {"x": {"dim": 2, "later": 5}}
    ((field, before, now),) = differences(older, newer)
    assert (field, now) == ("x.later", 5) and before is not None
    assert list(differences(newer, older)) == [("x.later", 5, None)]


def test_a_checkpoint_that_does_not_record_its_settings_is_reported(tmp_path, data, capsys):
    settings = Settings(small(tmp_path, data))
    settings.resume(tmp_path, 3)
    assert "is of a version that did not record settings" in capsys.readouterr().err
    assert settings.changes == []
    (tmp_path / SETTINGS).write_text("[[[")
    with pytest.raises(ValueError, match=rf"{SETTINGS} is not valid JSON"):
        settings.resume(tmp_path, 3)


def test_infinity_is_a_word_in_the_files_of_a_run(tmp_path, data):
    config = small(tmp_path, data, **{"training.max_norm": math.inf})
    assert plain_config(config)["training"]["max_norm"] == "inf"


@pytest.mark.parametrize("name", ["tf_clean"])
def test_a_run_with_vectors_resumes_bit_for_bit(name, tmp_path):
    """Noise, times and dropped conditions go on as in an unbroken run."""
    data = make_data(tmp_path / "vectors", vocabulary=VECTOR_VOCABULARY)

    def config(folder):
        return small(folder, data, VECTORS[name](), **{"training.steps": 4})

    unbroken = run(config(tmp_path / "unbroken"))
    run(config(tmp_path / "stopped"), stop_after=3)
    resumed = run(config(tmp_path / "stopped"))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
    for key, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize(
    "fields",
    [
        {"rotary": "running"},
        {"later_see": "clean"},
        {"diffusion": Diffusion.Config(predicts="v")},
        {"diffusion": Diffusion.Config(steps=100)},
        {"diffusion": Diffusion.Config(schedule="flow")},
    ],
    ids=str,
)
def test_weights_of_another_diffusion_are_refused(fields, tmp_path):
    """Shapes of parameters do not tell them apart."""
    model = VECTORS["tf_paper"]()
    other = replace(model, vectors=replace(model.vectors, **fields))
    here, there = ({"model": to_dict(config)} for config in (model, other))
    refuse_other_function(here, here["model"], tmp_path)
    with pytest.raises(ValueError, match=r"is of another model: here, model\.vectors\."):
        refuse_other_function(here, there["model"], tmp_path)
