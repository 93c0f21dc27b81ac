"""Files of image and speech tokenizers: damage is refused by file and field, never a traceback."""

import json
import random
import struct
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from earlyfuse.data.tokenizers import image, speech
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer, shape_of
from earlyfuse.data.tokenizers.image_diffusers import DiffusersTokenizer
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_vae import VAETokenizer, build_vae
from earlyfuse.data.tokenizers.image_vectors import PixelTokenizer
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer, build_vqvae
from earlyfuse.data.tokenizers.log_mel import MELS
from earlyfuse.data.tokenizers.vqgan import VQGAN


def rows(width):
    return np.arange(8 * width, dtype=np.uint32).astype(np.uint8).reshape(8, width)


SETTINGS = {
    "kmeans": {"image_size": 16, "patch": 4, "codes": 8, "seed": 0},
    "vqvae": {
        "image_size": 16, "patch": 4, "codes": 8, "steps": 1, "seed": 0, "width": 32, "latent": 4,
    },
    "pixels": {"image_size": 16, "patch": 4},
    "vae": {
        "image_size": 16, "patch": 4, "factor": 2, "channels": 3, "kl": 0.001, "steps": 1,
        "seed": 0, "width": 32,
    },
    "diffusers": {
        "image_size": 16, "patch": 4, "config": {
            "in_channels": 3, "out_channels": 3, "act_fn": "silu", "block_out_channels": [8, 8],
            "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2, "use_quant_conv": True,
            "use_post_quant_conv": True, "mid_block_add_attention": False, "scaling_factor": 0.5,
            "shift_factor": None, "latents_mean": None, "latents_std": None,
        },
    },
    "chameleon": {
        "codes": 8, "embed": 4, "latent": 4, "width": 32, "multipliers": [1, 1], "blocks": 1,
        "attention": [], "middle_attention": True, "decoder": False, "image_size": 16,
        "scale": 1 / 127.5, "mean": 1.0, "std": 1.0, "long_side": "round",
    },
    "speech": {"frame_ms": 40, "codes": 8, "seed": 0},
}  # fmt: skip
torch.manual_seed(0)
FILES = {
    "kmeans": KMeansTokenizer(rows(48), SETTINGS["kmeans"]),
    "vqvae": VQVAETokenizer(build_vqvae(SETTINGS["vqvae"]), SETTINGS["vqvae"]),
    "chameleon": ChameleonTokenizer(
        VQGAN(shape_of(SETTINGS["chameleon"])), torch.arange(8), SETTINGS["chameleon"]
    ),
    "speech": speech.SpeechTokenizer(rows(4 * MELS), SETTINGS["speech"]),
}
FILES |= {
    "pixels": PixelTokenizer(SETTINGS["pixels"]),
    "vae": VAETokenizer(build_vae(SETTINGS["vae"]), torch.zeros(3), torch.ones(3), SETTINGS["vae"]),
}
if find_spec("diffusers"):
    from diffusers import AutoencoderKL

    config = {n: v for n, v in SETTINGS["diffusers"]["config"].items() if v is not None}
    FILES["diffusers"] = DiffusersTokenizer(AutoencoderKL(**config), SETTINGS["diffusers"])
FILES = {kind: tokenizer.to_bytes() for kind, tokenizer in FILES.items()}
absent = pytest.mark.skipif("diffusers" not in FILES, reason="diffusers is not installed")
KINDS = [*dict.fromkeys([*FILES, "diffusers"])]
KINDS[-1] = pytest.param(KINDS[-1], marks=absent)
each_kind = pytest.mark.parametrize("kind", KINDS)


def rewritten(kind, about=None, tensors=None, **settings):
    """The file with other metadata, settings or tensors; a setting of None is left out."""
    content = FILES[kind]
    length = int.from_bytes(content[:8], "little")
    meta = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["earlyfuse"])
    changed = about if isinstance(about, str) else json.dumps(
        meta | (about or {}) | ({"settings": settings} if settings else {})
    )  # fmt: skip
    found = load(content)
    return save(tensors(found) if tensors else found, metadata={"earlyfuse": changed})


def loaded(kind, path):
    return (speech if kind == "speech" else image).load(path)


@pytest.fixture
def refusal(tmp_path):
    def refused(kind, content):
        path = tmp_path / "tokenizer.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            loaded(kind, path)
        message = str(caught.value)
        assert str(path) in message and message.isprintable() and len(message) < 2000
        return message

    return refused


