"""No file of a checkpoint runs code or takes the machine's memory, whoever reads it."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_runs import MODELS, tiny_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from earlyfuse.parallel.checkpoint.files.dcp_metadata import read_metadata
from earlyfuse.parallel.checkpoint.files.plain_pickle import ForeignName, Made, Named, parse, plain
from earlyfuse.parallel.checkpoint.manifest import EVERYTHING, Manifest, describe
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools.convert import convert
from earlyfuse.tools.documents import ModelFolder


class Code:
    """An object whose unpickling leaves a file behind, in the current folder."""

    def __reduce__(self):
        return os.system, ("touch 'code was run'",)


def train(run: Path, data: Path, steps: int, stop: bool = True, **sections: dict) -> None:
    """Train, or stop before the first step; ``sections``: fields to set by section."""
    config = tiny_config(run, data, MODELS["dense"](), steps=steps)
    config.validator.enable = config.metrics.enable_tensorboard = False
    for section, fields in sections.items():
        for name, value in fields.items():
            setattr(getattr(config, section), name, value)
    trainer = config.build()
    trainer._finish = lambda saved: None
    if stop:
        trainer.should_continue_training = lambda: False
    try:
        trainer.train()
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("safety")
    train(folder / "run", data, 3, stop=False)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def vouch_again(step: Path) -> None:
    """Give a changed checkpoint a manifest that fits it, as an attacker would."""
    (step / "manifest.json").unlink()
    Manifest(3, EVERYTHING, 1, describe(step, 0)).write(step)


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


def in_notes_of_a_rank(step: Path) -> None:
    (step / "__0.metadata").write_bytes(pickle.dumps(Code()))
    (step / ".metadata").write_bytes(b"")
    vouch_again(step)


def in_a_value(name: str):
    return lambda step: point_to(step, name, archive(Code()))


def in_the_planner_data(notes) -> None:
    notes.planner_data = {"x": Code()}


HIDDEN = {
    "notes": lambda step: change_notes(step, in_the_planner_data),
    "notes, whole": lambda step: change_notes(step, lambda notes: Code()),
    "notes of a rank": in_notes_of_a_rank,
    "step": in_a_value("train_state.step"),
    "identity": in_a_value("dataloader.identity"),
    "tensor": in_a_value("norm.weight"),
    "lanes": in_a_value("dataloader.lanes"),
}


def begin_with(run: Path, data: Path, go_on: bool = True) -> None:
    train(run.with_name("new"), data, 1, start={"model": str(run), "data": go_on})


def look_at_tokenizers(run: Path, data: Path) -> None:
    (run / "checkpoint" / "step-3" / "config.json").unlink()
    ModelFolder.read(run)


READERS = {
    "resume": lambda run, data: train(run, data, 4),
    "start.model": begin_with,
    "start.model, no data": lambda run, data: begin_with(run, data, go_on=False),
    "load_model": lambda run, data: load_model(run),
    "convert": lambda run, data: convert(run, run.with_name("converted")),
    "generate": look_at_tokenizers,
}
OF_THE_MODEL = ("start.model, no data", "load_model", "convert")


@pytest.mark.parametrize("where", HIDDEN)
@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_checkpoint_does_not_run(run, data, tmp_path, monkeypatch, reader, where):
    monkeypatch.chdir(tmp_path)
    HIDDEN[where](run / "checkpoint" / "step-3")
    assert not (tmp_path / "code was run").exists()
    unread = {
        "step": (*OF_THE_MODEL, "start.model", "generate"),
        "identity": OF_THE_MODEL,
        "lanes": (*OF_THE_MODEL, "generate"),
        "tensor": ("generate",),
    }
    if reader in unread.get(where, ()):
        READERS[reader](run, data)
    else:
        with pytest.raises(ValueError, match="step-3") as refusal:
            READERS[reader](run, data)
        assert "Traceback" not in str(refusal.value)
    assert not (tmp_path / "code was run").exists()


# ---------------------------------------------------------------- bounds

SMALL = b"\x80\x04"
DEEP = 200_000
BOMBS = {
    "memory of a call": b"\x80\x02cbuiltins\nbytearray\nM\xff\xff\x85R.",
    "a far place in the memo": SMALL + b"Nr\xff\xff\xff\x7f.",
    "a text that is not there": SMALL + b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "lists in lists": SMALL + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "marks": SMALL + b"(" * DEEP + b".",
    "a tuple doubled as a key": SMALL + b"}N\x85" + b"\x94h\x00\x86" * 60 + b"N s.",
    "many empty tables": SMALL + b"(" + b"}" * 500_000 + b"l.",
    "a list in itself": SMALL + b"]\x94h\x00a.",
    "an unknown operation": SMALL + b"\x98N.",
    "an extension": SMALL + b"\x82\x01.",
    "text protocol": b"I1\n.",
    "nothing": b"",
    "no end": SMALL + b"N",
    "an empty stack": SMALL + b"\x85.",
    "state of a class": b"\x80\x02ctorch\nSize\n}b.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_takes_no_more_than_its_length(bomb):
    with pytest.raises(ValueError, match=r"^it "):
        plain(parse(BOMBS[bomb], lambda named: True))


def test_what_picklers_write_of_plain_values_is_read_as_it_was():
    text = "ä\ud800" * 300
    value = {
        "": [None, True, False, 0, -1, 255, 65_536, -(1 << 40), 1 << 200, 0.1, float("inf")],
        "deep": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ()),
        7: {"text": [text, text], "long": list(range(3000))},
    }
    value["same"] = value[""]
    for protocol in (2, 3, 4, 5):
        assert repr(plain(parse(pickle.dumps(value, protocol), lambda named: False))) == repr(value)
    shape = parse(pickle.dumps(torch.Size((2, 3))), lambda named: True)
    assert isinstance(shape, Made) and shape.of == Named("torch", "Size")
    with pytest.raises(ForeignName, match=r"it names torch\.Size"):
        parse(pickle.dumps(torch.Size((2, 3))), lambda named: False)


def test_notes_of_a_large_checkpoint_are_within_the_bounds(tmp_path):
    """As many parts as 64 ranks write of a tensor, in torch's own pickle of them."""
    (tmp_path / "__0_0.distcp").write_bytes(bytes(64))
    size, parts = torch.Size((64, 8)), range(64)
    chunks = [ChunkStorageMetadata(torch.Size((r, 0)), torch.Size((1, 8))) for r in parts]
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), size, chunks)
    places = {MetadataIndex("w", (r, 0), r): _StorageInfo("__0_0.distcp", r, 1) for r in parts}
    notes = Metadata({"w": tensor}, {"w": ("w",)}, places, StorageMeta(tmp_path), "1.0.0")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(notes))
    read = read_metadata(tmp_path)
    assert read.state_dict_metadata == notes.state_dict_metadata
    assert read.storage_data == notes.storage_data


