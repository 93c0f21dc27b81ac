"""The data folder of a run: read as it was prepared, never written to, and refused by name."""

import copy
import json
import os
import random
import runpy
import shutil
from dataclasses import replace

import pytest
from places import ROOT
from raw_shards import contents
from tiny_runs import tiny_config
from toy import VOCABULARY, make_data, text_document, write_source

from earlyfuse.configs import embedded
from earlyfuse.configs.command_line import help_text, override
from earlyfuse.configs.registry import catalogue
from earlyfuse.data.prepare.embedded import prepare_corpus
from earlyfuse.parallel.estimates import dry_run
from earlyfuse.parallel.training import data_config
from earlyfuse.parallel.training.data_config import DataSet


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def no_corpus(monkeypatch, tmp_path):
    """A run in an empty folder, where making the corpus is an error."""

    def made(*_, **__):
        raise AssertionError("the embedded corpus is made")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("earlyfuse.data.prepare.embedded.prepare_corpus", made)
    return tmp_path / "here"


def refusal(config: DataSet.Config | None = None, run=None) -> str:
    """What the start of ``run`` on its data says."""
    with pytest.raises(ValueError) as caught:
        dataset = DataSet(config or run.data)
        if run is not None:
            dataset.resolve(run, ranks=1)
    return str(caught.value)


# ---------------------------------------------------------------- whose folder it is


@pytest.mark.parametrize("name", ["moma_4t4i", "mamba_speech"])
def test_a_folder_given_to_a_config_with_a_corpus_is_read_and_not_written(data, no_corpus, name):

    before = contents(data)
    config = catalogue()[name]()
    config.data.folder = str(data)  # as in a config of one's own; the rest left as it was
    found = DataSet(config.data)
    assert found.shares.keys() == {"text", "pairs"} and sum(found.shares.values()) == 1
    assert found.shares["text"] > 0.6, "by the tokens that they have, not by the corpus's mix"
    said = refusal(run=config)
    assert f"({VOCABULARY.size} ids in {data})" in said and "vocab_size=48" in said
    assert contents(data) == before and not any(no_corpus.iterdir())


