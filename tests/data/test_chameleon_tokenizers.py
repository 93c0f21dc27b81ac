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
    taming,
    vq_fields,
    write_meta,
)  # fmt: skip
from PIL import Image
from raw_shards import contents, documents_of, quiet, write_tar

from earlyfuse.data.documents import BadSample
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.tokenizers import Tokenizers, image
from earlyfuse.data.tokenizers.imports import import_vq
from earlyfuse.data.tokenizers.pixels import image_pixels_whole
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.tools import prepare as command


def import_image(source, folder):
    """The image tokenizer of ``source``."""
    assert import_vq(source, folder)
    return image.load(folder / "image.safetensors")


def png(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("changes", [
    {},
    {"attn_resolutions": None},
    {"attn_resolutions": [32, 8], "num_res_blocks": 2},
    {"attn_type": "none"},
    {"channel_multiplier": [1, 1]},
    "equal rows",
    "half precision",
], ids=str)  # fmt: skip
def test_codes_are_those_of_transformers(changes, tmp_path):
    theirs = chameleon(order(), seed=3, **(changes if isinstance(changes, dict) else {}))
    if changes == "equal rows":  # the first of equal codebook rows is taken
        book = theirs.model.vqmodel.quantize.embedding.weight.data
        book[CODES // 2 :] = book[: CODES // 2].flip(0)
    elif changes == "half precision":  # computed in float32
        theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf")
    ours, images = import_image(tmp_path / "hf", tmp_path), pictures(9, seed=4)
    expected = theirs.float().model.get_image_tokens(pixel_values(images)).numpy()
    assert np.array_equal(ours.encode(images) + START, expected)
    assert ours.block == expected.shape[1]
    assert len(np.unique(expected)) > CODES / 4, "the images must tell codes apart"


def test_shards_one_file_and_the_vq_alone_give_the_same_codes(
    chameleon_model, source, imported, tmp_path
):
    chameleon_model.save_pretrained(tmp_path / "one")
    fields = json.loads((source / "processor_config.json").read_bytes())["image_processor"]
    (tmp_path / "one" / "preprocessor_config.json").write_text(json.dumps(fields))  # older name
    import_image(tmp_path / "one", tmp_path / "a")
    assert contents(tmp_path / "a")["image.safetensors"] == contents(imported)["image.safetensors"]
    vq = chameleon_model.model.vqmodel
    vq.save_pretrained(tmp_path / "alone")
    alone, images = import_image(tmp_path / "alone", tmp_path / "b"), pictures(5)
    codes = vq.encode(pixel_values(images)).image_tokens.numpy()
    assert np.array_equal(alone.encode(images).ravel(), codes), "no map: codes as they are"


def test_the_file_gives_the_tokenizer_back_and_the_batch_decides_nothing(imported, tmp_path):
    ours, images = image.load(imported / "image.safetensors"), pictures(7)
    ours.save(tmp_path / "image.safetensors")
    again = image.load(tmp_path / "image.safetensors")
    assert again.sha256 == ours.sha256 == contents(tmp_path)["image.safetensors"]
    assert again.settings == ours.settings and again.kind == "chameleon"
    again._batch = 2
    assert np.array_equal(again.encode(images), ours.encode(images))


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


def test_a_checkpoint_beside_hugging_face_files_adds_the_decoder(source, imported, tmp_path):
    without = image.load(imported / "image.safetensors")
    assert not without.decodes
    with pytest.raises(ValueError, match=r"no decoder.*vqgan\.ckpt"):
        without.decode(np.zeros((1, without.block), int))
    names = ("config.json", "processor_config.json", "tokenizer.json")
    folder = copied(source, tmp_path / "hf", *names)
    config = json.loads((folder / "config.json").read_bytes())
    config["vq_config"] = vq_fields(attn_resolutions=[8])
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": taming(janus())}, folder / "vqgan.ckpt")
    ours = import_image(folder, tmp_path)
    assert ours.decodes and ours.decode(ours.encode(pictures(2))).shape == (2, SIDE, SIDE, 3)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(32, 32), (47, 61), (200, 131), (33, 32), (20, 13), (90, 333)])
