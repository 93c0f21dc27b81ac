"""Saves that are killed, or meet an error, at each of their file operations in turn.

    python interrupted_saves.py FOLDER

A run with checkpoints of steps 3, 6 and 9 is taken back to step 6 and saves step 9 again, keeping
two. A hook on Python's audit events counts what it opens, makes, renames and removes below FOLDER.
The n-th of these kills the process (SIGKILL), or fails with ENOSPC, for every n. Prints a JSON
object for each: what was loadable, and what was left, afterwards. Kills meet a save in the
background, errors one in the foreground.
"""

import errno
import gc
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from small_states import SmallRun, SmallState

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class Interruption:
    """Kills this process, or fails, at its ``nth`` file operation below ``folder`` from now on."""

    def __init__(self, nth: int, folder: Path, kind: str):
        self.left, self.folder, self.kind = nth, str(folder), kind
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(self.folder):
            return
        self.left -= 1
        if self.left == 0 and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    def end(self) -> bool:
        """Stop it, as an audit hook cannot be removed; whether the operation was reached."""
        reached, self.left = self.left <= 0, -1
        return reached


def in_a_child(action: Callable[[], dict], report: Path) -> int:
    """Run ``action`` in a forked process, its result as JSON in ``report``; the exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            report.write_text(json.dumps(action()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_again(folder: Path, kind: str, nth: int) -> dict:
    run = SmallRun(folder, keep=2, async_mode="async" if kind == "kill" else "disabled")
    assert run.load(6) == 6
    interruption = Interruption(nth, folder, kind)
    run.save(9)
    run.close()
    reached = interruption.end()
    interrupted = {"reached": reached, "failed": run.checkpoints.failed, "left": names(folder)}
    return interrupted | look_after(folder)


def look_after(folder: Path) -> dict:
    run = SmallRun(folder, keep=2)
    loaded = run.load()
    run.save(12)
    run.close()
    again = SmallRun(folder).load()
    return {"loaded": loaded, "loaded_again": again, "left_again": names(folder)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def main(root: Path) -> None:
    torch.set_num_threads(1)
    SmallState().be_at(1)  # what torch imports late, it imports here once
    gc.freeze()  # what children collect is their own: pages stay shared
    base, folder, report = root / "base", root / "run", root / "report"
    assert in_a_child(lambda: {"saved": SmallRun(base).save(3, 6, 9)}, report) == 0
    for kind in ("kill", "error"):
        reached, nth = True, 0
        while reached:
            nth += 1
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            status = in_a_child(partial(save_again, folder, kind, nth), report)
            killed = status == -signal.SIGKILL
            if killed:
                status = in_a_child(partial(look_after, folder), report)
            assert status == 0, f"{kind} at {nth}"
            result = json.loads(report.read_text())
            print(json.dumps({"kind": kind, "nth": nth, "killed": killed, **result}), flush=True)
            reached = killed or result["reached"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
