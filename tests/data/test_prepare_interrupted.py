"""prepare: the same bytes after any interruption, and no work done twice."""

import errno
import io
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from raw_shards import contents, documents_of, files, pairs, quiet, spec_of, write_tar

from earlyfuse.data import atomic
from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.shards.writer import SHARD_SUFFIXES, ShardRecord
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.tools import prepare as command


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
    with pytest.raises(ValueError, match=r"train/own .* 2 \(1\.tar, …\) are not .* --replace"):
        prepare(spec, quiet())
    manifest = prepare(replace(spec, replace=True), quiet())["train/own"]
    assert manifest["documents"] == 20
    assert [shard["raw"] for shard in manifest["shards"]] == ["0.tar", "1.tar"]
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == untouched
    assert not list(folder.glob("shard-000002*"))
    record = ShardRecord.load(folder, 1)
    assert record.raw_sha256 == sha256_file(own / "1.tar")


def test_more_shards_join_a_source_and_a_bad_one_is_mended(raw, tmp_path):
    rng = np.random.default_rng(3)
    own = tmp_path / "raw"
    write_tar(own / "1.tar", pairs(rng, 10))
    write_tar(own / "3.tar", pairs(rng, 10, corrupt=(4, 5)))
    spec = spec_of(raw, tmp_path / "out", train={"own": own}, validation={})
    with pytest.raises(ValueError, match="2 of 20 samples are bad"):
        prepare(spec, quiet())
    write_tar(own / "3.tar", pairs(rng, 10))
    assert prepare(spec, quiet())["train/own"]["documents"] == 20
    write_tar(own / "2.tar", pairs(rng, 10))
    manifest = prepare(spec, quiet())["train/own"]
    assert [shard["raw"] for shard in manifest["shards"]] == ["1.tar", "2.tar", "3.tar"]
    assert manifest["documents"] == 30


def test_other_options_make_other_tokens_and_no_manifest_outlives_its_shards(raw, tmp_path):
    """Images first, then last: nothing of the first call is taken for the second."""
    spec = spec_of(raw, tmp_path, train={"pairs": raw / "pairs"}, validation={}, image_first=1.0)
    prepare(spec, quiet())
    folder = tmp_path / "train" / "pairs"
    begin = Tokenizers.load(tmp_path / "tokenizers").text.begin["image"]
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


def test_a_full_disk_is_told_with_its_file_and_the_command_goes_on(
    raw, prepared, tmp_path, monkeypatch, capsys
):
    own = tmp_path / "raw"
    write_tar(own / "0.tar", pairs(np.random.default_rng(3), 10))
    small = ["--text-tokenizer", str(prepared / "tokenizers/text.model"), "--workers", "1"]
    small += ["--image-tokenizer", str(prepared / "tokenizers/image.safetensors")]
    words = ["build", "--out", str(tmp_path / "out"), "--train", f"own={own}", *small]

    def full(descriptor):
        if "shard" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    assert command.main(words) == 2
    assert re.search(r"shard-000000\.tar: No space left on device", capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    assert command.main(words) == 0


@pytest.mark.parametrize("suffix", SHARD_SUFFIXES)
def test_a_damaged_shard_is_made_again(raw, prepared, tmp_path, suffix):
    shutil.copytree(prepared, tmp_path / "out")
    file = tmp_path / "out" / "train" / "books" / f"shard-000001{suffix}"
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 128]) + whole[middle + 1 :]
    for content in (whole[:-9], flipped, b"", b"[]"):
        file.write_bytes(content)
        prepare(spec_of(raw, tmp_path / "out"), quiet())
        assert contents(tmp_path / "out") == contents(prepared)
