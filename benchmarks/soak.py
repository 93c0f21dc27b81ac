"""A run on two ranks that meets a fault every few minutes, beside the same run left alone.

    python benchmarks/soak.py --minutes 60 --every 120 --seed 0

Both train MoMa on the embedded corpus through ``train.py`` and the project's launcher, with equal
configs. Faults of every kind come in random (seeded) order and at random moments, from outside:
signals, limits on file size, bytes flipped on disk. When the time is over, both go on to the next
common checkpoint. Then these must be equal bit for bit: parameters, optimizer, state of the data
lanes, and the numbers of every step, each of which must be in metrics.jsonl once.

Results: results/soak.md (summary), results/soak.jsonl (every event when it happened). Linux only.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from earlyfuse.data.prepare.embedded import prepare_corpus
from earlyfuse.parallel.checkpoint.files.dcp_reader import DcpReader, load_dcp
from harness import RESULTS, environment

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY, VALIDATE_EVERY, FROZEN_AFTER = 50, 70, 30
PATIENCE = 900  # seconds for one recovery, on a machine that other work shares
TIMES = ("tokens_per_second", "data_wait", "memory_gib", "mfu", "rank_seconds", "slowest")
SETTINGS = {
    "training.steps": 1_000_000,  # ends when the time is over
    "training.seq_len": 64,
    "training.local_batch_size": 4,
    "training.global_batch_size": 8,
    "checkpoint.interval": SAVE_EVERY,
    "validator.freq": VALIDATE_EVERY,
    "validator.max_batches": 2,
    "metrics.log_freq": 1,
    "watchdog.timeout_seconds": FROZEN_AFTER,
    "watchdog.slow_timeout_seconds": 300,
}


class Job:
    """One run folder and the launcher that works on it at present."""

    def __init__(self, folder: Path, data: Path, *options: str):
        self.folder, self.log_path = folder, folder.with_suffix(".log")
        self.command = [*("--nproc-per-node", "2"), str(ROOT / "train.py"), "moma_4t4i"]
        self.command += ["--dump_folder", str(folder), "--data.folder", str(data), *options]
        for name, value in SETTINGS.items():
            self.command += [f"--{name}", str(value)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, restarts: int = 1000) -> None:
        """Start the command, the same every time but for ``options``."""
        launcher = [sys.executable, "-m", "earlyfuse.tools.launch", "--standalone"]
        launcher += ["--max-restarts", str(restarts), *self.command, *options]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                launcher,
                stdout=log,
                stderr=log,
                cwd=self.folder.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """Rank → process id of what the launcher runs at present."""
        assert self.process is not None, "started"
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent != self.process.pid:
                    continue
                variables = (path / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError, IndexError):
                continue  # it ended meanwhile
            rank = [v for v in variables if v.startswith(b"RANK=")]
            if rank:
                found[int(rank[0][5:])] = int(path.name)
        return found

    def lines(self) -> list[dict[str, Any]]:
        """All that is logged; a line that is being written is left out."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        whole = path.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line, parse_constant=str) for line in whole]

    def last(self) -> tuple[int, str]:
        """Step and kind of the last logged line."""
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(max(path.stat().st_size - 50_000, 0))
                line = json.loads(file.read().rpartition(b"\n")[0].splitlines()[-1])
        except (OSError, IndexError, ValueError):
            return 0, ""
        return line["step"], line["kind"]

    def last_step(self) -> int:
        """Step of the last logged line."""
        return self.last()[0]

    def reach(self, step: int) -> None:
        """Wait until ``step`` is logged."""
        until(lambda: self.last_step() >= step, pause=0.2)

    def said(self, offset: int) -> str:
        """What the launcher and its ranks printed since ``offset``."""
        with self.log_path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")

    def offset(self) -> int:
        """Where the log ends at present."""
        return self.log_path.stat().st_size

    def checkpoint(self, step: int) -> Path:
        """Folder of the complete checkpoint of ``step``."""
        return self.folder / "checkpoint" / f"step-{step}"

    def wait(self, timeout: float = PATIENCE) -> int:
        """Exit status of the launcher."""
        assert self.process is not None, "started"
        return self.process.wait(timeout)

    def stop(self) -> int:
        """Ask for a graceful stop; exit status."""
        assert self.process is not None, "started"
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End everything at once."""
        if self.process is None:
            return
        pids = [*self.ranks().values(), self.process.pid]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def until(condition: Callable[[], Any], timeout: float = PATIENCE, pause: float = 0.05) -> Any:
    """The first true value of ``condition``; raises ``TimeoutError``."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} stayed false for {timeout} s")
        time.sleep(pause)
    return found


# ---------------------------------------------------------------- the faults


