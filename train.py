"""Pretrain an early-fusion model: pick a config, build its trainer, train."""

import logging
import os
import sys

from earlyfuse.data.console import protect_console
from earlyfuse.parallel.reliability import preemption

SHORT_HELP, LONG_HELP, LIST = ("-h", "--help"), "--help-all", "--list"


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    protect_console()
    preemption.end_with_parent()
    if "RANK" in os.environ:  # a request to stop must not kill a rank that is still importing
        preemption.listen()
    # large tensors on huge pages: 2 to 3 % of a step on CPUs; read at torch's first allocation
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # imported here: the processes that prepare data import this file again, and need none of it
    from earlyfuse.configs.command_line import help_text, list_text, override, take_dry_run
    from earlyfuse.configs.registry import DEFAULT, load_config
    from earlyfuse.parallel.estimates.dry_run import describe
    from earlyfuse.parallel.reliability import failure_report

    logging.getLogger().setLevel(logging.ERROR)  # torchtitan warns of every device it does not know
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT
    trainer = None
    try:
        files = [word for word in (name, *arguments) if word.endswith(".py")]
        if LIST in arguments or (files == [name] and not arguments):
            print(list_text(*files[:1]))
            return 0
        config = load_config(name)
        if any(flag in arguments for flag in SHORT_HELP):
            print(help_text(name, config))
            return 0
        dry_run = take_dry_run(arguments)
        config = override(config, ["--help" if a == LONG_HELP else a for a in arguments])
        if dry_run is not None:
            print(describe(name, config, dry_run))
            return 0
        trainer = config.build()
        preemption.listen()  # to the end: what is under way then is saved and drawn
        trainer.train()
        trainer.close()
    except (Exception, KeyboardInterrupt) as error:
        return failure_report.say(error, close=trainer and trainer.close)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    from earlyfuse.parallel.reliability.process_group import exit_with

    exit_with(status)
