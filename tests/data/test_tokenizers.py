"""Tokenizers: exact round trips, the same bytes each time, pixels as an image shows them."""

import contextlib
import io
import itertools
import os
import struct
import zlib

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from earlyfuse.data.documents import BadSample
from earlyfuse.data.tokenizers import image
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer, to_patches
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer, to_floats
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.tokenizers.tokenizer_file import code_usage

WORDS = "the quick brown fox jumps over a lazy dog\n    return x + 1  # two  spaces\n".split(" ")


def texts(count=300, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 20)) for _ in range(count)]


def blobs(count, size=16, seed=0):
    """Smooth images with structure: a bright disc on a gradient. uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = []
    for _ in range(count):
        cy, cx, r, slope = rng.random(4)
        disc = (np.hypot(y - cy, x - cx) < 0.15 + 0.3 * r)[..., None] * rng.random(3)
        images.append(0.6 * disc + 0.4 * (slope * x + (1 - slope) * y)[..., None])
    return (np.stack(images) * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def text():
    return TextTokenizer.train(texts(), 360)


@pytest.fixture(scope="module")
def kmeans():
    return KMeansTokenizer.train(blobs(100), patch=4, codes=32)


@pytest.fixture(scope="module")
def vqvae():
    torch.set_num_threads(1)
    return VQVAETokenizer.train(blobs(256), patch=4, codes=32, steps=120, width=32, batch=24)


# ---------------------------------------------------------------- text


@given(st.one_of(st.text(), st.text(alphabet="<>/imagespdunkbo0x41 ", max_size=40)))
@example(" leading, trailing ")
@example("\n\n\t \r\n    def f():\n        pass\n")
@example("a\u2581b \u2581")  # sentencepiece's own symbol for a space
@example("<image></image><s></s><pad><unk><0x41>")
@example("\x00\ufeffé\u0301 ﬁ 日本 \u2047")
@settings(max_examples=250, deadline=None)
def test_decode_undoes_encode_for_any_text_and_no_text_spells_a_sentinel(text, string):
    sentinels = {text.bos, text.eos, text.pad, text.begin["image"], text.end["image"]}
    ids = text.encode(string)
    assert text.decode(ids) == string
    assert len(sentinels) == 5 and not sentinels & set(ids)


def test_sentinels_decode_to_nothing_and_what_is_no_text_is_refused(text):
    begin, end = text.begin["image"], text.end["image"]
    assert text.decode([text.bos, *text.encode("fox"), begin, end, text.eos, text.pad]) == "fox"
    with pytest.raises(ValueError, match=rf"token \({text.size}\) must lie in \[0, {text.size}\)"):
        text.decode([text.size])
    with pytest.raises(UnicodeEncodeError):
        text.encode("a\ud800")


def test_training_text_twice_gives_the_same_file_and_load_gives_it_back(text, tmp_path):
    again = TextTokenizer.train(iter(texts()), 360)
    assert again.model == text.model and again.size == 360
    text.save(tmp_path / "text.model")
    loaded = TextTokenizer.load(tmp_path / "text.model")
    assert loaded.sha256 == text.sha256
    assert loaded.encode("quick dog") == text.encode("quick dog")


def test_a_foreign_model_gets_the_sentinels_it_lacks():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(texts()).split("\n")),
        model_writer=model,
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        user_defined_symbols=["<image>"],  # text can produce this one: not fit for a sentinel
        minloglevel=2,
    )
    foreign = TextTokenizer(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    added = [foreign.pad, foreign.begin["image"], foreign.end["image"]]
    assert added == [pieces, pieces + 1, pieces + 2] and foreign.size == pieces + 3
    ids = [foreign.bos, *foreign.encode("lazy dog"), foreign.end["image"]]
    assert foreign.decode(ids) == "lazy dog"


def test_texts_that_no_tokenizer_can_be_trained_on_are_refused(tmp_path):
    def failing():
        yield "one line"
        raise ZeroDivisionError("of the texts")

    for size in (0, 319, (1 << 20) + 1):
        with pytest.raises(
            ValueError, match=rf"vocabulary \({size}\) must lie in \[320, 1048576\]"
        ):
            TextTokenizer.train(texts(), size)
    with pytest.raises(ValueError, match=r"text vocabulary \(4000\) does not fit the training"):
        TextTokenizer.train(["one two"], 4000)
    with pytest.raises(ValueError, match="there is none"):
        TextTokenizer.train(["", "\n"], 400)
    with pytest.raises(ZeroDivisionError, match="of the texts"):
        TextTokenizer.train(failing(), 400)
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"x\.model\) must be a sentencepiece"):
        TextTokenizer.load(tmp_path / "x.model")


# ---------------------------------------------------------------- k-means


def test_kmeans_picks_the_nearest_codeword(kmeans):
    images = blobs(20, seed=7)
    patches = to_patches(images, 4).reshape(-1, 48).astype(np.int64)
    distance = ((patches[:, None] - kmeans.codebook_KD.astype(np.int64)) ** 2).sum(-1)
    assert np.array_equal(kmeans.encode(images).ravel(), distance.argmin(1))


def test_kmeans_is_near_exact_when_patches_are_few():
    """As many codes as distinct patches: nothing is lost, whatever the starting points."""
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    tokenizer = KMeansTokenizer.train(images, patch=4, codes=16)
    assert np.array_equal(tokenizer.decode(tokenizer.encode(images)), images)


def test_kmeans_beats_random_codewords(kmeans):
    images = blobs(100)
    drawn = np.unique(to_patches(images, 4).reshape(-1, 48), axis=0)
    drawn = drawn[np.random.default_rng(0).choice(len(drawn), 32, replace=False)]
    random = KMeansTokenizer(drawn, kmeans.settings)
    found = image.measure(kmeans, images)
    assert found.psnr > image.measure(random, images).psnr + 1 and found.used == 32


def test_kmeans_does_not_depend_on_the_number_of_threads(kmeans):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = KMeansTokenizer.train(blobs(100), patch=4, codes=32)
            assert again.sha256 == kmeans.sha256
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("patch", [2, 4, 16])
def test_kmeans_codes_survive_decoding(patch):
    """Patches up to 16: 768 values, beyond what float32 holds exactly."""
    tokenizer = KMeansTokenizer.train(blobs(40), patch=patch, codes=8)
    assert tokenizer.block == (16 // patch) ** 2
    codes = np.random.default_rng(1).integers(0, 8, (50, tokenizer.block))
    assert np.array_equal(tokenizer.encode(tokenizer.decode(codes)), codes)


def test_geometry_out_of_range_is_refused():
    for images, patch, codes, message in (
        (np.zeros((4, 16, 16, 3), np.uint8), 4, 32, r"codes \(32\) must not exceed .*4×4.*\(1\)"),
        (blobs(4), 5, 8, r"image_size \(16\) must be a multiple of patch \(5\)"),
        (blobs(4), 4, 1, r"codes \(1\) must lie in"),
        (blobs(4), 4, (1 << 20) + 1, r"codes \(1048577\) must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            KMeansTokenizer.train(images, patch=patch, codes=codes)
    with pytest.raises(ValueError, match=r"patch \(3\) must be a power of two"):
        VQVAETokenizer.train(blobs(4, size=12), patch=3, codes=8, steps=1)


# ---------------------------------------------------------------- VQ-VAE


def test_vqvae_learns_more_than_the_mean_image_and_uses_its_codes(vqvae):
    held_out = blobs(64, seed=99)
    constant = float(((held_out - blobs(256).mean(0)) ** 2).mean())
    found = image.measure(vqvae, held_out)
    assert found.psnr > image.quality(constant) + 3
    assert found.used >= 24 and found.perplexity > 12


def test_vqvae_codes_carry_the_image(vqvae):
    """Other codes, other pixels: the decoder does not answer with one picture."""
    images = blobs(64, seed=3)
    codes = vqvae.encode(images)
    assert codes.shape == (64, 16) and codes.dtype == np.int64 and codes.max() < 32
    own = np.mean((vqvae.decode(codes).astype(float) - images) ** 2)
    exchanged = np.mean((vqvae.decode(codes[::-1].copy()).astype(float) - images) ** 2)
    assert own < exchanged / 2


def test_vqvae_training_is_deterministic():
    state = torch.get_rng_state()
    a, b, other = (
        VQVAETokenizer.train(blobs(32), patch=4, codes=8, steps=12, width=32, batch=8, seed=seed)
        for seed in (0, 0, 1)
    )
    assert a.sha256 == b.sha256 != other.sha256
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_vqvae_revives_dead_codes():
    tokenizer = VQVAETokenizer.train(blobs(64), patch=4, codes=16, steps=2, width=32, batch=16)
    net = tokenizer.net
    net.codebook_KE[:] = 1e3  # all latents are equally far: only code 0 is chosen
    net.total_KE[:] = net.codebook_KE * net.count_K[:, None]
    rng, x = torch.Generator().manual_seed(0), to_floats(torch.from_numpy(blobs(24)))
    for _ in range(180):
        net.loss(x, True, rng)
    assert len(net.nearest(net.latents(x)).unique()) >= 12


@pytest.mark.parametrize("name", ["kmeans", "vqvae"])
def test_loading_gives_the_same_tokenizer(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    path = tmp_path / "image.safetensors"
    tokenizer.save(path)
    loaded = image.load(path)
    images = blobs(10, seed=5)
    assert loaded.kind == name and loaded.sha256 == tokenizer.sha256
    assert loaded.settings == tokenizer.settings
    codes = tokenizer.encode(images)
    assert np.array_equal(loaded.encode(images), codes)
    assert np.array_equal(loaded.decode(codes), tokenizer.decode(codes))
    assert os.listdir(tmp_path) == ["image.safetensors"]


def test_code_usage_counts_codes_and_their_spread():
    assert code_usage(np.array([5, 5, 0, 5, 5])) == (4, pytest.approx(4))
    assert code_usage(np.array([9, 0])) == (1, pytest.approx(1))
    assert image.quality(255**2 / 100) == pytest.approx(20)


# ---------------------------------------------------------------- pixels


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_the_shorter_side_fits_and_the_centre_is_kept():
    picture = np.full((32, 96, 3), 255, np.uint8)
    picture[:, 32:64] = (200, 30, 40)  # the central square
    pixels = image_pixels(encoded(Image.fromarray(picture)), 16)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels[:, 4:12], np.broadcast_to((200, 30, 40), (16, 8, 3)))
    fits = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(image_pixels(encoded(Image.fromarray(fits)), 16), fits), "untouched"


@pytest.mark.parametrize("picture, value", [
    (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), 255),
    (Image.new("LA", (16, 16), (0, 128)), 127),
    (Image.fromarray(np.full((16, 16), 32768, np.uint16)), 128),
    (Image.new("1", (16, 16), 1), 255),
], ids=["clear", "half", "deep", "bits"])  # fmt: skip
def test_transparency_is_laid_on_white_and_modes_become_rgb(picture, value):
    assert (abs(image_pixels(encoded(picture), 16).astype(int) - value) <= 1).all()


def with_exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "Maker"
    exif[ExifTags.Base.ExifOffset] = {ExifTags.Base.ExposureTime: (1, 100)}
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright(orientation):
    whole = encoded(Image.fromarray(blobs(1)[0]), exif=with_exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(whole)))
    assert np.array_equal(image_pixels(whole, 16), np.asarray(upright))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own word on each
def test_an_image_is_read_although_its_other_exif_fields_are_damaged():
    exif = with_exif(6)
    whole = encoded(Image.fromarray(blobs(1)[0]), "JPEG", exif=exif)
    # the make becomes a width that is text: such fields can be read, and not be written
    damaged = whole.replace(b"\x01\x0f\0\2", b"\x01\0\0\2")
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(damaged)))
    assert np.array_equal(image_pixels(damaged, 16), image_pixels(whole, 16))
    for place, change in itertools.product(range(len(exif)), (1, 4, 255)):
        broken = bytearray(whole)
        broken[whole.index(exif) + place] ^= change
        with contextlib.suppress(BadSample):
            image_pixels(bytes(broken), 16)


def test_a_cut_image_is_corrupt_or_complete():
    picture = blobs(1)[0]
    whole = encoded(Image.fromarray(picture))
    refused = 0
    for length in range(0, len(whole), 7):
        try:
            pixels = image_pixels(whole[:length], 16)
        except BadSample as bad:
            assert bad.cause == "corrupt-image"
            refused += 1
        else:  # nothing but checksums was cut
            assert np.array_equal(pixels, picture)
    assert refused > 0.9 * len(whole) / 7


@pytest.mark.parametrize("side", [9000, 50000])
def test_huge_images_are_refused_before_they_unpack(side):
    whole = encoded(Image.new("1", (16, 16)))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + whole[24:29]
    claimed = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    with pytest.raises(BadSample, match=r"too large|bomb") as caught:
        image_pixels(claimed, 16)
    assert caught.value.cause == "corrupt-image"