@dataclass
class Met:
    """What a fault did: ``pids`` of the ranks before it, ``offset`` of the log before it."""

    job: Job
    dice: random.Random
    pids: dict[int, int]
    offset: int
    facts: dict[str, Any] = field(default_factory=dict)

    def signal_rank(self, number: signal.Signals) -> int:
        """Send it to a rank at random; returns its process id."""
        rank = self.dice.choice(sorted(self.pids))
        os.kill(self.pids[rank], number)
        self.facts |= {"rank": rank, "step": self.job.last_step()}
        return self.pids[rank]

    def signal_launcher(self, number: signal.Signals) -> None:
        """Send it to the launcher."""
        assert self.job.process is not None, "started"
        self.job.process.send_signal(number)
        self.facts["step"] = self.job.last_step()

    def exits_0_and_resumes(self) -> None:
        """The launcher must have stopped gracefully; start the command again."""
        status = self.job.wait()
        self.facts["exit"] = status
        if status != 0 or "the same command resumes" not in self.job.said(self.offset):
            raise AssertionError(f"a graceful stop ended with exit status {status}")
        self.job.start()

    def restarted(self) -> None:
        """Wait until the launcher has started other processes."""
        until(lambda: len(now := self.job.ranks()) == 2 and not set(now.values()) & self.ids())

    def ids(self) -> set[int]:
        """Process ids before the fault."""
        return set(self.pids.values())


def killed_at_any_moment(met: Met) -> None:
    """SIGKILL of one rank"""
    met.signal_rank(signal.SIGKILL)
    met.restarted()


def killed_in_a_checkpoint(met: Met) -> None:
    """SIGKILL of one rank while a checkpoint is being written"""
    until(lambda: [*(met.job.folder / "checkpoint").glob("*.partial")], pause=0.002)
    time.sleep(met.dice.uniform(0, 0.4))
    met.facts["partial left"] = bool([*(met.job.folder / "checkpoint").glob("*.partial")])
    met.signal_rank(signal.SIGKILL)
    met.restarted()


def killed_in_validation(met: Met) -> None:
    """SIGKILL of one rank during a validation"""

    def validating() -> bool:
        step, kind = met.job.last()
        return kind == "train" and step % VALIDATE_EVERY == 0

    until(validating, pause=0.002)
    met.signal_rank(signal.SIGKILL)
    met.restarted()


def launcher_killed(met: Met) -> None:
    """SIGKILL of the launcher: its ranks must end by themselves, then the same command"""
    met.signal_launcher(signal.SIGKILL)
    met.job.wait()
    until(lambda: not any(alive(pid) for pid in met.ids()), timeout=3 * FROZEN_AFTER)
    met.job.start()


def launcher_sigterm(met: Met) -> None:
    """SIGTERM to the launcher, then the same command"""
    met.signal_launcher(signal.SIGTERM)
    met.exits_0_and_resumes()


def launcher_sigusr1(met: Met) -> None:
    """SIGUSR1 to the launcher, then the same command"""
    met.signal_launcher(signal.SIGUSR1)
    met.exits_0_and_resumes()


def rank_sigterm(met: Met) -> None:
    """SIGTERM to one rank, then the same command"""
    met.signal_rank(signal.SIGTERM)
    met.exits_0_and_resumes()


def frozen(met: Met) -> None:
    """SIGSTOP of one rank: found by the watchdog"""
    pid, begin = met.signal_rank(signal.SIGSTOP), time.monotonic()
    until(lambda: not alive(pid))
    met.facts["found after s"] = round(time.monotonic() - begin, 1)
    named = f"rank {met.facts['rank']} on "
    if f"the job stands still: {named}" not in met.job.said(met.offset):
        raise AssertionError("the watchdog did not name the rank")
    met.restarted()


def slowed(met: Met) -> None:
    """one rank paused for a third of the watchdog's limit: nothing may end"""
    pid = met.signal_rank(signal.SIGSTOP)
    time.sleep(FROZEN_AFTER / 3)
    os.kill(pid, signal.SIGCONT)
    met.job.reach(met.job.last_step() + 3)
    if met.job.ranks() != met.pids:
        raise AssertionError("a rank that was only slow was ended")


def disk_full(met: Met) -> None:
    """no file may grow as large as a checkpoint: the run goes on without that one"""
    limit = (met.job.folder / "metrics.jsonl").stat().st_size + (8 << 20)
    step = met.job.last_step()
    for pid in met.pids.values():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    told = "could not be written: rank"
    until(lambda: told in met.job.said(met.offset), pause=0.5)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    for pid in met.pids.values():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    met.job.reach(step + SAVE_EVERY + 1)
    if met.job.ranks() != met.pids:
        raise AssertionError("a full disk ended the job")


