"""What prepare says while it works: one bar in a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from earlyfuse.data.console import printable

_PLAIN_LINES = 10


class Progress:
    """Writes to ``file``, standard error unless given otherwise."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stderr if file is None else file

    def tell(self, line: str) -> None:
        """One line; a bar that is shown stays below it."""
        tqdm.write(printable(line), file=self.file)

    @contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Gives ``show(step, loss)``."""
        with self.bar(name, total, "step") as advance:
            yield lambda step, loss: advance(1, f"loss {loss:.4f}")

    @contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """Gives ``advance(by, note)``: a bar in a terminal, about ten lines elsewhere."""
        if self.file.isatty():
            with tqdm(
                total=total, desc=printable(name), unit=unit, file=self.file, dynamic_ncols=True
            ) as shown:

                def advance(by: int, note: str) -> None:
                    shown.set_postfix_str(printable(note), refresh=False)
                    shown.update(by)

                yield advance
            return
        done = 0

        def advance_plainly(by: int, note: str) -> None:
            nonlocal done
            before, done = done, done + by
            if before * _PLAIN_LINES // total != done * _PLAIN_LINES // total:
                self.tell(f"{name}: {done} of {total} {unit}s, {note}")

        yield advance_plainly
