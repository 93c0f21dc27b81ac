"""Reads and writes ``metrics.jsonl``, the log of a run: a JSON object per line.

Every line has ``step`` and ``kind`` ("train" or "validation"); other fields are numbers, except
``slowest_host`` and ``weights``. Losses of a training line are means over the steps since the last
line, weighted by labels; all else is of that step, of the run so far (``tokens/…``, ``flops/…``,
``…_by_source/…``) or of the time since (rates). ``null`` is a number that is not finite, such as
the loss of a skipped step; NaN, as earlier versions wrote it, is also read.
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
_WORDS = ("kind", "slowest_host", "weights")
_REMEDY = "correct or remove that line, or move the file away"


def as_line(metrics: Mapping[str, Any], step: int) -> str:
    """A line of strict JSON, without line break; ``metrics`` includes ``kind``."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps({"step": step, **finite}, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines, with NaN for null; ``ValueError`` naming an invalid line."""
    return list(_lines(path))


def drop_after(path: Path, step: int) -> None:
    """Remove lines beyond ``step``, and an unfinished last line.

    ``ValueError`` as in ``read_metrics``, leaving the file as it was.
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
    """The lines, without an unfinished last one; if only the line break is missing, it counts."""
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
