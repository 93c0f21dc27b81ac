"""Checkpoints are whole or not there, are verified before they are loaded, and are not lost to
kills, full disks or damaged files.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from places import SUPPORT
from small_states import SmallRun
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from earlyfuse.parallel.checkpoint.file_layout import latest_checkpoint
from earlyfuse.parallel.checkpoint.files.dcp import Writer
from earlyfuse.parallel.checkpoint.manager import Checkpoints
from earlyfuse.parallel.checkpoint.manifest import read_manifest
from earlyfuse.parallel.training.skip_step import not_finite

SYNC_AND_ASYNC = pytest.mark.parametrize("mode", ["disabled", "async"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def latest(folder: Path) -> str:
    return (folder / "checkpoint" / "latest").read_text().strip()


def saved(folder: Path, *steps: int, **options) -> None:
    run = SmallRun(folder, **options)
    assert run.save(*steps)
    run.close()


def loaded(folder: Path, step: int = -1, **options) -> int:
    run = SmallRun(folder, **options)
    found = run.load(step)
    run.close()
    return found


# ---------------------------------------------------------------- interrupted


def test_a_kill_or_an_error_at_any_file_operation_leaves_a_checkpoint_to_load(tmp_path):
    script = SUPPORT / "interrupted_saves.py"
    job = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert job.returncode == 0, job.stdout + job.stderr
    results = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("{")]
    kills = [result for result in results if result["killed"]]
    failures = [result for result in results if result.get("failed")]
    assert len(kills) > 15 and len(failures) > 10, "the save was hardly interrupted"
    for result in results:
        # between the two renames that replace step 9, what is left of it is step 6
        assert result["loaded"] in (6, 9), result
        assert result["loaded_again"] == 12, result
        assert result["left_again"] == ["latest", "step-12", f"step-{result['loaded']}"], result
        assert not any(name.endswith(".partial") for name in result.get("left", ())), result
    for result in failures:
        assert "step-3" in result["left"], f"purged without a newer checkpoint: {result}"
    assert job.stderr.count("No space left on device") >= len(failures)
    assert "the newest good one" in job.stderr


def test_leftovers_of_a_killed_save_are_not_loaded_and_go_with_the_next(tmp_path):
    saved(tmp_path, 3)
    folder = tmp_path / "checkpoint"
    shutil.copytree(folder / "step-3", folder / "step-6.partial")
    shutil.copytree(folder / "step-3", folder / "step-1.discarded")
    (folder / "latest.77.part").write_text("step-6")
    assert loaded(tmp_path) == 3
    saved(tmp_path, 9)
    assert names(tmp_path) == ["latest", "step-3", "step-9"] and latest(tmp_path) == "step-9"


# ---------------------------------------------------------------- disk errors


def full(self, path, mode):
    return open("/dev/full" if "w" in mode else path, mode)


def forbidden(self, path, mode):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def stream_of(create_stream):
    """DCP's files are opened by ``create_stream``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", create_stream)
        yield


