"""prepare: the right tokens, the same bytes after any interruption, and refusals that say why."""

import hashlib
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from earlyfuse.data import atomic
from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.tokenised import (
    MEMBER_BYTES,
    ShardRecord,
    read_manifest,
    token_dtype,
    write_shard,
)
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.image import save_image_tokenizer
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.modality import MediaCodes, Modality, Vocabulary
from earlyfuse.tools import prepare as command

OTHER_TEXTS = ["so many other words that none could guess what they mean to us today"] * 9
WORDS = "red green blue round square small large disc on a field of grey 0 1 2 3".split()


def png(rng):
    y, x = np.mgrid[:8, :8] / 8
    disc = (np.hypot(y - rng.random(), x - rng.random()) < 0.4)[..., None]
    pixels = (255 * (0.5 * disc * rng.random(3) + 0.5 * rng.random() * x[..., None])).astype(
        np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sentence(rng):
    return " ".join(rng.choice(WORDS, 12)) + ".\n"


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(rng, count, corrupt=()):
    for number in range(count):
        image = png(rng)
        yield f"{number:04d}.png", image[:40] if number in corrupt else image
        yield f"{number:04d}.txt", sentence(rng).encode()


def articles(rng, count):
    for number in range(count):
        yield f"{number:04d}.txt", "".join(sentence(rng) for _ in range(5)).encode()


def interleaved(rng, count):
    for number in range(count):
        fields = {"texts": [sentence(rng), None, sentence(rng)], "images": [None, "0.png", None]}
        yield f"{number:04d}.json", json.dumps(fields).encode()
        yield f"{number:04d}.0.png", png(rng)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Three sources to train on and one to validate on; seven shards."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for number in range(2):
        write_tar(folder / "books" / f"{number}.tar", articles(rng, 40))
        write_tar(folder / "pairs" / f"{number}.tar", pairs(rng, 30))
        write_tar(folder / "mixed" / f"{number}.tar", interleaved(rng, 20))
    write_tar(folder / "held" / "0.tar", pairs(rng, 10))
    return folder


def spec_of(raw, out, **changes):
    names = {"books": [raw / "books"], "pairs": [str(raw / "pairs/*.tar")], "mixed": raw / "mixed"}
    fields = {
        "train": names, "validation": {"pairs": raw / "held"}, "text_vocab": 330,
        "image_size": 8, "patch": 4, "codes": 16, "workers": 1, "max_bad_rate": 0.0,
    }  # fmt: skip
    return PrepareSpec(out=out, **{**fields, **changes})


def quiet():
    return Progress(io.StringIO())


def contents(folder):
    """Relative path → SHA-256 of every file below ``folder``."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def files(folder) -> int:
    """How many there are, finished or not, while others may be renaming them."""
    return sum(len(names) for _, _, names in os.walk(folder))


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    prepare(spec_of(raw, out), quiet())
    return out


def documents_of(folder):
    """Token lists through the sidecar index, by plain reading of bytes."""
    manifest = read_manifest(folder)
    for shard in manifest["shards"]:
        content = (folder / shard["name"]).read_bytes()
        index = np.load(folder / shard["name"].replace(".tar", ".index.npy"))
        for offset, length, *counts in index:
            yield np.frombuffer(content, "<u2", length, offset).astype(int), counts


# the tokens


def test_documents_come_back_out_of_the_tokens(raw, prepared):
    """Text exactly, images as their tokenizer codes them, in reading order."""
    tokenizers = Tokenizers.load(prepared / "tokenizers")
    text, image, vocabulary = tokenizers.text, tokenizers.image, tokenizers.vocabulary
    expected = []
    for number in range(2):
        with tarfile.open(raw / "mixed" / f"{number}.tar") as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        for n in range(20):
            fields = json.loads(members[f"{n:04d}.json"])
            expected.append((fields, members[f"{n:04d}.0.png"]))
    found = list(documents_of(prepared / "train" / "mixed"))
    assert len(found) == len(expected)
    for (ids, counts), (fields, picture) in zip(found, expected, strict=True):
        begin, end = list(ids).index(text.begin_image), list(ids).index(text.end_image)
        assert ids[0] == text.bos and ids[-1] == text.eos and end - begin - 1 == image.block == 4
        assert text.decode(ids[:begin].tolist()) == fields["texts"][0]
        assert text.decode(ids[end:].tolist()) == fields["texts"][2]
        codes = ids[begin + 1 : end] - vocabulary.medium(Modality.IMAGE).start
        assert np.array_equal(codes, image.encode(image_pixels(picture, 8)[None])[0])
        assert counts == [len(ids) - 4, 4]


def test_manifest_states_what_is_there(prepared):
    for folder in (prepared / "train").iterdir():
        manifest = read_manifest(folder)
        documents = list(documents_of(folder))
        assert manifest["documents"] == len(documents)
        totals = np.sum([counts for _, counts in documents], axis=0)
        assert list(totals) == [manifest["tokens"]["text"], manifest["tokens"]["image"]]
        for shard in manifest["shards"]:
            assert sha256_file(folder / shard["name"]) == shard["sha256"]
            assert (folder / shard["name"]).stat().st_size == shard["bytes"]
        assert manifest["tokenizers"] == {
            "text": sha256_file(prepared / "tokenizers" / "text.model"),
            "image": sha256_file(prepared / "tokenizers" / "image.safetensors"),
        }
        recorded = json.loads((prepared / "tokenizers" / "vocabulary.json").read_text())
        assert manifest["vocabulary"] == recorded
        assert Vocabulary.from_dict(recorded).size == 330 + 16


def test_shards_are_ordinary_tars_of_arrays(prepared):
    with tarfile.open(prepared / "train" / "books" / "shard-000000.tar") as tar:
        arrays = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar.getmembers()]
    first = read_manifest(prepared / "train" / "books")["shards"][0]
    assert sum(map(len, arrays)) == sum(first["tokens"].values())
    assert all(array.dtype == np.uint16 for array in arrays)


@pytest.mark.parametrize("codes", [65536 - 300, 65536 - 299])
def test_index_points_at_the_tokens_in_every_member_and_dtype(codes, tmp_path):
    """Documents that fill several members; one id more in the vocabulary switches to uint32."""
    media = (MediaCodes(Modality.IMAGE, 300, codes, 4, 5, 16),)
    vocabulary = Vocabulary(300 + codes, 1, 2, 3, media)
    dtype = "uint16" if codes == 65536 - 300 else "uint32"
    assert token_dtype(vocabulary.size) == dtype
    rng = np.random.default_rng(0)
    lengths = [1, 70_000, 600_000, 2, 3, 524_288, 9]
    documents = [rng.integers(0, vocabulary.size, n) for n in lengths]
    documents[1][-1] = vocabulary.size - 1
    record = ShardRecord("shard-000000.tar", "recipe", "raw", 0, "")
    write_shard(tmp_path, record, ((ids, [len(ids), 0]) for ids in documents), vocabulary)
    content = (tmp_path / "shard-000000.tar").read_bytes()
    index = np.load(tmp_path / "shard-000000.index.npy")
    for ids, (offset, length, text, image) in zip(documents, index, strict=True):
        assert np.array_equal(
            np.frombuffer(content, f"<u{np.dtype(dtype).itemsize}", length, offset), ids
        )
        assert (text, image) == (len(ids), 0)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert len(tar.getmembers()) >= 2
        assert max(m.size for m in tar.getmembers()) < 3 * MEMBER_BYTES


def test_an_id_too_large_for_the_dtype_is_an_error_not_another_id(tmp_path):
    record = ShardRecord("shard-000000.tar", "recipe", "raw", 0, "")
    documents = [(np.array([1, 70_000]), [2])]
    with pytest.raises(ValueError, match=r"token ids 1 … 70000 do not fit uint16"):
        write_shard(tmp_path, record, documents, Vocabulary(100, 1, 2, 3))
    assert os.listdir(tmp_path) == []


def test_tokenizers_see_training_data_only(raw, prepared, tmp_path):
    rng = np.random.default_rng(9)
    write_tar(tmp_path / "held" / "0.tar", [("0.txt", "Ω≈ç√∫ zzz\n".encode() * 50), *pairs(rng, 5)])
    spec = spec_of(raw, tmp_path / "out", validation={"held": tmp_path / "held"}, max_bad_rate=1.0)
    prepare(spec, quiet())
    assert contents(tmp_path / "out" / "tokenizers") == contents(prepared / "tokenizers")


def test_text_only(raw, tmp_path):
    spec = spec_of(raw, tmp_path, image_tokenizer="none", max_bad_rate=1.0)
    manifests = prepare(spec, quiet())
    assert manifests["train/books"]["tokens"].keys() == {"text"}
    assert manifests["train/books"]["drops"] == {}
    assert manifests["train/pairs"]["drops"] == {"no-image-tokenizer": 60}
    assert manifests["train/pairs"]["documents"] == 0
    assert "train/books" in describe(tmp_path)


def test_a_vqvae_can_take_the_place_of_kmeans(raw, tmp_path):
    changes = {"image_tokenizer": "vqvae", "vq_steps": 3, "codes": 8}
    names = {"pairs": raw / "pairs"}
    manifests = prepare(spec_of(raw, tmp_path, train=names, **changes), quiet())
    assert manifests["train/pairs"]["tokens"]["image"] == 60 * 4
    assert Tokenizers.load(tmp_path / "tokenizers").image.kind == "vqvae"


# interruptions


def test_workers_do_not_change_a_byte(raw, prepared, tmp_path):
    prepare(spec_of(raw, tmp_path, workers=2), quiet())
    assert contents(tmp_path) == contents(prepared)


def test_every_interruption_between_two_files_is_made_good(raw, prepared, tmp_path, monkeypatch):
    """Stopped at each rename in turn, each time going on from what the stop before left."""

    class Stopped(BaseException):
        pass

    replace = os.replace
    allowed = 0

    def replace_some(source, target):
        nonlocal allowed
        if allowed == 0:
            raise Stopped
        allowed -= 1
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace_some)
    for attempt in range(1, 200):
        # a shard is three files: stop before one, after its tar, after its index
        allowed = 3 + attempt % 3
        try:
            prepare(spec_of(raw, tmp_path), quiet())
            break
        except Stopped:
            for path in tmp_path.rglob("manifest.json"):
                assert (
                    contents(path.parent).items()
                    <= {
                        str(Path(name).relative_to(path.parent.relative_to(tmp_path))): value
                        for name, value in contents(prepared).items()
                        if Path(name).is_relative_to(path.parent.relative_to(tmp_path))
                    }.items()
                )
    assert attempt > 5
    assert contents(tmp_path) == contents(prepared)


def test_killed_at_random_moments_and_restarted(raw, prepared, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["earlyfuse.data.prepare"])
    out, rng, kills = tmp_path / "out", random.Random(0), 0

    def run(kill_after_files: int) -> bool:
        """Whether prepare ended by itself, rather than at a random moment after some files."""
        before = files(out)
        process = context.Process(target=prepare, args=(spec_of(raw, out), None))
        process.start()
        while process.exitcode is None and files(out) < before + kill_after_files:
            time.sleep(rng.uniform(0, 0.002))
        process.kill()
        process.join()
        return process.exitcode == 0

    for attempt in range(40):
        if run(kill_after_files=1 + attempt % 3):
            break
        kills += 1
    prepare(spec_of(raw, out), quiet())
    assert kills
    assert contents(out) == contents(prepared)


def test_killed_command_leaves_no_worker_and_goes_on(raw, prepared, tmp_path):
    out = tmp_path / "out"
    arguments = [
        sys.executable, "-m", "earlyfuse.tools.prepare", "build", "--out", str(out), "--train",
        f"books={raw / 'books'}", f"pairs={raw / 'pairs'}", f"mixed={raw / 'mixed'}",
        "--validation", f"pairs={raw / 'held'}", "--text-vocab", "330", "--image-size", "8",
        "--codes", "16", "--workers", "2", "--max-bad-rate", "0",
    ]  # fmt: skip
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.glob("train/*/shard-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    # every process that writes holds the pipe: end of file means that all of them are gone
    process.communicate(timeout=60)
    before = contents(out)
    assert command.main(arguments[3:]) == 0
    assert contents(out) == contents(prepared)
    complete = {name for name in before if name.endswith(".json") and "shard-" in name}
    assert complete <= contents(out).keys()


def test_a_second_call_writes_no_shard(raw, prepared, tmp_path):
    prepare(spec_of(raw, tmp_path), quiet())
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")}
    said = Progress(io.StringIO())
    prepare(spec_of(raw, tmp_path), said)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")}
    assert "7 of 7 shards are complete already" in said.file.getvalue()


def test_changed_added_and_removed_shards_are_noticed(raw, tmp_path):
    rng = np.random.default_rng(3)
    own = tmp_path / "raw"
    for number in range(3):
        write_tar(own / f"{number}.tar", pairs(rng, 10))
    spec = spec_of(raw, tmp_path / "out", train={"own": own}, validation={})
    prepare(spec, quiet())
    folder = tmp_path / "out" / "train" / "own"
    untouched = (folder / "shard-000000.tar").stat().st_mtime_ns
    write_tar(own / "1.tar", pairs(rng, 10))
    (own / "2.tar").unlink()
    manifest = prepare(spec, quiet())["train/own"]
    assert manifest["documents"] == 20
    assert [shard["raw"] for shard in manifest["shards"]] == ["0.tar", "1.tar"]
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == untouched
    assert not list(folder.glob("shard-000002*"))
    record = ShardRecord.load(folder, 1)
    assert record.raw_sha256 == sha256_file(own / "1.tar")


def test_other_options_make_other_tokens_and_no_manifest_outlives_its_shards(raw, tmp_path):
    """Images first, then last: nothing of the first call is taken for the second."""
    spec = spec_of(raw, tmp_path, train={"pairs": raw / "pairs"}, validation={}, image_first=1.0)
    prepare(spec, quiet())
    folder = tmp_path / "train" / "pairs"
    begin = Tokenizers.load(tmp_path / "tokenizers").text.begin_image
    assert all(ids[1] == begin for ids, _ in documents_of(folder))

    class Stopped(BaseException):
        pass

    class StopsAtFirstShard(Progress):
        def tell(self, line):
            raise Stopped

    last = spec_of(raw, tmp_path, train={"pairs": raw / "pairs"}, validation={}, image_first=0.0)
    with pytest.raises(Stopped):
        prepare(last, StopsAtFirstShard(io.StringIO()))
    assert not (folder / "manifest.json").exists()
    prepare(last, quiet())
    assert all(ids[1] != begin for ids, _ in documents_of(folder))


def test_a_damaged_shard_is_made_again(raw, prepared, tmp_path):
    prepare(spec_of(raw, tmp_path), quiet())
    shard = tmp_path / "train" / "books" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    prepare(spec_of(raw, tmp_path), quiet())
    assert contents(tmp_path) == contents(prepared)


# bad samples


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
    spec = spec_of(raw, tmp_path / "out", train={"bad": bad}, validation={}, max_bad_rate=0.1)
    manifest = prepare(spec, quiet())["train/bad"]
    assert manifest["drops"] == {"corrupt-image": 2, "truncated": 1}
    assert manifest["drops_by_shard"] == {"0.tar": {"corrupt-image": 2}, "1.tar": {"truncated": 1}}
    # the sample before a cut may count as incomplete, the one that is cut never as complete
    assert manifest["documents"] in (18 + 18, 18 + 19)
    page = describe(tmp_path / "out")
    assert "train/bad dropped: corrupt-image 2, truncated 1" in page
    assert "  0.tar: corrupt-image 2" in page


def test_too_many_bad_samples_end_it_and_name_the_worst_shard(raw, bad, tmp_path):
    spec = spec_of(raw, tmp_path / "out", train={"bad": bad}, validation={}, max_bad_rate=0.05)
    message = (
        r"train/bad: 3 of (39|40) samples are bad.*max_bad_rate \(0.05\).*0\.tar: corrupt-image 2"
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


# refusals


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
    save_image_tokenizer(codes, tmp_path / "codes.safetensors")
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


def test_sources_without_an_image_say_how_to_prepare_text_only(raw, tmp_path):
    with pytest.raises(ValueError, match="image_tokenizer 'none'"):
        prepare(spec_of(raw, tmp_path, train={"books": raw / "books"}, validation={}), quiet())


# the command


def test_inspect_prints_documents_tokens_and_tokenizers(prepared, capsys):
    assert command.main(["inspect", str(prepared)]) == 0
    page = capsys.readouterr().out
    manifest = read_manifest(prepared / "train" / "pairs")
    line = next(line for line in page.splitlines() if line.startswith("train/pairs"))
    cells = line.split()
    assert cells[1:5] == ["2", "60", f"{manifest['tokens']['text']:,}", "240"]
    for sha in manifest["tokenizers"].values():
        assert sha in page
    (prepared / "train" / "zz").mkdir()
    try:
        assert "train/zz: unfinished" in describe(prepared)
    finally:
        (prepared / "train" / "zz").rmdir()


def test_mistakes_on_the_command_line_end_in_one_line(tmp_path, capsys):
    assert command.main(["inspect", str(tmp_path / "none")]) == 2
    assert command.main(["build", "--out", str(tmp_path), "--train", "no-equals"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert (
        "holds no prepared data" in lines[0]
        and "source (no-equals) must be NAME=SHARDS" in lines[1]
    )


def test_help_states_the_defaults_and_imports_nothing_heavy(tmp_path):
    program = (
        "import sys\nfrom earlyfuse.tools import prepare\n"
        "try: prepare.main(['build', '--help'])\n"
        "finally: print('heavy', [m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert "heavy []" in shown
    defaults = {
        name: str(field.default) for name, field in PrepareSpec.__dataclass_fields__.items()
    }
    for name in ("text_vocab", "image_tokenizer", "image_size", "patch", "codes", "vq_steps",
                 "layout", "image_first", "on_bad", "max_bad_rate", "seed"):  # fmt: skip
        option = "--" + name.replace("_", "-")
        described = " ".join(shown[shown.rindex(option + " ") :].split("--")[1].split())
        assert f"({defaults[name]}" in described, (option, described)


def test_progress_is_plain_lines_off_a_terminal():
    progress = quiet()
    with progress.bar("tokenising", 25, "shard") as advance:
        for _ in range(25):
            advance(1, "note")
    lines = progress.file.getvalue().splitlines()
    assert len(lines) == 10 and lines[-1] == "tokenising: 25 of 25 shards, note"
    assert "\r" not in progress.file.getvalue()


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_hash_of_a_file_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
