"""Runs a tool's command: one line and an exit status for what the user can change."""

import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from earlyfuse.data.console import error_text, near_names, printable, protect_console

REFUSED, INTERRUPTED = 2, 130


class Parser(ArgumentParser):
    """Refuses a wrong command line in one line, with near names for an unknown option."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        text, _, words = message.partition("unrecognized arguments: ")
        if words and not text:
            word = words.split()[0]
            near = near_names(word.partition("=")[0], self._options())
            message = f"{word} is unknown{near}"
        line = f"{self.prog}: {printable(message)}"
        self.exit(REFUSED, f"{line}{' ' if line.endswith('?') else '; '}--help lists all options\n")

    def _options(self) -> Iterator[str]:
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, _SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()


def add_code_option(parser: ArgumentParser) -> None:
    """Adds ``--code``, the user's file that defines classes of a model."""
    parser.add_argument(
        "--code",
        type=Path,
        metavar="FILE.py",
        help="Python file to import first, for branches and routers of your own",
    )


def add_weights_option(parser: ArgumentParser) -> None:
    """Adds ``--weights``, for checkpoints of runs that average their weights."""
    parser.add_argument(
        "--weights",
        choices=("ema", "trained"),
        help="of a checkpoint: averaged over the steps, or as trained (averaged, if it has them)",
    )


def import_code(file: Path | None) -> None:
    """Imports the file of ``--code``; ``ValueError`` with its line if it fails."""
    if file is not None:
        from earlyfuse.configs.registry import import_file  # --help does not pay for torch

        import_file(file)


def check_device(name: str) -> None:
    """Raises ``ValueError`` for a ``--device`` that this machine does not have."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device ({name}) cannot be used: {reason}; give another") from error


def run_command(
    name: str,
    command: Callable[[], int | None],
    interrupted: str,
    also: tuple[type[Exception], ...] = (),
) -> int:
    """The exit status of ``command``; 2 with one line for what was refused, 130 after Ctrl-C.

    ``interrupted``: what a Ctrl-C leaves behind. ``also``: errors that mean a refusal as
    ``ValueError`` and ``OSError`` do.
    """
    protect_console()
    refusals: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    try:
        return command() or 0
    except refusals as error:
        print(f"{name}: {error_text(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