@each_kind
def test_files_are_read_as_they_were_written(kind, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(FILES[kind])
    assert loaded(kind, path).to_bytes() == FILES[kind]


@each_kind
def test_each_setting_that_is_wrong_is_named(kind, refusal):
    settings = SETTINGS[kind]
    for name, value in settings.items():
        wrong = [None, {}, "x", [[]]]
        if type(value) in (int, float):
            wrong += [True, float("nan"), 1e300]
            wrong += [-(10**30), -1, 0, 10**9, 1 << 70, 4.0] if type(value) is int else [-(10**30)]
        else:
            wrong += [5]
        if name in ("seed", "steps"):  # any whole number
            wrong = [other for other in wrong if type(other) is not int]
        for other in wrong:
            content = rewritten(kind, **settings | {name: other})
            assert f"settings: {name}" in refusal(kind, content), (name, other)
        others = {key: other for key, other in settings.items() if key != name}
        assert f"settings has no field '{name}'" in refusal(kind, rewritten(kind, **others))


@each_kind
def test_settings_that_do_not_fit_one_another_or_the_tensors_are_refused(kind, refusal):
    refused = 0
    for name, value in (
        ("codes", 9), ("codes", 1 << 20), ("patch", 3), ("width", 64), ("blocks", 60),
        ("frame_ms", 35), ("frame_ms", 50), ("multipliers", [16] * 16), ("image_size", 15),
        ("factor", 4), ("channels", 4), ("image_size", 1 << 14), ("patch", 32),
    ):  # fmt: skip
        if name in SETTINGS[kind]:
            refused += bool(refusal(kind, rewritten(kind, **SETTINGS[kind] | {name: value})))
    assert refused >= 4


@each_kind
def test_metadata_of_another_shape_are_refused(kind, refusal):
    for about in ("", "5", "[]", "{}", "[" * 5000, '{"format": 5}', '{"format": {}, "kind": "x"}'):
        message = refusal(kind, rewritten(kind, about))
        assert "must be a safetensors file of format earlyfuse-" in message
    for field in ("kind", "settings"):
        for value in (None, 5, [], "vqgan", {"x": 1}):
            assert field in refusal(kind, rewritten(kind, {field: value}))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pixels"])
def test_tensors_that_are_not_as_settings_say_are_named(kind, refusal):
    first = sorted(load(FILES[kind]))[0]
    floats = load(FILES[kind])[first].is_floating_point()
    changes = [
        lambda t: t[:-1].clone(),
        lambda t: t[None],
        lambda t: t.flatten()[:0],
        lambda t: t.to(torch.float64 if floats else torch.int32),
        lambda t: t.to(torch.bfloat16),
    ]
    for change in changes:
        content = rewritten(kind, tensors=lambda t, c=change: {**t, first: c(t[first])})
        assert f"tensor {first} (" in refusal(kind, content)
    for bad in (float("nan"), float("inf")) if floats else ():
        content = rewritten(
            kind, tensors=lambda t, b=bad: {**t, first: torch.full_like(t[first], b)}
        )
        assert f"tensor {first} holds values that are not" in refusal(kind, content)
    more = rewritten(kind, tensors=lambda t: {**t, "\x1bmore": torch.ones(2)})
    assert "unknown tensor" in refusal(kind, more)
    fewer = rewritten(kind, tensors=lambda t: {k: v for k, v in t.items() if k != first})
    assert "lacks the tensor" in refusal(kind, fewer)


def test_pixels_have_no_tensors_and_no_scale_may_be_zero(refusal):
    more = rewritten("pixels", tensors=lambda t: {"scale": torch.ones(3)})
    assert "unknown tensor 'scale'" in refusal("pixels", more)
    for std in (0.0, -1.0):
        content = rewritten("vae", tensors=lambda t, s=std: {**t, "std": torch.full((3,), s)})
        assert "tensor std must be positive" in refusal("vae", content)


def test_an_order_of_codes_that_is_none_is_refused(refusal):
    for ranks in ([0] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [-1, 1, 2, 3, 4, 5, 6, 7]):
        content = rewritten("chameleon", tensors=lambda t, r=ranks: {**t, "rank": torch.tensor(r)})
        assert "order of the 8 codes" in refusal("chameleon", content)


@each_kind
def test_flipped_bits_and_cuts_are_read_or_refused_by_name(kind, tmp_path):
    rng, whole, refused = random.Random(0), FILES[kind], 0
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "tokenizer.safetensors"
    for number in range(120):
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.randrange(len(damaged))] if number % 6 == 0 else damaged)
        try:
            loaded(kind, path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 60


@each_kind
def test_files_that_cannot_be_read_are_named(kind, tmp_path, refusal):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=f"{path}.* cannot be read"):
            loaded(kind, path)
    huge = struct.pack("<Q", 1 << 62) + FILES[kind][8:]
    for content in (b"", b"\x80\x04.", b"x" * 100, b"\x02\0\0\0\0\0\0\0{}", huge):
        message = refusal(kind, content)
        assert "must be a safetensors file of format" in message or "is damaged or" in message
