"""Images as vectors: pixels, a KL-VAE, public KL-VAEs of diffusers; from raw shards to stored
vectors with their statistics.
"""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from raw_shards import contents, pairs, quiet, spec_of, write_tar
from safetensors.torch import load_file, save_file

from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.shards.manifest import read_manifest
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.shards.writer import ShardRecord
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.data.tokenizers import Tokenizers, image, image_diffusers
from earlyfuse.data.tokenizers.image_diffusers import DiffusersTokenizer
from earlyfuse.data.tokenizers.image_vae import VAETokenizer
from earlyfuse.data.tokenizers.image_vectors import LatentTokenizer, PixelTokenizer, to_floats

VAE = {"factor": 2, "channels": 3, "steps": 150, "width": 32, "batch": 16}
UNTRAINED = VAE | {"steps": 1, "patch": 4}


def noise(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def slopes(count, size=16, seed=0):
    """Colour gradients: few degrees of freedom, so that a short training shows."""
    y, x = np.mgrid[:size, :size][..., None] / size
    a, b, c = np.random.default_rng(seed).random((3, count, 1, 1, 3))
    return (255 * (a * x + b * y + c * (1 - x * y)) / 3).astype(np.uint8)


@pytest.fixture(scope="module")
def vae():
    return VAETokenizer.train(slopes(200, 8), patch=4, **VAE)


def save_public(folder, **config):
    """A tiny KL-VAE with random weights, in diffusers' own format."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 3, **config}
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    net = diffusers.AutoencoderKL(3, 3, *blocks, **sizes).eval()
    net.save_pretrained(folder)
    return net


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Folder and network of diffusers."""
    folder = tmp_path_factory.mktemp("public") / "vae"
    return folder, save_public(folder, shift_factor=0.3, scaling_factor=1.5)


@pytest.fixture(params=["pixels", "vae", "diffusers"])
def tokenizer(request):
    if request.param == "pixels":
        return PixelTokenizer({"image_size": 16, "patch": 4})
    if request.param == "vae":
        return VAETokenizer.train(slopes(30), **UNTRAINED)
    return DiffusersTokenizer.from_folder(request.getfixturevalue("public")[0], 16, 4)


# ---------------------------------------------------------------- all kinds


def test_a_vector_is_a_square_of_the_grid_row_by_row_and_channels_last(tokenizer):
    images = slopes(5, seed=2)
    channels, side = tokenizer.grid
    vectors = tokenizer.encode(images)
    assert tokenizer.codes == 1 and tokenizer.vectors == (channels * side**2, "float16", channels)
    assert vectors.shape == (5, tokenizer.block, tokenizer.vectors.width)
    assert vectors.dtype == np.float16
    grid = tokenizer.to_grid(images).astype(np.float16)
    for place in range(tokenizer.block):
        row, column = side * (place // 4), side * (place % 4)
        square = grid[:, row : row + side, column : column + side]
        assert np.array_equal(vectors[:, place].reshape(5, side, side, channels), square)
    assert np.array_equal(tokenizer.decode(vectors), tokenizer.from_grid(grid.astype(np.float32)))


def test_sampled_vectors_are_clipped_and_refused_unless_finite(tokenizer):
    vectors = tokenizer.encode(slopes(2)).astype(np.float32)
    far = tokenizer.decode(np.sign(vectors) * 1e30)
    assert np.array_equal(far, tokenizer.decode(np.sign(vectors) * 1e4)), "both are out of range"
    png = tokenizer.to_file(vectors[0])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), tokenizer.decode(vectors)[0])
    for bad in (np.nan, np.inf):
        vectors[1, 3, 2] = bad
        with pytest.raises(ValueError, match=r"must be .* and finite"):
            tokenizer.decode(vectors)
    with pytest.raises(ValueError, match=r"\(2, 15, \d+\) must be \(images, 16, \d+\)"):
        tokenizer.decode(vectors[:, 1:])


