"""Detects hangs: aborts a stalled job and names the rank, host, step and phase at fault.

A thread of each rank reports to the job's store: step, phase, for how long, and a heartbeat. A rank
past its own limit reads the reports of all ranks: at fault are ranks without a heartbeat (stopped,
or their host is gone), else those furthest behind. It writes the finding and every thread's stack
to the run folder, kills stopped ranks of its own host, and exits, so the launcher ends or restarts
the job. A rank that waits for one that has reported its failure (``failure_report``) exits at once.

A slow job continues: a rank waits for one behind it as long as *that* one may take; start, first
step, validation and checkpoint may take longer than other phases.
"""

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torchtitan.config import Configurable

from earlyfuse.parallel.reliability import failure_report, process_group
from earlyfuse.parallel.reliability.rank_consistency import named_ranks
from earlyfuse.parallel.reporting import rank_log

T = TypeVar("T")

EXIT_STATUS = 70
FOLLOWING = 1.0  # seconds for a rank to fail by itself after another one has
DONE = -1  # heartbeat of a rank that has finished training
FOLDER = "stalls"


class Phase(IntEnum):
    """Phases of a rank, in their order within a step."""

    START = 0
    DATA = 1
    FORWARD_BACKWARD = 2
    OPTIMIZER = 3
    VALIDATION = 4
    CHECKPOINT = 5


SLOW = (Phase.START, Phase.VALIDATION, Phase.CHECKPOINT)


class Report(NamedTuple):
    """State of one rank. ``idle``: seconds since it last moved; ``allowed``: its limit."""

    step: int
    phase: int
    idle: float
    allowed: float
    beat: int
    host: str
    pid: int

    @property
    def place(self) -> str:
        """Step and phase, in a message."""
        return f"step {self.step}, {Phase(self.phase).name.lower().replace('_', '-')}"

    @property
    def late(self) -> bool:
        """True at its limit, allowing for the time since the report."""
        return self.idle >= 0.8 * self.allowed


Reports = dict[int, Report | None]
"""Reports by rank; None for a rank that has not reported yet."""


