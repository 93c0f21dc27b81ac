"""torchrun, with a graceful stop.

``python -m earlyfuse.tools.launch --nproc-per-node 8 train.py moma_4t4i …`` takes the arguments of
``torchrun``; ``train`` in place of a script is ``earlyfuse train``. On SIGTERM, SIGUSR1 or Ctrl-C
to it, on any host of the job, all ranks finish their step, save and exit; it then exits 0 (130
after Ctrl-C), and the same command resumes. ``torchrun`` itself would forward SIGTERM, wait 30 s
(``--shutdown-timeout``) and exit 1 in every case, and die of SIGUSR1 at once. A second Ctrl-C kills
the job.

A request outlives restarts: ranks that start after it do one step, save and exit.

A job whose config is refused (status 2 of any rank) is not restarted, and the launcher exits 2: the
same command would fail again. Errors that ranks have reported are not repeated; for ranks killed by
a signal, the launcher prints the signal. Both need a subclass of torch's agent.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from earlyfuse.data.console import error_text, protect_console
from earlyfuse.parallel.reliability import preemption, tcp_timeouts
from earlyfuse.parallel.reliability.preemption import SIGNALS, STOP_FILE

# signals that torchrun still handles; those of a graceful stop are not among them
ABRUPT = "SIGHUP,SIGQUIT"
REFUSED, FAILED = 2, 1  # exit statuses, as of ``train.py``
HELP = """usage: launch [OPTION ...] train CONFIG [--FIELD VALUE ...]

Trains CONFIG on several GPUs or hosts: torchrun, with a graceful stop. train is the command of that
name, or train.py; any other script may stand there.

One host:    launch --standalone --nproc-per-node 8 train moma_4t4i
Two hosts:   launch --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
                 --rdzv-id NAME train moma_4t4i      (the same on each)

  --nproc-per-node N    ranks on this host, or gpu: one for each
  --nnodes N            hosts
  --max-restarts N      restarts after a fault (0); a refused config is not restarted
  --standalone          one host, any free port

All options of torchrun apply (torchrun --help). On SIGTERM, SIGUSR1 or Ctrl-C all ranks save and
exit; the same command resumes. A second Ctrl-C kills the job."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``torchrun`` with ``arguments``; returns the exit status."""
    protect_console()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(HELP)
        return 0 if given else REFUSED
    with tempfile.TemporaryDirectory(prefix="earlyfuse-") as folder:
        request = Path(folder) / "stop"
        os.environ[STOP_FILE] = str(request)
        # a new store for each attempt: in one shared with the launcher, restarted ranks find the
        # addresses of dead ranks and fail to connect
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

        def ask(number: int, frame: FrameType | None) -> None:
            with suppress(OSError):  # the folder is gone after the job
                request.touch()

        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            preemption.tell("stopping after this step, with a checkpoint; Ctrl-C again kills")
            ask(signal.SIGINT, None)

        for number in SIGNALS:
            signal.signal(number, ask)
        preemption.on_interrupt(interrupt)
        status = _run(given)
        return preemption.INTERRUPTED if interrupted and status == 0 else status


def _run(arguments: list[str]) -> int:
    # imported late: it takes seconds, in which a signal must not end this process
    tcp_timeouts.watch()
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    class Agent(LocalElasticAgent):
        """Restarts ranks that failed, unless they were refused."""

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode == REFUSED for failure in result.failures.values()):
                self._remaining_restarts = 0
            return result

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    # the ranks have reported their errors; torch would repeat them
    for name in ("api", "errors.error_handler"):
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}")
        logger.setLevel(logging.CRITICAL)
    parser = run.get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    options = parser.parse_args([f"--signals-to-handle={ABRUPT}", *arguments])
    if options.training_script == "train":
        options.module, options.training_script = True, "earlyfuse.tools.train"
    if not (options.module or options.no_python or Path(options.training_script).is_file()):
        _refuse(f"script ({options.training_script}) does not exist; give train, or a file")
    try:
        run.run(options)
    except ValueError as error:  # of an option
        _refuse(error_text(error))
    except ChildFailedError as error:
        statuses = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        if REFUSED in statuses.values():
            return REFUSED
        _print_signals(statuses)
        return FAILED
    except SignalException as error:
        print(f"launch: stopped by {error.sigval.name}, without a checkpoint", file=sys.stderr)
        return 128 + error.sigval
    return 0


def _refuse(message: str) -> NoReturn:
    print(f"launch: {message}; --help shows examples", file=sys.stderr)
    sys.exit(REFUSED)


def _print_signals(statuses: dict[int, int]) -> None:
    """Names the ranks that a signal has killed, unless others failed first and said why."""
    killed = {rank: -status for rank, status in statuses.items() if status < 0}
    unasked = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    for rank, number in (unasked or killed).items():
        if unasked or len(killed) == len(statuses):
            name = signal.Signals(number).name
            print(f"launch: rank {rank} was ended by {name}", file=sys.stderr)


if __name__ == "__main__":
    status = main()
    preemption.ignore()
    sys.exit(status)
