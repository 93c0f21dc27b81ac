"""Text of a Hugging Face tokenizer.json, and the vocabulary that holds text and image codes."""

import json

import pytest
from chameleon_files import (
    CODES,
    CORPUS,
    SIDE,
    START,
    code_name,
    copied,
    fast_tokenizer,
    order,
    transformers,
)  # fmt: skip
from raw_shards import contents, documents_of, quiet, spec_of, write_tar
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from earlyfuse.data.prepare import prepare
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.imports import import_text, import_vocabulary
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.tools.convert import convert
from earlyfuse.tools.generate import main as generate


def load(tokenizer: Tokenizer, folder) -> TextTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextTokenizer.load(folder / "tokenizer.json")


# ---------------------------------------------------------------- text


def test_text_is_encoded_as_by_transformers_and_comes_back(imported, source):
    ours = TextTokenizer.load(imported / "text.json")
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    for text in (*CORPUS[:3], "", "  two\n\nlines 日本 é", "x" * 300):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos, ours.pad, ours.eos) == (0, 1, 2)
    assert (ours.begin["image"], ours.end["image"]) == (START + CODES + 1, START + CODES)
    assert ours.size == ours.pieces == len(theirs)


def test_text_never_gives_a_sentinel_or_an_image_code(imported, tmp_path):
    ours = TextTokenizer.load(imported / "text.json")
    for text in ("<s>x</s><pad>", "a<racm3:break>IMGIMGBCZ IMGIMGAZ<eoss>", "<reserved08706>"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text and not ours.reserved & set(ids)
    mixed = [ours.bos, *ours.encode("disc"), ours.begin["image"], ours.end["image"], ours.eos]
    assert ours.decode(mixed) == "disc"
    with pytest.raises(ValueError, match=r"token \(5\) is an image code"):
        ours.decode([5])
    listed = fast_tokenizer(order())
    listed.add_tokens([code_name(code) for code in range(CODES)])  # ordinary, not special
    listed.enable_truncation(3)
    ours, text = load(listed, tmp_path), "a disc IMGIMGBCZ and more"
    assert ours.decode(ours.encode(text)) == text, "not cut by their truncation either"


def word_tokenizer() -> Tokenizer:
    words = ["<s>", "</s>", "<unk>", "IMGIMGAZ", "IMGIMGBZ", "red", "disc"]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["<s>", "</s>", "<unk>"])
    return built


def test_a_vocabulary_of_words_refuses_reserved_ones_and_knows_unknown_ones(tmp_path):
    ours = load(word_tokenizer(), tmp_path)
    assert ours.encode("red blue disc") == [5, 2, 6]
    with pytest.raises(ValueError, match=r"'IMGIMGBZ' \(4\), which is reserved"):
        ours.encode("red IMGIMGBZ")
    assert (ours.bos, ours.eos, ours.pieces) == (0, 1, 7)
    assert [ours.pad, ours.begin["image"], ours.end["image"]] == [7, 8, 9], "behind the pieces"
    # in a document it is a bad sample
    write_tar(tmp_path / "t.tar", [("0.txt", b"red disc"), ("1.txt", b"red IMGIMGBZ")])
    spec = spec_of(
        tmp_path, tmp_path / "out", train={"t": tmp_path / "t.tar"}, validation={},
        text_tokenizer=tmp_path / "tokenizer.json", image_tokenizer="none", max_bad_rate=1.0,
    )  # fmt: skip
    manifest = prepare(spec, quiet())["train/t"]
    assert (manifest["documents"], manifest["drops"]) == (1, {"reserved-token": 1})


def test_the_config_beside_a_tokenizer_says_which_tokens_are_sentinels(tmp_path):
    tokenizer = fast_tokenizer(order())
    named = {"bos_token": {"content": "<unk>"}, "eos_token": "<reserved08706>", "boi_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    text = load(tokenizer, tmp_path)
    assert (text.bos, text.eos, text.pad) == (3, tokenizer.token_to_id("<reserved08706>"), 1)
    (tmp_path / "out").mkdir()
    text.save(tmp_path / "out" / "text.json")
    moved = TextTokenizer.load(tmp_path / "out" / "text.json")
    assert (moved.bos, moved.eos, moved.sha256) == (text.bos, text.eos, text.sha256)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"model": {"type": "BPE"}}', b'{"model": 3}'])