class Watchdog(Configurable):
    """Watches the main thread of a rank, from construction to ``close``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        timeout_seconds: float = 300.0
        """How long a rank may stay in one phase of a step before the job ends; 0 turns it off."""

        slow_timeout_seconds: float = 1800.0
        """The same for start, first step (compilation), validation and checkpoint."""

        def __post_init__(self) -> None:
            if self.timeout_seconds < 0 or self.slow_timeout_seconds < self.timeout_seconds:
                raise ValueError(
                    f"watchdog.timeout_seconds ({self.timeout_seconds}) must be 0 (off) or more, "
                    f"and watchdog.slow_timeout_seconds ({self.slow_timeout_seconds}) not less"
                )

    def __init__(self, config: Config, *, folder: Path):
        self.config, self.folder = config, folder / FOLDER
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # step, phase, since when; replaced as a whole, so the thread never reads half of it
        self._stand = (0, Phase.START, time.monotonic())
        self._first_step: int | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if self.world_size > 1 and config.timeout_seconds:
            self._interval = min(config.timeout_seconds / 10, 1.0)
            self._job_store: Any = dist.distributed_c10d._get_default_store()
            self._store: dist.Store | None = None
            self._notes: dist.Store | None = None
            self._calls = process_group.BoundedCalls()
            self._cause: failure_report.Cause | None = None
            # the store is the launcher's, or rank 0's: then it falls silent with that rank
            self._rank_0_keeps = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            self._keeper: Report | None = None
            self._launcher = os.getppid()
            self._beat = 0
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def enter(self, step: int, phase: Phase) -> None:
        """Records that the main thread begins ``phase`` of ``step``, or makes progress in it."""
        if self._first_step is None and phase is not Phase.START:
            self._first_step = step
        self._stand = (step, phase, time.monotonic())

    def close(self) -> None:
        """Stops watching; the other ranks no longer wait for this one."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(2 * self._interval)

    # ---------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        limit, before, asked = self.config.timeout_seconds, None, 0.0
        self._send(self._own_report())
        while not self._closed.wait(self._interval):
            mine = self._own_report()
            self._send(mine)
            if self._cause is not None and not self._closed.wait(FOLLOWING):
                self._follow(self._cause)
            if os.getppid() != self._launcher:
                self._end("the launcher of this host is gone", [])
            now = time.monotonic()
            if mine.idle < limit / 2:
                before = None
            elif before is None:
                before, asked = self._read_all(), now
            elif mine.idle + self._interval >= limit and now - asked >= limit / 3:
                reports, asked = self._read_all(), now
                finding, stopped = find_stall(mine, before, reports, self._keeper)
                if finding and not self._closed.is_set():
                    self._end(finding, stopped)
                before = reports
        self._send(self._own_report()._replace(beat=DONE))

    def _own_report(self) -> Report:
        step, phase, since = self._stand
        slow = phase in SLOW or step == self._first_step
        allowed = self.config.slow_timeout_seconds if slow else self.config.timeout_seconds
        self._beat += 1
        idle = time.monotonic() - since
        return Report(step, phase, idle, allowed, self._beat, socket.gethostname(), os.getpid())

    def _send(self, mine: Report) -> None:
        def send(store: dist.Store) -> Report | None:
            store.set(str(self.rank), json.dumps(mine))
            self._cause = failure_report.entered(self._notes)
            if not self._rank_0_keeps or self.rank == 0:
                return None
            # waits for rank 0's first report, without which it could not be named when silent
            return Report(*json.loads(store.get("0")))

        self._keeper = self._on_store(send) or self._keeper

    def _read_all(self) -> Reports:
        """Returns the reports of all ranks; {} if the store does not answer."""

        def read(store: dist.Store) -> Reports:
            keys = [str(r) for r in range(self.world_size)]
            if not store.check(keys):
                keys = [key for key in keys if store.check([key])]
            texts = dict(zip(keys, store.multi_get(keys), strict=True))
            reports = {int(key): Report(*json.loads(text)) for key, text in texts.items()}
            return {r: reports.get(r) for r in range(self.world_size)}

        return self._on_store(read) or {}

    def _on_store(self, action: Callable[[dist.Store], T]) -> T | None:
        """Returns the result of ``action`` on the job's store, over an own connection; None if it
        fails or does not answer in time.
        """

        def act() -> T:
            try:
                if self._store is None:
                    own = self._job_store.clone()
                    self._store = dist.PrefixStore("watchdog", own)
                    self._notes = process_group.notes(own)
                return action(self._store)
            except RuntimeError:  # every error of a store: closed, unreachable, too slow
                self._store = None
                raise

        return self._calls.within(max(self.config.timeout_seconds / 20, 2.0), act)

    def _follow(self, cause: failure_report.Cause) -> None:
        """Exits with the status of the rank that failed: the collective will never complete."""
        failure_report.follow(cause)
        if (notes := self._notes) is not None:
            self._on_store(lambda _: process_group.count_as_left(notes))
        os._exit(cause.status)

    def _end(self, finding: str, stopped: list[Report]) -> None:
        """Writes ``finding`` and all stacks, kills stopped ranks of this host, and exits."""
        process_group.within(10, lambda: self._write(finding))  # the disk may be what hangs
        for report in stopped:
            if report.host == socket.gethostname() and report.pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(report.pid, signal.SIGKILL)
        os._exit(EXIT_STATUS)

    def _write(self, finding: str) -> None:
        if self._on_store(lambda store: store.add("found", 1)) in (1, None):  # one rank prints it
            with suppress(OSError):  # the console may be gone with the launcher
                rank_log.tell(f"the job stands still: {finding}; stacks are in {self.folder}")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.rank}.txt"
        with suppress(OSError), path.open("w") as file:  # the disk may be full
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {finding}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def find_stall(
    mine: Report, before: Reports, now: Reports, keeper: Report | None = None
) -> tuple[str, list[Report]]:
    """Finds the ranks at fault: a description, and the last reports of ranks that have stopped.

    ``mine``: this rank's report. ``before``, ``now``: those of all ranks at two times, {} if the
    store did not answer. ``keeper``: the last of rank 0, if it keeps the store. The description is
    "" while the ranks at fault still have time.
    """
    if not before and not now and keeper and keeper.beat != DONE:
        words = f"{_stopped(0, keeper)} (it holds the job's store, which is silent)"
        return f"{words}; this rank waits in {mine.place}", [keeper]
    if not before and not now and mine.late:
        return "its store (the launcher of the first host, or the network) is silent", []
    if not before or not now:
        return "", []
    silent = [r for r, report in now.items() if report is None]
    if silent:
        return f"{named_ranks(silent)} never started", []
    reports = {r: report for r, report in now.items() if report and report.beat != DONE}
    stopped = [r for r in reports if (old := before[r]) and old.beat == reports[r].beat]
    if stopped:
        words = "; ".join(_stopped(r, reports[r]) for r in stopped[:4])
        words += f"; and {len(stopped) - 4} more" if len(stopped) > 4 else ""
        return f"{words}; this rank waits in {mine.place}", [reports[r] for r in stopped]
    last = min(report[:2] for report in reports.values())
    behind = [r for r, report in reports.items() if report[:2] == last]
    if not all(reports[r].late for r in behind):
        return "", []
    longest = max(behind, key=lambda r: reports[r].idle)
    words = f"{reports[longest].place} for {reports[longest].idle:.0f} s"
    if len(behind) == len(reports):
        return f"all ranks have been in {words}; a collective hangs", []
    named = ", ".join(f"{r} on {reports[r].host}" for r in behind[:4])
    more = f" and {len(behind) - 4} more" if len(behind) > 4 else ""
    return f"rank {named}{more} has been in {words}, the others wait further on", []


def _stopped(rank: int, report: Report) -> str:
    return (
        f"rank {rank} on {report.host} (pid {report.pid}) has stopped, last seen in {report.place}"
    )
