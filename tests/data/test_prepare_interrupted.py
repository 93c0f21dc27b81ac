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


class Stopped(BaseException):
    """Ends prepare as nothing else does."""


def test_every_interruption_between_two_files_is_made_good(raw, prepared, tmp_path, monkeypatch):
    """Stopped at each rename in turn, each time resuming from what the stop before left."""
    rename = os.replace
    allowed = 0

    def rename_some(source, target):
        nonlocal allowed
        if allowed == 0:
            raise Stopped
        allowed -= 1
        rename(source, target)

    monkeypatch.setattr(atomic.os, "replace", rename_some)
    whole = contents(prepared)
    for attempt in range(1, 200):
        # a shard is three files: stop before one, after its tar, after its index
        allowed = 3 + attempt % 3
        try:
            prepare(spec_of(raw, tmp_path), quiet())
            break
        except Stopped:
            found = contents(tmp_path)
            for manifest in tmp_path.rglob("manifest.json"):
                source = f"{manifest.parent.relative_to(tmp_path)}/"
                own = {name: sha for name, sha in found.items() if name.startswith(source)}
                assert own.items() <= whole.items()
    assert attempt > 5
    assert contents(tmp_path) == whole


def test_killed_at_random_moments_and_restarted(raw, prepared, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["earlyfuse.data.prepare"])
    out, rng, kills = tmp_path / "out", random.Random(0), 0

    def ended(kill_after_files: int) -> bool:
        """True if prepare ended by itself, before a kill at a random moment after some files."""
        before = files(out)
        process = context.Process(target=prepare, args=(spec_of(raw, out), None))
        process.start()
        while process.exitcode is None and files(out) < before + kill_after_files:
            time.sleep(rng.uniform(0, 0.002))
        process.kill()
        process.join()
        return process.exitcode == 0

    while kills < 8 and not ended(kill_after_files=1 + kills):
        kills += 1
    prepare(spec_of(raw, out), quiet())
    assert kills
    assert contents(out) == contents(prepared)


def test_killed_command_leaves_no_worker_and_resumes_with_the_bytes_of_one_worker(
    raw, prepared, tmp_path
):
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
    # every process that writes has the pipe open: end of file means that all of them are gone
    process.communicate(timeout=60)
    assert command.main(arguments[3:]) == 0
    found = contents(out)
    assert found.pop("validation/prompts.json"), "made by the command, not by prepare()"
    assert found == contents(prepared)


def test_a_second_call_writes_no_shard(raw, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")}
    said = Progress(io.StringIO())
    prepare(spec_of(raw, tmp_path / "out"), said)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")}
    assert "7 of 7 shards are complete already" in said.file.getvalue()


def test_changed_added_and_removed_shards_are_noticed(raw, tmp_path):
    rng = np.random.default_rng(3)
    own, folder = tmp_path / "raw", tmp_path / "out" / "train" / "own"
    write_tar(own / "0.tar", pairs(rng, 10))
    write_tar(own / "3.tar", pairs(rng, 10, corrupt=(4, 5)))
    spec = spec_of(raw, tmp_path / "out", train={"own": own}, validation={})
    with pytest.raises(ValueError, match="2 of 20 samples are bad"):
        prepare(spec, quiet())
    write_tar(own / "3.tar", pairs(rng, 10))  # mended
    assert prepare(spec, quiet())["train/own"]["documents"] == 20
    write_tar(own / "1.tar", pairs(rng, 10))
    manifest = prepare(spec, quiet())["train/own"]
    assert [shard["raw"] for shard in manifest["shards"]] == ["0.tar", "1.tar", "3.tar"]
    untouched = (folder / "shard-000000.tar").stat().st_mtime_ns
    write_tar(own / "1.tar", pairs(rng, 10))
    (own / "3.tar").unlink()
    with pytest.raises(ValueError, match=r"train/own .* 2 \(1\.tar, …\) are not .* --replace"):
        prepare(spec, quiet())
    manifest = prepare(replace(spec, replace=True), quiet())["train/own"]
    assert manifest["documents"] == 20
    assert [shard["raw"] for shard in manifest["shards"]] == ["0.tar", "1.tar"]
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == untouched
    assert not list(folder.glob("shard-000002*"))
    assert ShardRecord.load(folder, 1).raw_sha256 == sha256_file(own / "1.tar")


def test_other_options_make_other_tokens_and_no_manifest_outlives_its_shards(raw, tmp_path):
    """Images first, then last: nothing of the first call is used by the second."""

    class StopsAtFirstShard(Progress):
        def tell(self, line):
            raise Stopped

    def spec(image_first):
        sources = {"train": {"pairs": raw / "pairs"}, "validation": {}}
        return spec_of(raw, tmp_path, **sources, image_first=image_first)

    prepare(spec(1.0), quiet())
    folder = tmp_path / "train" / "pairs"
    begin = Tokenizers.load(tmp_path / "tokenizers").text.begin["image"]
    assert all(ids[1] == begin for ids, _ in documents_of(folder))
    with pytest.raises(Stopped):
        prepare(spec(0.0), StopsAtFirstShard(io.StringIO()))
    assert not (folder / "manifest.json").exists()
    prepare(spec(0.0), quiet())
    assert all(ids[1] != begin for ids, _ in documents_of(folder))


def test_a_full_disk_is_told_with_its_file_and_the_command_resumes(
    raw, prepared, tmp_path, monkeypatch, capsys
):
    own = write_tar(tmp_path / "raw" / "0.tar", pairs(np.random.default_rng(3), 10))
    words = ["build", "--out", str(tmp_path / "out"), "--train", f"own={own}", "--workers", "1",
             "--tokenizers", str(prepared / "tokenizers")]  # fmt: skip

    def full(descriptor):
        if "shard" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    assert command.main(words) == 2
    assert re.search(r"shard-000000\.tar: No space left on device", capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    assert command.main(words) == 0


def test_a_damaged_shard_is_made_again(raw, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    for suffix in SHARD_SUFFIXES:
        file = tmp_path / "out" / "train" / "books" / f"shard-000001{suffix}"
        whole = file.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 128]) + whole[middle + 1 :]
        for content in (whole[:-9], flipped, b"", b"[]"):
            file.write_bytes(content)
            prepare(spec_of(raw, tmp_path / "out"), quiet())
            assert contents(tmp_path / "out") == contents(prepared)
