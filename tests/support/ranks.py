"""Starts a program on several ranks: under torchrun, as users do, or forked, which is faster.

    ranks.py RANKS MODULE ARGUMENT … [";" ARGUMENT …]

Imports MODULE once and forks into ranks under torchrun's agent, each of which calls its
``main(*arguments)``; after ";" into fresh ones with other arguments.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path


def torchrun(
    ranks: int, *arguments: str, restarts: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """``torchrun`` of one host with ``arguments`` (a script and its own); one thread per rank.

    Its output, and that of all ranks, comes through ``stdout``.
    """
    command = ["-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *arguments]
    return _started(command, env)


def forked(ranks: int, program: Path, *arguments: str) -> subprocess.Popen:
    """``program.main(*arguments)`` on ``ranks`` forked ranks; more after each ";".

    Its output, and that of all ranks, comes through ``stdout``.
    """
    return _started([__file__, str(ranks), program.stem, *arguments])


def _started(command: list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen:
    tests = os.path.dirname(os.path.abspath(__file__))
    paths = [tests, os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **settings, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output_of(process: subprocess.Popen, timeout: float = 900) -> str:
    """Everything that ``process`` printed; fails with it when the exit status is not 0."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{output}") from None
    assert process.returncode == 0, output
    return output


def main(ranks: int, module: str, *arguments: str) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    program = importlib.import_module(module).main
    parts = [tuple(part) for wanted, part in groupby(arguments, ";".__ne__) if wanted]
    for part in parts:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(config, program)(*part)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
