"""Chameleon's tokenizers in our data path: the codes, ids and pixels that transformers gives."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from raw_shards import contents, documents_of, quiet, write_tar
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from earlyfuse.data.documents import BadSample
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from earlyfuse.data.tokenizers.imports import import_text, import_vocabulary, import_vq
from earlyfuse.data.tokenizers.pixels import image_pixels_whole
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.modality import Modality, Vocabulary
from earlyfuse.tools import prepare as command

transformers = pytest.importorskip("transformers")

SIDE, CODES, START = 32, 24, 4
SPECIALS = ["<eoss>", "<racm3:break>", "<reserved08706>", "<image>"]
CORPUS = ["a small red disc on grey", "the disc is red; the field, grey.\n", "42 discs é 日本"] * 9


def code_name(code: int) -> str:
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def order(seed: int = 1) -> list[int]:
    """Code → place of its token: not the identity."""
    return np.random.default_rng(seed).permutation(CODES).tolist()


def vq_fields(**changes):
    return {
        "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 12, "resolution": SIDE,
        "base_channels": 32, "channel_multiplier": [1, 2, 1], "num_res_blocks": 1,
        "attn_resolutions": [16], **changes,
    }  # fmt: skip


def fast_tokenizer(places: list[int]) -> Tokenizer:
    """Byte-level BPE laid out as Chameleon's: sentinels, image codes, more sentinels, text."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learnt.train_from_iterator(CORPUS, trainer)
    fields = json.loads(learnt.to_str())["model"]
    tokens = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    tokens |= {code_name(code): START + place for code, place in enumerate(places)}
    for name in (*SPECIALS, *fields["vocab"]):
        tokens[name] = len(tokens)
    built = Tokenizer(models.BPE(tokens, [tuple(pair) for pair in fields["merges"]]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(
        [AddedToken(n, normalized=False) for n in ["<s>", "<pad>", "</s>", "<unk>", *SPECIALS]]
    )
    return built


def chameleon(places: list[int], seed: int = 0, **vq_changes):
    """A tiny random model; weights and codebook spread so that many codes are used."""
    tokens = fast_tokenizer(places).get_vocab()
    config = transformers.ChameleonConfig(
        vocab_size=len(tokens) + 5, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocabulary_map=tokens,
        vq_config=vq_fields(**vq_changes),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    for name, parameter in model.model.vqmodel.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_out.weight")):
            parameter.data += 1
    spread = model.model.vqmodel.encode(pixel_values(pictures(8))).last_hidden_state
    z = model.model.vqmodel.quant_conv(spread).permute(0, 2, 3, 1).flatten(0, 2)
    picked = torch.randint(len(z), (CODES,))
    model.model.vqmodel.quantize.embedding.weight.data = z[picked] + 0.01 * torch.randn(CODES, 8)
    return model


def pictures(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = np.sin(6 * (x * rng.normal(size=(count, 1, 1)) + y * rng.normal(size=(count, 1, 1))))
    colour = waves[..., None] * rng.random((count, 1, 1, 3)) * 100 + 128
    return (colour + rng.normal(0, 9, (count, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


def pixel_values(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def processor(places: list[int]):
    """Hugging Face's processor on their own image backend without torchvision."""
    from transformers.models.chameleon.image_processing_pil_chameleon import (
        ChameleonImageProcessorPil,
    )

    images = ChameleonImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(places), bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", sep_token="<reserved08706>",
    )  # fmt: skip
    return transformers.ChameleonProcessor(images, text, image_seq_length=(SIDE // 4) ** 2)


@pytest.fixture(scope="module")
def model():
    return chameleon(order())


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    """What a user has: sharded weights, config, tokenizer.json and the processors' settings."""
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder, max_shard_size="200KB")
    processor(order()).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    assert import_vq(source, folder) and import_text(source, folder)
    assert import_vocabulary(source, folder)
    return folder


def copied(source, target, *names):
    """The named files of ``source`` in a new folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())
    return target


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_resolutions": None},
        {"attn_resolutions": [32, 8], "num_res_blocks": 2},
        {"attn_type": "none"},
        {"channel_multiplier": [1, 1]},
    ],
)
def test_codes_are_those_of_transformers(changes, tmp_path):
    places = order()
    theirs = chameleon(places, seed=3, **changes)
    theirs.save_pretrained(tmp_path / "hf")
    assert import_vq(tmp_path / "hf", tmp_path)
    ours = load_image_tokenizer(tmp_path / "image.safetensors")
    images = pictures(9, seed=4)
    expected = theirs.model.get_image_tokens(pixel_values(images)).numpy()
    assert np.array_equal(ours.encode(images) + START, expected)
    assert ours.block == expected.shape[1]
    assert len(np.unique(expected)) > CODES / 3, "the images must tell codes apart"


def test_equal_codebook_rows_give_the_first_as_in_transformers(tmp_path):
    theirs = chameleon(order())
    book = theirs.model.vqmodel.quantize.embedding.weight.data
    book[CODES // 2 :] = book[: CODES // 2].flip(0)
    theirs.save_pretrained(tmp_path / "hf")
    import_vq(tmp_path / "hf", tmp_path)
    images = pictures(6, seed=5)
    expected = theirs.model.get_image_tokens(pixel_values(images)).numpy()
    ours = load_image_tokenizer(tmp_path / "image.safetensors")
    assert np.array_equal(ours.encode(images) + START, expected)


def test_shards_one_file_and_the_vq_alone_give_the_same_codes(model, source, imported, tmp_path):
    model.save_pretrained(tmp_path / "one")
    copied(source, tmp_path / "one", "processor_config.json")
    assert import_vq(tmp_path / "one", tmp_path / "a")
    assert contents(tmp_path / "a")["image.safetensors"] == contents(imported)["image.safetensors"]
    model.model.vqmodel.save_pretrained(tmp_path / "alone")
    assert import_vq(tmp_path / "alone", tmp_path / "b")
    alone = load_image_tokenizer(tmp_path / "b" / "image.safetensors")
    images = pictures(5)
    codes = model.model.vqmodel.encode(pixel_values(images)).image_tokens.numpy()
    assert np.array_equal(alone.encode(images).ravel(), codes), "no map: codes as they are"


def test_half_precision_files_are_computed_in_float32(model, tmp_path):
    half = chameleon(order()).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    import_vq(tmp_path / "half", tmp_path)
    images = pictures(5)
    expected = half.float().model.get_image_tokens(pixel_values(images)).numpy()
    ours = load_image_tokenizer(tmp_path / "image.safetensors")
    assert np.array_equal(ours.encode(images) + START, expected)


def test_encoding_does_not_depend_on_the_batch(imported):
    ours, images = load_image_tokenizer(imported / "image.safetensors"), pictures(7)
    together = ours.encode(images)
    ours._batch = 2
    assert np.array_equal(ours.encode(images), together)


def test_the_file_gives_the_same_tokenizer_back(imported, tmp_path):
    ours = load_image_tokenizer(imported / "image.safetensors")
    save_image_tokenizer(ours, tmp_path / "image.safetensors")
    again = load_image_tokenizer(tmp_path / "image.safetensors")
    assert again.sha256 == ours.sha256 == contents(tmp_path)["image.safetensors"]
    assert again.settings == ours.settings and again.kind == "chameleon"


# ---------------------------------------------------------------- decoder


def janus():
    """transformers' Janus VQ-GAN: the same network with its decoder, levels stored coarse first."""
    config = transformers.models.janus.configuration_janus.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=CODES, latent_channels=12, base_channels=32,
        channel_multiplier=[1, 2, 1], num_res_blocks=1, num_patches=SIDE // 4,
    )  # fmt: skip
    torch.manual_seed(5)
    net = transformers.JanusVQVAE(config).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embedding" not in name else 1.0)
    return net


def taming(net) -> dict[str, torch.Tensor]:
    """The state dict of ``net`` under the names of the original files."""
    named = {}
    for name, tensor in net.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(2 - int(parts[2]))
        named[".".join(parts)] = tensor
    return named


VQGAN_YAML = """
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 8
    n_embed: 24
    ckpt_path: somewhere
    lossconfig: {target: taming.modules.losses.DummyLoss}
    ddconfig: {double_z: false, z_channels: 12, resolution: 32, in_channels: 3, out_ch: 3, ch: 32,
      ch_mult: [1, 2, 1], num_res_blocks: 1, attn_resolutions: [8], dropout: 0.0}
"""


def write_meta(folder, tensors):
    """The original layout: tokenizer/vqgan.{ckpt,yaml} and text_tokenizer.json."""
    (folder / "tokenizer").mkdir(parents=True)
    extra = {"loss.discriminator.main.0.weight": torch.ones(3), "model_ema.decay": torch.ones(())}
    torch.save({"state_dict": {**tensors, **extra}, "epoch": 3}, folder / "tokenizer/vqgan.ckpt")
    (folder / "tokenizer/vqgan.yaml").write_text(VQGAN_YAML)
    fast_tokenizer(order()).save(str(folder / "tokenizer/text_tokenizer.json"))
    return folder


def test_the_original_checkpoint_brings_its_decoder(tmp_path):
    net = janus()
    write_meta(tmp_path / "meta", taming(net))
    assert import_vq(tmp_path / "meta", tmp_path) and import_text(tmp_path / "meta", tmp_path)
    assert import_vocabulary(tmp_path / "meta", tmp_path)
    tokenizers = Tokenizers.load(tmp_path)
    ours, places = tokenizers.image, np.array(order())
    codes = np.random.default_rng(0).integers(0, CODES, (3, ours.block))
    # not through their quantiser, which normalises its entries
    z = net.quantize.embedding(torch.from_numpy(codes)).reshape(3, 8, 8, 8).permute(0, 3, 1, 2)
    shown = net.decoder(net.post_quant_conv(z)).detach()
    expected = ((shown + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    difference = ours.decode(places[codes]).astype(int) - expected.numpy()
    assert np.abs(difference).max() <= 1 and (difference == 0).mean() > 0.999
    assert expected.std() > 10, "the decoder must draw something"
    z = net.quant_conv(net.encoder(pixel_values(pictures(4)))).permute(0, 2, 3, 1).flatten(0, 2)
    nearest = torch.cdist(z, net.quantize.embedding.weight).argmin(1).numpy()
    assert np.array_equal(ours.encode(pictures(4)).ravel(), places[nearest])
    assert len(np.unique(nearest)) > 3
    medium = tokenizers.vocabulary.medium(Modality.IMAGE)
    assert (medium.start, medium.count, medium.block) == (START, CODES, 64)


def test_a_checkpoint_beside_hugging_face_files_adds_the_decoder(source, tmp_path):
    names = ("config.json", "processor_config.json", "tokenizer.json")
    folder = copied(source, tmp_path / "hf", *names)
    config = json.loads((folder / "config.json").read_bytes())
    config["vq_config"] = vq_fields(attn_resolutions=[8])
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": taming(janus())}, folder / "vqgan.ckpt")
    assert import_vq(folder, tmp_path)
    ours = load_image_tokenizer(tmp_path / "image.safetensors")
    assert ours.decodes and ours.decode(ours.encode(pictures(2))).shape == (2, SIDE, SIDE, 3)


def test_without_a_decoder_decoding_says_what_to_do(imported):
    ours = load_image_tokenizer(imported / "image.safetensors")
    assert not ours.decodes
    with pytest.raises(ValueError, match=r"no decoder.*vqgan\.ckpt"):
        ours.decode(np.zeros((1, ours.block), int))


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(32, 32), (47, 61), (200, 131), (33, 32), (20, 13), (90, 333)])
def test_pixels_are_those_of_their_processor(imported, size):
    rng = np.random.default_rng(7)
    y, x = np.mgrid[: size[1], : size[0]]
    picture = np.stack([x * 5 % 256, y * 7 % 256, rng.integers(0, 256, x.shape)], -1)
    image = Image.fromarray(picture.astype(np.uint8))
    expected = processor(order()).image_processor(image, return_tensors="pt").pixel_values
    ours = load_image_tokenizer(imported / "image.safetensors")
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        image.save(file, kind)
        if kind == "JPEG":  # at full resolution, though a draft would be quicker
            image = Image.open(io.BytesIO(file.getvalue()))
            expected = processor(order()).image_processor(image, return_tensors="pt").pixel_values
        floats = ours._floats(torch.from_numpy(ours.pixels(file.getvalue())[None].copy()))
        assert torch.equal(floats, expected), kind


def test_the_original_rounds_the_long_side_and_scales_exactly(tmp_path):
    write_meta(tmp_path / "meta", taming(janus()))
    import_vq(tmp_path / "meta", tmp_path)
    ours = load_image_tokenizer(tmp_path / "image.safetensors")
    image = Image.fromarray(pictures(1)[0]).resize((57, 34))  # 32 / 34 · 57 = 53.6
    file = io.BytesIO()
    image.save(file, "PNG")
    whole = image.resize((54, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(ours.pixels(file.getvalue()), np.asarray(whole.crop((11, 0, 43, 32))))
    values = ours._floats(
        torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 3)
    )
    exact = np.arange(256) / 255 * 2 - 1
    assert np.abs(values[0, 0, 0].numpy() - exact).max() < 1.2e-7


def test_an_image_too_long_to_resize_is_a_bad_sample():
    file = io.BytesIO()
    Image.new("1", (60_000, 1)).save(file, "PNG")
    with pytest.raises(BadSample, match=r"60000 × 1 pixels is too long"):
        image_pixels_whole(file.getvalue(), 512, "round")


# ---------------------------------------------------------------- text and vocabulary


def test_text_is_encoded_as_by_transformers_and_comes_back(imported, source):
    ours = TextTokenizer.load(imported / "text.json")
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    for text in (*CORPUS[:3], "", "  two\n\nlines 日本 é", "x" * 300):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos, ours.pad, ours.eos) == (0, 1, 2)
    assert (ours.begin_image, ours.end_image) == (START + CODES + 1, START + CODES)
    assert ours.size == ours.pieces == len(theirs)


def test_text_never_gives_a_sentinel_or_an_image_code(imported):
    ours = TextTokenizer.load(imported / "text.json")
    for text in ("<s>x</s><pad>", "a<racm3:break>IMGIMGBCZ IMGIMGAZ<eoss>", "<reserved08706>"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert not ours.reserved & set(ids)
    mixed = [ours.bos, *ours.encode("disc"), ours.begin_image, ours.end_image, ours.eos]
    assert ours.decode(mixed) == "disc"
    with pytest.raises(ValueError, match=r"token \(5\) is an image code"):
        ours.decode([5])


def test_image_codes_listed_as_added_tokens_are_out_of_reach_too(tmp_path):
    tokenizer = fast_tokenizer(order())
    tokenizer.add_tokens([code_name(code) for code in range(CODES)])  # ordinary, not special
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer.load(tmp_path / "tokenizer.json")
    ids = ours.encode("a disc IMGIMGBCZ and more")
    assert ours.decode(ids) == "a disc IMGIMGBCZ and more", "not cut by their truncation either"


def word_tokenizer() -> Tokenizer:
    words = ["<s>", "</s>", "<unk>", "IMGIMGAZ", "IMGIMGBZ", "red", "disc"]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["<s>", "</s>", "<unk>"])
    return built


def test_a_vocabulary_of_words_refuses_reserved_ones_and_knows_unknown_ones(tmp_path):
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert ours.encode("red blue disc") == [5, 2, 6]
    with pytest.raises(ValueError, match=r"'IMGIMGBZ' \(4\), which is reserved"):
        ours.encode("red IMGIMGBZ")
    assert (ours.bos, ours.eos, ours.pieces) == (0, 1, 7)
    assert [ours.pad, ours.begin_image, ours.end_image] == [7, 8, 9], "behind the pieces"


def test_the_config_beside_a_tokenizer_says_which_tokens_are_sentinels(tmp_path):
    tokenizer = fast_tokenizer(order())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    told = {"bos_token": {"content": "<unk>"}, "eos_token": "<reserved08706>", "boi_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    text = TextTokenizer.load(tmp_path / "tokenizer.json")
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


def test_the_stored_vocabulary_is_that_of_the_checkpoint(imported, model):
    vocabulary = Tokenizers.load(imported).vocabulary
    tokens = model.config.vocabulary_map
    assert vocabulary.size == model.config.vocab_size == len(tokens) + 5
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad) == (0, 2, 1)
    medium = vocabulary.medium(Modality.IMAGE)
    assert (medium.start, medium.count, medium.block) == (START, CODES, (SIDE // 4) ** 2)
    assert (medium.begin, medium.end) == (tokens["<racm3:break>"], tokens["<eoss>"])


def test_without_a_stored_vocabulary_the_text_tokenizer_tells_where_codes_lie(imported, tmp_path):
    folder = copied(imported, tmp_path / "t", "text.json", "image.safetensors")
    stored, found = Tokenizers.load(imported).vocabulary, Tokenizers.load(folder).vocabulary
    assert found.media == stored.media and found.size == stored.size - 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["media"][0].update(count=CODES - 1), r"23 image codes in blocks of 64"),
        (lambda v: v["media"][0].update(block=9), r"24 image codes in blocks of 9"),
        (lambda v: v["media"][0].update(start=60), r"id 60 to image.* uses it for text"),
        (lambda v: v["media"][0].update(begin=70), r"id 70 to image.* uses it for text"),
        (lambda v: v.update(size=100), r"has 322 ids, the vocabulary 100"),
        (lambda v: v.update(media=[]), r"0 image codes in blocks of 0"),
        (lambda v: v.pop("bos"), r"vocabulary\.json\) cannot be read"),
    ],
)
def test_tokenizers_and_vocabulary_that_do_not_belong_together_are_refused(
    imported, tmp_path, change, message
):
    folder = copied(imported, tmp_path / "t", "text.json", "image.safetensors", "vocabulary.json")
    fields = json.loads((folder / "vocabulary.json").read_bytes())
    change(fields)
    (folder / "vocabulary.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        Tokenizers.load(folder)


def with_map(source, target, change):
    """The source with another vocabulary map."""
    folder = copied(source, target, *(path.name for path in source.iterdir()))
    config = json.loads((folder / "config.json").read_bytes())
    change(config["vocabulary_map"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_codes_that_are_not_one_range_of_ids_are_refused(source, tmp_path):
    last = code_name(order().index(CODES - 1))
    folder = with_map(source, tmp_path / "hf", lambda tokens: tokens.update({last: 400}))
    for take in (import_vq, import_vocabulary):
        with pytest.raises(ValueError, match=r"over the ids 4 … 400, and id 27 is not one of them"):
            take(folder, tmp_path / "out")
    folder = with_map(source, tmp_path / "less", lambda tokens: tokens.pop(code_name(7)))
    with pytest.raises(ValueError, match=r"23 image codes, the codebook has 24: 1 have no name"):
        import_vq(folder, tmp_path / "out")
    folder = with_map(source, tmp_path / "bare", lambda tokens: tokens.pop("<eoss>"))
    with pytest.raises(ValueError, match=r"has no <eoss>"):
        import_vocabulary(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- refusals


def rewritten(source, target, change):
    """The source as one file whose tensors ``change`` has altered."""
    folder = copied(source, target, "config.json")
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_keys_that_do_not_fit_are_all_reported(source, tmp_path):
    inside = "model.vqmodel.encoder."

    def change(tensors):
        del tensors[inside + "conv_in.bias"]
        tensors[inside + "strange.weight"] = torch.ones(2)
        tensors["model.vqmodel.quantize.embedding.weight"] = torch.ones(CODES, 9)

    message = (
        r"1 missing: encoder\.conv_in\.bias; 1 unexpected: encoder\.strange\.weight; 1 mis-shaped: "
        r"quantize\.embedding\.weight \[24, 9\] for \[24, 8\]"
    )
    with pytest.raises(ValueError, match=message):
        import_vq(rewritten(source, tmp_path / "hf", change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_no_numbers_are_refused(source, tmp_path):
    def change(tensors):
        tensors["model.vqmodel.quant_conv.weight"][0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"finite values.*quant_conv\.weight"):
        import_vq(rewritten(source, tmp_path / "hf", change), tmp_path / "out")


def test_a_source_without_tokenizers_says_so(source, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if ".vqmodel." in name]:
            del tensors[name]

    folder = rewritten(source, tmp_path / "hf", change)
    assert not import_vq(folder, tmp_path / "out") and not import_text(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for take in (import_vq, import_text, import_vocabulary):
        assert not take(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_pickled_and_missing_files_are_refused(source, tmp_path):
    names = [path.name for path in source.iterdir()]
    for shard in source.glob("*.safetensors"):
        folder = copied(source, tmp_path / f"cut-{shard.stem}", *names)
        (folder / shard.name).write_bytes(shard.read_bytes()[:-10])
        if any(".vqmodel." in name for name in load_file(shard)):
            with pytest.raises(ValueError, match=r"is no whole safetensors file.*cut short"):
                import_vq(folder, tmp_path / "out")
            (folder / shard.name).unlink()
            with pytest.raises(ValueError, match=rf"names the file '{shard.name}', which is not"):
                import_vq(folder, tmp_path / "out")
    folder = copied(source, tmp_path / "bin", "config.json")
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        import_vq(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_an_original_checkpoint_that_is_cut_or_holds_code_is_refused(tmp_path, capsys):
    folder = write_meta(tmp_path / "meta", taming(janus()))
    path = folder / "tokenizer" / "vqgan.ckpt"
    whole = path.read_bytes()
    impossible = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "pickle": pickle.dumps(Evil(), protocol=2),
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for name, content in impossible.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"vqgan\.ckpt cannot be read as a checkpoint"):
            import_vq(folder, tmp_path / name)
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match="would run code"):
        import_vq(folder, tmp_path / "out")
    torch.save({"state_dict": [1, 2]}, path)
    with pytest.raises(ValueError, match="must hold a state_dict of tensors"):
        import_vq(folder, tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_file_of_ours_is_refused(imported, tmp_path):
    whole = (imported / "image.safetensors").read_bytes()
    (tmp_path / "image.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"image\.safetensors\) is damaged or cut short"):
        load_image_tokenizer(tmp_path / "image.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 3}, r"must resize the shorter side by Lanczos"),
        ({"crop_size": {"height": 32, "width": 16}}, r"must resize the shorter side"),
        ({"do_normalize": False}, r"must resize the shorter side"),
        ({"image_mean": [1.0, 0.5, 1.0]}, r"must be equal in all channels"),
    ],
)
def test_other_ways_of_preparing_pixels_are_refused(source, tmp_path, change, message):
    folder = copied(source, tmp_path / "hf", *(path.name for path in source.iterdir()))
    fields = json.loads((folder / "processor_config.json").read_bytes())
    fields["image_processor"].update(change)
    (folder / "processor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        import_vq(folder, tmp_path / "out")


# ---------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Pairs, images of odd sizes among them, in one shard; pixels and captions in order."""
    folder, members, samples = tmp_path_factory.mktemp("raw"), [], []
    for number, picture in enumerate(pictures(5, seed=8)):
        image = Image.fromarray(picture).resize([(32, 32), (41, 37), (64, 33)][number % 3])
        file = io.BytesIO()
        image.save(file, "PNG")
        caption = f"a small red disc {number}, grey é"
        members += [(f"{number}.png", file.getvalue()), (f"{number}.txt", caption.encode())]
        samples.append((image, caption))
    write_tar(folder / "pairs" / "0.tar", members)
    return folder, samples


def test_prepared_ids_are_those_of_their_processor_and_model(model, imported, raw, tmp_path):
    folder, samples = raw
    arguments = ["build", "--out", str(tmp_path), "--train", f"pairs={folder / 'pairs'}",
                 "--tokenizers", str(imported), "--image-first", "1", "--workers", "1"]  # fmt: skip
    assert command.main(arguments) == 0
    for name in ("text.json", "image.safetensors", "vocabulary.json"):
        assert (tmp_path / "tokenizers" / name).read_bytes() == (imported / name).read_bytes()
    theirs = processor(order())
    found = list(documents_of(tmp_path / "train" / "pairs"))
    assert len(found) == len(samples)
    for (ids, counts), (image, caption) in zip(found, samples, strict=True):
        inputs = theirs(
            text="<s><image>" + caption, images=image, return_tensors="pt",
            return_for_text_completion=True,
        )  # fmt: skip
        expected = inputs.input_ids[0].clone()
        codes = model.model.get_image_tokens(inputs.pixel_values)[0]
        expected[expected == model.config.image_token_id] = codes.to(expected.dtype)
        assert ids.tolist() == [*expected.tolist(), 2]
        assert counts == [len(ids) - 64, 64]
    page = describe(tmp_path)
    assert "tokenizer.json" in page and "chameleon" in page
    before = contents(tmp_path)
    assert command.main(arguments) == 0 and contents(tmp_path) == before


def test_a_folder_prepared_with_other_tokenizers_or_ids_is_refused(imported, raw, tmp_path):
    spec = PrepareSpec(
        tmp_path / "out", {"pairs": raw[0] / "pairs"}, tokenizers=imported, workers=1
    )
    prepare(spec, quiet())
    names = ("text.json", "image.safetensors", "vocabulary.json")
    fields = json.loads((imported / "vocabulary.json").read_bytes())
    other = copied(imported, tmp_path / "wider", *names)
    (other / "vocabulary.json").write_text(json.dumps({**fields, "size": fields["size"] + 1}))
    changed = copied(imported, tmp_path / "renamed", *names)
    text = json.loads((changed / "text.json").read_bytes())
    text["earlyfuse"]["eos"] = "<reserved08706>"
    (changed / "text.json").write_text(json.dumps(text))
    without = copied(imported, tmp_path / "no-image", "text.json", "vocabulary.json")
    before = contents(tmp_path / "out")
    for folder, message in (
        (other, "another vocabulary"),
        (changed, "prepared with text tokenizer"),
        (without, "prepared with image tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(PrepareSpec(**{**spec.__dict__, "tokenizers": folder}), quiet())
    assert contents(tmp_path / "out") == before


def test_text_alone_can_use_the_vocabulary_of_a_mixed_model(imported, raw, tmp_path):
    folder = copied(imported, tmp_path / "no-image", "text.json", "vocabulary.json")
    spec = PrepareSpec(
        tmp_path / "out", {"pairs": raw[0] / "pairs"}, tokenizers=folder, workers=1, max_bad_rate=1
    )
    manifest = prepare(spec, quiet())["train/pairs"]
    assert manifest["drops"] == {"no-image-tokenizer": 5}
    assert Vocabulary.from_dict(manifest["vocabulary"]).medium(Modality.IMAGE).count == CODES
    assert "train/pairs" in describe(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizers": "gone"}, r"must be a folder with text\.model or text\.json"),
        ({"image_tokenizer": "vqvae"}, r"names all tokenizers; leave out"),
        ({"text_tokenizer": "text.json"}, r"names all tokenizers; leave out"),
    ],
)
def test_a_spec_with_two_sources_of_tokenizers_is_refused(imported, tmp_path, changes, message):
    fields = {"tokenizers": imported, **changes}
    for name in ("tokenizers", "text_tokenizer"):
        if isinstance(fields.get(name), str):
            fields[name] = imported / fields[name]
    with pytest.raises(ValueError, match=message):
        PrepareSpec(tmp_path, {"pairs": tmp_path}, **fields)
