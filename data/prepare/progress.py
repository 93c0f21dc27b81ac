"""Progress of prepare: one bar in a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from earlyfuse.data.console import printable

_PLAIN_LINES = 10


class Progress:
    """Writes to ``file``, by default standard error."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stderr if file is None else file

    def tell(self, line: str) -> None:
        """Write one line above the bar, if one is shown."""
        tqdm.write(printable(line), file=self.file)

    @contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Yield ``show(step, loss)``."""
        with self.bar(name, total, "step") as advance:
            yield lambda step, loss: advance(1, f"loss {loss:.4f}")

    @contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """Yield ``advance(by, note)``, which moves a bar or prints about ten lines in all."""
        terminal = self.file.isatty()
        with tqdm(
            total=total,
            desc=printable(name),
            unit=unit,
            file=self.file,
            dynamic_ncols=True,
            disable=not terminal,
        ) as shown:
            done = 0

            def advance(by: int, note: str) -> None:
                nonlocal done
                before, done = done, done + by
                if terminal:
                    shown.set_postfix_str(printable(note), refresh=False)
                    shown.update(by)
                elif before * _PLAIN_LINES // total != done * _PLAIN_LINES // total:
                    self.tell(f"{name}: {done} of {total} {unit}s, {note}")

            yield advance
