"""Worker processes of prepare: started afresh, and ended with the main process."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from types import TracebackType
from typing import Any, TypeVar

import torch

from earlyfuse.data.media import MEDIA, Medium
from earlyfuse.models.vocabulary import Modality

Job = TypeVar("Job")
Result = TypeVar("Result")


class ProcessPool:
    """``workers`` processes; one worker is this process itself, which runs one job at a time.

    A context manager: on an error the workers are ended at once; their files are atomic.
    Raises ``ValueError`` for a medium registered at run time that workers cannot import.
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
            media = {label: _fields(label) for label in MEDIA}
            self._executor = ProcessPoolExecutor(
                workers, context, _start_worker, (Modality.LABELS, media)
            )

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
        """Start ``function(job)`` in the background; the returned function waits for its result."""
        if self._executor is None:
            return lambda: function(job)
        future = self._executor.submit(function, job)
        return lambda: _explaining_death(future.result)

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of ``jobs``."""
        for result in [self.start(function, job) for job in jobs]:
            yield result()


def _explaining_death(result: Callable[[], Result]) -> Result:
    try:
        return result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed, perhaps for lack of memory; repeat the command to "
            "resume, with fewer workers if memory is short"
        ) from error


def _fields(label: str) -> dict[str, Any]:
    """Fields of a medium but its modality, which a worker registers before it uses the others.

    Raises ``ValueError`` if workers could not import its module.
    """
    try:
        function = MEDIA[label].module
        if function.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise ValueError(f"{function.__qualname__} is defined interactively")
        pickle.dumps(function)
    except Exception as error:
        raise ValueError(
            f"medium {label!r} cannot be sent to worker processes ({error}); define the function "
            "`module` of its row at the top of an importable file, or set workers to 1"
        ) from error
    names = [field.name for field in fields(Medium) if field.name != "modality"]
    return {name: getattr(MEDIA[label], name) for name in names}


def _start_worker(labels: list[str], media: dict[str, dict[str, Any]]) -> None:
    """``labels``, ``media``: modalities and rows of the main process, which may have added some."""
    torch.set_num_threads(1)
    # Ctrl-C reaches the main process too, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for label in labels:
        Modality.register(label)
    for label, values in media.items():
        MEDIA[label] = Medium(modality=Modality[label], **values)


def _end_with_parent() -> None:
    """End a worker that waits for jobs when the main process is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    parent.join()
    os._exit(1)