def test_pixels_are_those_of_their_processor(imported, size):
    rng = np.random.default_rng(7)
    y, x = np.mgrid[: size[1], : size[0]]
    picture = np.stack([x * 5 % 256, y * 7 % 256, rng.integers(0, 256, x.shape)], -1)
    ours, theirs = image.load(imported / "image.safetensors"), processor(order()).image_processor
    for kind in ("PNG", "JPEG"):  # at full resolution, though a draft would be quicker
        file = png(Image.fromarray(picture.astype(np.uint8)), kind)
        expected = theirs(Image.open(io.BytesIO(file)), return_tensors="pt").pixel_values
        floats = ours._floats(torch.from_numpy(ours.features(file)[None].copy()))
        assert torch.equal(floats, expected), kind


def test_the_original_rounds_the_long_side_and_scales_exactly(tmp_path):
    ours = import_image(write_meta(tmp_path / "meta", taming(janus())), tmp_path)
    picture = Image.fromarray(pictures(1)[0]).resize((57, 34))  # 32 / 34 · 57 = 53.6
    whole = picture.resize((54, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(ours.features(png(picture)), np.asarray(whole.crop((11, 0, 43, 32))))
    bytes_ = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 3)
    exact = np.arange(256) / 255 * 2 - 1
    assert np.abs(ours._floats(bytes_)[0, 0, 0].numpy() - exact).max() < 1.2e-7


def test_an_image_too_long_to_resize_is_a_bad_sample():
    with pytest.raises(BadSample, match=r"60000 × 1 pixels is too long"):
        image_pixels_whole(png(Image.new("1", (60_000, 1))), 512, "round")


# ---------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def raw_pairs(tmp_path_factory):
    """Pairs, images of odd sizes among them, in one shard; pixels and captions in order."""
    folder, members, samples = tmp_path_factory.mktemp("raw"), [], []
    for number, picture in enumerate(pictures(5, seed=8)):
        resized = Image.fromarray(picture).resize([(32, 32), (41, 37), (64, 33)][number % 3])
        caption = f"a small red disc {number}, grey é"
        members += [(f"{number}.png", png(resized)), (f"{number}.txt", caption.encode())]
        samples.append((resized, caption))
    write_tar(folder / "pairs" / "0.tar", members)
    return folder / "pairs", samples


def test_prepared_ids_are_those_of_their_processor_and_model(
    chameleon_model, imported, raw_pairs, tmp_path
):
    folder, samples = raw_pairs
    arguments = ["build", "--out", str(tmp_path), "--train", f"pairs={folder}",
                 "--tokenizers", str(imported), "--image-first", "1", "--workers", "1"]  # fmt: skip
    assert command.main(arguments) == 0
    for name in ("text.json", "image.safetensors", "vocabulary.json"):
        assert (tmp_path / "tokenizers" / name).read_bytes() == (imported / name).read_bytes()
    theirs = processor(order())
    found = list(documents_of(tmp_path / "train" / "pairs"))
    for (ids, counts), (picture, caption) in zip(found, samples, strict=True):
        inputs = theirs(
            text="<s><image>" + caption, images=picture, return_tensors="pt",
            return_for_text_completion=True,
        )  # fmt: skip
        expected = inputs.input_ids[0].clone()
        codes = chameleon_model.model.get_image_tokens(inputs.pixel_values)[0]
        expected[expected == chameleon_model.config.image_token_id] = codes.to(expected.dtype)
        assert ids.tolist() == [*expected.tolist(), 2]
        assert counts == [len(ids) - 64, 64]
    page = describe(tmp_path)
    assert "tokenizer.json" in page and "chameleon" in page
    cells = next(line for line in page.splitlines() if line.startswith("train/pairs")).split()
    assert cells[6] == "-" and cells[8:10] == ["/", str(CODES)], "codes are counted, PSNR is not"
    before = contents(tmp_path)
    assert command.main(arguments) == 0 and contents(tmp_path) == before


def test_a_folder_prepared_with_other_tokenizers_or_ids_is_refused(imported, raw_pairs, tmp_path):
    spec = PrepareSpec(tmp_path / "out", {"pairs": raw_pairs[0]}, tokenizers=imported, workers=1)
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
    # text alone can use the vocabulary of a mixed model
    alone = PrepareSpec(
        tmp_path / "text", spec.train, tokenizers=without, workers=1, max_bad_rate=1
    )
    manifest = prepare(alone, quiet())["train/pairs"]
    assert manifest["drops"] == {"no-image-tokenizer": 5}
    assert Vocabulary.from_dict(manifest["vocabulary"]).medium(Modality.IMAGE).count == CODES
    assert "train/pairs" in describe(tmp_path / "text")
