"""Pairs of ranks that end in several ways: started by ``test_exit.py``.

    ending_ranks.py FOLDER ENDING …

Forks two connected ranks for each ENDING, one after the other, out of one process that has imported
torch. What the two put on their common console goes to FOLDER/ENDING.txt, their exit statuses are
printed.
"""

import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from earlyfuse.data.console import protect_console
from earlyfuse.parallel.reliability import failure_report, process_group
from earlyfuse.parallel.reporting import rank_log

SAME = ValueError("field (1) must be 2")
# by rank, what it meets; None: it waits for the other
ENDINGS: dict[str, tuple[BaseException | None, BaseException | None]] = {
    "refused-0": (ValueError("field (1) must be 2"), None),
    "refused-1": (None, ValueError("field (1) must be 2")),
    "refused-both": (SAME, SAME),
    "refused-unconnected": (SAME, SAME),
    "crashed-1": (None, RuntimeError("lost a wheel\n#0 a frame of C++")),
    "no-file": (None, FileNotFoundError(2, "No such file or directory", "shard\x1b[2J.tar")),
    "done": (None, None),
}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in (0, 1):
            if not (pid := os.fork()):
                run(folder, name, rank, port)
            ranks.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        print(name, *statuses, flush=True)


def run(folder: Path, name: str, rank: int, port: int) -> NoReturn:
    console = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(console, 1)
    os.dup2(console, 2)
    protect_console()
    error_file = folder / name / "attempt_0" / str(rank) / "error.json"
    error_file.parent.mkdir(parents=True)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_ERROR_FILE": str(error_file),
    }
    try:
        if name != "refused-unconnected":
            process_group.leave_at_exit()
            dist.init_process_group("gloo")
            rank_log.start(folder / name)
            dist.all_gather_object([None, None], "a tensor that gloo's thread frees")
        if error := ENDINGS[name][rank]:
            raise error
        dist.barrier()
    except Exception as error:
        process_group.exit_with(failure_report.say(error))
    # its tensors may still be in the hands of a thread
    time.sleep(0.01 * rank)
    process_group.exit_with(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
