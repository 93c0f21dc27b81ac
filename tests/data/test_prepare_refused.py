"""prepare: bad samples are counted or stop it, and what cannot be is refused with the reason."""

import gzip
import io
import json
import os
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from raw_shards import OTHER_TEXTS, contents, pairs, quiet, spec_of, write_tar

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.prepare.spec import find_shards
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.text import TextTokenizer


@pytest.fixture
def bad(tmp_path):
    """Two corrupt images in shard 0; shard 1 is cut inside its last sample."""
    rng = np.random.default_rng(5)
    write_tar(tmp_path / "bad" / "0.tar", pairs(rng, 20, corrupt=(3, 11)))
    whole = write_tar(tmp_path / "bad" / "1.tar", pairs(rng, 20))
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        last = tar.getmember("0019.png")
    whole.write_bytes(content[: last.offset_data + 30])
    return tmp_path / "bad"


def test_bad_samples_are_dropped_and_counted_by_cause_and_shard(raw, bad, tmp_path):
    changes = {"train": {"bad": bad}, "validation": {}, "on_bad": "skip-shards"}
    spec = spec_of(raw, tmp_path / "out", max_bad_rate=0.1, **changes)
    manifest = prepare(spec, quiet())["train/bad"]
    lost = manifest["drops"]["truncated"]
    assert 1 <= lost <= 6  # an estimate from sizes, in which padding is as large as five samples
    assert manifest["drops"] == {"corrupt-image": 2, "truncated": lost}
    by_shard = {"0.tar": {"corrupt-image": 2}, "1.tar": {"truncated": lost}}
    assert manifest["drops_by_shard"] == by_shard
    # the sample before a cut may count as incomplete, the one that is cut never as complete
    assert manifest["documents"] in (18 + 18, 18 + 19)
    page = describe(tmp_path / "out")
    assert f"train/bad dropped: corrupt-image 2, truncated {lost}" in page
    assert "  0.tar: corrupt-image 2" in page
    assert f"  1 of 2 shards end early: about {lost} samples are lost" in page