def test_json_that_is_no_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json\) must be a sentencepiece .* cannot be"):
        TextTokenizer.load(tmp_path / "tokenizer.json")


def test_a_sentencepiece_model_is_imported_as_it_is(tmp_path):
    trained = TextTokenizer.train(["some words to learn pieces from, again and again"] * 20, 320)
    (tmp_path / "llama").mkdir()
    trained.save(tmp_path / "llama" / "tokenizer.model")
    assert import_text(tmp_path / "llama", tmp_path / "out")
    assert TextTokenizer.load(tmp_path / "out" / "text.model").sha256 == trained.sha256
    assert not import_vocabulary(tmp_path / "llama", tmp_path / "out")


# ---------------------------------------------------------------- the vocabulary


def test_the_stored_vocabulary_is_that_of_the_checkpoint(imported, source, tmp_path):
    vocabulary = Tokenizers.load(imported).vocabulary
    config = json.loads((source / "config.json").read_bytes())
    tokens = config["vocabulary_map"]
    assert vocabulary.size == config["vocab_size"] == len(tokens) + 5
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad) == (0, 2, 1)
    medium = vocabulary.medium(Modality.IMAGE)
    assert (medium.start, medium.count, medium.block) == (START, CODES, (SIDE // 4) ** 2)
    assert (medium.begin, medium.end) == (tokens["<racm3:break>"], tokens["<eoss>"])
    # without the file, the names of the text tokenizer give it
    folder = copied(imported, tmp_path / "t", "text.json", "image.safetensors")
    derived = Tokenizers.load(folder).vocabulary
    assert derived.media == vocabulary.media and derived.size == vocabulary.size - 5


def plain_tokenizer() -> Tokenizer:
    """As most public checkpoints have it: no image codes, no padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<|begin_of_text|>", normalized=True), "<|end_of_text|>"])
    return built


def test_a_public_tokenizer_with_image_codes_learnt_here(raw, tmp_path):
    plain_tokenizer().save(str(tmp_path / "tokenizer.json"))
    spec = spec_of(
        raw, tmp_path / "out", train={"mixed": raw / "mixed"}, validation={},
        text_tokenizer=tmp_path / "tokenizer.json",
    )  # fmt: skip
    prepare(spec, quiet())
    tokenizers = Tokenizers.load(tmp_path / "out" / "tokenizers")
    text, medium = tokenizers.text, tokenizers.vocabulary.medium(Modality.IMAGE)
    assert (text.bos, text.eos, text.pieces, text.size) == (256, 257, 258, 261)
    assert (medium.start, medium.begin, medium.end) == (261, 259, 260)
    ids, _ = next(documents_of(tmp_path / "out" / "train" / "mixed"))
    assert ids[0] == 256 and ids[-1] == 257 and ids.max() >= 261
    assert text.encode("<|begin_of_text|>")[0] < 256
    before = contents(tmp_path / "out")
    prepare(spec, quiet())
    assert contents(tmp_path / "out") == before


def test_a_converted_checkpoint_writes_with_the_tokenizers_it_came_with(source, tmp_path, capsys):
    ours = tmp_path / "ours"
    convert(source, ours)
    assert Tokenizers.load(ours / "tokenizers").vocabulary == load_model(ours)[1]
    run = [str(ours), "--prompt", CORPUS[0], "--out", str(tmp_path / "out")]
    assert generate([*run, "--mode", "image"]) == 2
    assert "the image tokenizer has no decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert generate([*run, "--mode", "text", "--temperature", "0", "--new-tokens", "5"]) == 0
    (written,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert 1 <= written["tokens"] <= 5
