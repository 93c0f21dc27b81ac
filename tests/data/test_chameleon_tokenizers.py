"""Chameleon's VQ-GAN in our data path: the codes, ids and pixels that transformers gives."""

import io
import json

import numpy as np
import pytest
import torch
from chameleon_files import (
    CODES,
    SIDE,
    START,
    chameleon,
    copied,
    import_all,
    janus,
    order,
    pictures,
    pixel_values,
    processor,
    save_hugging_face,
    taming,
    vq_fields,
    write_meta,
)
from PIL import Image
from raw_shards import contents, documents_of, quiet, write_tar

from earlyfuse.data.documents import BadSample
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.image import load_image_tokenizer, save_image_tokenizer
from earlyfuse.data.tokenizers.imports import import_vq
from earlyfuse.data.tokenizers.pixels import image_pixels_whole
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.tools import prepare as command


@pytest.fixture(scope="module")
def model():
    return chameleon(order())


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    return save_hugging_face(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    return import_all(source, tmp_path_factory.mktemp("imported"))


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
    fields = json.loads((source / "processor_config.json").read_bytes())["image_processor"]
    (tmp_path / "one" / "preprocessor_config.json").write_text(json.dumps(fields))  # older name
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


def test_the_original_checkpoint_brings_its_decoder(tmp_path):
    net = janus()
    write_meta(tmp_path / "meta", taming(net))
    tokenizers = Tokenizers.load(import_all(tmp_path / "meta", tmp_path))
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


def test_a_model_folder_of_the_original_layout_finds_its_tokenizers(tmp_path):
    write_meta(tmp_path / "data", taming(janus()))
    model = tmp_path / "data" / "models" / "7b"
    model.mkdir(parents=True)
    assert not import_vq(model, tmp_path / "out")
    (model / "params.json").write_text("{}")
    import_all(model, tmp_path / "out")
    import_all(tmp_path / "data", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
    cells = next(line for line in page.splitlines() if line.startswith("train/pairs")).split()
    assert cells[6] == "-" and cells[8:10] == ["/", str(CODES)], "codes are counted, PSNR is not"
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
