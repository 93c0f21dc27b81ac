"""Worker processes for prepare: started afresh, gone when the main process is gone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


class ProcessPool:
    """``workers`` processes; with one worker everything happens in this process, one job at a time.

    A context manager: on an error the workers are ended at once; their files are atomic.
    """

    def __init__(self, workers: int) -> None:
        self._executor: ProcessPoolExecutor | None = None
        self._others = multiprocessing.active_children()
        if workers > 1:
            # never plain fork: this process may have threads; the fork server imports torch once
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context(
                "forkserver" if "forkserver" in methods else "spawn"
            )
            context.set_forkserver_preload(["earlyfuse.data.prepare.tokenise"])
            self._executor = ProcessPoolExecutor(workers, context, _start_worker)

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._executor is None:
            return
        if error is not None:
            for child in multiprocessing.active_children():
                if child not in self._others:
                    child.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def start(self, function: Callable[[Job], Result], job: Job) -> Callable[[], Result]:
        """Begin ``function(job)`` beside what this process does next; call the answer to wait."""
        if self._executor is None:
            return lambda: function(job)
        future = self._executor.submit(function, job)
        return lambda: _died_is_told(future.result)

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of ``jobs``."""
        if self._executor is None:
            yield from map(function, jobs)
            return
        for future in [self._executor.submit(function, job) for job in jobs]:
            yield _died_is_told(future.result)


def _died_is_told(result: Callable[[], Result]) -> Result:
    try:
        return result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed, perhaps for lack of memory; the same command goes on "
            "where this one ended, with fewer workers if memory is short"
        ) from error


def _start_worker() -> None:
    torch.set_num_threads(1)
    # the main process hears Ctrl-C too, and ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that waits for jobs would outlive a main process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    parent.join()
    os._exit(1)
