"""Averages of the weights: formula, checkpoints, layouts, use in validation, tools and starts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ema_ranks import LAYOUTS, averages, ema_config, equal, train
from places import SUPPORT
from ranks import forked, output_of
from tiny_pairs import make_pairs
from tiny_runs import MODELS, changed, metrics, run, state, tiny_config
from toy import make_data

from earlyfuse.configs import decoders
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader
from earlyfuse.parallel.checkpoint.manifest import read_manifest
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model, open_model
from earlyfuse.parallel.estimates.memory import rank_memory
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.tools import convert, generate

DECAY = 0.4  # above the warm-up's ratio for the first four steps
STEP_3, STEP_6 = Path("checkpoint/step-3"), Path("checkpoint/step-6")


def small(folder, data, **fields):
    config = tiny_config(folder, data, MODELS["dense"]())
    return changed(config, {"ema.decay": DECAY, "metrics.enable_tensorboard": False} | fields)


def copied(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def weights(trainer) -> dict[str, torch.Tensor]:
    return copied(dict(trainer.model.named_parameters()))


def stored(folder: Path) -> set[str]:
    """Keys of a checkpoint."""
    return set(DcpReader(folder).read_metadata().state_dict_metadata)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    """A run that has saved steps 3 and 6, its trainer, and its weights at all seven steps."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    trainer = small(folder, data).build()
    seen, step = [], trainer.train_step

    def train_step(iterator):
        seen.append(weights(trainer))
        step(iterator)

    trainer.train_step = train_step
    trainer.train()
    trainer.close()
    return folder, trainer, [*seen, weights(trainer)]


@pytest.fixture
def ema(unbroken):
    """The averages of that run, which are as before afterwards."""
    ema = unbroken[1].ema
    kept, trained = copied(ema.state_dict()), copied(ema.parameters)
    yield ema
    ema.load_state_dict(kept)
    for name, parameter in ema.parameters.items():
        parameter.data.copy_(trained[name])


@pytest.fixture
def stopped(unbroken, tmp_path):
    """A copy of that run as it was at step 3."""
    folder = shutil.copytree(unbroken[0], tmp_path / "stopped")
    shutil.rmtree(folder / STEP_6)
    (folder / "checkpoint" / "latest").write_text("step-3")
    return folder


@pytest.fixture(scope="module")
def without(tmp_path_factory, data):
    """The same run without averages, and its trainer."""
    folder = tmp_path_factory.mktemp("without") / "run"
    return folder, run(small(folder, data, **{"ema.decay": 0.0}))


# ---------------------------------------------------------------- formula


def test_the_average_begins_with_the_weights_and_forgets_by_the_stated_decays(unbroken):
    _, trainer, seen = unbroken
    expected = {name: tensor.double() for name, tensor in seen[0].items()}
    for n, now in enumerate(seen[1:]):
        d = min(DECAY, (1 + n) / (10 + n))
        expected = {name: d * expected[name] + (1 - d) * now[name].double() for name in now}
    assert trainer.ema.updates == 6
    for name, average in trainer.ema.averages.items():
        torch.testing.assert_close(average.double(), expected.pop(name), rtol=0, atol=1e-6)
        assert average.dtype == torch.float32 and not average.requires_grad
    assert not expected and not equal(trainer.ema.averages, seen[-1])


def test_a_skipped_step_moves_neither_the_average_nor_its_warm_up(ema):
    before = copied(ema.state_dict())
    ema.parameters["lm_head.weight"].data += 1
    ema(torch.tensor(False))
    assert equal(before, ema.state_dict())
    ema(torch.tensor(True))
    assert ema.updates == before["updates"] + 1
    assert not torch.equal(ema.averages["lm_head.weight"], before["lm_head.weight"])


def test_the_skipped_steps_of_a_run_do_not_count(data, tmp_path):
    trainer = small(tmp_path / "run", data).build()
    decide = trainer.skip.decide

    def odd_steps(step, loss, *others):
        return decide(step, loss if step % 2 else loss * torch.nan, *others)

    trainer.skip.decide = odd_steps
    trainer.train()
    trainer.close()
    assert trainer.skip.total == 3 and trainer.ema.updates == 3


