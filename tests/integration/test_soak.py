"""Soak: a run on two ranks that meets faults from outside, in random order and at random moments,
equals the undisturbed run bit for bit.

    SOAK_ROUNDS=20 SOAK_SEED=1 pytest tests/integration/test_soak.py

A round has each fault once and takes minutes; without SOAK_ROUNDS the test is skipped.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT
from soak_ranks import SAVE_EVERY
from tiny_runs import metrics
from toy import make_data

from earlyfuse.parallel.checkpoint.manifest import read_manifest

PATIENCE = 600  # seconds for one recovery, on a machine that other work shares
ENDLESS = 1_000_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SOAK_ROUNDS" not in os.environ, reason="minutes a round: set SOAK_ROUNDS"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc"),
]


def until(condition: Callable[[], Any]) -> Any:
    """The first true value of ``condition``."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {PATIENCE} s"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    """True if the process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Job:
    """A run folder and the launcher that works on it."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data, self.log = folder, data, folder.with_suffix(".log")
        self.launcher: subprocess.Popen | None = None

    def start(self, *options: str, last: int = ENDLESS, restarts: int = 100) -> None:
        command = [sys.executable, "-m", "earlyfuse.tools.launch", "--standalone"]
        command += ["--nproc-per-node=2", f"--max-restarts={restarts}"]
        command += [str(SUPPORT / "soak_ranks.py"), str(self.folder), str(self.data), str(last)]
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*command, *options],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def pids(self) -> list[int]:
        """Process ids of both ranks, once they run."""
        files = [self.folder / f"pid-{rank}" for rank in range(2)]

        def running() -> list[int]:
            pids = [int(file.read_text() or 0) for file in files if file.exists()]
            return pids if len(pids) == 2 and all(map(alive, pids)) else []

        return until(running)

    def last_step(self) -> int:
        """Last step logged; a line that is being written does not count."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def ended(self) -> tuple[int, str]:
        """Exit status and output of the launcher."""
        return self.launcher.wait(PATIENCE), self.log.read_text()


@pytest.fixture
def jobs(tmp_path):
    data = make_data(tmp_path / "data")
    jobs = [Job(tmp_path / name, data) for name in ("harmed", "calm")]
    yield jobs
    for job in jobs:
        if job.launcher is not None and job.launcher.poll() is None:
            for pid in (*job.pids(), job.launcher.pid):
                os.kill(pid, signal.SIGKILL)
            job.launcher.wait()


# ---------------------------------------------------------------- the faults


def killed_rank(job: Job, dice: random.Random) -> None:
    os.kill(dice.choice(job.pids()), signal.SIGKILL)


def killed_launcher(job: Job, dice: random.Random) -> None:
    """Its ranks end by themselves."""
    pids = job.pids()
    job.launcher.kill()
    job.launcher.wait()
    until(lambda: not any(map(alive, pids)))
    job.start()


def stopped_launcher(job: Job, dice: random.Random) -> None:
    job.launcher.send_signal(dice.choice([signal.SIGTERM, signal.SIGUSR1]))
    resume_after_a_graceful_stop(job)


def stopped_rank(job: Job, dice: random.Random) -> None:
    os.kill(dice.choice(job.pids()), signal.SIGTERM)
    resume_after_a_graceful_stop(job)


def resume_after_a_graceful_stop(job: Job) -> None:
    status, output = job.ended()
    assert status == 0 and "the same command resumes" in output, output
    job.start()


def frozen_rank(job: Job, dice: random.Random) -> None:
    """The watchdog ends it and names it."""
    rank = dice.randrange(2)
    pid = job.pids()[rank]
    os.kill(pid, signal.SIGSTOP)
    until(lambda: not alive(pid))
    assert f"the job stands still: rank {rank} on " in job.log.read_text()


def slow_rank(job: Job, dice: random.Random) -> None:
    """Nothing ends."""
    pids = job.pids()
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(3)
    os.kill(pids[0], signal.SIGCONT)
    step = job.last_step()
    until(lambda: job.last_step() > step + 3)
    assert job.pids() == pids and all(map(alive, pids))


def damaged_checkpoint(job: Job, dice: random.Random) -> None:
    """Refused by name; then the one before it, if asked for."""
    job.launcher.send_signal(signal.SIGTERM)
    status, output = job.ended()
    assert status == 0, output
    checkpoints = job.folder / "checkpoint"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    victim = newest / dice.choice(sorted(read_manifest(newest).files))
    content = bytearray(victim.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    victim.write_bytes(content)
    job.start(restarts=0)
    status, output = job.ended()
    assert status != 0 and f"{newest} is damaged" in output, output
    job.start("fallback")


FAULTS = (
    killed_rank,
    killed_launcher,
    stopped_launcher,
    stopped_rank,
    frozen_rank,
    slow_rank,
    damaged_checkpoint,
)


def test_a_run_that_met_every_fault_is_the_undisturbed_one_bit_for_bit(jobs):
    harmed, calm = jobs
    dice = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    harmed.start()
    until(lambda: harmed.last_step() > 2 * SAVE_EVERY)  # two checkpoints: one may be damaged
    for _ in range(int(os.environ["SOAK_ROUNDS"])):
        for fault in dice.sample(FAULTS, len(FAULTS)):
            time.sleep(dice.uniform(0, 5))
            begin = time.monotonic()
            print(f"{fault.__name__} in step {harmed.last_step()}", end=" ", flush=True)
            fault(harmed, dice)
            harmed.pids()
            step = harmed.last_step()
            until(lambda step=step: harmed.last_step() > step)
            print(f"trains further after {time.monotonic() - begin:.0f} s", flush=True)
    common = (harmed.last_step() // SAVE_EVERY + 1) * SAVE_EVERY
    until(lambda: harmed.last_step() > common)
    harmed.launcher.send_signal(signal.SIGTERM)
    assert harmed.ended()[0] == 0
    calm.start(last=common)
    assert calm.ended()[0] == 0, calm.log.read_text()

    expected, found = (
        read_manifest(job.folder / "checkpoint" / f"step-{common}").files for job in (calm, harmed)
    )
    assert found == expected, "the same bytes in every file"
    lines = [line for line in metrics(harmed.folder) if line["step"] <= common]
    assert lines == metrics(calm.folder)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, common + 1))
