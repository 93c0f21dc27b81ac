"""The doctor's checks: each fails with a remedy when its cause is planted, and passes without."""

import errno
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_runs import MODELS, changed, tiny_config
from toy import make_data

from earlyfuse.tools import doctor, environment, handshake


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "run", make_data(tmp_path / "data"), MODELS["dense"]())


def only(findings) -> environment.Finding:
    """The one that failed."""
    (found,) = [one for one in findings if one.remedy]
    assert f"{found}".startswith("FAILED") and found.remedy in f"{found}"
    return found


def passes(findings) -> bool:
    found = list(findings)
    return bool(found) and not any(one.remedy for one in found)


def test_a_wrong_or_missing_package_is_named(monkeypatch):
    assert passes(environment.check_versions())
    version = environment.metadata.version
    monkeypatch.setattr(
        environment.metadata, "version", lambda n: "0.2.0" if n == "torchtitan" else version(n)
    )
    found = only(environment.check_versions())
    assert "torchtitan is 0.2.0, needs torchtitan==0.3.0" in found.text
    assert "constraints.txt" in found.remedy

    def missing(name):
        raise environment.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "version", missing)
    assert all("is missing" in one.text for one in environment.check_versions() if one.remedy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees the GPU")
def test_a_driver_whose_gpu_torch_does_not_see_fails(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "sees no GPU" in only(environment.check_device()).text


def test_a_full_a_small_and_a_slow_disk_fail(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(environment, "PROBE", 1 << 20)
    assert passes(environment.check_folder(folder, config)) and not folder.exists()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as planted:
        planted.setattr(environment.os, "fsync", full)
        assert "No space left on device" in only(environment.check_folder(folder)).text
    assert list(tmp_path.iterdir()) == [tmp_path / "data"], "nothing is left"
    with monkeypatch.context() as planted:
        planted.setattr(environment.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        assert "keep_latest_k" in only(environment.check_folder(folder, config)).remedy
    monkeypatch.setattr(environment, "_write_speed", lambda _: 1.0)
    assert "slow_timeout_seconds" in only(environment.check_folder(folder, config)).text


def test_data_that_are_missing_damaged_or_too_few_fail(config, tmp_path):
    assert passes(environment.check_data(config, 1, 4))
    long = changed(tiny_config(tmp_path / "run", tmp_path / "data"), {"training.steps": 200})
    long.model_spec = config.model_spec
    few = only(environment.check_data(long, 1, 4))
    assert "pairs" in few.text and "more than 4" in few.text and "--most-epochs 7" in few.remedy
    assert passes(environment.check_data(long, 1, most_epochs=7))
    wide = {"training.global_batch_size": 1024, "training.steps": 1}
    lanes = [one for one in environment.check_data(changed(long, wide), 1, 99) if one.remedy]
    assert "1024 lanes need a document each" in lanes[0].text
    (shard,) = (tmp_path / "data" / "train" / "pairs").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[np.load(shard.with_suffix(".index.npy"))[0][0]] ^= 255  # a token of document 0
    shard.write_bytes(content)
    assert "differs from its checksum" in only(environment.check_data(config, 1, 4)).text
    shard.unlink()
    assert f"{shard} is missing" in only(environment.check_data(config, 1, 4)).text
    config.data.folder = str(tmp_path / "none")
    assert "prepare" in str(only(environment.check_data(config, 1, 4)))


def test_a_model_that_no_rank_can_hold_fails(config, monkeypatch):
    assert passes(environment.check_memory(config, 1))
    monkeypatch.setattr(environment, "_memory_of_a_rank", lambda _: (10, "of a GPU"))
    assert "local_batch_size" in only(environment.check_memory(config, 1)).remedy
    refused = list(environment.check_memory(changed(config, {"training.seq_len": 0}), 1))
    assert refused[0].remedy


@pytest.fixture
def forks(monkeypatch):
    """Fresh interpreters would take seconds to import torch."""
    monkeypatch.setattr(handshake, "START_METHOD", "fork")
    monkeypatch.setitem(handshake.LARGE, "gloo", 1 << 16)


def test_ranks_meet_here_and_one_that_ends_or_stalls_is_a_finding(forks, monkeypatch):
    good = handshake.meet_here(30)
    assert passes(good) and "2 ranks on 1 host, gloo: all-reduce in" in good[0].text
    meets = handshake._local_rank
    for instead, text in ((lambda *_: os._exit(1), "{1: 1}"), (stall, "do not answer")):

        def planted(rank, *others, instead=instead):
            (instead if rank else meets)(rank, *others)

        monkeypatch.setattr(handshake, "_local_rank", planted)
        assert text in only(handshake.meet_here(0.3 if instead is stall else 30)).text


def stall(*_):
    time.sleep(60)


def test_clocks_that_differ_and_wrong_sums_fail(monkeypatch, tmp_path):
    monkeypatch.setitem(handshake.LARGE, "gloo", 1 << 10)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    assert passes(handshake.measure("gloo"))
    line = "the clock of b (rank 1) is 9.0 s ahead of that of rank 0 (a); synchronise (NTP)"
    monkeypatch.setattr(handshake, "differences", lambda facts: [line])
    assert only(handshake.measure("gloo")).remedy == "synchronise (NTP)"
    monkeypatch.undo()
    monkeypatch.setitem(handshake.LARGE, "gloo", 1 << 10)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(1))
    assert "wrong sums" in only(handshake.measure("gloo")).text
    dist.destroy_process_group()


def test_the_status_says_whether_all_passed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "PROBE", 1 << 20)
    monkeypatch.setattr(handshake, "meet_here", lambda _: [])
    assert doctor.main([]) == 0 and "all checks passed" in capsys.readouterr().out
    bad = environment.Finding("ranks", "no answer", "open the ports")
    monkeypatch.setattr(handshake, "meet_here", lambda _: [bad])
    assert doctor.main(["--folder", "runs"]) == 1
    assert "FAILED  ranks     no answer. Remedy: open the ports" in capsys.readouterr().out
    assert doctor.main(["check", "no_such_config"]) == 2
    assert doctor.main(["--training.steps=3"]) == 2
    assert "doctor check CONFIG" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        doctor.main(["presets", "--training.steps", "3"])
    assert end.value.code == 2
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "whether runs can start here" in capsys.readouterr().out


def test_the_ranks_of_a_launcher_meet(monkeypatch, tmp_path):
    environ = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(handshake.LARGE, "gloo", 1 << 10)
    bad = environment.Finding("folder", "full", "make room")
    found = handshake.meet([bad], 30)
    assert found[0] == bad and "1 rank on 1 host" in found[1].text
    monkeypatch.setenv("WORLD_SIZE", "2")  # the other never comes
    assert "rank 0" in only(handshake.meet([], 0.5)).text