def test_averages_in_chunks_are_the_same(ema, monkeypatch):
    before = copied(ema.state_dict())
    ema(torch.tensor(True))
    at_once = copied(ema.state_dict())
    ema.load_state_dict(before)
    monkeypatch.setattr("earlyfuse.parallel.training.ema.CHUNK", 2000)
    assert 2 < len(list(ema._chunks())) < len(ema.averages)
    ema(torch.tensor(True))
    assert equal(at_once, ema.state_dict())


# ---------------------------------------------------------------- runs and resumes


def test_averages_change_nothing_of_the_training_and_without_them_there_are_none(unbroken, without):
    (folder, trainer, _), (plain, plainly) = unbroken, without
    assert equal(state(plainly), state(trainer))
    lines = list(zip(metrics(plain), metrics(folder), strict=True))
    assert [one == other for one, other in lines if one["kind"] == "train"] == [True] * 6
    held_out = [(one, other) for one, other in lines if one["kind"] == "validation"]
    assert all("weights" not in one and other["weights"] == "ema" for one, other in held_out)
    assert all(one["loss"] != other["loss"] for one, other in held_out)
    more = {"ema.updates", *(f"ema.{name}" for name in trainer.ema.averages)}
    assert stored(folder / STEP_6) == stored(plain / STEP_6) | more
    assert not stored(plain / STEP_6) & more


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(unbroken, stopped, data):
    resumed = run(small(stopped, data))
    assert equal(resumed.ema.state_dict(), unbroken[1].ema.state_dict())
    assert read_manifest(stopped / STEP_6).files == read_manifest(unbroken[0] / STEP_6).files
    assert metrics(stopped) == metrics(unbroken[0])


def test_averages_that_begin_at_a_resume_begin_with_its_weights_and_say_so(
    without, data, tmp_path, capsys
):
    folder = shutil.copytree(without[0], tmp_path / "run")
    fields = {"training.steps": 8, "checkpoint.load_step": 6}
    trainer = small(folder, data, **fields).build()
    began, step = [], trainer.train_step

    def train_step(iterator):
        began.append((copied(trainer.ema.averages), weights(trainer)))
        step(iterator)

    trainer.train_step = train_step
    trainer.train()
    trainer.close()
    assert equal(*began[0]) and not equal(*began[1]) and trainer.ema.updates == 2
    line = next(x for x in capsys.readouterr().out.splitlines() if "resumed at step 6" in x)
    assert f"ema.decay 0.0 → {DECAY}" in line and "begins with those of this step" in line
    changes = json.loads((folder / "run.json").read_text())["changes"]
    assert {"step": 6, "field": "ema.decay", "before": 0.0, "now": DECAY} in changes


def test_averages_that_end_at_a_resume_are_named(stopped, without, data, capfd):
    resumed = run(small(stopped, data, **{"ema.decay": 0.0}))
    printed = "".join(capfd.readouterr())
    assert "has averaged weights, which end here: ema.decay is 0" in printed
    assert f"ema.decay {DECAY} → 0.0" in printed
    assert equal(state(resumed), state(without[1]))
    assert stored(stopped / STEP_6) == stored(without[0] / STEP_6)


def test_a_last_save_of_weights_keeps_the_averages_in_its_type(unbroken, stopped, data):
    fields = {"last_save_model_only": True, "export_dtype": "bfloat16"}
    run(small(stopped, data, **{f"checkpoint.{name}": value for name, value in fields.items()}))
    assert not any(key.startswith("optimizer") for key in stored(stopped / STEP_6))
    loaded, _ = load_model(stopped / STEP_6)
    expected = unbroken[1].ema.averages
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.equal(expected[name].bfloat16())


# ---------------------------------------------------------------- use


def test_weights_and_averages_come_back_bit_for_bit_also_after_an_error(ema):
    trained, averaged = copied(ema.parameters), copied(ema.averages)
    with pytest.raises(KeyError), ema.weights(True):
        assert equal(copied(ema.parameters), averaged)
        raise KeyError
    assert equal(copied(ema.parameters), trained) and equal(ema.averages, averaged)
    with ema.weights(False) as which:
        assert which == {"weights": "trained"} and equal(copied(ema.parameters), trained)


