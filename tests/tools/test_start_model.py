"""Models of others as starts: fitted, grown by new ids, upcycled, trained, and given back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chameleon_files import chameleon, fast_tokenizer, order
from hypothesis import example, given, settings
from hypothesis import strategies as st
from public_mambas import hugging_face
from safetensors.torch import save_file
from tiny_runs import MODELS, SHAPE, tiny_config
from tokenizers import Tokenizer
from toy import make_data, write_source

from earlyfuse.configs import decoders, embedded, mamba_decoders
from earlyfuse.configs.presets.pretrained import pretrained
from earlyfuse.configs.start_model import with_start_model
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.huggingface import tokenizer_files
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.state_dicts.config_json import describe
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.parallel.training.warm_start import WarmStart, load_inherited
from earlyfuse.tools.convert import convert

transformers = pytest.importorskip("transformers")

TEXTS = [
    "the disc is red; the field is grey.\n",
    "  a small, small red disc — 42é",
    "x = [1]\n",
] * 9
CODES = 16


def tokens(folder: Path) -> Vocabulary:
    """Tokenizers of data whose text is a tiny Mamba's, with images as new ids behind the pieces."""
    text = TextTokenizer.load(folder / "text.json")
    begin, end = text.begin["image"], text.end["image"]
    image = MediaCodes(Modality.IMAGE, text.size, CODES, begin, end, 4)
    vocabulary = Vocabulary(text.size + CODES, text.bos, text.eos, text.pad, (image,))
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary.to_dict()))
    return vocabulary


@pytest.fixture(scope="module")
def mamba(tmp_path_factory) -> Path:
    """A public text model with its tokenizer, of fewer pieces than rows."""
    folder = tmp_path_factory.mktemp("public") / "mamba"
    tokenizer = fast_tokenizer(order())
    model = hugging_face(False, vocab_size=tokenizer.get_vocab_size() + 6)
    model.save_pretrained(folder)
    fields = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(fields).replace("IMGIMG", "word"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, mamba) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "tokenizers").mkdir()
    TextTokenizer.load(mamba / "tokenizer.json").save(folder / "tokenizers" / "text.json")
    tokens(folder / "tokenizers")
    return folder


def started(config, data: Path, model: Path, **fields):
    """The child's module with the parameters of ``model``, and the line about them."""
    config.data = replace(config.data, folder=str(data), embedded=False)
    config.start = WarmStart.Config(model=str(model), **fields)
    config, _ = with_start_model(config)
    child = config.model_spec.model.build()
    child.init_states()
    parent = config.start.build().find(config.model_spec.model, data)
    load_inherited(child, parent.origins, parent.opened)
    return child.eval(), parent.describe()


@torch.no_grad()
def test_a_text_mamba_grows_into_a_mixture_of_mamba_with_images(mamba, data):
    theirs = transformers.MambaForCausalLM.from_pretrained(mamba).eval()
    child, line = started(embedded.mixture_of_mamba(), data, mamba)
    rows, new = theirs.config.vocab_size, child.config.vocab_size
    pieces = TextTokenizer.load(mamba / "tokenizer.json").pieces
    assert f"{pieces} of its {rows} token ids, {new - pieces} new" in line
    assert len(child.config.layers) == theirs.config.num_hidden_layers
    assert {layer.mamba.in_proj_groups for layer in child.config.layers} == {2}
    ids = torch.randint(0, pieces, (2, 24), generator=torch.Generator().manual_seed(0))
    found = child(MixedBatch.of(ids))
    torch.testing.assert_close(
        found[..., :pieces], theirs(ids).logits[..., :pieces], atol=2e-5, rtol=0
    )
    embedding, head = child.tok_embeddings.weight, child.lm_head.weight
    torch.testing.assert_close(head[pieces:], head[:pieces].mean(0).expand(new - pieces, -1))
    spread = embedding[pieces:].std() / embedding[:pieces].std()
    assert 0.8 < spread < 1.25 and len(embedding[pieces:].unique(dim=0)) == new - pieces


