"""Finds stragglers: compares the ranks' own times in a logged step by one small gather.

Collectives make all ranks take equally long, so the wall time of a step identifies no rank; a
rank's own time excludes waiting for others. On CPU a thread that waits in a collective sleeps, so
its own time is the time it was running or runnable, and the time it waited for data. A GPU queues
collectives like other work: there it is the whole step, and only a slow host or slow data shows.
"""

import socket
import time

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils


class RankTimes:
    """Own time per step of every rank since the last ``restart``."""

    def __init__(self) -> None:
        self.step = 0
        """The last completed step."""
        self.hosts: list[str] = [""]

    def start(self, step: int) -> None:
        """Starts after ``step``; collective: gathers the hosts."""
        self.step = step
        self.hosts = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.restart()

    def restart(self) -> None:
        """Measures times from now on."""
        self._first_step, self._working = self.step, _working_seconds()

    def gather(self, step: int, data_wait: float, elapsed: float) -> dict[str, float | str]:
        """Returns the times of the slowest rank at the end of ``step``; collective; {} on one rank.

        ``data_wait``, ``elapsed``: this rank's seconds since ``restart``, for data and in all. The
        result has ``data_wait`` (largest share of the time), ``rank_seconds/max`` and ``/min`` (own
        seconds per step), ``slowest_rank`` and its ``slowest_host``.
        """
        self.step = step
        if len(self.hosts) == 1:
            return {}
        device, own = titan_utils.device_type, elapsed
        if device == "cpu":
            # data drawn in this thread counts as both, hence the bound
            own = min(elapsed, data_wait + _working_seconds() - self._working)
        mine_2 = torch.tensor([own / (step - self._first_step), data_wait / elapsed], device=device)
        times = [torch.empty_like(mine_2) for _ in self.hosts]
        dist.all_gather(times, mine_2)
        own_R, wait_R = torch.stack(times, dim=1).tolist()
        slowest = own_R.index(max(own_R))
        return {
            "data_wait": max(wait_R),
            "rank_seconds/max": max(own_R),
            "rank_seconds/min": min(own_R),
            "slowest_rank": slowest,
            "slowest_host": self.hosts[slowest],
        }


def _working_seconds() -> float:
    """Returns the seconds this thread has been running or runnable."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            running, runnable, _ = file.read().split()
    except OSError:  # not Linux, or a kernel without these statistics: running only
        return time.thread_time()
    return (int(running) + int(runnable)) / 1e9
