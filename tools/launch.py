"""torchrun, with a graceful stop.

``python -m earlyfuse.tools.launch --nproc-per-node 8 train.py moma_4t4i …`` takes what ``torchrun``
takes. SIGTERM or SIGUSR1 to it, on any host of the job, lets all ranks finish their step, save and
end; it then exits 0, and the same command resumes. ``torchrun`` itself would pass SIGTERM on, wait
30 s (``--shutdown-timeout``) and exit 1 in every case; of SIGUSR1 it would die at once. SIGINT
(Ctrl-C) stays what it is there: an end without a checkpoint.

The request outlives restarts: ranks that are started while it stands do one step, save and end.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from earlyfuse.parallel import lost_hosts
from earlyfuse.parallel.stop import SIGNALS, STOP_FILE

# what torchrun itself still answers; the signals of a graceful stop are not among them
ABRUPT = "SIGINT,SIGHUP,SIGQUIT"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``torchrun`` with ``arguments``; exits as it does."""
    with tempfile.TemporaryDirectory(prefix="earlyfuse-") as folder:
        request = Path(folder) / "stop"
        os.environ[STOP_FILE] = str(request)
        # a new store for each attempt: in one shared with the launcher, restarted ranks find the
        # addresses of those that are gone and fail to connect
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

        def ask(number: int, frame: FrameType | None) -> None:
            request.touch()

        for number in SIGNALS:
            signal.signal(number, ask)
        lost_hosts.watch()
        # imported late: it takes seconds, in which a signal must not end this process
        from torch.distributed import run

        given = sys.argv[1:] if arguments is None else arguments
        run.main([f"--signals-to-handle={ABRUPT}", *given])


if __name__ == "__main__":
    main()
