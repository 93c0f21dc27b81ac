"""prepare: which files are shards, what is said of the others, and what a broken shard costs."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import zipfile

import numpy as np
import pytest
from raw_shards import articles, contents, png, quiet, spec_of, write_tar

from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.prepare.shard_files import find_shards, unused_files
from earlyfuse.tools import prepare as command


def text_spec(raw, out, shards, **changes):
    fields = {"train": {"t": shards}, "validation": {}, "image_tokenizer": "none"}
    return spec_of(raw, out, **{**fields, **changes})


def said_by(spec):
    """Runs prepare; returns its standard error and the manifest of the source."""
    progress = Progress(io.StringIO())
    manifest = prepare(spec, progress)["train/t"]
    return progress.file.getvalue(), manifest


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Four shards of 40 documents."""
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(3)
    for number in range(4):
        write_tar(folder / f"{number:06d}.tar", articles(rng, 40))
    return folder


# ---------------------------------------------------------------- shards that end early


def test_a_shard_that_ends_early_ends_the_build_unless_the_policy_is_skip_shards(
    raw, books, tmp_path
):
    """However small its share of all samples, and however high the rate that is allowed."""
    halved = shutil.copytree(books, tmp_path / "halved")
    third = halved / "000002.tar"
    size = third.stat().st_size // 2
    third.write_bytes(third.read_bytes()[:size])
    with pytest.raises(ValueError, match="ends at byte") as refused:
        prepare(text_spec(raw, tmp_path / "out", halved, max_bad_rate=1.0), quiet())
    for part in ("000002.tar", f"byte {size:,}", "samples are lost", "'skip-shards'"):
        assert part in str(refused.value)
    assert not list((tmp_path / "out").rglob("manifest.json"))
    spec = text_spec(raw, tmp_path / "out", halved, on_bad="skip-shards")
    for _ in range(2):  # each time
        said, manifest = said_by(spec)
        lost = manifest["drops"]["truncated"]
        assert f"1 of 4 shards end early, about {lost} samples are lost: 000002.tar" in said
    assert 20 <= lost <= 26 and 138 <= manifest["documents"] <= 145
    assert f"about {lost} samples are lost" in str(refused.value)
    assert f"1 of 4 shards end early: about {lost} samples" in describe(tmp_path / "out")
    with pytest.raises(ValueError, match=r"000002\.tar.*samples are lost"):
        prepare(text_spec(raw, tmp_path / "out", halved), quiet())