def damaged(met: Met) -> None:
    """a byte of the newest checkpoint flipped: refused by name, then --checkpoint.fallback"""
    if met.job.stop() != 0:
        raise AssertionError("a graceful stop did not end with exit status 0")
    met.facts["step"] = met.job.last_step()
    checkpoints = met.job.folder / "checkpoint"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    victim = met.dice.choice(sorted(json.loads((newest / "manifest.json").read_text())["files"]))
    with (newest / victim).open("r+b") as file:
        place = met.dice.randrange((newest / victim).stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << met.dice.randrange(8)]))
    met.facts["damaged"] = f"{newest.name}/{victim}"
    offset = met.job.offset()
    met.job.start(restarts=0)
    if met.job.wait() == 0 or f"{newest} is damaged" not in met.job.said(offset):
        raise AssertionError("a damaged checkpoint was not refused by name")
    met.job.start("--checkpoint.fallback")


def alive(pid: int) -> bool:
    """Whether the process still runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FAULTS = (
    *(killed_at_any_moment, killed_in_a_checkpoint, killed_in_validation, launcher_killed),
    *(launcher_sigterm, launcher_sigusr1, rank_sigterm, frozen, slowed, disk_full, damaged),
)
GOES_ON = (slowed, disk_full)


# ---------------------------------------------------------------- the soak


class Events:
    """What happened, in order: printed and written at once."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", buffering=1)
        self.begin = time.monotonic()
        self.all: list[dict[str, Any]] = []

    def add(self, **event: Any) -> None:
        """Note ``event`` with the time since the start."""
        event = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "minute": round((time.monotonic() - self.begin) / 60, 2),
            **event,
        }
        self.all.append(event)
        self.file.write(json.dumps(event) + "\n")
        print(json.dumps(event), flush=True)


def in_turn(dice: random.Random) -> Iterator[Callable[[Met], None]]:
    """Every kind once in random order, then again."""
    while True:
        yield from dice.sample(FAULTS, len(FAULTS))


def inject(fault: Callable[[Met], None], job: Job, dice: random.Random) -> dict[str, Any]:
    """Let the job meet ``fault`` and wait until it trains further than ever before."""
    ranks = until(lambda: len(r := job.ranks()) == 2 and r)
    met, begin = Met(job, dice, ranks, job.offset()), time.monotonic()
    met.facts["step"] = job.last_step()
    fault(met)
    furthest = met.facts["step"]
    if fault not in GOES_ON:
        words = until(lambda: "resumed at step" in job.said(met.offset) and job.said(met.offset))
        resumed = int(words.rpartition("resumed at step")[2].split()[0])
        met.facts |= {"resumed at": resumed, "done again": max(furthest - resumed, 0)}
    job.reach(furthest + 1)
    met.facts["seconds"] = round(time.monotonic() - begin, 1)
    return met.facts


def soak(options: argparse.Namespace, work: Path, events: Events) -> tuple[Job, Job]:
    """Harm one job for the given time while another is left alone; both end at a checkpoint."""
    dice = random.Random(options.seed)
    calm = Job(work / "calm", options.data, "--checkpoint.keep_latest_k", "0")
    harmed = Job(work / "harmed", options.data, "--checkpoint.keep_latest_k", "3")
    try:
        calm.start()
        until(calm.last_step, pause=1)  # the data are prepared
        harmed.start()
        for job in (calm, harmed):
            job.reach(SAVE_EVERY + 1)
        events.begin = time.monotonic()
        events.add(event="both train", steps=[calm.last()[0], harmed.last()[0]])
        end, kinds = events.begin + 60 * options.minutes, in_turn(dice)
        while time.monotonic() < end:
            time.sleep(options.every * dice.uniform(0.5, 1.5))
            assert harmed.process is not None and calm.process is not None, "started"
            if harmed.process.poll() is not None or calm.process.poll() is not None:
                raise AssertionError("a job ended without a fault; see its log")
            fault = next(kinds)
            try:
                facts = inject(fault, harmed, dice)
                events.add(event="fault", kind=fault.__name__, survived=True, **facts)
            except (AssertionError, TimeoutError, OSError) as error:
                events.add(event="fault", kind=fault.__name__, survived=False, error=repr(error))
                harmed.kill()  # what follows still counts
                harmed.wait()
                harmed.start()
            drop_old(calm, harmed.last()[0])
        common = (max(harmed.last()[0], SAVE_EVERY) // SAVE_EVERY + 1) * SAVE_EVERY
        for job in (harmed, calm):
            until(job.checkpoint(common).is_dir, timeout=4 * PATIENCE, pause=0.2)
        statuses = [job.stop() for job in (harmed, calm)]
        events.add(event="stopped", common_step=common, exit=statuses)
        return calm, harmed
    except BaseException:
        calm.kill()
        harmed.kill()
        raise


def drop_old(calm: Job, step: int) -> None:
    """Delete checkpoints that the harmed run has left behind; the rest waits for it."""
    for path in (calm.folder / "checkpoint").glob("step-*"):
        if path.name[5:].isdigit() and int(path.name[5:]) < step - 4 * SAVE_EVERY:
            shutil.rmtree(path)


# ---------------------------------------------------------------- what was lost


def differences(calm: Job, harmed: Job, step: int) -> dict[str, Any]:
    """What is not equal at ``step``; all empty when nothing was lost."""
    expected, found = load(calm.checkpoint(step)), load(harmed.checkpoint(step))
    unequal = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or not same(expected[name], found[name])
    )
    lines = {job: [shown(x) for x in job.lines() if x["step"] <= step] for job in (calm, harmed)}
    steps = Counter(x["step"] for x in lines[harmed] if x["kind"] == "train")
    return {
        "entries of the checkpoint that differ": unequal,
        "steps missing": [s for s in range(1, step + 1) if not steps[s]],
        "steps logged twice": [s for s, count in steps.items() if count > 1],
        "logged lines that differ": [
            a["step"] for a, b in zip(lines[calm], lines[harmed], strict=False) if a != b
        ]
        + (["number of lines"] if len(lines[calm]) != len(lines[harmed]) else []),
        "compared": f"{len(expected)} entries, {len(lines[calm])} lines",
        "tokens": int(sum(expected["train_state.tokens_M"].tolist())),
        "rows": int(expected["dataloader.lanes"][:, -1].sum()),
    }


