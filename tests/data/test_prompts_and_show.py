"""Prompts from held-out pairs, and documents shown beside their originals."""

import json

import numpy as np
import pytest
from PIL import Image
from raw_shards import pairs, quiet, write_tar
from tiny_pairs import SHADES, make_pairs, pixels, png

from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.prompts import make_prompts
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.prepare.shard_files import find_shards
from earlyfuse.data.prepare.show import show
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.parallel.evaluation.sample_generation import load_pairs
from earlyfuse.tools import prepare as command


@pytest.mark.parametrize("vectors", [False, True])
def test_held_out_pairs_become_the_prompts_of_samples(tmp_path, vectors):
    out = make_pairs(tmp_path / "data", pixels_as_vectors=vectors)
    path = out / "validation" / "prompts.json"
    path.unlink()
    members = [
        pair
        for shade, caption in enumerate(SHADES)
        for pair in ((f"{shade}.png", png(shade)), (f"{shade}.txt", caption.encode()))
    ]
    members += [("bad.png", png(0)[:30]), ("bad.txt", b"cut"), ("long.png", png(1))]
    held = write_tar(tmp_path / "held.tar", [*members, ("long.txt", b"x" * 2000)])
    spec = PrepareSpec(out, {"pairs": held}, {"held": held}, tokenizers=out / "tokenizers")
    object.__setattr__(spec, "train", {})  # the same shard twice is refused
    make_prompts(spec, quiet())
    first, tokenizers = path.read_bytes(), Tokenizers.load(out / "tokenizers")
    found = {pair.caption: pair for pair in load_pairs(path, tokenizers)}
    assert found.keys() == set(SHADES), "all good pairs, and no other"
    for shade, caption in enumerate(SHADES):
        assert np.array_equal(found[caption].pixels, pixels(shade))
        assert (found[caption].image_vectors is not None) == vectors
    path.unlink()
    make_prompts(spec, quiet())
    assert path.read_bytes() == first
    path.write_text("mine")
    make_prompts(spec, quiet())
    assert path.read_text() == "mine"


@pytest.fixture(scope="module")
def shown(prepared, tmp_path_factory):
    """A source of pairs, one of them damaged, and its raw shard."""
    folder = tmp_path_factory.mktemp("shown")
    raw = write_tar(folder / "0.tar", pairs(np.random.default_rng(3), 8, corrupt=(3,)))
    options = {"tokenizers": prepared / "tokenizers", "max_bad_rate": 1.0, "workers": 1}
    prepare(PrepareSpec(folder / "out", {"pairs": raw}, **options), quiet())
    return folder / "out", raw


def test_a_document_is_shown_beside_its_original(shown, tmp_path):
    out, raw = shown
    picture = tmp_path / "p.png"
    lines = list(show(out, "pairs", key="0006", raw=find_shards("raw", raw), picture=picture))
    # the fourth is damaged
    assert lines[0].startswith("train/pairs, document 5 of 7, sample '0006', of 0.tar: ")
    assert any("[image 0: 4 codes]" in line for line in lines)
    assert list(show(out, number=5, raw=find_shards("raw", raw), picture=picture)) == lines
    with Image.open(picture) as opened:
        sheet = np.asarray(opened).astype(int)
    left, right = sheet[8:168:20, 8:168:20], sheet[8:168:20, 176:336:20]
    image = Tokenizers.load(out / "tokenizers").image
    codes = image.encode(left[None].astype(np.uint8))
    assert np.array_equal(image.decode(codes)[0], right) and (left != right).any()
    assert any(line.startswith("  corrupt-image  0.tar: sample '0003'") for line in lines)
    alone = list(show(out, number=5, picture=picture))
    assert any("reconstructions alone" in line for line in alone) and "sample" not in alone[0]
    with Image.open(picture) as narrow:
        assert narrow.width < sheet.shape[1]


def test_what_cannot_be_shown_is_refused_by_name(shown, tmp_path, raw):
    out, shard = shown
    shards, others = (find_shards("raw", path) for path in (shard, raw / "pairs" / "0.tar"))
    for options, said in (
        ({"source": "films"}, r"--source \(films\) must be .*train/pairs"),
        ({"number": 7}, r"--sample \(7\) must lie in \[0, 7\)"),
        ({"key": "0006"}, r"--key \(0006\) needs --raw"),
        (
            {"key": "0003", "raw": shards},
            r"--key \(0003\) is a bad sample, corrupt-image",
        ),
        ({"key": "x", "raw": shards}, r"--key \(x\) must be a sample"),
        ({"raw": others}, "have another one of that name"),
    ):
        with pytest.raises(ValueError, match=said):
            list(show(out, picture=tmp_path / "p.png", **options))
    assert not (tmp_path / "p.png").exists()


def test_inspect_says_what_models_see_of_a_folder(prepared, capsys):
    said = describe(prepared)
    vocabulary = json.loads((prepared / "tokenizers" / "vocabulary.json").read_text())
    medium = vocabulary["media"][0]
    assert f"ids    {vocabulary['size']}; documents: begin {vocabulary['bos']}, end" in said
    assert f"image  codes {medium['start']}-{medium['start'] + 15}, begin" in said
    assert "blocks 4 tokens, 6 with begin and end" in said
    assert "training.seq_len must be at least 6" in said
    assert command.main(["show", str(prepared), "--source", "books"]) == 0
    assert "train/books, document 0 of 80" in capsys.readouterr().out