def test_forms_are_those_asked_for_or_refused_with_the_list(mamba, data, tmp_path):
    as_it_is, _ = started(pretrained(), data, mamba, upcycle="none")
    assert {layer.mamba.in_proj_groups for layer in as_it_is.config.layers} == {1}
    upcycled, _ = started(pretrained(), data, mamba, upcycle="mixture_of_mamba")
    assert {layer.mamba.in_proj_groups for layer in upcycled.config.layers} == {2}
    for config, fields, says in (
        (pretrained(), {"upcycle": "4x4"}, "must be mot, mixture_of_mamba, a number .* 4t4i"),
        (pretrained(), {"upcycle": "4t4i"}, "unties feed-forwards, and the parent has none"),
        (embedded.dense(), {}, "start.model is made of mamba, the config of attention and"),
        (embedded.mod(), {}, "layers, the config 7 that are not all alike"),
    ):
        with pytest.raises(ValueError, match=says):
            started(config, data, mamba, **fields)
    with pytest.raises(ValueError, match=r"start.upcycle \(none\) needs start.model"):
        with_start_model(pretrained())


def test_ids_that_mean_another_text_are_refused_by_the_first(mamba, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "data")
    text = (other / "tokenizers" / "text.json").read_text()
    (other / "tokenizers" / "text.json").write_text(text.replace('"wordBZ"', '"other"'))
    with pytest.raises(ValueError, match=r"id \d+ is 'wordBZ' there, 'other' in .*text.json; prep"):
        started(pretrained(), other, mamba, upcycle="none")
    alone = shutil.copytree(mamba, tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no text tokenizer to compare, and its layout of ids"):
        started(pretrained(), data, alone, upcycle="none")


def test_a_config_takes_the_sizes_of_the_model_and_keeps_its_form(tmp_path):
    """A dense parent of other sizes: experts begin as its feed-forward, whatever the config's."""
    make_data(tmp_path / "data")
    parent = decoders.dense(replace(SHAPE, dim=48, layers=3, hidden_dim=40, heads=4))
    first = tiny_config(tmp_path / "run", tmp_path / "data", parent, steps=1).build()
    first.train()
    first.close()
    child, line = started(embedded.moma_4t4i(), tmp_path / "data", tmp_path / "run")
    assert "new (routers)" in line and "data continue" in line
    assert [(layer.dim, layer.attention.heads) for layer in child.config.layers] == [(48, 4)] * 3
    pools = child.config.layers[0].feed_forward.pools
    assert [(pool.experts, pool.hidden_dim) for pool in pools] == [(4, 40)] * 2
    assert pools[0].router.causal is not None
    for pool in child.layers["0"].feed_forward.pools:
        assert (pool.experts.w1 == first.model.layers["0"].feed_forward.w1).all()


def test_a_chameleon_is_started_from_trained_and_loaded_by_transformers(tmp_path):
    """With its tokenizer, image encoder and processor, which its data have from it."""
    places = order()
    chameleon(places).save_pretrained(tmp_path / "hf")
    fast_tokenizer(places).save(str(tmp_path / "hf" / "tokenizer.json"))
    convert(tmp_path / "hf", tmp_path / "start")
    ready = tmp_path / "start" / "tokenizers"
    vocabulary = Tokenizers.load(ready).vocabulary
    found = _trained(tmp_path, ready, vocabulary)
    convert(found, tmp_path / "out", "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    text = "a small <image> disc é"
    expected = Tokenizers.load(ready).text.encode("a small ")
    assert processor.tokenizer(text).input_ids[: len(expected)] == expected
    ids = torch.randint(0, vocabulary.size, (2, 24), generator=torch.Generator().manual_seed(1))
    ours, _ = load_model(found)
    with torch.no_grad():
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(logits, ours(MixedBatch.of(ids)), rtol=0, atol=2e-5)
    their = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    images = [m.model.get_image_tokens(pixels) for m in (model, their)]
    assert torch.equal(*images)
    write = transformers.pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    (written,) = write("a small red", max_new_tokens=3, do_sample=False)
    assert written["generated_text"].startswith("a small red")


def _trained(folder: Path, ready: Path, vocabulary: Vocabulary) -> Path:
    """A run of one step from ``hf`` on documents in its ids."""
    data = folder / "data"
    hashes = Tokenizers.load(ready).hashes
    image = vocabulary.medium(Modality.IMAGE)
    text = Tokenizers.load(ready).text
    words = [vocabulary.bos, *text.encode("a small red disc on grey"), vocabulary.eos]
    block = [image.begin, *range(image.start, image.start + 16), *[image.start] * 48, image.end]
    for split in ("train", "validation"):
        documents = [words, [vocabulary.bos, *block, *words[1:]]] * 8
        write_source(data / split / "all", documents, hashes, vocabulary)
    shutil.copytree(ready, data / "tokenizers")
    config = tiny_config(folder / "run", data, MODELS["dense"](), steps=1)
    config.data.shares, config.dataloader.media_share = {"all": 1.0}, None
    config.training.seq_len, config.sampler.enable = 96, False
    config.validator.enable = config.metrics.enable_tensorboard = False
    config.start = WarmStart.Config(model=str(folder / "hf"), upcycle="none")
    config, line = with_start_model(config)
    assert "1 layers of 32, 2 heads" in line
    trainer = config.build()
    trainer.train()
    trainer.close()
    return folder / "run"


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def sentencepiece() -> tuple[TextTokenizer, Tokenizer]:
    text = TextTokenizer.train(TEXTS, 340)
    files = tokenizer_files(text, Vocabulary(text.size, text.bos, text.eos, text.pad), {})
    return text, Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


@given(st.text(st.sampled_from("aedisr  \n\t_▁é日😀\u200d0<>x42") | st.characters(codec="utf-8")))
@example("<0xE2><0x96><0x81> ▁  ")
@settings(max_examples=40, deadline=None)
def test_sentencepiece_bpe_has_the_same_ids_as_tokenizer_json(sentencepiece, written):
    ours, theirs = sentencepiece
    if not any(name in written for name in ("<s>", "</s>", "<unk>", "<pad>", "<image>")):
        found = theirs.encode(written, add_special_tokens=False).ids
        assert found == ours.encode(written) and theirs.decode(found) == written


def test_an_export_of_a_mamba_of_ours_is_loaded_with_its_tokenizer(tmp_path):
    text = TextTokenizer.train(TEXTS, 340)
    shape = replace(embedded.MAMBA_SHAPE, dim=32, vocab_size=text.size + CODES)

    begin, end = text.begin["image"], text.end["image"]
    image = MediaCodes(Modality.IMAGE, text.size, CODES, begin, end, 4)
    vocabulary = Vocabulary(shape.vocab_size, text.bos, text.eos, text.pad, (image,))
    config = mamba_decoders.mamba(shape)
    module = config.build()
    module.init_states()
    ours = tmp_path / "ours"
    (ours / "tokenizers").mkdir(parents=True)
    text.save(ours / "tokenizers" / "text.model")
    (ours / "config.json").write_text(json.dumps(describe(config, vocabulary, {"format": "x"})))
    save_file(module.state_dict(), ours / "model.safetensors", {"format": "pt"})
    assert convert(ours, tmp_path / "hf", "hf") == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    sample = "  a small red disc — Größe 日本\n▁😀"
    assert tokenizer(sample).input_ids == [text.bos, *text.encode(sample)]
    assert tokenizer.decode(text.encode(sample)) == sample and tokenizer.eos_token_id == text.eos
    assert tokenizer.convert_tokens_to_ids("IMGIMGBCZ") == image.start + 12
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == text.eos
    write = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    (written,) = write("a small red", max_new_tokens=3, do_sample=False)
    assert written["generated_text"].startswith("a small red")
