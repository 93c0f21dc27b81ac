"""``tools.arank``: what it measures, which layers it lists, what it refuses, what it leaves."""

import json
import os

import numpy as np
import pytest
from exported_models import VOCABULARY, change_json, change_tensors, described, export
from tiny_pairs import make_pairs
from tiny_runs import MAMBAS, MODELS
from toy import make_data

from earlyfuse.configs import decoders
from earlyfuse.configs.transfusion import with_vectors
from earlyfuse.models.decoder import Decoder
from earlyfuse.tools import arank

SMALL = ("--samples", "12", "--shortest", "8", "--seq-len", "32", "--seed", "3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared data, and a random model of each kind, with sharp attention in layer 1."""

    def sharpen(tensors):
        for key in tensors:
            if "layers.1" in key and "q_norm.weight" in key:
                tensors[key] = tensors[key] * 20

    root = tmp_path_factory.mktemp("arank")
    make_data(root / "data")
    for name, make in {**MODELS, **MAMBAS}.items():
        if name in ("dense", "moma", "mamba", "hybrid"):
            config = make()
            config.init_std = 0.2
            export(config, root / name)
            (weights,) = (root / name).glob("*.safetensors")
            change_tensors(weights, sharpen)
    return root


def measured(folders, name, out, *options) -> dict:
    data = ("--data", str(folders / "data"))
    given = (str(folders / name), "--out", str(out), *data, *SMALL, *options)
    assert arank.main(given) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((out / arank.RESULTS).read_text(), parse_constant=refuse)


def test_ranks_do_not_depend_on_the_batch_and_layers_of_the_lowest_are_listed(
    folders, tmp_path, capsys
):
    found = measured(folders, "dense", tmp_path / "one", "--layers", "1", "--capacity", "0.25")
    again = measured(folders, "dense", tmp_path / "two", "--batch-size", "1", "--length", "12")
    assert len(found["tokens"]) == 12 and 8 <= min(found["tokens"]) < max(found["tokens"]) > 12
    assert again["tokens"] == [min(count, 12) for count in found["tokens"]]
    short = [place for place, count in enumerate(found["tokens"]) if count <= 12]
    for left, right in zip(found["layers"], again["layers"], strict=True):
        for place in short:
            assert left["by_sample"][place] == right["by_sample"][place]
        ranks, limits = np.array(left["by_sample"]), np.array(found["tokens"]) - 1
        assert left["rank"] == pytest.approx(ranks.mean()) and (ranks <= limits).all()
        assert left["sd"] == pytest.approx(np.sqrt(((ranks - ranks.mean()) ** 2).sum() / 11))
        assert left["se"] == pytest.approx(left["sd"] / np.sqrt(12))
        assert left["relative"] == pytest.approx((ranks / limits).mean())
    means = [layer["rank"] for layer in found["layers"]]
    assert means[1] < means[0] and found["routed"] == [1] and found["capacities"] == [None, 0.25]
    assert again["routed"] == [] and again["capacities"] is None
    printed = capsys.readouterr().out
    assert "routed layers: [1]\ncapacities: (None, 0.25)\n" in printed
    assert (tmp_path / "one" / arank.PICTURE).stat().st_size > 5000


def test_a_threshold_lists_the_layers_up_to_it(folders, tmp_path):
    """MoMa without causal routers, hence whole routing groups of rows."""
    first = measured(folders, "moma", tmp_path / "all", "--batch-size", "1")
    ranks = [layer["rank"] for layer in first["layers"]]
    assert first["settings"]["rule"] == "batch" and ranks[1] < ranks[0]
    for threshold, routed in ((ranks[0], [0, 1]), (ranks[1], [1]), (ranks[1] / 2, [])):
        options = ("--batch-size", "1", "--threshold", str(threshold))
        second = measured(folders, "moma", tmp_path / str(threshold), *options)
        assert second["routed"] == routed and second["layers"] == first["layers"]


def test_layers_without_attention_are_listed_as_such_and_never_chosen(folders, tmp_path, capsys):
    found = measured(folders, "hybrid", tmp_path / "out", "--layers", "1")
    assert [layer is None for layer in found["layers"]] == [False, True, True]
    assert found["routed"] == [0] and "| 1 | no attention |" in capsys.readouterr().out


def test_a_model_with_vectors_is_measured_on_its_images(tmp_path, monkeypatch, capsys):
    data = make_pairs(tmp_path / "data", pixels_as_vectors=True)
    shape = decoders.Shape(dim=32, layers=2, heads=2, hidden_dim=64, vocab_size=331)
    model = with_vectors(decoders.dense(shape), 48, block=4)
    model.init_std = 0.3
    vocabulary = json.loads((data / "tokenizers" / "vocabulary.json").read_text())
    options = ("--data", str(data), "--samples", "10", "--shortest", "4", "--seq-len", "32")
    for name, config in (("model", model), ("narrow", with_vectors(model, 12, block=16))):
        export(config, tmp_path / name)
        change_json(tmp_path / name / "config.json", vocabulary=vocabulary)
    seen, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda m, b, **o: seen.append(b) or forward(m, b, **o))
    assert arank.main((str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options)) == 0
    assert all(b.has_vector_BS.any() and b.vectors_BSP.any() and b.time_BS is None for b in seen)
    ranks = json.loads((tmp_path / "out" / arank.RESULTS).read_text())["layers"]
    assert all(layer["rank"] > 0 for layer in ranks)
    assert arank.main((str(tmp_path / "narrow"), "--out", str(tmp_path / "no"), *options)) == 2
    assert "must have vectors of the shape of the model's" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("mamba", (), "has no attention"),
        ("hybrid", ("--layers", "2"), "--layers (2) must be at most 1"),
        ("dense", ("--samples", "1"), "--samples (1) must lie in"),
        ("dense", ("--samples", "1000"), "--samples (1000) exceeds the"),
        ("dense", ("--shortest", "33", "--length", "40"), "exceeds the 0 documents"),
        ("dense", ("--shortest", "9", "--length", "8"), "--shortest (9) must be at most --length"),
        ("dense", ("--threshold", "nan"), "--threshold (nan)"),
        ("dense", ("--capacity", "0"), "--capacity (0.0)"),
        ("dense", ("--sources", "prose"), "has no validation/prose"),
        ("dense", ("--data", "nowhere"), "nowhere has no validation/"),
        ("dense", ("--seq-len", "5"), "seq_len (5) must be at least 6"),
        ("dense", ("--device", "tpu"), "--device (tpu) cannot be used"),
        ("nothing", (), "nothing is no folder"),
    ],
)
def test_what_is_refused_writes_nothing(folders, tmp_path, capsys, model, options, words):
    data = ("--data", str(folders / "data"))
    given = (str(folders / model), "--out", str(tmp_path / "out"), *data, *SMALL, *options)
    assert arank.main(given) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_data_of_other_tokenizers_are_refused(folders, tmp_path, capsys):
    config = MODELS["dense"]()
    for name in ("vocabulary", "tokenizers"):
        export(config, tmp_path / name)
    changed = described(tmp_path / "vocabulary")["vocabulary"] | {"bos": VOCABULARY.pad}
    change_json(tmp_path / "vocabulary" / "config.json", vocabulary=changed)
    other = {"step": 7, "tokenizers": {"text": "cc", "image": "bb"}}
    change_json(tmp_path / "tokenizers" / "config.json", source=other)
    for name in ("vocabulary", "tokenizers"):
        given = (str(tmp_path / name), "--out", str(tmp_path / "out"), *SMALL)
        assert arank.main((*given, "--data", str(folders / "data"))) == 2
        assert "made by other tokenizers than the model's" in capsys.readouterr().err


def test_files_are_written_whole_or_not_at_all(folders, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    out, data = tmp_path / "out", ("--data", str(folders / "data"))
    given = (str(folders / "dense"), "--out", str(out), *data, *SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert arank.main(given) == 2
    assert "No space left" in capsys.readouterr().err and list(out.iterdir()) == []
    assert arank.main(given) == 0
    before = (out / arank.RESULTS).read_bytes()
    assert arank.main(given) == 2 and (out / arank.RESULTS).read_bytes() == before