def test_files_bring_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "image.safetensors")
    loaded = image.load(tmp_path / "image.safetensors")
    assert type(loaded) is type(tokenizer) and loaded.sha256 == tokenizer.sha256
    images = slopes(3, seed=1)
    assert np.array_equal(loaded.encode(images), tokenizer.encode(images))


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16])
def test_pixels_come_back_exactly(patch):
    tokenizer = PixelTokenizer({"image_size": 16, "patch": patch})
    images = noise(8)
    images[0].flat[:256] = np.arange(256)
    vectors = tokenizer.encode(images)
    assert vectors.min() >= -1 and vectors.max() <= 1
    assert np.array_equal(tokenizer.decode(vectors), images)
    assert image.measure(tokenizer, images).psnr == np.inf


# ---------------------------------------------------------------- KL-VAE


def test_a_vae_reconstructs_images_that_it_has_not_seen(vae):
    held_out = slopes(64, 8, seed=9)
    constant = float(((held_out - slopes(200, 8).mean(0)) ** 2).mean())
    assert image.measure(vae, held_out).psnr > image.quality(constant) + 3
    own = np.mean((vae.decode(vae.encode(held_out)).astype(float) - held_out) ** 2)
    other = np.mean((vae.decode(vae.encode(held_out[::-1].copy())).astype(float) - held_out) ** 2)
    assert own < other / 4, "latents carry the image"


def test_latents_of_the_training_images_are_standardised_by_channel(vae):
    values = vae.encode(slopes(200, 8)).astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-3)
    posterior = vae.net.posterior(to_floats(torch.from_numpy(slopes(200, 8))))[0]
    np.testing.assert_allclose(posterior.std((0, 2, 3)), vae.std_C, rtol=1e-3)


def test_training_a_vae_is_deterministic_and_leaves_the_global_generator_alone():
    first, *others = (
        (torch.rand(1), VAETokenizer.train(slopes(40, 8), **UNTRAINED | {"steps": 5}).sha256)[1]
        for _ in range(2)
    )
    state = torch.get_rng_state()
    other = VAETokenizer.train(slopes(40, 8), **UNTRAINED | {"steps": 5}, seed=1)
    assert others == [first] and first != other.sha256
    assert torch.equal(torch.get_rng_state(), state)


def test_a_heavy_kl_term_empties_the_latents(vae):
    heavy = VAETokenizer.train(slopes(200, 8), patch=4, kl=100.0, **VAE | {"steps": 60})
    assert (heavy.std_C < vae.std_C.min() / 4).all()
    assert np.isfinite(heavy.encode(slopes(9, 8))).all()


