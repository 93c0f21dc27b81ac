"""The data folder of a run: read as it was prepared, never written to, and refused by name."""

import copy
import json
import os
import random
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import ROOT
from raw_shards import contents
from tiny_runs import VECTORS, changed, tiny_config
from toy import VECTOR_VOCABULARY, VOCABULARY, make_data, text_document, write_source

from earlyfuse.configs import embedded
from earlyfuse.configs.command_line import override
from earlyfuse.configs.registry import catalogue
from earlyfuse.data.prepare.embedded import prepare_corpus
from earlyfuse.data.shards.manifest import manifest_hash
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import validation_batches
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.parallel.estimates import dry_run
from earlyfuse.parallel.training import data_config
from earlyfuse.parallel.training.data_config import DataSet

PREPARE_CORPUS = "earlyfuse.data.prepare.embedded.prepare_corpus"


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def no_corpus(monkeypatch, tmp_path):
    """A run in an empty folder, where making the corpus is an error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(PREPARE_CORPUS, lambda *_, **__: pytest.fail("the corpus is made"))
    return tmp_path / "here"


def resolved(config, ranks=1):
    return DataSet(config.data).resolve(config, ranks)


def refusal(config) -> str:
    """Console output of the start of a run on its data."""
    with pytest.raises(ValueError) as caught:
        resolved(config)
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
    config.dataloader.media_share = None
    assert resolved(config).model_spec.model.vocab_size == VOCABULARY.size
    assert contents(data) == before and not any(no_corpus.iterdir())


def test_train_on_the_command_line_neither_makes_nor_fills_a_folder(data, no_corpus, capsys):
    train = runpy.run_path(str(ROOT / "train.py"))["main"]
    before = contents(data)
    empty = no_corpus.parent / "empty"
    empty.mkdir()
    for folder, said in (
        (data, "--dataloader.media_share None"),
        (no_corpus / "mistyped", "it does not exist; without --data.folder the run takes"),
        (empty, "it has no tokenizers/vocabulary.json"),
    ):
        assert train(["moma_4t4i", "--data.folder", str(folder)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and said in message
        assert str(folder) in message or folder == data
    assert contents(data) == before and not any(no_corpus.iterdir()) and not any(empty.iterdir())


def test_without_a_folder_the_corpus_is_made_in_its_own_place(no_corpus, monkeypatch):
    made = []

    def make(folder, extra):
        made.append((folder, extra))
        make_data(folder)

    monkeypatch.setattr(PREPARE_CORPUS, make)
    config = embedded.moma_4t4i().data
    for options in ({}, {"speech": True}, {"clips": True}, {"vectors": True}):
        DataSet(replace(config, **options))
    names = ("data", "data_speech", "data_clips", "data_vectors")
    folders = [Path("runs", name) for name in names]
    assert made == list(zip(folders, (None, "speech", "clips", "vectors"), strict=True))
    with pytest.raises(ValueError, match=r"data.speech .* and data.clips .* set one"):
        DataSet(replace(config, speech=True, clips=True))
    with pytest.raises(ValueError, match=r"data.clips \(True\) needs data.embedded"):
        DataSet(replace(config, clips=True, embedded=False))


def test_a_weight_of_frames_needs_videos(tmp_path):
    config = embedded.moma_4t4i()
    config.loss.stream_loss_weight = 2.0
    media = (replace(VOCABULARY.media[0], separator=VOCABULARY.size),)
    for name, vocabulary in (
        ("stills", VOCABULARY),
        ("videos", replace(VOCABULARY, size=VOCABULARY.size + 1, media=media)),
    ):
        config.data.folder = str(make_data(tmp_path / name, vocabulary=vocabulary))
        if name == "stills":
            with pytest.raises(ValueError, match=r"stream_loss_weight \(2.0\) needs videos"):
                DataSet(config.data).resolve(config, 1)
        else:
            assert DataSet(config.data).resolve(config, 1).loss.stream_loss_weight == 2.0


def test_frames_of_vectors_have_no_weight(tmp_path):
    """What follows a vector is no label."""
    medium = replace(VECTOR_VOCABULARY.media[0], separator=VECTOR_VOCABULARY.size)
    vocabulary = replace(VECTOR_VOCABULARY, size=VECTOR_VOCABULARY.size + 1, media=(medium,))
    folder = make_data(tmp_path / "videos", vocabulary=vocabulary)
    config = tiny_config(tmp_path / "run", folder, VECTORS["tf_dense"]())
    config.loss.stream_loss_weight = 2.0
    with pytest.raises(ValueError, match=r"stream_loss_weight \(2.0\) needs videos of codes"):
        DataSet(config.data).resolve(config, 1)


def test_the_corpus_has_a_mix_and_an_order_of_its_own_wherever_it_is(tmp_path, no_corpus):
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
    names = ["interleaved", "speech", "a", "digits", "z", "text", "glyphs"]
    first = ["text", "glyphs", "digits", "interleaved", "speech"]  # as in the first runs
    assert sorted(names, key=data_config._place) == [*first, "a", "z"]


@pytest.mark.parametrize("mine", ["thesis.tex", "train/text/shard-000000.tar", "raw/notes.txt"])
def test_a_corpus_is_never_made_in_a_folder_that_holds_something_else(tmp_path, mine):
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(ValueError, match=r"and no raw/corpus\.json.* new or an empty one"):
        prepare_corpus(tmp_path, scale=0.01)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / mine]


def test_a_corpus_interrupted_while_it_was_built_goes_on(tmp_path, monkeypatch):
    def go(*_, **__):
        raise InterruptedError

    monkeypatch.setattr("earlyfuse.data.prepare.embedded.build_corpus", go)
    (tmp_path / ".raw-abc" / "corpus").mkdir(parents=True)  # as kill -9 leaves it
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InterruptedError):
            prepare_corpus(folder)


# ---------------------------------------------------------------- what a run makes of it


def test_a_dry_run_makes_nothing_and_leaves_config_and_environment(
    tmp_path, no_corpus, data, monkeypatch
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "made at the first start" in dry_run.describe("dense", embedded.dense(), 1)
    mistyped = changed(embedded.dense(), {"data.folder": "mistyped"})
    with pytest.raises(ValueError, match=r"data\.folder \('mistyped'\) .* does not exist"):
        dry_run.describe("dense", mistyped, 1)
    config = changed(tiny_config(tmp_path, data), {"training.global_batch_size": -1})
    before = copy.deepcopy(config)
    page = dry_run.describe("tiny", config, 32)
    assert "32 data ranks" in page and f"from {data}: 48 ids; text, image" in page
    assert config == before and "WORLD_SIZE" not in os.environ and not any(no_corpus.iterdir())


def test_resolving_fills_a_copy_and_refuses_what_it_would_overwrite(tmp_path, data):
    config = changed(tiny_config(tmp_path, data), {"training.global_batch_size": -1})
    before = copy.deepcopy(config)
    found = resolved(config, ranks=4)
    assert config == before and found.training.global_batch_size == 8
    assert list(found.dataloader.sources.values()) == [0.5, 0.5]
    assert resolved(found, ranks=4) == found
    config.dataloader.sources = {"elsewhere": 1.0}
    assert "dataloader.sources ({'elsewhere': 1.0}) must be left out" in refusal(config)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64])
def test_any_number_of_ranks_shares_the_same_validation_rows(ranks, tmp_path, data):
    fields = {"training.global_batch_size": -1, "validator.batch_rows": 4}
    config = changed(tiny_config(tmp_path, data), fields | {"validator.max_batches": 5})
    config = resolved(config, ranks)
    mixture = Mixture(tuple(TokenSource(folder) for folder in config.validator.sources), (0.5, 0.5))
    alone = torch.cat([batch.tokens_BS for batch in validation_batches(mixture, 32, 4, 5)])
    shared = config.validator.batch_rows, config.validator.max_batches
    parts = [validation_batches(mixture, 32, *shared, rank, ranks) for rank in range(ranks)]
    assert all(len(batch.tokens_BS) % 2 == 0 for batch in parts[0]), "whole routing groups"
    together = [batch.tokens_BS for batches in zip(*parts, strict=True) for batch in batches]
    rows = torch.cat(together)
    assert torch.equal(rows[:20], alone) and len(rows) < 20 + 2 * ranks
    assert len(rows) == 20 or ranks in (3, 4, 8, 64), "no more rows than asked for if they divide"


def test_shares_on_the_command_line_replace_all_that_a_config_has():
    def shares(*words: str) -> dict[str, float]:
        config = changed(embedded.dense(), {"data.shares": {"a": 0.3, "b": 0.7}})
        return override(config, [*words, "--training.steps", "3"]).data.shares

    assert shares() == {"a": 0.3, "b": 0.7}
    assert shares("--data.shares", "text=0.5", "pairs=0.5") == {"text": 0.5, "pairs": 0.5}
    assert shares("--data.shares", "text", "0.25", "b", "0.75") == {"text": 0.25, "b": 0.75}
    assert shares("--data.shares") == {}
    for words in (["x"], ["x=y"], ["x=1", "x=1"], ["=1"], ["x", "0.5", "y"]):
        with pytest.raises(ValueError, match=r"--data\.shares"):
            shares("--data.shares", *words)


def test_the_order_of_shares_decides_nothing(tmp_path, data):
    """The same stream whatever order shares are given in, and a resume that continues it."""
    options = {"dp_world_size": 1, "dp_rank": 0, "seq_len": 32, "local_batch_size": 4}

    def run(*names):
        shares = {"data.shares": dict.fromkeys(names, 0.5)}
        config = resolved(changed(tiny_config(tmp_path / "run", data), shares))
        loader = config.dataloader.build(tokenizer=None, **options)
        batches = iter(loader)
        return loader, lambda: [next(batches)[0]["batch"].tokens_BS.tolist() for _ in range(5)]

    one, draw = run("text", "pairs")
    _, draw_other = run("pairs", "text")
    assert draw() == draw_other()
    again, draw_again = run("pairs", "text")
    again.load_state_dict(one.state_dict())
    assert draw() == draw_again()


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize("split", ["train", "validation"])
def test_unfinished_and_empty_sources_are_refused_by_name(tmp_path, data, split):
    manifest = data / split / "pairs" / "manifest.json"
    whole = manifest.read_text()
    config = tiny_config(tmp_path / "run", data)
    for content in ("", whole.replace('"shards"', '"shard"'), empty(whole), None):
        manifest.unlink() if content is None else manifest.write_text(content)
        said = refusal(config)
        assert f"{split}/pairs" in said and ("manifest" in said or "no token" in said), said
    # of no use to a run without validation, or with other shares
    unused = {"validator.enable": False} if split == "validation" else {"data.shares": {"text": 1}}
    resolved(changed(config, unused))


def empty(manifest: str) -> str:
    """The manifest of a source of the same name that has no shards, as prepare would write it."""
    fields = json.loads(manifest) | {"shards": [], "documents": 0}
    fields["tokens"] = dict.fromkeys(fields["tokens"], 0)
    del fields["sha256"]
    return json.dumps(fields | {"sha256": manifest_hash(fields)})


DAMAGES = [None, True, -1, 3, 10**30, 0.5, float("nan"), "x\x1b[2J", [], {}, [[]]]


def test_vocabulary_json_is_that_of_the_data_in_every_field(tmp_path, data):
    path = data / "tokenizers" / "vocabulary.json"
    fields, config = json.loads(path.read_text()), tiny_config(tmp_path / "run", data)
    medium = fields["media"][0]
    others = [{k: v for k, v in fields.items() if k != name} for name in fields]
    others += [fields | {name: value} for name in fields for value in DAMAGES]
    others += [fields | {"media": [medium | {n: v}]} for n in medium for v in DAMAGES]
    others += [fields | {"media": [medium] * 2}, fields | {"more": 1}]
    damaged = [json.dumps(other) for other in others if json.dumps(other) != json.dumps(fields)]
    damaged += ["", "[]", "null", "{", '{"size": 48}', "[" * 100_000, "\x00\xff"]
    for content in damaged:
        path.write_text(content)
        said = refusal(config)
        assert str(path) in said and "\x1b" not in said and "again" in said, (content, said)
    path.write_text(json.dumps(fields))
    resolved(config)


def test_a_tokenizer_exchanged_beside_its_data_is_refused(tmp_path, data):
    (data / "tokenizers" / "text.model").write_bytes(b"another")
    said = refusal(tiny_config(tmp_path / "run", data))
    assert "text.model: SHA-256" in said and "must be that of the data (aa" in said
