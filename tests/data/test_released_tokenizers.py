"""Public models with their own text tokenizers: imported, written with, prepared for, trained on.

GPT-2, GPT-NeoX and the released Mambas begin and end documents with one token, name no padding,
and have embeddings of more rows than their tokenizer has pieces. Their tokenizers are made here:
the same JSON, with few merges.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from public_mambas import hugging_face, write_mamba_ssm
from raw_shards import documents_of, quiet, spec_of, write_tar
from tiny_runs import SHAPE, tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from earlyfuse.configs.decoders import dense
from earlyfuse.data.console import console_stream
from earlyfuse.data.prepare import prepare
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.imports import import_text, import_vocabulary
from earlyfuse.models.generate.session import Sampling, generate
from earlyfuse.models.vocabulary import Vocabulary
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools.convert import convert, main
from earlyfuse.tools.generate import main as write

END, PADDING = "<|endoftext|>", "<|padding|>"
TEXTS = ["the disc is red; the field is grey.\n", "a small red disc on grey", "42 discs"] * 9
PIECES, ROWS = 288, 296  # GPT-NeoX has 50277, of which the released Mambas pad to 50280
GREEDY = ["--mode", "text", "--temperature", "0", "--new-tokens", "6"]


def byte_level(specials: list[str]) -> Tokenizer:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = BpeTrainer(vocab_size=280, special_tokens=specials, **options)
    built.train_from_iterator(TEXTS, trainer)
    return built


def neox() -> Tokenizer:
    """In the form of GPT-NeoX: specials first, runs of spaces as added tokens behind the pieces."""
    built = byte_level([END, PADDING])
    built.normalizer = normalizers.NFC()
    built.add_tokens([AddedToken(" " * n, normalized=True) for n in range(10, 2, -1)])
    assert built.get_vocab_size() == PIECES
    return built


def gpt2() -> Tokenizer:
    """In the form of GPT-2: one special token, behind the pieces."""
    built = byte_level([])
    built.add_special_tokens([END])
    return built


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **named) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(scope="module")
def mamba(tmp_path_factory) -> Path:
    """A Mamba as Hugging Face has it: padded embedding, tokenizer beside."""
    folder = tmp_path_factory.mktemp("hf") / "mamba"
    hugging_face(vocab_size=ROWS).save_pretrained(folder)
    return save_tokenizer(neox(), folder, bos_token=END, eos_token=END, unk_token=END)


@pytest.fixture(scope="module")
def converted(mamba, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "mamba"
    convert(mamba, folder)
    return folder


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- sentinels


@pytest.mark.parametrize("named", [{}, {"bos_token": END, "eos_token": END}], ids=["alone", "told"])
def test_one_token_begins_and_ends_documents(tmp_path, named):
    for form, ids in ((neox, (0, 0, 1)), (gpt2, (280, 280, 281))):
        folder = save_tokenizer(form(), tmp_path / form.__name__, **named)
        (folder / "config.json").write_text(json.dumps({"vocab_size": ROWS, "model_type": "x"}))
        ours = tmp_path / f"{form.__name__}-ours"
        assert import_text(folder, ours)
        text = Tokenizers.load(ours).text
        assert (text.bos, text.eos, text.pad) == ids
        # padding that the tokenizer does not name is the end: ids behind its pieces are untrained
        assert import_vocabulary(folder, ours)
        pad = text.pad if text.pad < text.pieces else text.eos
        assert Tokenizers.load(ours).vocabulary == Vocabulary(ROWS, text.bos, text.eos, pad)
        assert not set(text.encode(f"{END} x {PADDING}")) & text.reserved, "spelled out"
        assert text.decode([text.bos, *text.encode("red disc"), text.eos]) == "red disc"


@pytest.mark.parametrize("pad", [0, 2], ids=["padding is the end too", "padding of its own"])
def test_a_document_that_began_with_the_end_token_ends_with_the_next(pad):
    vocabulary = Vocabulary(size=6, bos=0, eos=0, pad=pad)

    class Ends(torch.nn.Module):
        """Prefers the padding, then the end."""

        config = dense(SHAPE)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch, *_, **__):
            logits = torch.zeros(len(batch.tokens_BS), 1, 6)
            logits[..., 0], logits[..., 2] = 1.0, 2.0
            return logits

    options = {"new_tokens": 5, "mode": "text", "sampling": Sampling(temperature=0)}
    assert generate(Ends(), vocabulary, [[0], [0, 4]], **options) == (
        [[0], [0]] if pad == 2 else [[2] * 5] * 2
    )
    assert generate(Ends(), vocabulary, [[0]], unused=[2, 3], **options) == [[0]]
    with pytest.raises(ValueError, match="has ended with eos"):
        generate(Ends(), vocabulary, [[0, 4, 0]], **options)


def test_an_end_that_text_could_spell_is_refused(converted, tmp_path):
    shutil.copytree(converted / "tokenizers", tmp_path / "tokenizers")
    path = tmp_path / "tokenizers" / "vocabulary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos": 70}))
    with pytest.raises(ValueError, match=r"eos \(70\) of the vocabulary is a piece of text"):
        Tokenizers.load(tmp_path / "tokenizers")


# ---------------------------------------------------------------- an imported Mamba


def test_an_imported_mamba_writes_what_transformers_writes(mamba, converted, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, vocabulary = load_model(converted)
    tokenizers = Tokenizers.load(converted / "tokenizers")
    assert tokenizers.vocabulary == vocabulary == Vocabulary(ROWS, 0, 0, 1)
    assert tokenizers.unused == list(range(PIECES, ROWS))
    assert write([str(converted), "--prompt", "the disc", *GREEDY, "--out", str(tmp_path)]) == 0
    theirs = transformers.MambaForCausalLM.from_pretrained(mamba)
    prompt = torch.tensor([[0, *tokenizers.text.encode("the disc")]])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
        suppress_tokens=[1, *tokenizers.unused], use_cache=False,
    )[0, prompt.shape[1] :].tolist()  # fmt: skip
    (line,) = results(tmp_path)
    assert line["tokens"] == len(expected) and line["ended"] == (expected[-1] == 0)
    assert line["written"] == [{"text": tokenizers.text.decode(expected)}]


def test_rows_without_a_piece_are_never_written(converted, tmp_path):
    """Whatever the padding rows of the head prefer."""
    model, vocabulary = load_model(converted)
    with torch.no_grad():
        model.lm_head.weight[PIECES:] = 50 * model.norm.weight.sign()
    unused = Tokenizers.load(converted / "tokenizers").unused
    options = {"new_tokens": 8, "mode": "text", "sampling": Sampling(temperature=5.0)}
    loose = generate(model, vocabulary, [[0]] * 4, **options)
    assert any(token >= PIECES for tokens in loose for token in tokens), "they are preferred"
    kept = generate(model, vocabulary, [[0]] * 4, unused=unused, **options)
    assert all(token < PIECES for tokens in kept for token in tokens)


def test_training_goes_on_from_an_imported_mamba_on_data_of_its_tokenizers(mamba, tmp_path):
    """Convert, prepare, train, write: as a user does, with padding that no piece fills."""
    convert(mamba, tmp_path / "start", "dcp")
    raw = [(f"{n:02}.txt", text.encode()) for n, text in enumerate(TEXTS * 2)]
    held = [("0.txt", b"the disc is not red")]
    train, validation = (write_tar(tmp_path / f"{n}.tar", m) for n, m in (("t", raw), ("v", held)))
    spec = spec_of(
        tmp_path, tmp_path / "data", train={"t": train}, validation={"t": validation},
        tokenizers=tmp_path / "start" / "tokenizers",
    )  # fmt: skip
    prepare(spec, quiet())
    ids, _ = next(documents_of(tmp_path / "data" / "train" / "t"))
    assert ids[0] == ids[-1] == 0 and ids[1:-1].min() > 1
    start, vocabulary = load_model(tmp_path / "start")
    assert vocabulary == Tokenizers.load(tmp_path / "data" / "tokenizers").vocabulary
    config = tiny_config(tmp_path / "run", tmp_path / "data", start.config, steps=2)
    config.data.shares, config.dataloader.media_share = {"t": 1.0}, None
    config.start.model = str(tmp_path / "start")
    config.metrics.enable_tensorboard = False
    trainer = config.build()
    trainer.train()
    trainer.close()
    out = tmp_path / "out"
    run = ["--mode", "text", "--prompt", "the", "--new-tokens", "4", "--out", str(out)]
    assert write([str(tmp_path / "run"), *run]) == 0 and len(results(out)) == 1


@pytest.mark.parametrize("kind", ["huggingface", "mamba_ssm"])
def test_ids_of_a_config_that_the_tokenizer_contradicts_are_its_own(mamba, tmp_path, capsys, kind):
    source = tmp_path / "source"
    if kind == "huggingface":
        hugging_face(vocab_size=ROWS, bos_token_id=7, eos_token_id=8).save_pretrained(source)
    else:
        write_mamba_ssm(source, hugging_face(vocab_size=ROWS), vocab_size=PIECES + 1)
    shutil.copy(mamba / "tokenizer.json", source)
    assert main([str(source), str(tmp_path / "ours")]) == 0
    assert "documents are 0, 0 and 1, by the text tokenizer" in capsys.readouterr().out
    assert load_model(tmp_path / "ours")[1] == Vocabulary(ROWS, 0, 0, 1)
    assert import_text(source, tmp_path / "alone")
    assert import_vocabulary(source, tmp_path / "alone")
    assert Tokenizers.load(tmp_path / "alone").vocabulary == Vocabulary(ROWS, 0, 0, 1)


def test_a_tokenizer_that_does_not_fit_is_left_out_with_the_reason(mamba, tmp_path, capsys):
    def said(name, **changes):
        source = tmp_path / name
        shutil.copytree(mamba, source)
        path = source / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        assert main([str(source), str(tmp_path / f"{name}-ours")]) == 0
        assert not (tmp_path / f"{name}-ours" / "tokenizers").exists()
        return capsys.readouterr().out

    token = {"content": "<x>", "special": True, "single_word": False, "lstrip": False}
    beyond = token | {"id": ROWS, "rstrip": False, "normalized": False}
    assert f"has {ROWS + 1} ids, the vocabulary {ROWS}" in said("beyond", added_tokens=[beyond])
    assert "added_tokens ('x') must be a list" in said("damaged", added_tokens="x")
    nameless = models.BPE({letter: n for n, letter in enumerate("abc")}, [])
    unnamed = json.loads(Tokenizer(nameless).to_str())
    assert "names no end of a document" in said("unnamed", **unnamed)


# ---------------------------------------------------------------- the tool that writes


def test_what_cannot_be_written_is_refused_in_one_line(converted, mamba, tmp_path, capsys):
    deep = tmp_path / "deep.jsonl"
    deep.write_text('[{"text": "fine"}]\n' + "[" * 100_000 + "]" * 100_000 + "\n")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    for words, folder, options in (
        ("deep.jsonl, line 2 is nested", converted, ["--prompts", str(deep)]),
        ("empty.jsonl holds no prompts", converted, ["--prompts", str(empty)]),
        ("prompt 0: ", converted, ["--prompt", "\udcff"]),
        ("--new-tokens (9999999999) must lie in", converted, ["--new-tokens", "9999999999"]),
        ("--new-tokens (0) must lie in", converted, ["--new-tokens", "0"]),
        ("--device (abacus) cannot be used", converted, ["--device", "abacus"]),
        ("temperature (inf) must be at least 0 and finite", converted, ["--temperature", "inf"]),
        ("convert a public model first", mamba, []),
    ):
        assert write([str(folder), "--out", str(tmp_path / "out"), *options]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("closed", [True, False])
def test_results_are_whole_whatever_becomes_of_the_console(
    converted, tmp_path, monkeypatch, closed
):
    """A console that is closed, as by ``| head``, or shows ASCII alone."""
    reader, writer = os.pipe()
    if closed:
        os.close(reader)
    monkeypatch.setattr("sys.stdout", console_stream(writer, "ascii"))
    options = ["--prompt", "red", "--samples", "5", "--new-tokens", "9", "--mode", "text"]
    assert write([str(converted), *options, "--out", str(tmp_path)]) == 0
    monkeypatch.undo()
    os.close(writer)
    assert len(results(tmp_path)) == 5
    if not closed:
        with open(reader, "rb") as console:
            shown = console.read()
        assert shown and all(32 <= byte < 127 or byte in b"\n\t" for byte in shown)
