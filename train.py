"""Pretrain an early-fusion model: pick a config, build its trainer, train."""

import logging
import sys

SHORT_HELP, LONG_HELP, LIST = ("-h", "--help"), "--help-all", "--list"


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    # imported here: the processes that prepare data import this file again, and need none of it
    from earlyfuse.configs.catalogue import DEFAULT, catalogue
    from earlyfuse.configs.command_line import help_text, list_text, override

    logging.getLogger().setLevel(logging.ERROR)  # torchtitan warns of every device it does not know
    configs = catalogue()
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT
    if LIST in arguments:
        print(list_text(configs))
        return 0
    if name not in configs:
        print(f"unknown config {name!r}; the configs are:\n{list_text(configs)}", file=sys.stderr)
        return 2
    config = configs[name]()
    if any(flag in arguments for flag in SHORT_HELP):
        print(help_text(name, config))
        return 0
    config = override(config, ["--help" if a == LONG_HELP else a for a in arguments])
    trainer = None
    try:
        trainer = config.build()
        trainer.train()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if trainer is not None:
            trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
