"""Pretrains an early-fusion model: picks a config, builds its trainer, trains.

``python train.py CONFIG``, as ``earlyfuse train CONFIG`` or ``python -m earlyfuse.tools.train``.
"""

import logging
import os
import sys
from functools import partial
from typing import NoReturn

from earlyfuse.configs import listing
from earlyfuse.data.console import error_text, protect_console
from earlyfuse.parallel.reliability import preemption

REFUSED = 2


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    protect_console()
    preemption.end_with_parent()
    launched = "RANK" in os.environ
    if launched:  # a request to stop must not kill a rank that is still importing
        preemption.listen()
    # large tensors on huge pages: 2 to 3 % of a step on CPUs; read at torch's first allocation
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        try:
            text = listing.answer(arguments)  # without torch, whose import takes seconds
        except (ValueError, OSError) as error:
            if launched:  # one rank reports for all
                return _say(error)
            print(f"error: {error_text(error)}", file=sys.stderr)
            return REFUSED
        if text is None:
            return _train(arguments)
        print(text)
        return 0
    except KeyboardInterrupt:  # in the imports
        print("stopped before the first step", file=sys.stderr)
        return preemption.INTERRUPTED


def exit_after(status: int) -> NoReturn:
    """Ends this process with ``status``, whatever the threads of a library still do."""
    if "torch" in sys.modules:
        from earlyfuse.parallel.reliability.process_group import exit_with

        exit_with(status)
    sys.exit(status)


def _say(error: BaseException) -> int:
    from earlyfuse.parallel.reliability import failure_report

    return failure_report.say(error)


def _train(arguments: list[str]) -> int:
    # imported here: the processes that prepare data import this file again, and need none of it
    from earlyfuse.configs.command_line import long_help, override, take_dry_run, value_of
    from earlyfuse.configs.registry import DEFAULT, DEFAULT_WITH_START, load_config, title
    from earlyfuse.configs.start_model import with_start_model
    from earlyfuse.parallel.estimates.dry_run import describe
    from earlyfuse.parallel.reliability import failure_report

    logging.getLogger().setLevel(logging.ERROR)  # torchtitan warns of every device it does not know
    starts = any(word.partition("=")[0] == "--start.model" for word in arguments)
    name = DEFAULT_WITH_START if starts else DEFAULT
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    trainer = None
    try:
        config = load_config(name)
        asked = {word for word in arguments if word in (*listing.HELP, listing.LONG_HELP)}
        dry_run = take_dry_run(arguments)
        config = override(config, [word for word in arguments if word not in asked])
        if asked:
            whole, value = listing.LONG_HELP in asked, partial(value_of, config)
            print(long_help(name, config) if whole else listing.help_text(name, value))
            return 0
        config, about_start = with_start_model(config)
        if about_start and os.environ.get("RANK", "0") == "0":
            print(about_start, flush=True)
        if dry_run is not None:
            print(describe(name, config, dry_run))
            return 0
        trainer = config.build()
        trainer.title = title(name)
        preemption.listen()  # to the end: what is under way then is saved and drawn
        trainer.train()
        trainer.close()
    except (Exception, KeyboardInterrupt) as error:
        return failure_report.say(error, close=trainer and trainer.close)
    # a launcher restarts ranks that do not return 0, and has its own status
    stopped = preemption.interrupted() and "RANK" not in os.environ
    return preemption.INTERRUPTED if stopped and trainer.should_continue_training() else 0


if __name__ == "__main__":
    exit_after(main(sys.argv[1:]))
