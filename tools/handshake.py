"""Lets ranks meet as those of a run do: reduces, measures latency and bandwidth, compares clocks.

Under a launcher these are the job's ranks, else processes of this host: one per GPU on NCCL, or two
on gloo.
"""

import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from earlyfuse.data.console import error_text
from earlyfuse.parallel.reliability.process_group import within
from earlyfuse.parallel.reliability.rank_consistency import differences, facts_of_ranks
from earlyfuse.parallel.reporting.opening import count, quantity
from earlyfuse.tools.environment import Finding

START_METHOD = "spawn"  # fork would break CUDA and threads
REPEATS = 20
LARGE = {"gloo": 16 << 20, "nccl": 256 << 20}  # bytes
_REMEDY = (
    "name the network of the hosts (NETWORK=ib0 in host.sh; GLOO_SOCKET_IFNAME, "
    "NCCL_SOCKET_IFNAME), open its ports between them, and start all with the same command "
    "(docs/clusters.md); NCCL_DEBUG=INFO shows what NCCL does"
)


def meet(findings: Sequence[Finding], seconds: float) -> list[Finding]:
    """Findings of all ranks of the launcher's job, with those of the ranks together; collective.

    ``findings``: this rank's. Ranks other than 0 return only whether something failed there, by
    the same list. A group that does not form, or stalls for ``seconds``, is a finding.
    """
    rank = int(os.environ["RANK"])
    try:
        backend = _backend(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
        together = measure(backend)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (socket.gethostname(), list(findings)))
        # not ``leave``: that waits for ranks at the end of a run
        dist.barrier()
        within(5.0, dist.destroy_process_group)
    except (RuntimeError, ValueError, OSError) as error:
        return [*findings, _failed(f"rank {rank}: {_first_line(error)}")]
    others = [
        Finding(found.name, f"rank {other} on {host}: {found.text}", found.remedy)
        for other, (host, theirs) in enumerate(everywhere)
        for found in theirs
        if other and found.remedy
    ]
    return [*everywhere[0][1], *together, *others]


def meet_here(seconds: float) -> list[Finding]:
    """Findings of ranks that are started on this host."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks, backend = (gpus, "nccl") if gpus > 1 else (2, "gloo")
    context: Any = multiprocessing.get_context(START_METHOD)
    with tempfile.TemporaryDirectory(prefix="earlyfuse-") as folder:
        arguments = (ranks, backend, folder, seconds)
        processes = [
            context.Process(target=_local_rank, args=(rank, *arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 2 * seconds  # to start, and to meet
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        ended = {n: process.exitcode for n, process in enumerate(processes) if process.exitcode}
        stalled = [n for n, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        if ended:
            return [_failed(f"of {ranks} ranks on this host some ended, rank: status {ended}")]
        if stalled:
            return [_failed(f"ranks {stalled} of {ranks} on this host do not answer")]
        return [Finding(*fields) for fields in json.loads(Path(folder, "0.json").read_text())]


def _local_rank(rank: int, ranks: int, backend: str, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=seconds),
        )
        found = measure(backend)
        dist.barrier()
        dist.destroy_process_group()
    except (RuntimeError, ValueError, OSError) as error:
        found = [_failed(f"rank {rank}: {_first_line(error)}")]
    text = json.dumps([(one.name, one.text, one.remedy) for one in found])
    Path(folder, f"{rank}.json").write_text(text)


def measure(backend: str) -> list[Finding]:
    """Latency, bandwidth and result of all-reduces, versions and clocks; collective."""
    device = "cuda" if backend == "nccl" else "cpu"
    ranks = dist.get_world_size()
    small = torch.ones(1, device=device)
    large = torch.ones(LARGE[backend] // 4, device=device)
    latency, bandwidth = _seconds(small), LARGE[backend] / _seconds(large)
    large.fill_(1)
    dist.all_reduce(large)
    right = bool((large == ranks).all())
    facts = facts_of_ranks()
    hosts = len({fact.host for fact in facts})
    where = f"{count(ranks, 'rank')} on {count(hosts, 'host')}, {backend}"
    # what a ring sends and receives: NCCL tests call it bus bandwidth
    bus = bandwidth * 2 * (ranks - 1) / ranks
    text = f"{where}: all-reduce in {1e6 * latency:,.0f} µs, {quantity(bus)}B/s of bus bandwidth"
    remedy = "" if right else "check memory and network of the hosts; the driver's logs name errors"
    wrong = "" if right else ", with wrong sums"
    found = [Finding("ranks", text + wrong, remedy)]
    for line in differences(facts):
        what, _, repair = line.partition("; ")
        found.append(Finding("ranks", what, repair))
    if len(found) == 1:
        found.append(Finding("clocks", f"of {count(hosts, 'host')} agree within a second"))
    return found


def _seconds(tensor: torch.Tensor) -> float:
    """Median time of an all-reduce of ``tensor``; its values are lost."""
    times = []
    for _ in range(REPEATS + 1):  # the first one connects
        tensor.zero_()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _backend(local_rank: int) -> str:
    """NCCL with a GPU for this rank; selects it."""
    if not torch.cuda.is_available():
        return "gloo"
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: the host has {torch.cuda.device_count()}; start "
            "as many ranks as GPUs"
        )
    torch.cuda.set_device(local_rank)
    return "nccl"


def _failed(text: str) -> Finding:
    return Finding("ranks", text, _REMEDY)


def _first_line(error: BaseException) -> str:
    return error_text(error).partition("\n")[0]
