"""Reads and writes ``metrics.jsonl``: what a run has logged, a JSON object a line.

Every line has ``step`` and ``kind`` ("train" or "validation"); the other fields are numbers, but
for ``slowest_host``. ``null`` is a number that is not finite, such as the loss of a skipped step:
JSON has no NaN. Earlier versions wrote NaN, which is read as well.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from earlyfuse.data.console import printable
from earlyfuse.data.json_files import JsonObject, load_json

METRICS_FILE = "metrics.jsonl"
TRAIN, VALIDATION = "train", "validation"

LONGEST_LINE = 1 << 20  # bytes; a hundred layers with routers log 100 kB
_WORDS = ("kind", "slowest_host")
_REMEDY = "correct or remove that line, or move the file away to log anew"


def as_line(metrics: Mapping[str, Any], step: int) -> str:
    """One line of strict JSON, without its end; ``metrics`` has its ``kind``."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps({"step": step, **finite}, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines, with NaN for null; ``ValueError`` naming the line that is none of ours."""
    return list(_lines(path))


def drop_after(path: Path, step: int) -> None:
    """Remove lines beyond ``step``, and the half of a line that a killed run has left.

    ``ValueError`` as in ``read_metrics``; the file is then as it was.
    """
    replacement = path.with_suffix(".tmp")
    try:
        with replacement.open("wb") as file:
            for values in _lines(path):
                if values["step"] <= step:
                    file.write(f"{as_line(values, values['step'])}\n".encode())
        os.replace(replacement, path)
    except BaseException:
        replacement.unlink(missing_ok=True)
        raise


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines. A last one without its end, which a killed run leaves, is dropped unless all that
    it lacks is the line break.
    """
    with path.open("rb") as file:
        for number in count(1):
            raw = file.readline(LONGEST_LINE + 1)
            where = f"{printable(str(path))}, line {number}"
            if not raw:
                return
            if len(raw) > LONGEST_LINE:
                raise ValueError(f"{where} is longer than {LONGEST_LINE:,} bytes; {_REMEDY}")
            if not raw.strip():
                continue
            try:
                values = _read(raw, where)
            except ValueError:
                if raw.endswith(b"\n"):
                    raise
                return
            yield values


def _read(raw: bytes, where: str) -> dict[str, Any]:
    line = JsonObject.of(load_json(raw, where, _REMEDY), where, _REMEDY)
    line.field("step", int, least=0, most=2**63)
    line.field("kind", str, choices=(TRAIN, VALIDATION))
    for name, value in line.values.items():
        number = type(value) is float or (type(value) is int and abs(value) < 2**127)
        if name in _WORDS:
            line.field(name, str)
        elif value is not None and not number:
            raise line.wrong(printable(name), "must be a number, or null")
    return {name: math.nan if value is None else value for name, value in line.values.items()}