def test_a_damaged_gzip_ends_the_build_before_a_tokenizer_learns_from_it(raw, books, tmp_path):
    content = bytearray(gzip.compress((books / "000000.tar").read_bytes()))
    content[len(content) // 2] ^= 4
    shard = tmp_path / "a.tar.gz"
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar\.gz.* gzip .*about \d+ samples are lost"):
        prepare(text_spec(raw, tmp_path / "out", shard), quiet())
    assert not list((tmp_path / "out").rglob("*.model"))
    # skip-shards continues without any of it
    both = [shard, books / "000000.tar"]
    _, manifest = said_by(text_spec(raw, tmp_path / "out", both, on_bad="skip-shards"))
    _, alone = said_by(text_spec(raw, tmp_path / "alone", both[1:]))
    assert manifest["documents"] == 40 == alone["documents"]
    assert 34 <= manifest["drops"]["corrupt-tar"] <= 46
    model = "tokenizers/text.model"
    assert contents(tmp_path / "out")[model] == contents(tmp_path / "alone")[model]


def test_what_a_failed_download_left_is_a_lost_shard_where_the_policy_says_so(raw, books, tmp_path):
    shards = [tmp_path / "a.tar", tmp_path / "b.tar", books / "000000.tar"]
    shards[0].write_bytes(b"")
    shards[1].write_text("<!DOCTYPE html><html><title>404 Not Found</title></html>")
    for on_bad in ("skip", "stop"):
        spec = text_spec(raw, tmp_path / "out", shards, on_bad=on_bad)
        with pytest.raises(ValueError, match=r"a\.tar is an empty file.*1 more shards cannot"):
            prepare(spec, quiet())
    _, manifest = said_by(text_spec(raw, tmp_path / "out", shards, on_bad="skip-shards"))
    assert manifest["documents"] == 40
    lost = {os.path.basename(name): drops for name, drops in manifest["drops_by_shard"].items()}
    assert lost == {"a.tar": {"truncated": 1}, "b.tar": {"truncated": 1}}


# ---------------------------------------------------------------- files that are no tars


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def zip_of(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        entries.writestr(name, b"x")
    return file.getvalue()


ROWS = b"".join(json.dumps({"text": f"row {n}"}).encode() + b"\n" for n in range(60))
OTHERS = {
    "a parquet file": b"PAR1" + bytes(900) + b"PAR1",
    "JSON lines": ROWS,
    "a JSON file": b'\n[{"text": "alone"}]',
    "gzip of JSON lines": gzip.compress(ROWS),
    "plain text": "αβγ, and much more\n".encode() * 9000,
    "gzip of plain text": gzip.compress(b"words " * 999),
    "compressed with zstd": b"\x28\xb5\x2f\xfd" + bytes(range(250)),
    "compressed with bzip2": bz2.compress(ROWS),
    "compressed with xz": lzma.compress(ROWS),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c" + bytes(99),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(900),
    "an .npz file": npz(),
    "a zip archive": zip_of("a.txt"),
    "an .xlsx table": zip_of("xl/workbook.xml"),
    "a PNG image": png(np.random.default_rng(0)),
    "a JPEG image": b"\xff\xd8\xff\xe0" + bytes(900),
    "a WAV file": b"RIFF\x24\0\0\0WAVEfmt " + bytes(900),
    "an Arrow or Feather file": b"ARROW1\0\0" + bytes(900),
    "a safetensors file": (40).to_bytes(8, "little") + b'{"a":{}}' + b" " * 600,
    "an HTML page": b"<!DOCTYPE html>\n<html><body>503</body></html>",
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "an empty file": b"",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_no_tar_is_named_before_anything_is_written(raw, tmp_path, kind, capsys):
    """By its content, whatever its name, in one line with the formats that are read."""
    shard = tmp_path / "a.tar"
    shard.write_bytes(OTHERS[kind])
    arguments = ["build", "--out", str(tmp_path / "out"), "--train", f"t={shard}"]
    assert command.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"train/t: shard {shard} is {kind}" in line and "not a tar" in line
    assert not (tmp_path / "out").exists()


def test_a_tar_is_read_under_any_name(raw, books, tmp_path):
    content = (books / "000000.tar").read_bytes()
    (tmp_path / "data.parquet").write_bytes(content)
    (tmp_path / "packed").write_bytes(gzip.compress(content))
    for name in ("data.parquet", "packed"):
        spec = text_spec(raw, tmp_path / f"out {name}", tmp_path / name)
        assert prepare(spec, quiet())["train/t"]["documents"] == 40


# ---------------------------------------------------------------- finding shards


def test_what_a_folder_holds_besides_shards_is_counted_and_named(raw, books, tmp_path):
    folder = tmp_path / "cc12m"
    (folder / "more").mkdir(parents=True)
    (folder / "0.tar").write_bytes((books / "000000.tar").read_bytes())
    (folder / "1.TGZ").write_bytes(gzip.compress((books / "000001.tar").read_bytes()))
    for name in ("0.parquet", "1.parquet", "0_stats.json", "._0.tar", "README"):
        (folder / name).write_bytes(b"x")
    said, manifest = said_by(text_spec(raw, tmp_path / "out", folder))
    assert manifest["documents"] == 80
    (line,) = [line for line in said.splitlines() if "not read" in line]
    for part in (
        "2 .parquet (0.parquet, 1.parquet)", "1 .json (0_stats.json)", "1 hidden (._0.tar)",
        "1 without ending (README)", "1 folder (more)", f"train/t: not read, in {folder}: ",
    ):  # fmt: skip
        assert part in line
    assert unused_files(books) == []
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.avro").write_bytes(ROWS)
    with pytest.raises(FileNotFoundError, match=r"the folder holds 1 \.avro \(a\.avro"):
        find_shards("train/t", tmp_path / "texts")


def test_braces_name_shards_and_those_that_are_missing(books, tmp_path):
    def found(pattern):
        return [shard.name for shard in find_shards("train/t", f"{books}/{pattern}")]

    assert found("{000001..000003}.tar") == ["000001.tar", "000002.tar", "000003.tar"]
    assert found("{000000..000003..2}.tar") == ["000000.tar", "000002.tar"]
    assert found("00000{3,{0..1}}.tar") == ["000003.tar", "000000.tar", "000001.tar"]
    assert found(f"../*{books.name[-3:]}/0*{{0,1}}.tar") == ["000000.tar", "000001.tar"]
    for pattern, error, said in (
        ("{000001..000005}.tar", FileNotFoundError,
         r"2 of the 5 shards .*/000004\.tar, .*000005\.tar"),
        ("{0..99999999999}.tar", ValueError, "more than 1,000,000 shards"),
        ("{0..999}{0..1999}.tar", ValueError, "more than 1,000,000 shards"),
        ("{0..9.tar", ValueError, r"Unbalanced braces.*write a range as \{000..127\}"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            found(pattern)
    with pytest.raises(ValueError, match="URL"):
        find_shards("train/t", "https://host/{00..99}.tar")
    literal = tmp_path / "{0..1}.tar"
    literal.write_bytes((books / "000000.tar").read_bytes())
    assert [shard.path for shard in find_shards("train/t", literal)] == [literal]


def test_names_that_no_manifest_can_hold_are_refused(books, tmp_path, capsys):
    content = (books / "000000.tar").read_bytes()
    folder = tmp_path / "raw"
    folder.mkdir()
    bad = os.fsencode(folder) + b"/caf\xe9.tar"
    with open(bad, "wb") as file:
        file.write(content)
    out = str(tmp_path / "out")
    assert command.main(["build", "--out", out, "--train", f"t={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"caf\udce9.tar" in line and "not UTF-8" in line
    assert not os.path.exists(out)
    os.unlink(bad)
    # a name with control characters is one shard like any other, and printed escaped
    (folder / "a\n\x1b[31mb.tar").write_bytes(content[: len(content) // 2])
    (folder / "c.tar").write_bytes((books / "000001.tar").read_bytes())
    options = ["--image-tokenizer", "none", "--text-vocab", "330", "--workers", "1"]
    build = ["build", "--out", out, "--train", f"t={folder}", *options]
    assert command.main(build) == 2
    assert command.main([*build, "--on-bad", "skip-shards"]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert r"  a\n\x1b[31mb.tar: truncated " in shown.out
    assert r"a\n\x1b[31mb.tar" in shown.err


def test_shards_that_are_no_plain_readable_files_are_named(books, tmp_path, monkeypatch):
    def refusal(name, error=FileNotFoundError):
        for path in (tmp_path / name, tmp_path / "*.tar"):
            with pytest.raises(error) as told:
                find_shards("train/t", path)
            assert name in str(told.value)
        (tmp_path / name).rmdir() if name == "folder.tar" else (tmp_path / name).unlink()
        return str(told.value)

    (tmp_path / "link.tar").symlink_to(tmp_path / "gone.tar")
    assert "symbolic link to" in refusal("link.tar")
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    assert "symbolic link" in refusal("loop.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    assert "a FIFO" in refusal("pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    assert "a folder" in refusal("folder.tar")
    (tmp_path / "secret.tar").write_bytes(b"x")
    opened = io.open

    def denied(path, *arguments, **options):
        if str(path).endswith("secret.tar"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", denied)
    assert "cannot be read (Permission denied)" in refusal("secret.tar", PermissionError)
    monkeypatch.setattr(os, "listdir", lambda path: os.stat("/none") and [])
    with pytest.raises(OSError, match=r"train/t: folder .* cannot be read"):
        find_shards("train/t", books)
