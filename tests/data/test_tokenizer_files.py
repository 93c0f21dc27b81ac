"""Files of image and speech tokenizers: damage is refused by file and field, never a traceback."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from earlyfuse.data.tokenizers.image import load_image_tokenizer
from earlyfuse.data.tokenizers.image_chameleon import ChameleonTokenizer, shape_of
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer, build_vqvae
from earlyfuse.data.tokenizers.speech_kmeans import MELS, SpeechTokenizer
from earlyfuse.data.tokenizers.vqgan import VQGAN


def kmeans():
    rows = np.arange(8 * 48, dtype=np.uint8).reshape(8, 48)
    return KMeansTokenizer(rows, {"image_size": 16, "patch": 4, "codes": 8, "seed": 0})


def vqvae():
    settings = {
        "image_size": 16, "patch": 4, "codes": 8, "steps": 1, "seed": 0, "width": 32, "latent": 4,
    }  # fmt: skip
    return VQVAETokenizer(build_vqvae(settings), settings)


def chameleon():
    settings = {
        "codes": 8, "embed": 4, "latent": 4, "width": 32, "multipliers": [1, 1], "blocks": 1,
        "attention": [], "middle_attention": True, "decoder": False, "image_size": 16,
        "scale": 1 / 127.5, "mean": 1.0, "std": 1.0, "long_side": "round",
    }  # fmt: skip
    torch.manual_seed(0)
    return ChameleonTokenizer(VQGAN(shape_of(settings)), torch.arange(8), settings)


def speech():
    rows = np.arange(8 * 4 * MELS, dtype=np.uint32).astype(np.uint8).reshape(8, 4 * MELS)
    return SpeechTokenizer(rows, {"frame_ms": 40, "codes": 8, "seed": 0})


KINDS = {maker.__name__: maker().to_bytes() for maker in (kmeans, vqvae, chameleon, speech)}


def loaded(kind, path):
    return SpeechTokenizer.load(path) if kind == "speech" else load_image_tokenizer(path)


def rewritten(content, about=None, tensors=None):
    """The file with other metadata, given what they were, or other tensors."""
    length = int.from_bytes(content[:8], "little")
    meta = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["earlyfuse"])
    found = load(content)
    changed = meta if about is None else about(meta)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    return save(found if tensors is None else tensors(found), metadata={"earlyfuse": text})


def refusal(kind, content, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        loaded(kind, path)
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 2000
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_as_they_were_written(kind, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(KINDS[kind])
    assert loaded(kind, path).to_bytes() == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_each_setting_that_is_wrong_is_named(kind, tmp_path):
    settings = json.loads(json.dumps(globals()[kind]().settings))
    for name, value in settings.items():
        number = type(value) in (int, float)
        wrong = [None, {}, "x", [[]], *([True, float("nan"), 1e300, -(10**30)] if number else [5])]
        if type(value) is int and name not in ("seed", "steps"):
            wrong += [-1, 0, 10**9, 1 << 70, 4.0]
        for other in wrong:
            content = rewritten(
                KINDS[kind],
                lambda about, name=name, other=other: {
                    **about, "settings": {**about["settings"], name: other},
                },
            )  # fmt: skip
            if name in ("seed", "steps") and type(other) is int:
                continue
            assert f"settings: {name}" in refusal(kind, content, tmp_path), (name, other)
        del_one = {key: v for key, v in settings.items() if key != name}
        content = rewritten(KINDS[kind], lambda about, s=del_one: {**about, "settings": s})
        assert f"settings has no field '{name}'" in refusal(kind, content, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_do_not_fit_one_another_or_the_tensors_are_refused(kind, tmp_path):
    for changes in ({"codes": 9}, {"codes": 1 << 20}, {"patch": 3}, {"width": 64}, {"blocks": 60},
                    {"frame_ms": 35}, {"frame_ms": 50}, {"multipliers": [16] * 16},
                    {"image_size": 15}):  # fmt: skip
        if changes.keys() <= globals()[kind]().settings.keys():
            about = lambda a, c=changes: {**a, "settings": {**a["settings"], **c}}  # noqa: E731
            refusal(kind, rewritten(KINDS[kind], about), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "about", ["", "5", "[]", "{}", "[" * 5000, '{"format": 5}', '{"format": {}, "kind": "kmeans"}']
)
def test_metadata_of_another_shape_are_refused(kind, about, tmp_path):
    message = refusal(kind, rewritten(KINDS[kind], lambda _: about), tmp_path)
    assert "must be a safetensors file of format earlyfuse-" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["kind", "settings"])
def test_a_kind_or_settings_of_another_type_are_refused(kind, field, tmp_path):
    for value in (None, 5, [], "vqgan", {"x": 1}):
        content = rewritten(KINDS[kind], lambda about, v=value: {**about, field: v})
        assert field in refusal(kind, content, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_as_settings_say_are_named(kind, tmp_path):
    def with_first(change):
        def changed(tensors):
            name = sorted(tensors)[0]
            return {**tensors, name: change(tensors[name])}

        return rewritten(KINDS[kind], tensors=changed)

    first = sorted(load(KINDS[kind]))[0]
    for change in (
        lambda t: t[:-1].clone(),
        lambda t: t[None],
        lambda t: t.flatten()[:0],
        lambda t: t.to(torch.float64 if t.is_floating_point() else torch.int32),
        lambda t: t.to(torch.bfloat16),
    ):
        assert f"tensor {first} (" in refusal(kind, with_first(change), tmp_path)
    if load(KINDS[kind])[first].is_floating_point():
        for bad in (float("nan"), float("inf")):
            content = with_first(lambda t, b=bad: torch.full_like(t, b))
            assert f"tensor {first} holds values that are not" in refusal(kind, content, tmp_path)
    more = rewritten(KINDS[kind], tensors=lambda t: {**t, "\x1bmore": torch.ones(2)})
    assert "unknown tensor" in refusal(kind, more, tmp_path)
    fewer = rewritten(KINDS[kind], tensors=lambda t: {k: v for k, v in t.items() if k != first})
    assert "lacks the tensor" in refusal(kind, fewer, tmp_path)


@pytest.mark.parametrize("ranks", [[0] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [-1, 1, 2, 3, 4, 5, 6, 7]])
def test_an_order_of_codes_that_is_none_is_refused(ranks, tmp_path):
    content = rewritten(KINDS["chameleon"], tensors=lambda t: {**t, "rank": torch.tensor(ranks)})
    assert "order of the 8 codes" in refusal("chameleon", content, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_and_cuts_are_read_or_refused_by_name(kind, tmp_path):
    rng, whole = random.Random(0), KINDS[kind]
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


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_cannot_be_read_are_named(kind, tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=f"{path}.* cannot be read"):
            loaded(kind, path)
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + KINDS[kind][8:])
    with pytest.raises(ValueError, match="must be a safetensors file of format"):
        loaded(kind, path)
