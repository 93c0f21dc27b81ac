"""No file of a checkpoint runs code or takes the machine's memory, whoever reads it."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_runs import MODELS, tiny_config
from toy import make_data

from earlyfuse.models.state_dicts import load_model
from earlyfuse.models.state_dicts.manifest import EVERYTHING, Manifest
from earlyfuse.parallel.checkpoint_files import describe, write_manifest
from earlyfuse.tools.convert import convert
from earlyfuse.tools.documents import ModelFolder


class Code:
    """An object whose unpickling leaves a file behind, in the current folder."""

    def __reduce__(self):
        return os.system, ("touch 'code was run'",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run folder, and its data."""
    folder = tmp_path_factory.mktemp("safety")
    make_data(folder / "data")
    config = tiny_config(folder / "run", folder / "data", MODELS["dense"](), steps=3)
    config.validator.enable = config.metrics.enable_tensorboard = False
    trainer = config.build()
    trainer.train()
    trainer.close()
    return folder / "run", folder / "data"


def vouch_again(step: Path) -> None:
    """Give a changed checkpoint a manifest that fits it, as an attacker would."""
    (step / "manifest.json").unlink()
    write_manifest(step, Manifest(3, EVERYTHING, 1, describe(step, 0)))


def change_notes(step: Path, change) -> None:
    notes = pickle.loads((step / ".metadata").read_bytes())
    (step / ".metadata").write_bytes(pickle.dumps(change(notes) or notes))
    vouch_again(step)


def point_to(step: Path, name: str, content: bytes) -> None:
    """Let the entry ``name`` of the checkpoint be ``content``."""
    file = step / "__0_0.distcp"

    def change(notes):
        (place,) = [index for index in notes.storage_data if index.fqn == name]
        notes.storage_data[place].offset = file.stat().st_size
        notes.storage_data[place].length = len(content)

    change_notes(step, change)
    with open(file, "ab") as data:
        data.write(content)
    vouch_again(step)


def archive(value: object) -> bytes:
    """``value`` as ``torch.save`` writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive like torch's around any pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", b"3\n")
    return stream.getvalue()


def in_a_note(step: Path) -> None:
    change_notes(step, lambda notes: setattr(notes, "planner_data", {"x": Code()}))


def instead_of_notes(step: Path) -> None:
    change_notes(step, lambda notes: Code())


def in_notes_of_a_rank(step: Path) -> None:
    (step / "__0.metadata").write_bytes(pickle.dumps(Code()))
    (step / ".metadata").write_bytes(b"")
    vouch_again(step)


def in_a_value(name: str):
    return lambda step: point_to(step, name, archive(Code()))


HIDDEN = {
    "notes": in_a_note,
    "notes, whole": instead_of_notes,
    "notes of a rank": in_notes_of_a_rank,
    "step": in_a_value("train_state.step"),
    "identity": in_a_value("dataloader.identity"),
    "optimizer": in_a_value("optimizer.param_groups.norm.weight.lr"),
    "tensor": in_a_value("norm.weight"),
    "lanes": in_a_value("dataloader.lanes"),
}


def resume(run: Path, data: Path) -> None:
    train(tiny_config(run, data, MODELS["dense"](), steps=4))


def begin_with_weights(run: Path, data: Path) -> None:
    config = tiny_config(run.with_name("new"), data, MODELS["dense"](), steps=1)
    config.checkpoint.initial_load_path = str(run / "checkpoint" / "step-3")
    train(config)


def begin_with_everything(run: Path, data: Path) -> None:
    config = tiny_config(run.with_name("new"), data, MODELS["dense"](), steps=4)
    config.checkpoint.initial_load_path = str(run / "checkpoint" / "step-3")
    config.checkpoint.initial_load_model_only = False
    train(config)


def start_from_run(run: Path, data: Path) -> None:
    config = tiny_config(run.with_name("new"), data, MODELS["dense"](), steps=1)
    config.start.run = str(run)
    train(config)


def train(config) -> None:
    """Until the first step would be taken."""
    config.validator.enable = config.metrics.enable_tensorboard = False
    trainer = config.build()
    trainer.should_continue_training = lambda: False
    trainer._finish = lambda saved: None
    try:
        trainer.train()
    finally:
        trainer.close()


def look_at_tokenizers(run: Path, data: Path) -> None:
    step = run / "checkpoint" / "step-3"
    (step / "config.json").unlink()
    ModelFolder.read(run)


READERS = {
    "resume": resume,
    "initial_load_path": begin_with_weights,
    "initial_load_path, everything": begin_with_everything,
    "start.run": start_from_run,
    "load_model": lambda run, data: load_model(run),
    "convert": lambda run, data: convert(run, run.with_name("converted")),
    "generate": look_at_tokenizers,
}
OF_THE_MODEL = ("initial_load_path", "load_model", "convert")


@pytest.mark.parametrize("where", HIDDEN)
@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_checkpoint_does_not_run(trained, tmp_path, monkeypatch, reader, where):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0], tmp_path / "run")
    HIDDEN[where](tmp_path / "run" / "checkpoint" / "step-3")
    assert not (tmp_path / "code was run").exists()
    unread = {
        "step": (*OF_THE_MODEL, "start.run", "generate"),
        "optimizer": (*OF_THE_MODEL, "start.run", "generate"),
        "identity": OF_THE_MODEL,
        "lanes": (*OF_THE_MODEL, "generate"),
        "tensor": ("generate",),
    }
    if reader in unread.get(where, ()):
        READERS[reader](tmp_path / "run", trained[1])
    else:
        with pytest.raises(ValueError, match="step-3") as refusal:
            READERS[reader](tmp_path / "run", trained[1])
        assert "Traceback" not in str(refusal.value)
    assert not (tmp_path / "code was run").exists()