def test_too_many_bad_samples_end_it_and_name_the_worst_shard(raw, bad, tmp_path):
    changes = {"train": {"bad": bad}, "validation": {}, "on_bad": "skip-shards"}
    spec = spec_of(raw, tmp_path / "out", max_bad_rate=0.05, **changes)
    message = (
        r"train/bad: 2 of (38|39) samples are bad.*max_bad_rate \(0.05\).*0\.tar: corrupt-image 2"
    )
    with pytest.raises(ValueError, match=message):
        prepare(spec, quiet())
    assert not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_ends_at_the_first_bad_sample(raw, bad, tmp_path, workers):
    changes = {"train": {"bad": bad}, "validation": {}, "on_bad": "stop", "workers": workers}
    with pytest.raises(ValueError, match=r"shard 0\.tar: .*corrupt-image.*on_bad is 'stop'"):
        prepare(spec_of(raw, tmp_path / "out", **changes), quiet())
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_unusable_text_is_counted(raw, tmp_path):
    rows = [{"text": "fine"}, {"text": "a \ud800 b"}]
    write_tar(
        tmp_path / "t.tar", [(f"{n}.json", json.dumps(row).encode()) for n, row in enumerate(rows)]
    )
    spec = spec_of(
        raw, tmp_path / "out", train={"books": raw / "books", "t": tmp_path / "t.tar"},
        validation={}, image_tokenizer="none", max_bad_rate=1.0,
    )  # fmt: skip
    manifest = prepare(spec, quiet())["train/t"]
    assert (manifest["documents"], manifest["drops"]) == (1, {"not-utf8": 1})


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("changes", "message"), [
    ({"text_vocab": 10}, r"text vocabulary \(10\) must lie in \[320"),
    ({"codes": 1}, r"codes \(1\) must lie in \[2"),
    ({"patch": 3}, r"image_size \(8\) must be a multiple of patch \(3\)"),
    ({"image_tokenizer": "vqgan"}, r"image_tokenizer \(vqgan\) must be one of kmeans, vqvae, none"),
    ({"image_tokenizer": "vqvae", "image_size": 9, "patch": 3}, r"patch \(3\) must be a power of"),
    ({"text_tokenizer": Path("gone.model")}, r"text_tokenizer \(gone.model\) must be an existing"),
    ({"on_bad": "ignore"}, r"on_bad \(ignore\) must be one of skip, stop"),
    ({"layout": "parquet"}, r"layout \(parquet\) must be one of auto, pairs"),
    ({"max_bad_rate": 1.5}, r"max_bad_rate \(1.5\) is a share; it must lie in \[0, 1\]"),
    ({"workers": 0}, r"workers \(0\) must be at least 1"),
    ({"train": {}}, r"train names no source"),
])  # fmt: skip
def test_a_spec_that_cannot_be_is_refused_when_it_is_built(raw, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        spec_of(raw, tmp_path, **changes)


@pytest.mark.parametrize(("train", "error", "message"), [
    ({"a": "nowhere/*.tar"}, FileNotFoundError, r"train/a: no shard .* at nowhere/\*\.tar"),
    ({"a": "nowhere"}, FileNotFoundError, r"train/a: no shard .* at nowhere"),
    ({"a": "pipe:cat x.tar"}, ValueError, "would run a shell command"),
    ({"a": "https://host/x.tar"}, ValueError, "is a URL"),
    ({"a/b": "x"}, ValueError, r"source name \('a/b'\)"),
    ({"..": "x"}, ValueError, r"source name \('\.\.'\)"),
])  # fmt: skip
def test_shards_that_cannot_be_read_are_refused_before_anything_is_written(
    raw, tmp_path, train, error, message
):
    with pytest.raises(error, match=message):
        prepare(spec_of(raw, tmp_path / "out", train=train), quiet())
    assert not (tmp_path / "out").exists()


def test_validation_on_training_shards_is_refused(raw, tmp_path):
    with pytest.raises(ValueError, match=r"0\.tar of validation/pairs is a training shard too"):
        prepare(spec_of(raw, tmp_path / "out", validation={"pairs": raw / "pairs"}), quiet())


def test_validation_on_a_copy_of_a_training_shard_is_refused(raw, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "copy.tar").write_bytes((raw / "pairs" / "0.tar").read_bytes())
    with pytest.raises(
        ValueError, match=r"copy\.tar of validation/pairs has the bytes of .* 0\.tar"
    ):
        prepare(spec_of(raw, tmp_path / "out", validation={"pairs": held}), quiet())
    assert not (tmp_path / "out" / "validation" / "pairs" / "manifest.json").exists()


def test_a_source_of_other_shards_is_never_replaced_unasked(raw, prepared, tmp_path):
    """Fewer of them, or others of the same names: in silence a second command would lose data."""
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


def test_splits_are_kept_apart_by_every_later_command(raw, prepared, tmp_path):
    """A copy of a shard that an earlier command put into the other split, under another name,
    compressed or not.
    """
    out, copies = tmp_path / "out", tmp_path / "copies"
    shutil.copytree(prepared, out)
    copies.mkdir()
    (copies / "plain.tar").write_bytes((raw / "books" / "1.tar").read_bytes())
    (copies / "packed.tar.gz").write_bytes(gzip.compress((raw / "mixed" / "0.tar").read_bytes()))
    (copies / "back.tar").write_bytes((raw / "held" / "0.tar").read_bytes())
    new = {"new": write_tar(tmp_path / "new.tar", pairs(np.random.default_rng(8), 5))}
    held = {"text": copies / "plain.tar"}
    for changes, said in (
        ({"train": new, "validation": held}, r"plain\.tar of validation/text has the bytes of train"
         r"ing shard 1\.tar of train/books"),
        ({"train": new, "validation": {"text": copies / "packed.tar.gz"}},
         r"packed\.tar\.gz of validation/text has the documents of training shard 0\.tar"),
        ({"train": {"back": copies / "back.tar"}, "validation": {}},
         r"back\.tar of train/back has the bytes of validation shard 0\.tar of validation/pairs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            prepare(spec_of(raw, out, **changes), quiet())
        (refused,) = ({*changes["train"], *changes["validation"]} - {"new"}) or {"back"}
        assert not list(out.glob(f"*/{refused}/manifest.json"))
        if "the bytes" in said:  # seen before anything is written
            assert not list(out.glob(f"*/{refused}"))
    # what was refused is no data set, and in nobody's way
    prepare(spec_of(raw, out), quiet())


def test_hidden_files_of_a_folder_are_no_shards(raw, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "0.tar").write_bytes((raw / "held" / "0.tar").read_bytes())
    (held / "._0.tar").write_bytes(b"\0\5\x16\7")  # as macOS leaves them beside any file
    assert [s.name for s in find_shards("validation/pairs", held)] == ["0.tar"]


def test_a_folder_that_cannot_be_written_is_refused(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out \(.*file/out\) cannot be written \(Not a directory\)"):
        prepare(spec_of(raw, tmp_path / "file" / "out"), quiet())


def test_other_tokenizers_are_refused_by_name(raw, prepared, tmp_path):
    before = contents(prepared)
    made = json.loads((prepared / "train" / "books" / "manifest.json").read_text())["tokenizers"]
    other = TextTokenizer.train(OTHER_TEXTS, 325)
    other.save(tmp_path / "other.model")
    with pytest.raises(ValueError, match=rf"text tokenizer {made['text']}.*{other.sha256}"):
        prepare(spec_of(raw, prepared, text_tokenizer=tmp_path / "other.model"), quiet())
    with pytest.raises(
        ValueError, match=rf"text tokenizer {made['text']} of 330 pieces.*one of 340"
    ):
        prepare(spec_of(raw, prepared, text_vocab=340), quiet())
    images = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
    codes = KMeansTokenizer.train(images, patch=4, codes=16)
    codes.save(tmp_path / "codes.safetensors")
    path = str(tmp_path / "codes.safetensors")
    with pytest.raises(ValueError, match=rf"image tokenizer {made['image']}.*{codes.sha256}"):
        prepare(spec_of(raw, prepared, image_tokenizer=path), quiet())
    for changes in ({"codes": 17}, {"patch": 2}, {"image_tokenizer": "none"}, {"seed": 1}):
        with pytest.raises(ValueError, match=rf"image tokenizer {made['image']}.*but asked for is"):
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


def test_ready_tokenizers_are_copied_not_trained(raw, prepared, tmp_path):
    changes = {
        "text_tokenizer": prepared / "tokenizers" / "text.model",
        "image_tokenizer": str(prepared / "tokenizers" / "image.safetensors"),
    }
    prepare(spec_of(raw, tmp_path, **changes), quiet())
    assert contents(tmp_path) == contents(prepared)


def test_two_at_once_in_one_folder_are_refused(raw, tmp_path):
    import fcntl

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(RuntimeError, match="is being written by another prepare"):
            prepare(spec_of(raw, tmp_path), quiet())
    finally:
        os.close(descriptor)


def test_runs_that_start_together_wait_for_the_one_that_makes_their_corpus(raw, tmp_path):
    import fcntl

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    said = io.StringIO()
    with ThreadPoolExecutor(1) as second:
        manifests = second.submit(prepare, spec_of(raw, tmp_path), Progress(said), wait=True)
        while "waiting for another process" not in said.getvalue():
            assert not manifests.done()
            time.sleep(0.01)
        assert not (tmp_path / "tokenizers").exists(), "nothing is written while another writes"
        os.close(descriptor)
        assert "train/books" in manifests.result(timeout=60)


def test_sources_without_an_image_say_how_to_prepare_text_only(raw, tmp_path):
    with pytest.raises(ValueError, match="image_tokenizer 'none'"):
        prepare(spec_of(raw, tmp_path, train={"books": raw / "books"}, validation={}), quiet())
