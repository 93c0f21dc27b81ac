"""One process at a time in a folder: a second run is refused before it writes anything, and a lock
goes with its process.
"""

import errno
import fcntl
import math
import os
import stat
import subprocess
import sys

import pytest
from tiny_runs import MODELS, run, tiny_config

from earlyfuse.data.folder_lock import LOCK, FolderLock
from earlyfuse.parallel.reporting import run_folder

HOLDER = """
import sys, time
from pathlib import Path
from earlyfuse.data.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), print)
assert lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_and_the_folder_stays_as_it_is(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "ENDING_SECONDS", 0.2)
    folder = tmp_path / "run"
    first = tiny_config(folder, data, MODELS["dense"](), steps=1).build()
    first.train()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ValueError, match=r"dump_folder \(.*run\) is in use by another run") as info:
        tiny_config(folder, data, MODELS["dense"](), steps=2).build()
    assert "--dump_folder" in str(info.value)
    assert "waiting for another process" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    first.close()
    run(tiny_config(folder, data, MODELS["dense"](), steps=2))


def test_the_lock_goes_with_a_process_that_is_killed_while_another_waits(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waiting = FolderLock(tmp_path, lambda line: holder.kill())  # it is told of waiting once
    assert not FolderLock(tmp_path, print).acquire()
    assert waiting.acquire(math.inf)
    assert not FolderLock(tmp_path, print).acquire()
    waiting.release()
    assert FolderLock(tmp_path, print).acquire()
    holder.communicate()


def test_only_rank_0_of_a_job_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    first = run_folder.Reservation(tmp_path)
    monkeypatch.setenv("RANK", "1")
    other = run_folder.Reservation(tmp_path)
    assert first.lock is not None and other.lock is None
    other.release()
    first.release()


def test_ranks_that_are_restarted_wait_longer(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(FolderLock, "acquire", lambda _, seconds: waited.append(seconds) or True)
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        run_folder.Reservation(tmp_path)
    assert waited == [run_folder.ENDING_SECONDS, run_folder.RESTART_SECONDS]


def test_created_folders_that_stay_empty_are_removed_and_others_stay(tmp_path):
    runs = tmp_path / "runs"
    run_folder.Reservation(runs / "a").release()
    assert not runs.exists()
    runs.mkdir()
    run_folder.Reservation(runs / "a").release()
    assert not any(runs.iterdir())
    used = run_folder.Reservation(runs / "b")
    (runs / "b" / "file").touch()
    used.release()
    assert (runs / "b" / "file").exists()


@pytest.mark.parametrize("folders_only", [True, False])
def test_file_systems_that_do_not_lock_are_said(tmp_path, monkeypatch, folders_only):
    """NFS locks no folders, but files; some file systems lock nothing."""
    flock, said = fcntl.flock, []

    def limited(descriptor, operation):
        if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", limited)
    first, second = (FolderLock(tmp_path, said.append) for _ in range(2))
    assert first.acquire() and second.acquire() != folders_only
    assert (tmp_path / LOCK).exists()
    assert bool(said) != folders_only
    assert all("No locks available" in line for line in said)