@contextmanager
def files_up_to(size: int):
    """The kernel lets no file of this process grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


DISKS = {
    "No space left on device": lambda: stream_of(full),
    "Permission denied": lambda: stream_of(forbidden),
    "File too large": lambda: files_up_to(60_000),  # within a tensor
}


@SYNC_AND_ASYNC
@pytest.mark.parametrize("cause", DISKS)
def test_a_disk_that_fails_costs_one_checkpoint(tmp_path, capfd, mode, cause):
    run = SmallRun(tmp_path, keep=2, async_mode=mode)
    run.save(3, 6)
    run.checkpoints.maybe_wait_for_saving()
    with DISKS[cause]():
        run.save(9)
        run.checkpoints.maybe_wait_for_saving()
    assert names(tmp_path) == ["latest", "step-3", "step-6"], "older ones stay, no partial one"
    checkpoints = run.checkpoints
    assert (checkpoints.saved, checkpoints.failed, checkpoints.newest) == (2, 1, 6)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert "step 9" in line and "rank 0" in line and cause in line and line.endswith("step-6")
    run.save(12)
    run.close()
    assert names(tmp_path) == ["latest", "step-12", "step-6"] and loaded(tmp_path) == 12


def test_a_folder_that_cannot_be_made_costs_checkpoints_not_the_run(tmp_path, capfd):
    (tmp_path / "checkpoint").write_text("in the way")
    run = SmallRun(tmp_path)
    assert not run.save(3) and not run.save(6)
    assert run.checkpoints.failed == 2 and run.checkpoints.newest is None
    assert "there is none yet" in capfd.readouterr().err


def test_an_error_that_is_not_the_disks_is_raised(tmp_path, monkeypatch):
    run = SmallRun(tmp_path)
    run.save(3)
    monkeypatch.setattr(Writer, "finish", lambda *_, **__: {}["no such key"])
    with pytest.raises(RuntimeError, match="rank 0: KeyError: 'no such key'"):
        run.save(6)
    assert loaded(tmp_path) == 3


# ---------------------------------------------------------------- values that are not finite


def first_moment(run: SmallRun) -> torch.Tensor:
    return next(v for name, v in run.optimizers.state_dict().items() if name.endswith("exp_avg"))


@pytest.mark.parametrize(
    ("mode", "value", "of", "name"),
    [
        ("disabled", torch.nan, lambda run: run.model[1].weight, r"1\.weight"),
        ("async", -torch.inf, first_moment, r"optimizer|exp_avg"),
    ],
    ids=["parameter", "moment"],
)
def test_what_is_not_finite_is_not_saved(tmp_path, mode, value, of, name):
    run = SmallRun(tmp_path, async_mode=mode)
    run.save(3)
    run.be_at(6)
    with torch.no_grad():
        of(run).view(-1)[7] = value
    for last_step in (False, True):
        with pytest.raises(RuntimeError, match=rf"{name}.* on ranks \[0\] .* step 6.*step-3$"):
            run.checkpoints.save(6, last_step=last_step)
    run.close()
    assert names(tmp_path) == ["latest", "step-3"] and loaded(tmp_path) == 3


def test_a_value_that_is_not_finite_on_one_rank_is_refused_on_all(tmp_path, monkeypatch):
    run = SmallRun(tmp_path)
    gather = torch.distributed.all_gather_object

    def with_another_rank(found, own, group):
        gather(found, own, group=group)
        found.append(["layers.1.experts"])

    monkeypatch.setattr(torch.distributed, "all_gather_object", with_another_rank)
    with pytest.raises(RuntimeError, match=r"layers.1.experts on ranks \[1\] .*checkpoint, none"):
        run.save(3)
    mesh = init_device_mesh("cpu", (1,))
    shard = DTensor.from_local(torch.tensor([1.0, torch.inf]), mesh, [Shard(0)])
    assert not_finite({"a": shard, "b": torch.ones(2), "c": torch.ones(1).int(), "d": 3}) == ["a"]


# ---------------------------------------------------------------- async


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, write = threading.Event(), Writer.write_data

    def slow_write(self, plan, planner):
        assert may_write.wait(60)
        return write(self, plan, planner)

    monkeypatch.setattr(Writer, "write_data", slow_write)
    run = SmallRun(tmp_path, async_mode="async")
    assert run.save(3)
    run.be_at(4)  # a step of training changes everything in place
    assert names(tmp_path) == ["step-3.partial"], "not complete before it is written"
    may_write.set()
    run.save(6)  # waits for the first
    assert run.checkpoints.newest in (3, 6)
    run.be_at(9)
    run.checkpoints.save(9, last_step=True)  # waits for itself
    assert latest(tmp_path) == "step-9" and run.checkpoints.newest == 9
    assert run.checkpoints.stall_seconds > 0
    run.close()
    assert names(tmp_path) == ["latest", "step-3", "step-6", "step-9"]
    assert loaded(tmp_path, 3) == 3 and loaded(tmp_path) == 9


# ---------------------------------------------------------------- damaged


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES = [
    (flip_a_byte, "__0_0.distcp", "__0_0.distcp has another SHA-256"),
    (truncate, "__0_0.distcp", r"__0_0.distcp has \d+ bytes instead of \d+"),
    (Path.unlink, ".metadata", ".metadata is missing"),
    (truncate, "manifest.json", "manifest.json"),
    (Path.unlink, "manifest.json", "manifest.json is missing"),
]


@pytest.mark.parametrize(("harm", "file", "says"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_or_passed_over(tmp_path, capfd, harm, file, says):
    saved(tmp_path, 3, 6, 9)
    harm(tmp_path / "checkpoint" / "step-9" / file)
    run = SmallRun(tmp_path)
    before = {name: tensor.clone() for name, tensor in run.tensors().items()}
    refusal = rf"step-9 is damaged: .*{says}.*--checkpoint\.fallback"
    with pytest.raises(ValueError, match=refusal):
        run.load()
    assert all(tensor.equal(before[name]) for name, tensor in run.tensors().items())
    run = SmallRun(tmp_path, fallback=True)
    assert run.load() == 6
    assert "skipped checkpoint" in (line := capfd.readouterr().err) and "step-9" in line
    run.save(9)
    run.close()
    assert loaded(tmp_path) == 9


def test_every_bit_of_a_manifest_counts(tmp_path):
    saved(tmp_path, 3)
    folder = tmp_path / "checkpoint" / "step-3"
    whole = (folder / "manifest.json").read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (folder / "manifest.json").write_bytes(changed)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_manifest(folder)


def test_fallback_passes_over_all_that_is_damaged_and_says_when_nothing_is_left(tmp_path):
    """Checkpoints beyond the one loaded neither count as kept nor are deleted."""
    saved(tmp_path, 3, 6, 9)
    for step in (9, 6):
        flip_a_byte(tmp_path / "checkpoint" / f"step-{step}" / "__0_0.distcp")
    run = SmallRun(tmp_path, keep=2, fallback=True)
    assert run.load() == 3
    run.save(4)
    assert {"step-3", "step-4"} <= set(names(tmp_path))
    run.save(5)
    run.close()
    assert names(tmp_path) == ["latest", "step-4", "step-5", "step-6", "step-9"]
    for step in (5, 4):
        flip_a_byte(tmp_path / "checkpoint" / f"step-{step}" / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"no checkpoint .* is intact \(tried steps \[5, 4\]\)"):
        loaded(tmp_path, fallback=True)


# ---------------------------------------------------------------- which is loaded, which is kept


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, 3, 6, 9, 12, keep=2)
    assert names(tmp_path) == ["latest", "step-12", "step-9"]


def test_load_step_is_honoured_or_refused_with_the_steps_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"load_step \(3\) .*there is none"):
        loaded(tmp_path, 3)
    saved(tmp_path, 3, 6)
    with pytest.raises(ValueError, match=r"load_step \(5\) must be .*: \[3, 6\]"):
        loaded(tmp_path, 5)
    run = SmallRun(tmp_path)
    assert run.load(3) == 3
    run.save(4)  # a run taken back resumes from what it saved since
    assert latest(tmp_path) == "step-4" and loaded(tmp_path) == 4
    (tmp_path / "checkpoint" / "latest").unlink()  # as after a kill in the first save
    assert loaded(tmp_path) == 6, "without latest, the highest"


GARBLED = [b"", b"step-6\n\n", b"step-06", b"step--6", b"../step-6", b"\xff\x1b[2J", b"9" * 10**6]


def test_latest_that_is_damaged_is_refused_by_name(tmp_path):
    saved(tmp_path, 3, 6)
    path = tmp_path / "checkpoint" / "latest"
    loads = (loaded, lambda folder: latest_checkpoint(folder / "checkpoint"))
    for content, load in product(GARBLED, loads):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"latest .* must name .*step-3, step-6") as refusal:
            load(tmp_path)
        assert len(str(refusal.value)) < 500 and "\x1b" not in str(refusal.value)
    assert loaded(tmp_path, 3) == 3, "a step that is asked for needs no latest"
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"latest cannot be read .*there: step-3"):
        loaded(tmp_path)


@pytest.mark.parametrize("left", [(3, 6), ()], ids=repr)
def test_a_checkpoint_that_latest_names_and_is_gone_is_refused_with_what_is_there(tmp_path, left):
    saved(tmp_path, 3, 6, 9)
    for step in {3, 6, 9} - {*left}:
        shutil.rmtree(tmp_path / "checkpoint" / f"step-{step}")
    there = ", ".join(f"step-{step}" for step in left) or "none"
    with pytest.raises(ValueError, match=rf"step-9 .* is not there.*there: {there}"):
        loaded(tmp_path)
    with pytest.raises(ValueError, match=rf"step-9, which is not there \(there: {there}\)"):
        latest_checkpoint(tmp_path / "checkpoint")
    if 6 in left:
        assert loaded(tmp_path, fallback=True) == loaded(tmp_path, 6) == 6


def trained_to(folder: Path, step: int, **settings) -> Path:
    """Writes the files that a run leaves besides its checkpoints."""
    folder.mkdir(exist_ok=True)
    checkpoint = {"enable": True, "interval": 3, **settings}
    (folder / "run.json").write_text(json.dumps({"config": {"checkpoint": checkpoint}}))
    lines = [json.dumps({"step": at, "kind": "train"}) for at in range(1, step + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1']))
    return folder


def test_a_run_that_has_lost_its_checkpoints_does_not_begin_anew(tmp_path):
    trained_to(tmp_path, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has been trained to step 4 .* has no checkpoint"):
            loaded(tmp_path)
        (tmp_path / "checkpoint").mkdir(exist_ok=True)
    (trained_to(tmp_path / "finished", 2) / "loss_curves.png").touch()
    with pytest.raises(ValueError, match="has been trained to step 2"):
        loaded(tmp_path / "finished")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    cases = [(0, {}), (3, {}), (9, {"enable": False}), (9, {"load_only": True})]
    for number, (step, settings) in enumerate(cases):
        assert loaded(trained_to(tmp_path / str(number), step, **settings)) == 0
    (tmp_path / "checkpoint" / "step-3.partial").mkdir(parents=True)  # the first was being written
    assert loaded(trained_to(tmp_path, 5)) == 0


def test_a_kill_while_a_checkpoint_is_replaced_brings_the_old_one_back(tmp_path):
    saved(tmp_path, 3)
    folder = tmp_path / "checkpoint"
    shutil.copytree(folder / "step-3", folder / "step-3.partial")
    (folder / "step-3").rename(folder / "step-3.discarded")
    assert loaded(tmp_path) == 3
    assert names(tmp_path) == ["latest", "step-3", "step-3.partial"]


def test_a_renamed_checkpoint_is_refused_by_name(tmp_path):
    saved(tmp_path, 3, 6)
    folder = tmp_path / "checkpoint"
    (folder / "step-6").rename(folder / "step-9")
    (folder / "latest").write_text("step-9\n")
    with pytest.raises(ValueError, match=r"step-9 holds step 6 .* was renamed; name it step-6"):
        loaded(tmp_path)
    assert loaded(tmp_path, fallback=True) == 3
    shutil.copytree(folder / "step-9", tmp_path / "elsewhere")
    assert read_manifest(tmp_path / "elsewhere").step == 6, "any other name will do"


def test_equal_states_give_equal_files(tmp_path):
    for folder in ("one", "other"):
        saved(tmp_path / folder, 3)
    manifests = [read_manifest(tmp_path / f / "checkpoint" / "step-3") for f in ("one", "other")]
    assert manifests[0] == manifests[1] and len(manifests[0].files) == 2


# ---------------------------------------------------------------- only weights


def test_a_checkpoint_of_weights_continues_no_run(tmp_path):
    run = SmallRun(tmp_path / "first", last_save_model_only=True)
    run.save(3)
    run.be_at(6)
    run.checkpoints.save(6, last_step=True)
    with pytest.raises(ValueError, match=r"step-6 holds only weights .*--start.model"):
        loaded(tmp_path / "first")
    assert loaded(tmp_path / "first", 3) == 3


def test_what_cannot_work_here_is_refused(tmp_path):
    config = Checkpoints.Config()
    with pytest.raises(ValueError, match=r"checkpoint.folder .* must be on a file system"):
        replace(config, folder="s3://bucket/run")
    with pytest.raises(ValueError, match=r"async_with_pinned_mem.* must be async or disabled"):
        SmallRun(tmp_path, async_mode="async_with_pinned_mem")