@pytest.mark.parametrize(("factor", "patch", "side"), [(2, 2, 1), (2, 16, 8), (4, 8, 2)])
def test_patches_of_1_to_8_latents(factor, patch, side):
    sizes = VAE | {"factor": factor, "steps": 2, "channels": 5}
    tokenizer = VAETokenizer.train(slopes(8), patch=patch, **sizes)
    assert tokenizer.grid == (5, side) and tokenizer.block == (16 // patch) ** 2
    assert tokenizer.decode(tokenizer.encode(slopes(2))).shape == (2, 16, 16, 3)


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize("config", [
    {"scaling_factor": 0.18215},
    {"shift_factor": -0.4, "scaling_factor": 0.3611, "use_quant_conv": False},
    {"latents_mean": [0.1, -2.0, 0.5], "latents_std": [1.5, 2.0, 0.5], "scaling_factor": 0.5},
])  # fmt: skip
def test_vectors_are_the_latents_of_diffusers_scaled_as_its_pipelines_do(config, tmp_path):
    net = save_public(tmp_path / "vae", **config)
    tokenizer, images = DiffusersTokenizer.from_folder(tmp_path / "vae", 16, 4), slopes(3)
    z = net.encode(to_floats(torch.from_numpy(images))).latent_dist.mode()
    if "latents_mean" in config:
        mean, std = (torch.tensor(config[f"latents_{k}"])[:, None, None] for k in ("mean", "std"))
        scaled = (z - mean) * config["scaling_factor"] / std
        back = scaled / config["scaling_factor"] * std + mean
    else:
        shift = config.get("shift_factor", 0)
        scaled = (z - shift) * config["scaling_factor"]
        back = scaled / config["scaling_factor"] + shift
    expected = scaled.detach().movedim(1, 3).numpy()
    np.testing.assert_allclose(tokenizer.to_grid(images), expected, atol=1e-5)
    pixels = (net.decode(back).sample.detach().movedim(1, 3).numpy() + 1) * 127.5
    # float16 of vectors, rounding of pixels
    found = tokenizer.decode(tokenizer.encode(images))
    assert np.abs(found - pixels.clip(0, 255)).max() < 1


def test_old_names_and_half_precision_are_read(public, tmp_path):
    folder, _ = public
    whole = DiffusersTokenizer.from_folder(folder, 16, 4)
    old = shutil.copytree(folder, tmp_path / "old")
    path = old / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    save_file(renamed, path)
    assert DiffusersTokenizer.from_folder(old, 16, 4).sha256 == whole.sha256
    save_file({name: tensor.half() for name, tensor in renamed.items()}, path)
    half = DiffusersTokenizer.from_folder(old, 16, 4)
    assert all(tensor.dtype == torch.float32 for tensor in half.tensors().values())
    np.testing.assert_allclose(half.to_grid(slopes(2)), whole.to_grid(slopes(2)), atol=0.02)


def changed(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("fields", "message"), [
    ({"_class_name": "VQModel"}, r"_class_name \('VQModel'\) must be AutoencoderKL"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types .* must be Down"),
    ({"block_out_channels": [8, 10]}, r"block_out_channels .* multiples of norm_num_groups \(4\)"),
    ({"block_out_channels": [1 << 20] * 2}, "block_out_channels"),
    ({"latent_channels": 10**9}, "latent_channels"),
    ({"in_channels": 4}, r"in_channels \(4\) must be one of 3"),
    ({"act_fn": "mish"}, "act_fn"),
    ({"scaling_factor": 0}, "scaling_factor"),
    ({"latents_std": [1.0, 0.0, 1.0]}, "latents_std .* must be 3 numbers"),
    ({"latents_mean": [1.0]}, "latents_mean .* must be 3 numbers"),
    ({"new_norm": True}, "unknown field 'new_norm'"),
    ({"latent_channels": 5}, r"tensor .* must be float32 \[16, 5, .* for its settings"),
    ({"mid_block_add_attention": False}, "unknown tensor .*mid_block.attentions"),
])  # fmt: skip
def test_a_config_of_another_network_is_refused_by_field(public, tmp_path, fields, message):
    folder = shutil.copytree(public[0], tmp_path / "vae")
    changed(folder, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        DiffusersTokenizer.from_folder(folder, 16, 4)
    assert str(folder) in str(caught.value)


def test_damaged_weights_are_refused_by_name(public, tmp_path):
    folder = shutil.copytree(public[0], tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    first = min(tensors)
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=rf"{path} cannot be read"):
        DiffusersTokenizer.from_folder(folder, 16, 4)
    for content, message in (
        ({**tensors, first: tensors[first] * float("nan")}, f"tensor {first} holds values that"),
        ({n: t for n, t in tensors.items() if n != first}, f"lacks the tensor '{first}'"),
        ({**tensors, "more": torch.zeros(1 << 20)}, r"\([0-9,]+ bytes\) is larger than a model"),
    ):
        save_file(content, path)
        with pytest.raises(ValueError, match=rf"{path} .*{message}"):
            DiffusersTokenizer.from_folder(folder, 16, 4)


def test_folders_that_cannot_be_imported_are_refused_before_anything_is_written(
    raw, public, tmp_path, monkeypatch
):
    folder = shutil.copytree(public[0], tmp_path / "vae")
    chosen = {"image_tokenizer": str(folder), "codes": 512}
    with pytest.raises(ValueError, match=r"patch \(1\) must be a multiple of pixels of a latent"):
        spec_of(raw, tmp_path / "out", **chosen, patch=1)
    with monkeypatch.context() as patch:
        patch.setattr(image_diffusers, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match=r"needs the package diffusers.*-e '\.\[diffusers\]'"):
            spec_of(raw, tmp_path / "out", **chosen)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model\.safet"):
        spec_of(raw, tmp_path / "out", **chosen)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json cannot be read"):
        spec_of(raw, tmp_path / "out", image_tokenizer=str(tmp_path))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- another frozen encoder


class Averages(LatentTokenizer):
    """Means of 2 × 2 pixels as latents: what docs/data.md says an own encoder has."""

    kind = "averages"

    def __init__(self, settings):
        super().__init__(settings, 2, torch.tensor([0.5, 0, 0]), torch.tensor([2.0, 1, 1]), 8)

    @classmethod
    def from_file(cls, file):
        file.tensors({})
        return cls(file.settings.values)

    def tensors(self):
        return {}

    def latents(self, x_BCHH):
        return torch.nn.functional.avg_pool2d(x_BCHH, 2)

    def pixels(self, z_BChh):
        return z_BChh.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_a_class_of_ones_own_goes_from_raw_shards_to_vectors(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(image, "_KINDS", (*image._KINDS, Averages))
    own = Averages({"image_size": 8, "patch": 4})
    own.save(tmp_path / "own.safetensors")
    chosen = {"image_tokenizer": str(tmp_path / "own.safetensors")}
    prepare(spec_of(raw, tmp_path / "out", **chosen), quiet())
    source = TokenSource(tmp_path / "out" / "train" / "pairs")
    assert source.vectors[:3] == (12, "float16", 3)
    images = own.decode(source.document_vectors(0)[None])
    expected = images[0, ::2, ::2].astype(np.float32) / 127.5 - 1
    found = source.document_vectors(0)[0].reshape(2, 2, 3) * own.std_C.numpy() + own.mean_C.numpy()
    np.testing.assert_allclose(found, expected[:2, :2], atol=0.01)


# ---------------------------------------------------------------- prepared sources


def options(kind, public=None):
    chosen = {"image_tokenizer": str(public[0]) if kind == "diffusers" else kind, "codes": 512}
    own = {"vae_channels": 2, "vae_steps": 4} if kind == "vae" else {}
    return chosen | own | {"patch": 4 if kind == "vae" else 2}


@pytest.fixture(scope="module")
def with_vae(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors")
    prepare(spec_of(raw, out, **options("vae")), quiet())
    return out


@pytest.mark.parametrize("kind", ["pixels", "diffusers"])
def test_documents_hold_the_vectors_of_their_images(raw, tmp_path, kind, request):
    public = request.getfixturevalue("public") if kind == "diffusers" else None
    prepare(spec_of(raw, tmp_path, **options(kind, public)), quiet())
    tokenizers = Tokenizers.load(tmp_path / "tokenizers")
    source = TokenSource(tmp_path / "train" / "pairs")
    source.verify()
    medium, tokenizer = tokenizers.vocabulary.media[0], tokenizers.image
    assert medium.continuous and medium.block == 16 and tokenizer.kind == kind
    for number in range(len(source)):
        ids, _ = source.document(number)
        vectors = source.document_vectors(number)
        begin = ids.tolist().index(medium.begin)
        assert ids[begin + 1 : begin + 18].tolist() == [medium.start] * 16 + [medium.end]
        assert vectors.shape == (16, tokenizer.vectors.width) and vectors.dtype == np.float16
        if kind == "pixels":
            pixels = Image.open(io.BytesIO(tokenizer.to_file(vectors)))
            again = tokenizer.encode(np.asarray(pixels)[None])[0]
            assert np.array_equal(again, vectors), "8-bit pixels"
    assert f"image  {kind}" in describe(tmp_path)


def test_the_manifest_has_the_statistics_of_each_channel(with_vae):
    for name in ("train/pairs", "train/mixed", "validation/pairs"):
        source = TokenSource(with_vae / name)
        vectors = np.concatenate([source.document_vectors(n) for n in range(len(source))])
        values = vectors.astype(np.float64).reshape(-1, 2)
        assert source.vectors.channels == 2 and source.vectors.width == 8
        np.testing.assert_allclose(source.vectors.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(source.vectors.std, values.std(0), rtol=1e-9)
        assert f"{name} vectors: mean " in describe(with_vae)


def test_vectors_and_statistics_are_the_same_for_more_workers_and_after_an_interruption(
    raw, with_vae, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(with_vae / "tokenizers", out / "tokenizers")
    prepare(spec_of(raw, out, **options("vae"), workers=2), quiet())
    assert contents(out) == contents(with_vae)
    (out / "train" / "pairs" / "manifest.json").unlink()
    (out / "train" / "pairs" / "shard-000001.json").unlink()
    record = out / "train" / "mixed" / "shard-000000.json"
    record.write_text(record.read_text().replace('"channel_sums": [', '"channel_sums": [1', 1))
    assert ShardRecord.read(record.parent, 0) is None
    prepare(spec_of(raw, out, **options("vae")), quiet())
    assert contents(out) == contents(with_vae)


def test_a_folder_prepared_with_another_tokenizer_is_refused(raw, with_vae):
    before = contents(with_vae)
    for change in ({"vae_kl": 0.1}, {"vae_channels": 3}, {"vae_factor": 4}):
        with pytest.raises(ValueError, match=r"was prepared with image tokenizer .* asked for"):
            prepare(spec_of(raw, with_vae, **options("vae") | change), quiet())
    with pytest.raises(ValueError, match="was prepared with image tokenizer"):
        prepare(spec_of(raw, with_vae, **options("pixels")), quiet())
    assert contents(with_vae) == before


def test_data_of_another_vae_are_refused_by_a_checkpoint_and_beside_the_first(
    raw, with_vae, tmp_path
):
    """The same shards, latents of the same size; only the weights differ."""
    shutil.copytree(with_vae / "tokenizers", tmp_path / "tokenizers")
    (tmp_path / "tokenizers" / "image.safetensors").unlink()
    prepare(spec_of(raw, tmp_path, **options("vae"), seed=1), quiet())
    ours, theirs = with_vae / "train" / "pairs", tmp_path / "train" / "pairs"
    loaders = [
        LaneLoader(
            LaneLoader.Config(sources={str(folder): 1.0}, global_batch_size=2),
            dp_world_size=1, dp_rank=0, seq_len=64, local_batch_size=2,
        )
        for folder in (ours, ours, theirs)
    ]  # fmt: skip
    first, same, other = loaders
    state = first.state_dict()
    same.load_state_dict(state)
    hashes = [read_manifest(folder)["tokenizers"]["image"] for folder in (ours, theirs)]
    with pytest.raises(ValueError, match=rf"tokenizers of the data .*{hashes[1]}.*{hashes[0][:9]}"):
        other.load_state_dict(state)
    mixed = TokenSource(with_vae / "train" / "mixed")
    with pytest.raises(ValueError, match=rf"image tokenizer of .*{hashes[0]}.*{hashes[1]}"):
        Mixture((mixed, TokenSource(theirs)), (0.5, 0.5))


def test_a_kind_that_learns_nothing_needs_no_large_sample(raw, tmp_path):
    write_tar(tmp_path / "raw" / "0.tar", pairs(np.random.default_rng(0), 4))
    books = {"books": raw / "books", "few": tmp_path / "raw"}
    spec = spec_of(raw, tmp_path / "out", train=books, validation={}, **options("pixels"))
    prepare(spec, quiet())
    assert len(TokenSource(tmp_path / "out" / "train" / "few")) == 4
