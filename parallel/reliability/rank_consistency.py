"""Checks at startup that all ranks agree on config, software versions and clocks.

A different config on one rank would cause a hang or a wrong result: it is an error. Different
versions and clock skew are warnings, since their consequences are hard to trace back.
"""

import json
import platform
import re
import socket
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from earlyfuse.parallel.reliability import process_group
from earlyfuse.parallel.reporting import rank_log, run_folder

CLOCK_TOLERANCE = 1.0  # seconds; for comparing logs and file times of several hosts
CLOCK_ROUNDS = 3


class Facts(NamedTuple):
    """Host and software of one rank; ``clocks``: its wall clock right after each barrier."""

    host: str
    versions: dict[str, str]
    clocks: list[float]


def check_ranks_agree(config: Mapping[str, Any]) -> None:
    """Compares all ranks; warns of differences on rank 0. Collective.

    ``ValueError`` on all ranks, naming the fields, if the ``config`` is not the same everywhere.
    """
    if dist.get_world_size() == 1:
        return
    process_group.leave_at_exit()
    facts = facts_of_ranks()
    if dist.get_rank() == 0:
        for line in differences(facts):
            rank_log.tell(f"warning: {line}")
    _require_same_config(config)


def facts_of_ranks() -> list[Facts]:
    """Gathers the facts of all ranks. Collective."""
    clocks = []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        clocks.append(time.time())
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, Facts(socket.gethostname(), _versions(), clocks))
    return facts


def differences(facts: Sequence[Facts]) -> list[str]:
    """Lists a line for each version that differs between ranks, and each host with clock skew."""
    first = facts[0]
    lines = []
    for name, usual in first.versions.items():
        found: dict[str, list[int]] = {}
        for rank, other in enumerate(facts):
            found.setdefault(other.versions[name], []).append(rank)
        if len(found) > 1:
            others = ", ".join(
                f"{value} on {named_ranks(ranks)} ({facts[ranks[0]].host})"
                for value, ranks in found.items()
                if value != usual
            )
            lines.append(
                f"{name} is {usual} on rank 0 ({first.host}), but {others}; install the same "
                "everywhere"
            )
    for host in dict.fromkeys(other.host for other in facts):
        rank = next(r for r, other in enumerate(facts) if other.host == host)
        # ranks leave a barrier at slightly different times: the nearest pair counts
        pairs = zip(facts[rank].clocks, first.clocks, strict=True)
        skew = min((here - there for here, there in pairs), key=abs)
        if abs(skew) > CLOCK_TOLERANCE:
            lines.append(
                f"the clock of {host} (rank {rank}) is {abs(skew):.1f} s "
                f"{'ahead of' if skew > 0 else 'behind'} that of rank 0 ({first.host}); "
                "synchronise the hosts (NTP)"
            )
    return lines


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchtitan": version("torchtitan"),
        "CUDA": str(torch.version.cuda),
        "earlyfuse": run_folder.revision(),
    }


def _require_same_config(config: Mapping[str, Any]) -> None:
    """Compares every rank with rank 0; then all raise, or none."""
    mine = flattened(config)
    theirs: list[Any] = [mine]
    dist.broadcast_object_list(theirs, src=0)
    fields = sorted(mine.keys() | theirs[0].keys())
    wrong = [
        f"{name} is {mine.get(name, 'missing')} instead of {theirs[0].get(name, 'missing')}"
        for name in fields
        if mine.get(name) != theirs[0].get(name)
    ]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, wrong[:3])
    for rank, lines in enumerate(everywhere):
        if lines:
            raise ValueError(
                f"the config of rank {rank} is not that of rank 0: {'; '.join(lines)}; start all "
                "ranks with the same command"
            )


def flattened(config: Any, prefix: str = "") -> dict[str, str]:
    """Returns dotted field → value as text, without the addresses of objects."""
    if isinstance(config, Mapping):
        parts = [flattened(value, f"{prefix}{name}.") for name, value in config.items()]
        return {name: value for part in parts for name, value in part.items()}
    return {prefix.rstrip("."): re.sub(r" at 0x\w+", "", json.dumps(config, default=repr))}


def named_ranks(ranks: Sequence[int]) -> str:
    """Names ranks in a message: "rank 1, 2"."""
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {shown}{more}"