def notes_with(**changes):
    def change(notes):
        (place,) = [index for index in notes.storage_data if index.fqn == "norm.weight"]
        for name, value in changes.items():
            stored, tensor = notes.storage_data[place], notes.state_dict_metadata["norm.weight"]
            setattr(tensor if name in ("size", "chunks") else stored, name, value)

    return lambda step: change_notes(step, change)


def chunks(*extents: int) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size((0,)), torch.Size((extent,))) for extent in extents]


def value(content: bytes):
    return lambda step: point_to(step, "norm.weight", content)


def stretched() -> bytes:
    """A tensor that claims more values than its archive holds."""
    whole, changed = zipfile.ZipFile(io.BytesIO(archive(torch.zeros(2)))), io.BytesIO()
    with zipfile.ZipFile(changed, "w") as copy:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"QK\x00K\x02\x85") == 1
                content = content.replace(b"QK\x00K\x02\x85", b"QK\x00K\x20\x85")
            copy.writestr(name, content)
    return changed.getvalue()


WRONG = {
    "outside": (notes_with(relative_path="../step-3/__0_0.distcp"), "outside its folder"),
    "a device": (notes_with(relative_path="/dev/zero"), "outside its folder"),
    "missing": (notes_with(relative_path="__9_0.distcp"), "which is no file here"),
    "beyond": (notes_with(length=1 << 40), "beyond the end"),
    "before": (notes_with(offset=-1), "beyond the end"),
    "packed": (notes_with(transform_descriptors=["zstd"]), "compressed"),
    "huge": (notes_with(size=torch.Size((1 << 50,))), "chunks of norm.weight are missing"),
    "twice": (notes_with(chunks=chunks(32, 32)), "twice in it"),
    "in part": (notes_with(chunks=chunks(31)), "chunks of norm.weight are missing"),
    "no parts": (
        lambda step: change_notes(step, lambda notes: notes.storage_data.clear()),
        "is in no file",
    ),
    "text": (value(b"junk"), "no archive of torch.save"),
    "bytes": (value(archive(3)), "it is no tensor"),
    "shape": (value(archive(torch.zeros(5))), "cannot be read"),
    "stretched": (value(stretched()), "some of its values are missing"),
    "zip bomb": (value(zipped(bytes(1 << 24), zipfile.ZIP_DEFLATED)), "it is compressed"),
    "call": (value(zipped(BOMBS["memory of a call"])), "it names builtins.bytearray"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_the_notes_say_must_fit_the_files(run, what):
    harm, says = WRONG[what]
    harm(run / "checkpoint" / "step-3")
    with pytest.raises(ValueError, match=says) as refusal:
        load_model(run)
    assert "step-3" in str(refusal.value)


def test_a_flipped_bit_of_a_value_is_refused_by_all_that_read_it(trained, run, tmp_path):
    file = run / "checkpoint" / "step-3" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    values = load_model(trained)[0].state_dict()["norm.weight"].numpy().tobytes()
    content[content.index(values)] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"norm.weight cannot be read \(.*Bad CRC-32"):
        load_model(run)
    with pytest.raises(ValueError, match=r"__0_0\.distcp has another SHA-256"):
        convert(run, tmp_path / "new")


def test_values_of_another_kind_are_refused_by_name(run, data):
    for name, content, says in (
        ("train_state.skip.memory", [], r"train_state.skip.memory \(\[\]\) .* must be a str"),
        ("dataloader.identity", '{"seed"', "step-3: dataloader.identity is not valid JSON"),
        ("train_state.step", 2, "step-3 holds step 2, not the step in its name"),
    ):
        point_to(run / "checkpoint" / "step-3", name, archive(content))
        with pytest.raises(ValueError, match=says):
            train(run, data, 4)
