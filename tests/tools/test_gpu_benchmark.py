"""``benchmarks/gpu.py``: rows are right, and no failure on an untried GPU costs a figure."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_timing import FEWEST_ROUNDS, ROUNDS, Device, Goal, Work, check, measure  # noqa: E402

ONE = torch.ones(3)
BARE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.modules["torchtitan"] = None
sys.path.insert(0, sys.argv.pop(1))
import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""


def work(row="1 made up", **options):
    defaults = {"ours": lambda: [ONE], "expected": lambda: [ONE], "tolerance": 1e-3}
    return Work(row, "setting", **defaults | options)


def fails():
    raise RuntimeError("as kernels do\nin many lines")


def lines_of(monkeypatch, *cases, deadline=math.inf):
    """Final lines of untimed cases."""
    named = [(f"case {number}", case) for number, case in enumerate(cases)]
    monkeypatch.setattr(gpu, "cases", lambda row, kind, tiny: named)
    found = gpu.lines_of(["1"], None, deadline)
    return [line for line in found if line.get("failed") != gpu.DIED]


@pytest.mark.parametrize("row", gpu.ORDER)
def test_a_row_and_all_rivals_equal_the_definition(row):
    lines = [x for x in gpu.lines_of([row], None, math.inf) if x.get("failed") != gpu.DIED]
    assert lines and all(line["left out"] == {} and "failed" not in line for line in lines)


def test_full_sizes_are_named_before_anything_is_made():
    late = gpu.lines_of(gpu.ORDER, mock.Mock(environment={}), -1.0)
    assert {line["row"] for line in late} == set(gpu.ORDER)


def test_it_needs_neither_torchtitan_nor_an_installation():
    command = [sys.executable, "-c", BARE, str(BENCHMARKS), "--tiny", "--rows", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "| correct |" in done.stdout, done.stderr


def test_a_line_that_fails_is_reported_and_the_others_follow(monkeypatch, capsys):
    def cannot_be_made():
        yield work("1 before")
        raise MemoryError("inputs do not fit")

    lines = lines_of(
        monkeypatch,
        lambda: iter([work("1 crash", ours=fails), work("1 wrong", ours=lambda: [ONE + 1])]),
        cannot_be_made,
        lambda: iter([work("1 fine")]),
    )
    failed = {(line["row"], line["setting"]): line.get("failed") for line in lines}
    wrong = failed.pop(("1 wrong", "setting"))
    assert wrong.startswith("ValueError: result 0 of ours differs from the definition")
    assert failed == {
        ("1 crash", "setting"): "RuntimeError: as kernels do",
        ("1 before", "setting"): None,
        ("1", "case 1"): "MemoryError: inputs do not fit",
        ("1 fine", "setting"): None,
    }
    assert "Traceback" in capsys.readouterr().err


# ---------------------------------------------------------------- one line


class ClockedDevice(Device):
    """A device on which every run takes the seconds that ``times`` has for it."""

    def __init__(self, times):
        self.times, self.calls = times, []
        self.matmul, self.copy, self.clock, self.processors = 1e15, 4e12, 2e9, 132

    def seconds(self, run):
        run()
        self.calls.append(run)
        taken = self.times[run]
        return taken(len(self.calls)) if callable(taken) else taken

    def host_seconds(self, run):
        run()
        return 5e-3

    def peak(self, run):
        return 3_000_000

    def host_sync(self, run):
        return None


def run():
    return [ONE]


def slower():
    return [ONE]


def test_goals_and_the_floor_of_a_line():
    """0.5 of the rival's time; 1e12 FLOPs take 1 of 2 ms; 4 MB for what needs 2 MB."""
    goals = (
        (Goal("ours / slower", 0.9), "ours / slower ≤ 0.9: met (0.5)"),
        (Goal("ours / slower", 0.4), "ours / slower ≤ 0.4: missed (0.5)"),
        (Goal("% of floor", 40, at_most=False), "% of floor ≥ 40: met (50)"),
        (Goal("ours / absent", 1.0), "ours / absent ≤ 1: not measured"),
        (Goal("ours / noisy", 1.0), "ours / noisy ≤ 1: too noisy"),
        (Goal(gpu_timing.MEMORY, 1.1), f"{gpu_timing.MEMORY} ≤ 1.1: missed (2)"),
    )

    def noisy():
        return [ONE]

    rivals = {"slower": slower, "noisy": noisy, "absent": fails, "other": lambda: [ONE + 1]}
    one = work(
        ours=run, rivals=rivals, same=("absent", "other"), flops=1e12, held=(1e6, 2e6),
        goals=[goal for goal, _ in goals],
    )  # fmt: skip
    times = {run: 2e-3, slower: 4e-3, noisy: lambda turn: turn * 1e-3}
    line = measure(ClockedDevice(times), one, check(one))
    assert line["goals"] == [verdict for _, verdict in goals]
    assert line["left out"]["absent"] == "RuntimeError: as kernels do"
    assert "other differs from the definition" in line["left out"]["other"]
    assert line["ms"] == pytest.approx(2.0) and line["host ms"] == pytest.approx(5.0)
    for unit, amount in (
        ("flops", 1e13),
        ("bytes_moved", 4e10),
        ("exponentials", 16 * 132 * 2e7),
        ("fp32_flops", 256 * 132 * 2e7),
    ):
        assert ClockedDevice({}).floor(work(**{unit: amount})) == pytest.approx(1e-2)


