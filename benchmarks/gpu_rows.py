"""The rows of ``gpu.py`` at their sizes, and the process that goes through some of them.

It prints one JSON object per line of the table on standard output: first its row and setting, when
it begins, then the same with its figures, or with ``failed`` or ``missing``.
"""

import argparse
import gc
import json
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

if "earlyfuse" not in sys.modules:  # the tree itself, installed or not
    package = types.ModuleType("earlyfuse")
    package.__path__ = [str(Path(__file__).parent.parent)]
    sys.modules["earlyfuse"] = package

from gpu import NO_GPU, ORDER
from gpu_expert_rows import grouped_products, moma_layer, moving, top_k
from gpu_sequence_rows import convolutions, heads, scans
from gpu_timing import Device, Work, check, measure, still_works, told

DOCUMENT = 1000  # tokens
Line = dict[str, Any]
# makes the lines that share inputs
Case = Callable[[], Iterator[Work]]


def cases(row: str, kind: str, tiny: bool) -> list[Case]:
    """What a row consists of, the most telling first."""
    if row == "1":
        sizes = (16, 32, 4) if tiny else (2048, 5632, 8)
        return [
            partial(moma_layer, kind, tokens, *sizes)
            for tokens in ((32,) if tiny else (16384, 32768, 8192))
        ]
    if row == "2":
        shape = (32, 16, 32) if tiny else (16384, 2048, 5632)
        names = ("equal", "zipf", "one empty", "one tiny")
        groups = [(name, True) for name in names] + [("equal", False), ("zipf", False)]
        return [partial(grouped_products, kind, *shape, name, order) for name, order in groups]
    if row == "3":
        tokens, dim = ((64,), 16) if tiny else ((16384, 131072), 2048)
        choices = [partial(top_k, kind, n, experts) for n in tokens for experts in (8, 64)]
        return [*choices, *(partial(moving, kind, n, dim) for n in tokens)]
    if row == "4":
        if tiny:
            return [partial(scans, kind, 2, 24, 32, 10)]
        at, rivals = (4096, 4096, DOCUMENT), ("mambapy", "accelerated-scan")
        return [
            partial(scans, kind, 4, *at),
            partial(scans, kind, 2, *at, rivals),
            partial(scans, kind, 8, *at),
            # a loop over tokens, which knows no documents
            partial(scans, kind, 2, 256, 4096, 256, (*rivals, "transformers")),
        ]
    if row == "5":
        if tiny:
            return [partial(convolutions, kind, 2, 20, 16, length) for length in (None, 6)]
        runs = ((4, None), (4, DOCUMENT), (8, None), (2, None))
        return [
            partial(convolutions, kind, batch, 4096, 4096, document) for batch, document in runs
        ]
    return [partial(heads, kind, *((32, 16, 64) if tiny else (16384, 2048, 65536)))]


def go_through(rows: Sequence[str], tiny: bool, seconds: float) -> Iterator[Line]:
    """The lines of ``rows``; on a GPU with their figures, unless ``tiny``.

    What is not begun after ``seconds`` is only named. Whatever goes wrong in a line is in it, and
    the others follow, unless it left the device unusable: then its error is raised again.
    """
    started = time.monotonic()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = None if tiny else Device()
    on = {} if device is None else device.environment
    for row in rows:
        for case in cases(row, kind, tiny):
            for work in _works(row, case):
                if isinstance(work, dict):
                    yield work | on
                    continue
                line: Line = {"row": work.row, "setting": work.setting}
                yield line
                if time.monotonic() - started > seconds:
                    yield line | on | {"missing": "out of time"}
                    continue
                yield line | on | _outcome(work, device)
                still_works()


def _works(row: str, case: Case) -> Iterator[Work | Line]:
    """A case's works; where its inputs cannot be made, a line that says so."""
    try:
        yield from case()
    except Exception as error:
        traceback.print_exc()
        yield {"row": row, "setting": _name_of(case), "failed": told(error)}
        still_works()
    _release()


def _outcome(work: Work, device: Device | None) -> Line:
    try:
        wrong = check(work)
        _release()
        if device is None:
            return {"left out": wrong}
        return measure(device, work, wrong)
    except Exception as error:
        traceback.print_exc()
        return {"failed": told(error)}
    finally:
        _release()


def _release() -> None:
    """Device memory of what is not used any more, for the next line."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _name_of(case: Case) -> str:
    assert isinstance(case, partial)
    return f"{case.func.__name__}{case.args}"


def main() -> None:
    """Print the lines of the rows asked for."""
    parser = argparse.ArgumentParser(description="One process of gpu.py.")
    parser.add_argument("rows", nargs="+", choices=ORDER)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("no GPU here: nothing is timed; --tiny checks the rows on this device")
        sys.exit(NO_GPU)
    for line in go_through(arguments.rows, arguments.tiny, arguments.seconds):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
