"""Trained models leave a run by the converter, and converted ones start runs."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_models import change_json, files_of
from public_chameleons import chameleon
from tiny_runs import MODELS, SHAPE, tiny_config
from toy import VOCABULARY, make_data

from earlyfuse.configs import decoders
from earlyfuse.data.atomic import sha256_file
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.state_dicts.vocabulary_map import from_vocabulary
from earlyfuse.parallel.checkpoint.manager import Checkpoints
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.warm_start import WarmStart
from earlyfuse.tools.convert import convert
from earlyfuse.tools.documents import ModelFolder

TOKENS = torch.randint(0, 48, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Toy data whose tokenizers are files of the hashes that it names."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    (folder / "tokenizers").mkdir(parents=True)
    (folder / "tokenizers" / "text.model").write_bytes(b"pieces")
    return make_data(folder, tokenizer=sha256_file(folder / "tokenizers" / "text.model"))


def run(config: Trainer.Config) -> Trainer:
    config.metrics.enable_tensorboard = False
    trainer = config.build()
    trainer._finish = lambda saved: None
    trainer.train()
    trainer.close()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(tiny_config(folder, data, steps=4))


def test_a_run_or_a_checkpoint_of_it_loads_in_one_call(trained, tmp_path):
    folder, trainer = trained
    alone = shutil.copytree(folder / "checkpoint" / "step-4", tmp_path / "alone")
    for path in (folder, folder / "checkpoint/step-3", folder / "checkpoint/step-4", alone):
        model, vocabulary = load_model(path)
        assert vocabulary == VOCABULARY and not model.training
        found, expected = model.state_dict(), trainer.model.state_dict()
        same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert same == (path.name != "step-3")


def test_loading_needs_no_launcher_and_makes_no_process_group(trained):
    code = """
import sys, torch
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.state_dicts.vocabulary_map import from_vocabulary
from earlyfuse.parallel.checkpoint.manager import Checkpoints
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
model, vocabulary = load_model(sys.argv[1])
tokens = torch.arange(32).view(2, 16)
logits = model(MixedBatch.of(tokens, vocabulary.modality_of(tokens)))
assert logits.shape == (2, 16, 48) and logits.isfinite().all()
assert not torch.distributed.is_initialized()
assert not {'earlyfuse.parallel.trainer', 'earlyfuse.parallel.plan'} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", code, str(trained[0])], check=True)


def test_an_export_of_a_run_says_where_it_is_from_and_has_its_tokenizers(trained, data, tmp_path):
    convert(trained[0], tmp_path / "ours", verify=True)
    source = json.loads((tmp_path / "ours" / "config.json").read_text())["source"]
    assert source["step"] == 4 and source["revision"] and source["format"] == "checkpoint"
    assert set(source["data"]) == {"text", "pairs"} and "text" in source["tokenizers"]
    assert not (tmp_path / "ours" / "tokenizers").exists(), "the image tokenizer is not the run's"


def test_tokenizers_that_are_those_of_the_run_are_copied(trained, data, tmp_path):
    run_copy, data_copy = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained[0], run_copy)
    shutil.copytree(data, data_copy)
    image = data_copy / "tokenizers" / "image.safetensors"
    image.write_bytes(b"codes")  # as if the toy data had an image tokenizer
    path = run_copy / "checkpoint" / "step-4" / "config.json"
    source = json.loads(path.read_text())["source"]
    source["tokenizers"]["image"] = sha256_file(image)
    change_json(path, source=source)
    path.with_name("manifest.json").unlink()
    described = (run_copy / "run.json").read_text()
    (run_copy / "run.json").write_text(described.replace(str(data), str(data_copy)))
    assert convert(run_copy, tmp_path / "ours") == []
    assert files_of(tmp_path / "ours" / "tokenizers") == files_of(data_copy / "tokenizers")


@pytest.mark.parametrize("kind", ["dense", "mot"])
def test_a_run_starts_from_a_converted_model_whatever_its_format(tmp_path, data, kind):
    config = MODELS[kind]()
    first = run(tiny_config(tmp_path / "run", data, config, steps=2))
    convert(tmp_path / "run", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "dcp", "dcp")
    folders = ["run", "run/checkpoint/step-2", "ours", "dcp"]
    if kind == "dense":
        convert(tmp_path / "run", tmp_path / "hf", "hf")
        folders.append("hf")
    for folder in folders:
        second = begun_with(tmp_path / folder, tmp_path / "second", data, MODELS[kind]())
        assert second._begin() and second.step == 0
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(second.model.state_dict()[name], tensor), (folder, name)
        second.close()


