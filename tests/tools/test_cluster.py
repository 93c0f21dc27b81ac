"""The scripts for clusters, with a fake Slurm of one node."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, SUPPORT
from toy import make_data

SCRIPTS = ROOT / "tools" / "cluster"

FAKES = {
    # one node: the task is the command itself, which gets srun's signals
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$*" >> "$REQUEUED"; fi',
    "nvidia-smi": "exit 1",
}

# Stands in step 3 until it is asked to stop, the first time.
JOB = """
import sys, time
from pathlib import Path
from tiny_runs import tiny_config
from earlyfuse.parallel.reliability import preemption

assert sys.argv[1:3] == ["moma", "--dump_folder"] and sys.argv[4:] == ["--training.steps", "6"]
config = tiny_config(Path(sys.argv[3]), Path({data!r}))
config.checkpoint.interval = 1000
preemption.listen()
trainer = config.build()
train_step = trainer.train_step

def waiting(batches):
    while trainer.step == 3 and not preemption.requested():
        time.sleep(0.01)
    train_step(batches)

trainer.train_step = waiting
trainer.train()
trainer.close()
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a batch script; the fakes come first on PATH."""
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    tests = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": tests,
        "VIRTUAL_ENV": sys.prefix,  # else host.sh takes .venv, which may not be the one under test
        "OMP_NUM_THREADS": "1",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_ON_NODE": "1",
    }
    return {**os.environ, **variables}


def submit(environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(SCRIPTS / "train.sbatch"), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_signal_before_the_time_limit_saves_and_queues_the_job_again(slurm, tmp_path):
    (tmp_path / "job.py").write_text(JOB.format(data=str(make_data(tmp_path / "data"))))
    slurm["PROGRAM"] = str(tmp_path / "job.py")
    job = submit(slurm, str(tmp_path / "run"), "moma", "--training.steps", "6")
    shown = ""
    for line in job.stdout:
        shown += line
        if line.startswith("step 2/"):
            job.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B: has it
            break
    rest, _ = job.communicate(timeout=300)
    assert job.returncode == 0, shown + rest
    assert "the same command resumes" in rest
    assert (tmp_path / "run" / "checkpoint" / "step-3").is_dir()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("body", "status", "requeued"),
    [
        ("exit 0", 0, False),
        ("exit 3", 3, False),
        ('mkdir "$SAVED/step-20"; exit 3', 0, True),  # it got further: try again
        ('mkdir "$SAVED/step-10.partial"; exit 3', 3, False),
        ('mkdir "$SAVED/step-20"; exit 0', 0, False),
        ('mkdir "$SAVED/step-20"; exit 2', 2, False),  # refused: it would be again
    ],
)
def test_a_failed_job_is_queued_again_if_it_got_further(slurm, tmp_path, body, status, requeued):
    saved, launcher = tmp_path / "run" / "checkpoint", tmp_path / "launcher"
    (saved / "step-9").mkdir(parents=True)
    launcher.write_text(body)
    slurm |= {"LAUNCHER": f"bash {launcher}", "SAVED": str(saved)}
    job = submit(slurm, str(tmp_path / "run"), "moma")
    shown, _ = job.communicate(timeout=60)
    assert job.returncode == status, shown
    assert (tmp_path / "requeued").exists() == requeued


def test_the_launchers_of_a_job_meet_at_its_first_host(slurm, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text('echo "$@"; env | grep -E "^(OMP|NCCL|GLOO)"\n')
    slurm |= {"LAUNCHER": f"bash {launcher}", "SLURM_NNODES": "128", "NETWORK": "ib0", "RANKS": "8"}
    shown, _ = submit(slurm, "run", "moma", "--training.steps", "9").communicate(timeout=60)
    for word in (
        *("--nnodes=128", "--nproc-per-node=8", "--rdzv-endpoint=localhost:20077"),
        *("--rdzv-id=77-0", "train.py moma --dump_folder run --training.steps 9"),
        *("OMP_NUM_THREADS=1", "NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0"),
    ):
        assert word in shown, word


def test_mistakes_are_said_before_anything_starts(slurm, tmp_path):
    host = str(SCRIPTS / "host.sh")
    usage = subprocess.run([host], capture_output=True, text=True, env=slurm)
    assert usage.returncode == 2 and "RUN_FOLDER CONFIG" in usage.stderr
    elsewhere = [host, "run", "moma"]
    found = subprocess.run(elsewhere, capture_output=True, text=True, env=slurm, cwd=tmp_path)
    assert found.returncode == 2 and "train.py is not in" in found.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["host.sh", "train.sbatch"])
def test_shellcheck_finds_nothing(name):
    found = subprocess.run(["shellcheck", str(SCRIPTS / name)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