def test_rounds_rotate_and_a_rival_that_fails_late_is_left_out():
    left = iter(range(8))

    def tires():
        if next(left, None) is None:
            fails()
        return [ONE]

    device = ClockedDevice({run: 1e-3, slower: 2e-3, tires: 2e-3})
    line = measure(device, work(ours=run, rivals={"slower": slower, "tires": tires}), {})
    assert line["left out"] == {"tires": "RuntimeError: as kernels do"}
    assert line["rivals"].keys() == {"slower"} and line["rounds"] == ROUNDS >= FEWEST_ROUNDS
    assert device.calls[:6] == [run, slower, tires, slower, tires, run]


def test_a_host_synchronisation_is_reported_and_allowed_again_afterwards(monkeypatch):
    modes, device = mock.Mock(), Device.__new__(Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes)
    assert device.host_sync(fails) == "RuntimeError: as kernels do"
    assert device.host_sync(run) is None
    assert modes.mock_calls == [mock.call("error"), mock.call("default")] * 2


# ---------------------------------------------------------------- the command

FIGURES = ("ms", "spread", "host ms", "floor ms", "% of floor", "TFLOP/s", "GB/s", "peak MB")


def forked(command, check, timeout):
    """``subprocess.run`` of ``gpu.py``, without importing it again."""
    job = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(gpu.main(command[2:]))
    )
    job.start()
    job.join(timeout)
    if job.is_alive():
        job.kill()
        job.join()
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, job.exitcode)


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """``gpu.py`` with a made-up GPU, given what each row does: status, output, lines by row."""
    plan = {}

    def outcome(work, device):
        what = plan["row" + work.row[0]]
        if what == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(20)
        if what == "failed":
            return {"failed": "off"}
        measured = {"rivals": {}, "left out": {}, "goals": [], "host sync": None}
        if what == "waits":
            measured["host sync"] = "RuntimeError"
        return dict.fromkeys(FIGURES, 1.0) | measured

    def lines(row):
        if plan["row" + row] == "missing":
            time.sleep(0.4)  # past the row's time
        yield work(row + " made up")

    def cases(row, kind, tiny):
        return [("all", lambda: lines(row))]

    environment = {"device": "Fake 1", "setting of the run": "fake"}
    for name, value in {
        "Device": lambda: SimpleNamespace(environment=environment),
        "cases": cases,
        "_outcome": outcome,
        "ROW_SECONDS": 0.3,
        "GRACE": 1.0,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", forked)

    def start(**rows):
        plan.update(rows)
        names = [name.removeprefix("row") for name in rows]
        status = gpu.main(["--rows", *names, "--folder", str(tmp_path)])
        assert (tmp_path / "gpu_fake_1.md").read_text().startswith("# All kernels")
        lines = (tmp_path / "gpu_fake_1.jsonl").read_text().splitlines()
        found = {line["row"][0]: line for line in map(json.loads, lines)}
        return status, capfd.readouterr().out, found

    return start


def test_crashes_hangs_and_errors_cost_their_row_only(command):
    status, output, found = command(
        row1="crash", row4="measured", row2="failed", row6="hang", row3="measured"
    )
    assert status == 1
    assert {row for row, line in found.items() if "ms" in line} == {"4", "3"}
    assert found["1"]["failed"] == found["6"]["failed"] == gpu.DIED
    assert found["2"]["failed"] == "off"
    assert "row 1: its process ended with status -9" in output and "row 6: killed" in output


def test_a_second_command_adds_to_the_first_and_its_status_says_if_a_row_failed(command):
    for plan, expected, failed in (
        ({"row1": "measured", "row3": "missing"}, {"1": "ms", "3": "missing"}, 0),
        ({"row3": "measured"}, {"1": "ms", "3": "ms"}, 0),
        ({"row3": "missing"}, {"1": "ms", "3": "ms"}, 0),
        ({"row3": "waits"}, {"1": "ms", "3": "ms"}, 1),
        ({"row3": "failed"}, {"1": "ms", "3": "failed"}, 1),
        ({"row1": "missing"}, {"1": "ms", "3": "failed"}, 0),
    ):
        status, _, found = command(**plan)
        assert status == failed and found.keys() == expected.keys()
        assert all(what in found[row] for row, what in expected.items())