def begun_with(path: Path, folder: Path, data: Path, model) -> Trainer:
    config = tiny_config(folder, data, model, steps=2)
    config.start = WarmStart.Config(model=str(path))
    return config.build()


def test_what_no_run_can_begin_with_is_refused_by_name(trained, data, tmp_path, monkeypatch):
    folder, _ = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    convert(folder, tmp_path / "ours")
    shutil.copytree(folder, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "checkpoint" / "step-4")
    dense = MODELS["dense"]()
    monkeypatch.chdir(tmp_path)
    for path, model, says in [
        ("absent", None, r"start.model \(absent\) must be the folder .* does not exist"),
        ("file", None, r"start.model \(file\) must be the folder .* is a file"),
        ("empty", None, "start.model: empty .* must hold a model"),
        ("lost", None, r"names step-4, which is not there \(there: step-3\)"),
        ("ours", dense, r"cannot become this model: .*layers.0.feed_forward"),
    ]:
        trainer = begun_with(path, tmp_path / "second", data, model)
        with pytest.raises(ValueError, match=says):
            trainer._begin()
        trainer.close()
    with pytest.raises(ValueError, match=r"checkpoint.last_save_in_hf must be off: .*onver"):
        Checkpoints.Config(last_save_in_hf=True, last_save_model_only=True)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 9999, b"\xff"], ids=range(5))
def test_a_damaged_description_of_a_run_is_refused_by_file(trained, data, tmp_path, content):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(content)
    start = WarmStart.Config(model=str(tmp_path / "run"))
    for read in (
        load_model,
        ModelFolder.read,
        lambda folder: convert(folder, tmp_path / "new"),
        lambda folder: start.build().find(MODELS["moma"](), data),
    ):
        with pytest.raises(ValueError, match=r"run\.json"):
            read(tmp_path / "run")


def test_a_run_does_not_start_from_a_model_of_another_norm_order_or_rotation(tmp_path, data):
    shape = replace(SHAPE, norm_order="swin")
    run(tiny_config(tmp_path / "first", data, decoders.dense(shape), steps=2))
    others = {
        "norm_order": decoders.dense(replace(shape, norm_order="pre")),
        "rope_theta": replace(decoders.dense(shape), rope_theta=5e5),
    }
    for name, other in others.items():
        settings = tiny_config(tmp_path / name, data, other, steps=2)
        settings.start.model = str(tmp_path / "first" / "checkpoint" / "step-2")
        trainer = settings.build()
        with pytest.raises(ValueError, match=rf"{name} \(.*\) must be that of the parent"):
            trainer._begin()
        trainer.close()


def test_hugging_faces_model_is_trained_here_and_goes_back(tmp_path):
    """To DCP, into a run, out of it, into transformers."""
    transformers = pytest.importorskip("transformers")
    theirs = chameleon(True, 2)
    theirs.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    codes = json.loads(path.read_text())["vq_config"] | {"resolution": 4}  # 2 x 2 codes an image
    change_json(path, vocabulary_map=from_vocabulary(VOCABULARY), vq_config=codes)
    convert(tmp_path / "hf", tmp_path / "dcp", "dcp")
    start, _ = load_model(tmp_path / "dcp")
    start.config.modalities = (0, 1)
    make_data(tmp_path / "data")
    described = tmp_path / "data" / "tokenizers" / "vocabulary.json"
    described.write_text(json.dumps(VOCABULARY.to_dict() | {"size": 96}))
    settings = tiny_config(tmp_path / "run", tmp_path / "data", start.config, steps=2)
    settings.start.model = str(tmp_path / "dcp")
    settings.validator.enable = False
    run(settings)
    convert(tmp_path / "run", tmp_path / "back", "hf")
    back = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    ours, _ = load_model(tmp_path / "run")
    with torch.no_grad():
        expected = ours(MixedBatch.of(TOKENS))
        found = back.lm_head(back.model(input_ids=TOKENS).last_hidden_state)
        assert not torch.allclose(start(MixedBatch.of(TOKENS)), expected, atol=1e-2), (
            "nothing was learned"
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
