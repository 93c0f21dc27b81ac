"""A lock on a folder that is released when its process ends, however it ends."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from earlyfuse.data.console import printable

LOCK = "in_use.lock"
_POLL_SECONDS = 0.1


class FolderLock:
    """Exclusive use of ``folder``, which must exist, among all holders of a ``FolderLock``.

    ``tell`` is called when waiting, and for a file system without locks, which has no exclusion.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]):
        self.folder, self.tell = folder, tell
        self._descriptor: int | None = None

    def acquire(self, seconds: float = 0.0) -> bool:
        """Wait up to ``seconds`` for the lock. Returns True if the folder may be used."""
        deadline, told = time.monotonic() + seconds, False
        while not self._try():
            if time.monotonic() >= deadline:
                return False
            if not told:
                self.tell(f"waiting for another process that uses {printable(str(self.folder))}")
                told = True
            time.sleep(_POLL_SECONDS)
        return True

    def _try(self) -> bool:
        try:
            self._descriptor = _locked(self.folder, os.O_RDONLY)
        except OSError:  # NFS locks only files open for writing, which a folder cannot be
            try:
                self._descriptor = _locked(self.folder / LOCK, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                self.tell(
                    f"no lock on {printable(str(self.folder))} ({error.strerror}): make sure that "
                    "no other process writes there"
                )
                return True
        return self._descriptor is not None

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def _locked(path: Path, flags: int) -> int | None:
    """A descriptor that holds the lock of ``path``; None if another process holds it."""
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError | PermissionError):  # the second: some file servers
            return None
        raise
    return descriptor