def test_train_on_the_command_line_neither_makes_nor_fills_a_folder(data, no_corpus, capsys):
    train = runpy.run_path(str(ROOT / "train.py"))["main"]
    before = contents(data)
    empty = no_corpus.parent / "empty"
    empty.mkdir()
    for folder, said in (
        (data, "vocab_size=48"),
        (no_corpus / "mistyped", "it does not exist; without --data.folder the run takes"),
        (empty, "it has no tokenizers/vocabulary.json"),
    ):
        assert train(["moma_4t4i", "--data.folder", str(folder)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and str(folder) in message and said in message
    assert contents(data) == before and not any(no_corpus.iterdir()) and not any(empty.iterdir())


def test_without_a_folder_the_corpus_is_made_in_its_own_place(no_corpus, monkeypatch):
    made = []

    def make(folder, speech):
        made.append((folder, speech))
        make_data(folder)

    monkeypatch.setattr("earlyfuse.data.prepare.embedded.prepare_corpus", make)
    config = embedded.moma_4t4i()
    DataSet(config.data)
    spoken = replace(config.data, speech=True)
    DataSet(spoken)
    assert made == [(data_config.CORPUS, False), (data_config.SPEECH_CORPUS, True)]


def test_the_corpus_has_a_mix_of_its_own_wherever_it_lies(tmp_path, no_corpus):
    rng = random.Random(0)
    folder = make_data(tmp_path / "corpus")
    shutil.rmtree(folder / "train" / "pairs")
    for name in ("glyphs", "digits", "interleaved"):
        documents = [text_document(rng) for _ in range(5)]
        write_source(folder / "train" / name, documents, {"text": "aa", "image": "bb"})
    config = replace(embedded.moma_4t4i().data, folder=str(folder))
    mix = {"text": 0.2, "glyphs": 0.4, "digits": 0.2, "interleaved": 0.2}
    assert DataSet(config).shares == mix
    assert DataSet(replace(config, embedded=False)).shares["text"] > 0.9
    assert DataSet(replace(config, shares={"text": 1.0})).shares == {"text": 1.0}


@pytest.mark.parametrize("mine", ["thesis.tex", "train/text/shard-000000.tar", "raw/notes.txt"])
def test_a_corpus_is_never_made_in_a_folder_that_holds_something_else(tmp_path, mine):
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(ValueError, match=r"and no raw/corpus\.json.* new or an empty one"):
        prepare_corpus(tmp_path, scale=0.01)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / mine]


def test_a_corpus_interrupted_while_it_was_built_goes_on(tmp_path, monkeypatch):
    class Going(Exception):
        pass

    def go(*_, **__):
        raise Going

    monkeypatch.setattr("earlyfuse.data.prepare.embedded.build_corpus", go)
    (tmp_path / ".raw-abc" / "corpus").mkdir(parents=True)  # as kill -9 leaves it
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(Going):
            prepare_corpus(folder)


def test_a_dry_run_neither_makes_the_corpus_nor_a_folder(tmp_path, no_corpus, data):
    assert "made at the first start" in dry_run.describe("dense", embedded.dense(), 1)
    config = embedded.dense()
    config.data.folder = "mistyped"
    with pytest.raises(ValueError, match=r"data\.folder \('mistyped'\) .* does not exist"):
        dry_run.describe("dense", config, 1)
    assert not any(no_corpus.iterdir())
    assert "lanes of" in dry_run.describe("tiny", tiny_config(tmp_path, data), 1)


def test_a_dry_run_leaves_config_and_environment_as_they_are(tmp_path, data, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = tiny_config(tmp_path, data)
    config.training.global_batch_size = -1
    before = copy.deepcopy(config)
    assert "32 data ranks" in dry_run.describe("tiny", config, 32)
    assert config == before and "WORLD_SIZE" not in os.environ


def test_resolving_fills_a_copy_and_refuses_what_it_would_overwrite(tmp_path, data):
    config = tiny_config(tmp_path, data)
    config.training.global_batch_size = -1
    before = copy.deepcopy(config)
    found = DataSet(config.data).resolve(config, ranks=4)
    assert config == before and found.training.global_batch_size == 8
    assert list(found.dataloader.sources.values()) == [0.5, 0.5]
    assert DataSet(found.data).resolve(found, ranks=4) == found
    config.dataloader.sources = {"elsewhere": 1.0}
    assert "dataloader.sources ({'elsewhere': 1.0}) must be left out" in refusal(run=config)


def test_shares_on_the_command_line_take_the_place_of_all_that_a_config_has(capsys):
    def shares(*words: str) -> dict[str, float]:
        config = embedded.dense()
        config.data.shares = {"a": 0.3, "b": 0.7}
        return override(config, [*words, "--training.steps", "3"]).data.shares

    assert shares() == {"a": 0.3, "b": 0.7}
    assert shares("--data.shares", "text=0.5", "pairs=0.5") == {"text": 0.5, "pairs": 0.5}
    assert shares("--data.shares", "text", "0.25", "b", "0.75") == {"text": 0.25, "b": 0.75}
    assert shares("--data.shares") == {}
    for words in (["x"], ["x=y"], ["x=1", "x=1"], ["=1"], ["x", "0.5", "y"]):
        with pytest.raises(SystemExit):
            shares("--data.shares", *words)
        assert "--data.shares" in capsys.readouterr().err
    assert "--data.shares" in help_text("dense", embedded.dense())


def test_the_order_of_shares_decides_nothing(tmp_path, data):
    """The same stream whatever order shares are given in, and a resume that continues it."""

    def run(shares):
        config = tiny_config(tmp_path / "run", data)
        config.data.shares = shares
        config = DataSet(config.data).resolve(config, ranks=1)
        loader = config.dataloader.build(
            dp_world_size=1, dp_rank=0, seq_len=32, local_batch_size=4, tokenizer=None
        )
        batches = iter(loader)
        return loader, lambda: [next(batches)[0]["batch"].tokens_BS for _ in range(5)]

    one, draw = run({"text": 0.5, "pairs": 0.5})
    _, draw_other = run({"pairs": 0.5, "text": 0.5})
    assert [x.tolist() for x in draw()] == [x.tolist() for x in draw_other()]
    again, draw_again = run({"pairs": 0.5, "text": 0.5})
    again.load_state_dict(one.state_dict())
    assert [x.tolist() for x in draw()] == [x.tolist() for x in draw_again()]


def test_the_corpus_keeps_the_order_of_its_first_runs():
    names = ["interleaved", "speech", "a", "digits", "z", "text", "glyphs"]
    first = ["text", "glyphs", "digits", "interleaved", "speech"]
    assert sorted(names, key=data_config._place) == [*first, "a", "z"]


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize("split", ["train", "validation"])
def test_unfinished_and_empty_sources_are_refused_by_name(tmp_path, data, split):
    manifest = data / split / "pairs" / "manifest.json"
    whole = manifest.read_text()
    config = tiny_config(tmp_path / "run", data)
    for content in (None, "", whole.replace('"shards"', '"shard"'), empty(whole)):
        if content is None:
            manifest.unlink()
        else:
            manifest.write_text(content)
        said = refusal(run=config)
        assert f"{split}/pairs" in said and ("manifest" in said or "no token" in said), said
    manifest.unlink()
    if split == "validation":  # of no use to a run without validation
        config.validator.enable = False
        DataSet(config.data).resolve(config, ranks=1)
    else:  # nor a source that the shares leave out
        config.data.shares = {"text": 1.0}
        DataSet(config.data).resolve(config, ranks=1)


def empty(manifest: str) -> str:
    """The manifest of a source of the same name that has no shards, as prepare would write it."""
    from earlyfuse.data.shards.manifest import manifest_hash

    fields = json.loads(manifest) | {"shards": [], "documents": 0}
    fields["tokens"] = dict.fromkeys(fields["tokens"], 0)
    del fields["sha256"]
    return json.dumps(fields | {"sha256": manifest_hash(fields)})


DAMAGES = [None, True, -1, 3, 10**30, 0.5, float("nan"), "x\x1b[2J", [], {}, [[]]]


def test_vocabulary_json_is_that_of_the_data_in_every_field(tmp_path, data):
    path = data / "tokenizers" / "vocabulary.json"
    whole, config = path.read_text(), tiny_config(tmp_path / "run", data)
    contents_of_file = ["", "[]", "null", "{", '{"size": 48}', "[" * 100_000, "\x00\xff"]
    fields = json.loads(whole)
    for name in fields:
        contents_of_file += [json.dumps({k: v for k, v in fields.items() if k != name})]
        contents_of_file += [json.dumps(fields | {name: value}) for value in DAMAGES]
    for name in fields["media"][0]:
        for value in DAMAGES:
            contents_of_file.append(
                json.dumps(fields | {"media": [fields["media"][0] | {name: value}]})
            )
    contents_of_file.append(json.dumps(fields | {"media": fields["media"] * 2}))
    contents_of_file.append(json.dumps(fields | {"more": 1}))
    for content in contents_of_file:
        if content == json.dumps(fields) or content == whole:
            continue
        path.write_text(content)
        said = refusal(run=config)
        assert str(path) in said and "\x1b" not in said and "again" in said, (content, said)
    path.write_text(json.dumps(fields))
    DataSet(config.data).resolve(config, ranks=1)


def test_a_tokenizer_exchanged_beside_its_data_is_refused(tmp_path, data):
    config = tiny_config(tmp_path / "run", data)
    (data / "tokenizers" / "text.model").write_bytes(b"another")
    said = refusal(run=config)
    assert "text.model: SHA-256" in said and "must be that of the data (aa" in said
