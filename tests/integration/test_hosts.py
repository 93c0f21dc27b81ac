"""Two hosts, as two network namespaces joined by one cable, which is pulled out during training."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from places import SUPPORT
from toy import make_data

ADDRESSES = ("10.213.0.1", "10.213.0.2")
STEPS, CUT_IN = 8, 5  # saved every 3 steps
LOST_AFTER = 3  # seconds that a connection waits for a silent host
# what the kernel may say of a connection over a cable that is cut
UNREACHABLE = [
    os.strerror(number)
    for number in (
        *(errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH),
        *(errno.EHOSTDOWN, errno.ENETDOWN, errno.ECONNRESET),
    )
]
PATIENCE = 300  # seconds that a state is waited for, on any machine

# The undisturbed run first, then the same in another folder: one start of the ranks for both.
JOB = f"""
import os, sys, time
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from tiny_runs import tiny_config

out, data = Path(sys.argv[1]), Path(sys.argv[2])
for name in ("undisturbed", "cut"):
    result = out / f"{{name}}.pt"
    if result.exists():
        continue
    config = tiny_config(out / name, data, steps={STEPS})
    config.validator.enable = config.metrics.enable_tensorboard = False
    config.validator.batch_rows = 4
    trainer = config.build()
    train_step = trainer.train_step

    def held(batches):
        while trainer.step == {CUT_IN} and not (out / "go").exists():
            time.sleep(0.01)
        train_step(batches)

    if name == "cut":
        trainer.train_step = held
    trainer.train()
    found = {{
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in trainer.model.state_dict().items()
    }}
    trainer.close()
    if os.environ["RANK"] == "0":
        torch.save(found, result)
"""


class Hosts:
    """Two network namespaces in one user namespace; each is held open by a sleeping process."""

    def __init__(self) -> None:
        self.holders: list[subprocess.Popen] = []

    def connect(self) -> None:
        self.holders.append(_holder("unshare", "--map-root-user", "--net"))
        self.holders.append(_holder(*self._enter(0), "unshare", "--net"))
        second = self.holders[1].pid
        self.run(
            0, "ip", "link", "add", "cable", "type", "veth", "peer", "cable", "netns", f"{second}"
        )
        for host, address in enumerate(ADDRESSES):
            self.run(host, "ip", "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self.run(host, "ip", "link", "set", device, "up")

    def _enter(self, host: int) -> list[str]:
        flags = ["--user", "--preserve-credentials", "--net"]
        return ["nsenter", f"--target={self.holders[host].pid}", *flags]

    def run(self, host: int, *command: str) -> None:
        subprocess.run([*self._enter(host), *command], check=True, capture_output=True, text=True)

    def start(self, host: int, *command: str, log: Path) -> subprocess.Popen:
        with log.open("a") as file:
            return subprocess.Popen(
                [*self._enter(host), *command],
                env={
                    **os.environ,
                    "EARLYFUSE_LOST_HOST_SECONDS": f"{LOST_AFTER}",
                    "GLOO_SOCKET_IFNAME": "cable",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
                },
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def processes(self) -> set[int]:
        """All that live in the namespaces, besides those that hold them open."""
        holders = {holder.pid for holder in self.holders}
        networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in holders}
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone in between, or of another user
                if os.readlink(entry / "ns" / "net") in networks:
                    found.add(int(entry.name))
        return found - holders

    def close(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for holder in self.holders:
            holder.kill()
            holder.communicate()


def _holder(*command: str) -> subprocess.Popen:
    """A process that sleeps in namespaces of its own, once it is there."""
    holder = subprocess.Popen(
        [*command, "sh", "-c", "echo there; exec sleep 3600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if holder.stdout.readline() != "there\n":
        raise OSError(holder.communicate()[1].strip())
    return holder


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"network namespaces need {', '.join(missing)} (util-linux, iproute2)")
    hosts = Hosts()
    try:
        hosts.connect()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}")
    else:
        yield hosts
    finally:
        hosts.close()


@pytest.mark.slow
def test_a_cut_cable_ends_the_job_on_both_hosts_and_the_same_command_resumes(hosts, tmp_path):
    job, data, logs = tmp_path / "job.py", make_data(tmp_path / "data"), tmp_path / "host-{}.txt"
    job.write_text(JOB)

    def launch() -> list[subprocess.Popen]:
        return [
            hosts.start(
                host,
                *(sys.executable, "-m", "earlyfuse.tools.launch", "--nnodes=2"),
                *("--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"),
                *(f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--local-addr={address}"),
                f"--rdzv-conf=is_host={int(host == 0)},read_timeout=10",
                *(str(job), str(tmp_path), str(data)),
                log=Path(str(logs).format(host)),
            )
            for host, address in enumerate(ADDRESSES)
        ]

    def printed(host: int) -> str:
        return Path(str(logs).format(host)).read_text()

    launchers = launch()
    until(lambda: f"step {CUT_IN - 1}/" in printed(0).partition("done:")[2], launchers)
    hosts.run(0, "ip", "link", "set", "cable", "down")
    (tmp_path / "go").touch()
    assert [launcher.wait(PATIENCE) for launcher in launchers] == [1, 1], printed(0) + printed(1)
    assert hosts.processes() == set()
    assert any(words in printed(0) for words in UNREACHABLE), printed(0)
    assert any(words in printed(1) for words in UNREACHABLE), printed(1)

    hosts.run(0, "ip", "link", "set", "cable", "up")
    assert [launcher.wait(PATIENCE) for launcher in launch()] == [0, 0], printed(0) + printed(1)
    assert "resumed at step 3" in printed(0)
    undisturbed, cut = (torch.load(tmp_path / f"{name}.pt") for name in ("undisturbed", "cut"))
    assert [name for name in undisturbed if not torch.equal(undisturbed[name], cut[name])] == []


def until(reached: Callable[[], bool], launchers: list[subprocess.Popen]) -> None:
    """Wait for a state; fails when a launcher ends before it."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline and all(p.poll() is None for p in launchers)
        time.sleep(0.05)