def load(folder: Path) -> dict[str, Any]:
    """Every entry of a checkpoint, whole."""
    reader = DcpReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in stored.items()
    }
    load_dcp(state, reader, alone=True)
    return state


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def shown(line: dict[str, Any]) -> dict[str, Any]:
    """A logged line without what depends on the clock."""
    return {name: value for name, value in line.items() if not name.startswith(TIMES)}


# ---------------------------------------------------------------- the report


def report(options: argparse.Namespace, events: Events, lost: dict[str, Any], log: str) -> str:
    """The summary, in Markdown."""
    faults = [e for e in events.all if e["event"] == "fault"]
    ended = events.all[-1] if events.all[-1]["event"] == "stopped" else {}
    minutes = events.all[-1]["minute"]
    nothing = not any(lost[name] for name in list(lost)[:4])
    lines = [
        "# Soak: faults on a run of two ranks",
        "",
        ", ".join(f"{key}: {value}" for key, value in environment().items()),
        "",
        f"{minutes:.0f} minutes, {len(faults)} faults ({sum(f['survived'] for f in faults)} "
        f"survived), seed {options.seed}, one every {options.every:g} s on average besides "
        f"recovery; up to step {ended.get('common_step')}. Other work may have shared the machine.",
        "",
        "| fault | tried | survived | steps done again | seconds to new work, median |",
        "|---|---:|---:|---:|---:|",
    ]
    for fault in FAULTS:
        mine = [f for f in faults if f["kind"] == fault.__name__]
        seconds = sorted(f["seconds"] for f in mine if f["survived"])
        again = sum(f.get("done again", 0) for f in mine)
        lines.append(
            f"| {(fault.__doc__ or '').strip()} | {len(mine)} | "
            f"{sum(f['survived'] for f in mine)} | {again} | "
            f"{seconds[len(seconds) // 2] if seconds else '–'} |"
        )
    lines += [
        "",
        f"Lost: {'nothing' if nothing else 'SOMETHING, see below'}. Compared with the run left "
        f"alone, at step {ended.get('common_step')}, bit for bit: {lost['compared']} "
        f"({lost['rows']} rows, {lost['tokens']} tokens).",
        "",
        *(f"- {name}: {value or 'none'}" for name, value in list(lost.items())[:4]),
        f"- checkpoints not written, as arranged: {log.count('could not be written')}",
        f"- exits of the graceful stops at the end: {ended.get('exit')}",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the soak; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=120, help="seconds between faults, mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/soak"), help="emptied first")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="built if missing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.data = options.data.resolve()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    prepare_corpus(options.data)
    events = Events(options.results / "soak.jsonl")
    calm, harmed = soak(options, work, events)
    lost = differences(calm, harmed, events.all[-1]["common_step"])
    page = report(options, events, lost, harmed.log_path.read_text(errors="replace"))
    (options.results / "soak.md").write_text(page)
    print(page)
    return int(any(lost[name] for name in list(lost)[:4]))


if __name__ == "__main__":
    sys.exit(main())
