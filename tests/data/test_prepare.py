"""prepare: the right tokens, and a command line that says what it does."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from raw_shards import contents, documents_of, pairs, quiet, spec_of, write_tar

from earlyfuse.data import atomic
from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.shards.manifest import read_manifest
from earlyfuse.data.shards.writer import (
    MEMBER_BYTES,
    ShardRecord,
    token_dtype,
    write_shard,
)
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.tools import prepare as command


def test_documents_come_back_out_of_the_tokens(raw, prepared):
    """Text exactly, images as their tokenizer encodes them, in reading order."""
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
        begin, end = list(ids).index(text.begin["image"]), list(ids).index(text.end["image"])
        assert ids[0] == text.bos and ids[-1] == text.eos and end - begin - 1 == image.block == 4
        assert text.decode(ids[:begin].tolist()) == fields["texts"][0]
        assert text.decode(ids[end:].tolist()) == fields["texts"][2]
        codes = ids[begin + 1 : end] - vocabulary.medium(Modality.IMAGE).start
        assert np.array_equal(codes, image.encode(image_pixels(picture, 8)[None])[0])
        assert counts == [len(ids) - 4, 4]


def test_manifest_states_what_is_there_and_shards_are_tars_of_arrays(prepared):
    for folder in (prepared / "train").iterdir():
        manifest = read_manifest(folder)
        documents = list(documents_of(folder))
        assert manifest["documents"] == len(documents)
        totals = np.sum([counts for _, counts in documents], axis=0)
        assert list(totals) == [manifest["tokens"]["text"], manifest["tokens"]["image"]]
        for shard in manifest["shards"]:
            assert sha256_file(folder / shard["name"]) == shard["sha256"]
            assert (folder / shard["name"]).stat().st_size == shard["bytes"]
            with tarfile.open(folder / shard["name"]) as tar:
                arrays = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar]
            assert sum(map(len, arrays)) == sum(shard["tokens"].values())
            assert all(array.dtype == np.uint16 for array in arrays)
        assert manifest["tokenizers"] == {
            "text": sha256_file(prepared / "tokenizers" / "text.model"),
            "image": sha256_file(prepared / "tokenizers" / "image.safetensors"),
        }
        recorded = json.loads((prepared / "tokenizers" / "vocabulary.json").read_text())
        assert manifest["vocabulary"] == recorded
        assert Vocabulary.from_dict(recorded).size == 330 + 16
        # fields of what is dropped or not used are absent where nothing is
        assert not manifest.keys() & {"unused", "examples"}
        record = json.loads((folder / "shard-000000.json").read_bytes())
        assert not record.keys() & {"unused", "examples"}


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


def test_ready_tokenizers_are_copied_not_trained(raw, prepared, tmp_path):
    changes = {
        "text_tokenizer": prepared / "tokenizers" / "text.model",
        "image_tokenizer": str(prepared / "tokenizers" / "image.safetensors"),
    }
    prepare(spec_of(raw, tmp_path, **changes), quiet())
    assert contents(tmp_path) == contents(prepared)


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


# ---------------------------------------------------------------- the command


def test_inspect_prints_documents_tokens_and_tokenizers(prepared, capsys):
    (prepared / "train" / "zz").mkdir()
    try:
        assert command.main(["inspect", str(prepared)]) == 0
    finally:
        (prepared / "train" / "zz").rmdir()
    page = capsys.readouterr().out
    manifest = read_manifest(prepared / "train" / "pairs")
    line = next(line for line in page.splitlines() if line.startswith("train/pairs"))
    assert line.split()[1:5] == ["2", "60", f"{manifest['tokens']['text']:,}", "240"]
    for said in (*manifest["tokenizers"].values(), "train/zz: unfinished"):
        assert said in page


def test_mistakes_on_the_command_line_end_in_one_line(tmp_path, capsys):
    assert command.main(["inspect", str(tmp_path / "none")]) == 2
    assert command.main(["build", "--out", str(tmp_path), "--train", "no-equals"]) == 2
    missing, source = capsys.readouterr().err.splitlines()
    assert "holds no prepared data" in missing
    assert "source (no-equals) must be NAME=SHARDS" in source


def test_help_states_the_defaults_and_imports_nothing_heavy():
    program = (
        "import sys\nfrom earlyfuse.tools import prepare\n"
        "try: prepare.main(['build', '--help'])\n"
        "finally: print('heavy', [m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert "heavy []" in shown
    for name in ("text_vocab", "image_tokenizer", "image_size", "patch", "codes", "vq_steps",
                 "layout", "image_first", "on_bad", "max_bad_rate", "seed"):  # fmt: skip
        option = "--" + name.replace("_", "-")
        described = " ".join(shown[shown.rindex(option + " ") :].split("--")[1].split())
        default = PrepareSpec.__dataclass_fields__[name].default
        assert f"({default}" in described, (option, described)


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