def test_weights_narrower_than_their_averages_come_back_with_fsdp(data, tmp_path):
    """FSDP does not train on the gathered copies that validation leaves."""
    fields = {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"}
    fields |= {"training.steps": 3, "validator.freq": 1, "validator.tasks": False}
    trainers = [
        run(small(tmp_path / str(decay), data, **fields, **{"ema.decay": decay}))
        for decay in (DECAY, 0.0)
    ]
    with_averages, plain = (copied(t.model.state_dict()) for t in trainers)
    assert all(t.to_local().dtype == torch.bfloat16 for t in trainers[0].ema.parameters.values())
    assert all(t.to_local().equal(plain[n].to_local()) for n, t in with_averages.items())
    ema = trainers[0].ema
    averaged = copied(ema.averages)
    with ema.weights(True):
        for name, parameter in ema.parameters.items():
            assert parameter.to_local().equal(averaged[name].to_local().bfloat16())
    for name, average in ema.averages.items():
        assert average.to_local().equal(averaged[name].to_local())
        assert average.to_local().dtype == torch.float32


def test_validation_and_samples_are_of_the_weights_that_they_name(unbroken, ema, monkeypatch):
    folder, trainer, _ = unbroken
    averaged, trained = copied(ema.averages), copied(ema.parameters)
    monkeypatch.setattr(trainer.sampler, "pairs", ["one"])
    monkeypatch.setattr(trainer.metrics_processor, "console", None)
    lines, used = [], []
    logger = trainer.metrics_processor.logger
    monkeypatch.setattr(logger, "log", lambda line, step: lines.append(line))
    monkeypatch.setattr(trainer.sampler, "write", lambda *_: used.append(copied(ema.parameters)))
    config = trainer.config.ema
    for validation, samples in ((True, False), (False, True)):
        monkeypatch.setattr(config, "validation", validation)
        monkeypatch.setattr(config, "samples", samples)
        trainer._validate()
    assert equal(used[0], trained) and equal(used[1], averaged)
    assert [line["weights"] for line in lines] == ["ema", "trained"]
    assert lines[0]["loss"] == metrics(folder)[-1]["loss"] != lines[1]["loss"]
    for name, parameter in ema.parameters.items():
        parameter.data.copy_(averaged[name])
    by_hand = trainer.validator.measure(trainer.model, trainer.loss_fn, trainer.vocabulary)
    assert by_hand["loss"] == lines[0]["loss"]


def test_each_reader_takes_the_weights_asked_for(unbroken, tmp_path, capsys):
    folder, trainer, seen = unbroken
    expected = {"ema": trainer.ema.averages, "trained": seen[-1], None: trainer.ema.averages}
    for which, tensors in expected.items():
        model, _ = load_model(folder, weights=which)
        assert equal(copied(dict(model.named_parameters())), tensors)
        option = ["--weights", which] if which else []
        out = tmp_path / str(which)
        assert convert.main([str(folder), str(out), "--to", "earlyfuse", "--verify", *option]) == 0
        exported = open_model(out)
        assert exported.weights == (which or "ema")
        assert equal({n: exported.tensors.read(n) for n in exported.tensors.entries}, tensors)
    assert capsys.readouterr().out.count("these are the averaged weights; --weights trained") == 1
    assert open_model(tmp_path / "ema", "ema").weights == "ema"


def test_weights_that_a_folder_does_not_have_are_refused(unbroken, without, tmp_path, capsys):
    assert convert.main([str(unbroken[0]), str(tmp_path / "ema")]) == 0
    for folder, wanted, there in (
        (without[0], "ema", "trained"),
        (tmp_path / "ema", "trained", "ema"),
    ):
        with pytest.raises(ValueError, match=rf"weights \({wanted}\): .* has only {there} ones"):
            load_model(folder, weights=wanted)
        assert convert.main([str(folder), str(tmp_path / "out"), "--weights", wanted]) == 2
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_an_average_is_refused(stopped, data, monkeypatch):
    trainer = small(stopped, data, **{"training.steps": 4}).build()
    whole = trainer.ema.state_dict

    def lacking():
        return {name: value for name, value in whole().items() if name != "norm.weight"}

    trainer.checkpointer.load()
    monkeypatch.setattr(trainer.ema, "state_dict", lacking)
    trainer.step = 4
    trainer.checkpointer.save(4, last_step=True)
    trainer.close()
    with pytest.raises(ValueError, match=r"has no average of norm\.weight"):
        load_model(stopped)
    with pytest.raises(ValueError, match=r"ema\.norm\.weight"):
        small(stopped, data).build().checkpointer.load()
    load_model(stopped, weights="trained")


def test_a_warm_start_takes_the_weights_asked_for(unbroken, without, data, tmp_path):
    folder, trainer, seen = unbroken
    for which, expected in (("trained", seen[-1]), ("ema", trainer.ema.averages)):
        fields = {"start.model": str(folder), "start.weights": which, "training.steps": 1}
        child = small(tmp_path / which, data, **fields, **{"validator.enable": False}).build()
        assert ("averaged" in child._begin()) == (which == "ema")
        assert equal(weights(child), expected)
        child.ema.begin()
        assert equal(child.ema.averages, expected) and child.ema.updates == 0
        child.close()
    fields = {"start.model": str(without[0]), "start.weights": "ema"}
    child = small(tmp_path / "no", data, **fields).build()
    with pytest.raises(ValueError, match=r"start.model: weights \(ema\): .* only trained ones"):
        child._begin()
    child.close()


def test_the_estimate_counts_four_bytes_for_each_parameter(data, tmp_path):
    configs = [small(tmp_path, data, **{"ema.decay": decay}) for decay in (DECAY, 0.0)]
    on, off = (rank_memory(Step.of(config, 2)) for config in configs)
    assert on.averages == on.parameters > 0 == off.averages
    assert on.total - off.total == on.averages


# ---------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> Path:
    """A folder with the runs of one process, of the layouts, and of layouts from its step 2."""
    root = tmp_path_factory.mktemp("layouts")
    make_data(root / "data")
    train(ema_config(root / "alone", root / "data").build())
    output_of(forked(2, SUPPORT / "ema_ranks.py", str(root), *LAYOUTS))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_averages_of_two_ranks_are_those_of_one(name, layouts, tmp_path):
    """From the beginning, resumed from one rank, and those of one rank resumed from two."""
    shutil.copytree(layouts / name / "checkpoint/step-2", tmp_path / "checkpoint/step-2")
    train(ema_config(tmp_path, layouts / "data").build())
    expected = averages(layouts / "alone")
    assert expected
    for folder in (layouts / name, layouts / f"{name}-resumed", tmp_path):
        found = averages(folder)
        assert found.keys() == expected.keys()
        for parameter, average in found.items():
            torch.testing.assert_close(average, expected[parameter], rtol=0, atol=1e-5)
        lines = [(x["step"], x["weights"]) for x in metrics(folder) if x["kind"] == "validation"]
        assert lines[-1] == (4, "ema")


# ---------------------------------------------------------------- generation


def test_generation_is_by_the_weights_asked_for(tmp_path, capsys):
    pairs = make_pairs(tmp_path / "data")
    shape = decoders.Shape(dim=48, layers=1, heads=2, hidden_dim=96, vocab_size=337)
    config = tiny_config(tmp_path / "run", pairs, decoders.dense(shape))
    fields = {"data.shares": {"pairs": 1.0}, "dataloader.media_share": None, "ema.decay": DECAY}
    fields |= {"validator.enable": False, "lr_scheduler.warmup_steps": 0}
    run(changed(config, fields))

    def written(folder: Path, *options: str) -> list[list[dict]]:
        out = tmp_path / "-".join([folder.name, *options])
        words = [str(folder), "--mode", "text", "--samples", "4", "--new-tokens", "20"]
        assert generate.main([*words, "--out", str(out), *options]) == 0
        lines = [json.loads(line) for line in (out / generate.RESULTS).read_text().splitlines()]
        weights = "trained" if "trained" in options else "ema"
        assert [line["weights"] for line in lines] == [weights] * 4
        return [line["written"] for line in lines]

    assert convert.main([str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    by_default = written(tmp_path / "run")
    trained = written(tmp_path / "run", "--weights", "trained")
    assert by_default == written(tmp_path / "exported") != trained
    assert "4 documents by the averaged weights" in capsys.readouterr().out
    refused = [str(tmp_path / "exported"), "--out", str(tmp_path / "no"), "--weights", "trained"]
    assert generate.main(refused) == 2 and not (tmp_path / "no").exists()
    assert "has only ema ones" in capsys.readouterr().err
