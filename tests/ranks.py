"""Start a program on several ranks under torchrun, as users do."""

import os
import subprocess
import sys
from collections.abc import Mapping


def torchrun(
    ranks: int, *arguments: str, restarts: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """``torchrun`` of one host with ``arguments`` (a script and its own); one thread per rank.

    Its output, and that of all ranks, comes through ``stdout``.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *arguments]
    tests = os.path.dirname(os.path.abspath(__file__))
    paths = [tests, os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        command,
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
