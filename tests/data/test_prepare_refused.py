"""prepare: what cannot be prepared is refused with the reason, and earlier data are protected."""

import fcntl
import gzip
import io
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from raw_shards import OTHER_TEXTS, contents, pairs, quiet, spec_of, write_tar

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.text import TextTokenizer


@pytest.mark.parametrize(("changes", "message"), [
    ({"text_vocab": 10}, r"text vocabulary \(10\) must lie in \[320"),
    ({"codes": 1}, r"codes \(1\) must lie in \[2"),
    ({"patch": 3}, r"image_size \(8\) must be a multiple of patch \(3\)"),
    ({"image_tokenizer": "vqgan"}, r"image_tokenizer \(vqgan\) must be one of kmeans, vqvae, pix"),
    ({"image_tokenizer": "vqvae", "image_size": 9, "patch": 3}, r"patch \(3\) must be a power of"),
    ({"image_tokenizer": "vae", "vae_factor": 3, "codes": 512}, r"vae_factor \(3\) must be a pow"),
    ({"image_tokenizer": "vae", "vae_factor": 8, "codes": 512}, r"patch \(4\) .* vae_factor \(8"),
    ({"image_tokenizer": "vae", "vae_kl": -1.0, "codes": 512}, r"vae_kl \(-1.0\) must lie in"),
    ({"image_tokenizer": "vae", "vae_channels": 0, "codes": 512}, r"vae_channels \(0\) must lie"),
    ({"image_tokenizer": "vae", "vae_channels": 2000, "codes": 512}, r"vae_channels \(2000\) must"),
    ({"image_size": 1 << 14}, r"image_size \(16384\) must be at most 8192"),
    ({"image_tokenizer": "vae"}, r"codes \(16\) means nothing to image_tokenizer vae"),
    ({"image_tokenizer": "pixels"}, r"codes \(16\) means nothing to image_tokenizer pixels"),
    ({"vq_steps": 9}, r"vq_steps \(9\) means nothing to image_tokenizer kmeans"),
    ({"vae_steps": 9}, r"vae_steps \(9\) means nothing to image_tokenizer kmeans"),
    ({"text_tokenizer": Path("gone.model")}, r"text_tokenizer \(gone.model\) must be an existing"),
    ({"on_bad": "ignore"}, r"on_bad \(ignore\) must be one of skip, stop"),
    ({"layout": "parquet"}, r"layout \(parquet\) must be one of auto, pairs"),
    ({"max_bad_rate": 1.5}, r"max_bad_rate \(1.5\) must lie in \[0, 1\]"),
    ({"workers": 0}, r"workers \(0\) must be at least 1"),
    ({"train": {}}, r"train names no source"),
    ({"media_tokenizers": {"depth": "kmeans"}}, "media_tokenizers names 'depth'"),
])  # fmt: skip
def test_a_spec_that_cannot_be_is_refused_when_it_is_built(raw, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        spec_of(raw, tmp_path, **changes)


@pytest.mark.parametrize(("split", "name", "path", "error", "message"), [
    ("train", "a", "nowhere/*.tar", FileNotFoundError, r"train/a: no shard at nowhere/\*\.tar"),
    ("train", "a", "nowhere", FileNotFoundError, r"train/a: no shard at nowhere"),
    ("train", "a", "pipe:cat x.tar", ValueError, "would run a shell command"),
    ("train", "a", "https://host/x.tar", ValueError, "is a URL"),
    ("train", "a/b", "x", ValueError, r"source name \('a/b'\)"),
    ("train", "..", "x", ValueError, r"source name \('\.\.'\)"),
    ("validation", "p", "RAW/pairs", ValueError, r"0\.tar of validation/p is a training shard too"),
])  # fmt: skip
def test_shards_that_cannot_be_used_are_refused_before_anything_is_written(
    raw, tmp_path, split, name, path, error, message
):
    changes = {split: {name: path.replace("RAW", str(raw))}}
    with pytest.raises(error, match=message):
        prepare(spec_of(raw, tmp_path / "out", **changes), quiet())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out \(.*file/out\) cannot be written \(Not a directory\)"):
        prepare(spec_of(raw, tmp_path / "file" / "out"), quiet())


# ---------------------------------------------------------------- earlier data


def test_a_source_of_other_shards_is_never_replaced_unasked(raw, prepared, tmp_path):
    """Fewer of them, or others of the same names: a second command would silently lose data."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    before = contents(out)
    (tmp_path / "part").mkdir()
    shutil.copy(raw / "pairs" / "0.tar", tmp_path / "part")
    others = write_tar(tmp_path / "others" / "0.tar", pairs(np.random.default_rng(9), 5)).parent
    for shards, lost in ((tmp_path / "part", 1), (others, 2)):
        spec = spec_of(raw, out, train={"pairs": shards}, validation={})
        message = rf"source train/pairs is in .*made of 2 .* {lost} \(.*\.tar.* would be lost"
        with pytest.raises(ValueError, match=message) as caught:
            prepare(spec, quiet())
        assert str(shards) in str(caught.value) and "--replace" in str(caught.value)
        assert contents(out) == before
    for path in out.rglob("manifest.json"):
        path.unlink()  # as an interrupted command leaves it: the work of hours
    with pytest.raises(ValueError, match="would be lost"):
        prepare(spec, quiet())
    prepare(spec_of(raw, out), quiet())
    assert contents(out) == before
    asked = spec_of(raw, out, train={"pairs": others}, validation={}, replace=True)
    assert prepare(asked, quiet())["train/pairs"]["documents"] == 5


def test_splits_are_kept_apart_in_one_command_and_by_every_later_one(raw, prepared, tmp_path):
    """A copy of a shard of the other split, under another name, compressed or not."""
    out, copies = tmp_path / "out", tmp_path / "copies"
    shutil.copytree(prepared, out)
    copies.mkdir()
    (copies / "copy.tar").write_bytes((raw / "pairs" / "0.tar").read_bytes())
    (copies / "plain.tar").write_bytes((raw / "books" / "1.tar").read_bytes())
    (copies / "packed.tar.gz").write_bytes(gzip.compress((raw / "mixed" / "0.tar").read_bytes()))
    (copies / "back.tar").write_bytes((raw / "held" / "0.tar").read_bytes())
    new = {"new": write_tar(tmp_path / "new.tar", pairs(np.random.default_rng(8), 5))}
    for folder, changes, said in (
        (tmp_path / "one", {"validation": {"text": copies / "copy.tar"}},
         r"copy\.tar of validation/text has the bytes of training shard 0\.tar"),
        (out, {"train": new, "validation": {"text": copies / "plain.tar"}},
         r"plain\.tar of validation/text has the bytes of training shard 1\.tar of train/books"),
        (out, {"train": new, "validation": {"text": copies / "packed.tar.gz"}},
         r"packed\.tar\.gz of validation/text has the documents of training shard 0\.tar"),
        (out, {"train": {"back": copies / "back.tar"}, "validation": {}},
         r"back\.tar of train/back has the bytes of validation shard 0\.tar of validation/pairs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            prepare(spec_of(raw, folder, **changes), quiet())
        refused = "back" if "back" in said else "text"
        assert not list(folder.glob(f"*/{refused}/manifest.json"))
        if folder == out and "the bytes" in said:  # seen before anything is written
            assert not list(folder.glob(f"*/{refused}"))
    # what was refused is no data set, and in nobody's way
    prepare(spec_of(raw, out), quiet())


def test_other_tokenizers_are_refused_by_name(raw, prepared, tmp_path):
    before = contents(prepared)
    made = json.loads((prepared / "train" / "books" / "manifest.json").read_text())["tokenizers"]
    other = TextTokenizer.train(OTHER_TEXTS, 325)
    other.save(tmp_path / "other.model")
    images = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
    codes = KMeansTokenizer.train(images, patch=4, codes=16)
    codes.save(tmp_path / "codes.safetensors")
    text, image = (
        f"{kind} tokenizer {made[kind]}.*but asked for is " for kind in ("text", "image")
    )
    for changes, said in (
        ({"text_tokenizer": tmp_path / "other.model"}, text + other.sha256),
        ({"text_vocab": 340}, text + "one of 340 pieces"),
        ({"image_tokenizer": str(tmp_path / "codes.safetensors")}, image + codes.sha256),
        ({"codes": 17}, image + "kmeans, .*'codes': 17"),
        ({"patch": 2}, image + "kmeans, .*'patch': 2"),
        ({"image_tokenizer": "none"}, image + "none"),
        ({"seed": 1}, image + "kmeans, .*'seed': 1"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare(spec_of(raw, prepared, **changes), quiet())
    assert contents(prepared) == before


def test_a_tokenizer_exchanged_behind_its_data_is_refused(raw, tmp_path):
    spec = spec_of(raw, tmp_path / "out", train={"books": raw / "books"}, image_tokenizer="none",
                   validation={})  # fmt: skip
    prepare(spec, quiet())
    model = tmp_path / "out" / "tokenizers" / "text.model"
    was = sha256_file(model)
    other = TextTokenizer.train(OTHER_TEXTS, 330)
    other.save(model)
    with pytest.raises(ValueError, match=rf"text tokenizer {was} .*{other.sha256}"):
        prepare(spec, quiet())
    model.unlink()
    with pytest.raises(ValueError, match=rf"{was}.*the tokenizers folder is gone"):
        prepare(spec, quiet())


# ---------------------------------------------------------------- two at once


@contextmanager
def locked(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def test_two_at_once_in_one_folder_are_refused(raw, tmp_path):
    with locked(tmp_path), pytest.raises(RuntimeError, match="being written by another prepare"):
        prepare(spec_of(raw, tmp_path), quiet())


def test_runs_that_start_together_wait_for_the_one_that_makes_their_corpus(raw, tmp_path):
    said = io.StringIO()
    with ThreadPoolExecutor(1) as second:
        with locked(tmp_path):
            manifests = second.submit(prepare, spec_of(raw, tmp_path), Progress(said), wait=True)
            while "waiting for another process" not in said.getvalue():
                assert not manifests.done()
                time.sleep(0.01)
            assert not (tmp_path / "tokenizers").exists(), "nothing is written meanwhile"
        assert "train/books" in manifests.result(timeout=60)
