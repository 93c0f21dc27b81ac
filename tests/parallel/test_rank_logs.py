"""Under a launcher: a log file for each rank, one console, and the slowest rank named."""

import json
import re
import socket
from pathlib import Path

import pytest
from ranks import torchrun
from tiny_runs import run, tiny_config

STEPS = 6
SLOW = 4

# Rank 1 is slow in its steps from SLOW on and fails after the last, at the first attempt only.
JOB = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from tiny_runs import tiny_config
from earlyfuse.parallel.reporting import rank_log

folder, data = Path(sys.argv[1]), Path(sys.argv[2])
config = tiny_config(folder, data, steps={steps})
config.validator.batch_rows = 4
config.parallelism.data_parallel_shard_degree = 2
trainer = config.build()
rank = dist.get_rank()
train_step = trainer.train_step

def slow(iterator):
    if trainer.step == {slow} and rank == 1:
        until = time.thread_time() + 1
        while time.thread_time() < until:
            pass
    train_step(iterator)

trainer.train_step = slow
print("printed by rank", rank)
os.system("echo a child of rank " + str(rank))
trainer.train()
trainer.close()
if rank == 1:
    rank_log.tell("told to all")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise RuntimeError("lost a wheel")
"""


@pytest.fixture(scope="module")
def started_twice(tmp_path_factory, data) -> tuple[Path, str]:
    """A run of two ranks that is started twice: its folder and all that the console showed."""
    folder = tmp_path_factory.mktemp("logs")
    script = folder / "job.py"
    script.write_text(JOB.format(steps=STEPS, slow=SLOW))
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as tools/launch.py has it
    arguments = (str(script), str(folder / "run"), str(data))
    process = torchrun(2, *arguments, restarts=1, env=fresh_store)
    console, _ = process.communicate(timeout=300)
    assert process.returncode == 0, console
    return folder / "run", console


def test_each_rank_writes_its_own_file_across_restarts(started_twice):
    folder, _ = started_twice
    for rank in (0, 1):
        log = (folder / "logs" / f"rank-{rank}.log").read_text()
        headers = re.findall(r"^--- .*", log, re.MULTILINE)
        assert len(headers) == 2
        for restart, header in enumerate(headers):
            assert f"rank {rank} on {socket.gethostname()}, of 2, pid " in header
            assert header.endswith(f"restart {restart}")
        assert log.count(f"printed by rank {rank}\n") == 2
        assert log.count(f"a child of rank {rank}\n") == 2
        assert f"rank {1 - rank}\n" not in log
    assert log.count("RuntimeError: lost a wheel\n") == 1 and "Traceback" in log


def test_the_console_is_that_of_rank_0_and_of_errors(started_twice):
    folder, console = started_twice
    rank_0 = (folder / "logs" / "rank-0.log").read_text()
    steps = re.findall(r"^step .*", console, re.MULTILINE)
    assert steps == re.findall(r"^step .*", rank_0, re.MULTILINE) and len(steps) == STEPS
    assert console.count("printed by rank 0\n") == 2 and "printed by rank 1" not in console
    assert f"[rank 1 on {socket.gethostname()}] RuntimeError: lost a wheel\n" in console
    assert console.count("] told to all\n") == 2


def test_a_logged_step_names_the_slowest_rank(started_twice):
    folder, console = started_twice
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    slow = next(line for line in lines if line["kind"] == "train" and line["step"] == SLOW)
    assert slow["slowest_rank"] == 1 and slow["slowest_host"] == socket.gethostname()
    assert slow["rank_seconds/max"] > 1 and 0 <= slow["data_wait"] < 1
    # both ranks took the second that one of them lost; only its own time shows it
    assert slow["rank_seconds/min"] < slow["rank_seconds/max"] / 2
    shown = next(line for line in console.splitlines() if line.startswith(f"step {SLOW}/"))
    assert f", slowest rank 1 on {socket.gethostname()} | eta" in shown


def test_a_run_alone_has_no_other_ranks_to_speak_of(tmp_path, data, capfd):
    run(tiny_config(tmp_path / "run", data, steps=1))
    assert "slowest" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("step"))
    assert line.count("|") == 5 and "rank" not in line
    assert not (tmp_path / "run" / "logs").exists()
