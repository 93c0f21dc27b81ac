"""``benchmarks/gpu.py``: whatever goes wrong on a GPU that nobody has tried, no figure is lost."""

import json
import math
import signal
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_rows  # noqa: E402
from gpu_timing import Device, Goal, Work, check, measure  # noqa: E402

ONE = torch.ones(3)


def work(row="1 made up", **options):
    defaults = {"ours": lambda: [ONE], "expected": lambda: [ONE], "tolerance": 1e-3}
    return Work(row, "setting", **defaults | options)


def fails():
    raise RuntimeError("as kernels do\nin many lines")


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("row", gpu_rows.ORDER)
def test_a_row_and_all_rivals_equal_the_definition(row):
    lines = list(gpu_rows.go_through([row], tiny=True, seconds=math.inf))
    outcomes = [line for line in lines if line.keys() != {"row", "setting"}]
    assert outcomes
    for line in outcomes:
        assert line.keys() == {"row", "setting", "left out"}
        assert not line["left out"]


def test_full_sizes_are_named_before_anything_is_made():
    """Every case is a function that makes its inputs when it is called, not before."""
    for row in gpu_rows.ORDER:
        assert all(isinstance(case, partial) for case in gpu_rows.cases(row, "cuda", False))


def test_a_line_that_fails_is_told_and_the_others_follow(monkeypatch, capsys):
    def made(*works):
        yield from works

    def cannot_be_made():
        yield work("1 before")
        raise MemoryError("inputs do not fit")

    broken = [
        partial(made, work("1 crash", ours=fails), work("1 wrong", ours=lambda: [ONE + 1])),
        partial(cannot_be_made),
        partial(made, work("1 fine")),
    ]
    monkeypatch.setattr(gpu_rows, "cases", lambda row, kind, tiny: broken)
    lines = list(gpu_rows.go_through(["1"], tiny=True, seconds=math.inf))
    told = {line["row"]: line.get("failed") for line in lines}
    assert told.pop("1 wrong").startswith("ValueError: result 0 of ours is off from the definition")
    assert told == {
        "1 crash": "RuntimeError: as kernels do",
        "1 before": None,
        "1": "MemoryError: inputs do not fit",
        "1 fine": None,
    }
    assert "Traceback" in capsys.readouterr().err


def test_what_is_not_begun_in_time_is_named(monkeypatch):
    monkeypatch.setattr(
        gpu_rows, "cases", lambda row, kind, tiny: [partial(iter, [work(ours=fails)])]
    )
    begun, line = gpu_rows.go_through(["1"], tiny=True, seconds=-1.0)
    assert line == begun | {"missing": "out of time"}


# ---------------------------------------------------------------- one line


class ClockedDevice(Device):
    """A device on which every run takes the seconds that it has in ``times``."""

    def __init__(self, times, host=1e-3):
        self.times, self.host = times, host
        self.calls = []
        self.matmul, self.copy, self.clock, self.processors = 1e15, 4e12, 2e9, 132

    def seconds(self, run, cover):
        run()
        self.calls.append((run, cover))
        taken = self.times[run]
        return taken(len(self.calls)) if callable(taken) else taken

    def host_seconds(self, run):
        run()
        return self.host

    def peak(self, run):
        return 3_000_000

    def host_sync(self, run):
        return None


def run():
    return [ONE]


def slower():
    return [ONE]


def test_goals_are_decided_in_the_line():
    one = work(
        ours=run,
        rivals={"slower": slower, "absent": fails},
        same=("absent",),
        flops=1e12,
        held=(1e6, 2e6),
        goals=(
            Goal("ours / slower", 0.9),
            Goal("ours / slower", 0.4),
            Goal("% of floor", 40, at_most=False),
            Goal("ours / absent", 1.0),
            Goal("peak / (inputs, results, chunk states)", 1.1),
        ),
    )
    line = measure(ClockedDevice({run: 2e-3, slower: 4e-3}), one, check(one))
    assert line["goals"] == [
        "ours / slower ≤ 0.9: met (0.5)",
        "ours / slower ≤ 0.4: missed (0.5)",
        "% of floor ≥ 40: met (50)",
        "ours / absent ≤ 1: not measured",
        "peak / (inputs, results, chunk states) ≤ 1.1: missed (2)",
    ]
    assert line["left out"] == {"absent": "RuntimeError: as kernels do"}
    assert line["ms"] == pytest.approx(2.0)


def test_a_noisy_ratio_is_withheld():
    one = work(ours=run, rivals={"slower": slower}, goals=[Goal("ours / slower", 0.9)])
    line = measure(ClockedDevice({run: 2e-3, slower: lambda turn: turn * 1e-3}), one, {})
    assert line["rivals"]["slower"]["ours / rival"] is None
    assert line["goals"] == ["ours / slower ≤ 0.9: too noisy"]


def test_a_rival_with_other_results_is_left_out():
    one = work(ours=run, rivals={"slower": lambda: [ONE + 1]}, same=("slower",))
    wrong = check(one)
    assert "slower is off from the definition" in wrong["slower"]
    assert not measure(ClockedDevice({run: 1e-3}), one, wrong)["rivals"]


def test_a_rival_that_fails_late_is_left_out_and_the_round_goes_on():
    left = iter(range(20))

    def tires():
        if next(left, None) is None:
            fails()
        return [ONE]

    one = work(ours=run, rivals={"tires": tires, "slower": slower})
    line = measure(ClockedDevice({run: 1e-3, slower: 2e-3, tires: 2e-3}), one, {})
    assert line["left out"] == {"tires": "RuntimeError: as kernels do"}
    assert line["rivals"].keys() == {"slower"}
    assert line["rounds"] == 50


def test_the_device_is_kept_waiting_for_longer_than_the_host_needs():
    device = ClockedDevice({run: 1e-4, slower: 1e-4}, host=5e-3)
    line = measure(device, work(ours=run, rivals={"slower": slower}), {})
    assert all(cover > 5e-3 for _, cover in device.calls)
    assert line["host ms"] == pytest.approx(5.0)


def test_rounds_begin_with_another_rival_each():
    device = ClockedDevice({run: 1e-3, slower: 1e-3})
    measure(device, work(ours=run, rivals={"slower": slower}), {})
    first_of_rounds = [which for which, _ in device.calls[-100::2]]
    assert first_of_rounds[::2] == [run] * 25
    assert first_of_rounds[1::2] == [slower] * 25


@pytest.mark.parametrize(
    ("bound_by", "seconds"),
    [
        ({"flops": 1e13}, 1e-2),
        ({"bytes_moved": 4e10}, 1e-2),
        ({"exponentials": 16 * 132 * 2e7}, 1e-2),
        ({"fp32_flops": 256 * 132 * 2e7}, 1e-2),
    ],
)
def test_the_floor_is_that_of_the_scarcest_unit(bound_by, seconds):
    small = {"flops": 1.0, "bytes_moved": 1.0, "exponentials": 1.0, "fp32_flops": 1.0}
    assert ClockedDevice({}).floor(work(**small | bound_by)) == pytest.approx(seconds)


def bare_device():
    device = Device.__new__(Device)
    device.clock, device.other = 2e9, mock.Mock()
    return device


def test_only_the_run_lies_between_the_events(monkeypatch):
    order = mock.Mock()
    events = iter((order.begin, order.end))
    order.end.synchronize.return_value = None
    order.begin.elapsed_time.return_value = 7.0
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: next(events))
    monkeypatch.setattr(torch.cuda, "_sleep", order.sleep)
    device = bare_device()
    device.other = order.other
    assert device.seconds(order.run, 1e-3) == pytest.approx(7e-3)
    assert order.mock_calls == [
        mock.call.other.sum(),
        mock.call.sleep(2_000_000),
        mock.call.begin.record(),
        mock.call.run(),
        mock.call.end.record(),
        mock.call.end.synchronize(),
        mock.call.begin.elapsed_time(order.end),
    ]


def test_a_host_synchronisation_is_told_and_allowed_again_afterwards(monkeypatch):
    modes = mock.Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes)
    assert bare_device().host_sync(fails) == "RuntimeError: as kernels do"
    assert bare_device().host_sync(run) is None
    assert modes.mock_calls == [mock.call("error"), mock.call("default")] * 2


# ---------------------------------------------------------------- the command

# stands in for gpu_rows.py: what each row does is in a file beside it
STAND_IN = """
import json, os, sys, time
row = sys.argv[1]
base = {"row": row + " made up", "setting": "all", "device": "Fake 1"}
figures = dict.fromkeys(("ms", "spread", "host ms", "floor ms", "% of floor", "TFLOP/s", "GB/s",
                         "peak MB"), 1.0)
measured = base | figures | {"rivals": {}, "left out": {}, "goals": [], "host sync": None,
                             "setting of the run": "fake"}
for what in json.load(open(os.path.dirname(__file__) + "/plan.json"))[row]:
    print(json.dumps({"row": base["row"], "setting": base["setting"]}), flush=True)
    print("a library says", flush=True)
    if what == "crash":
        os.abort()
    if what == "hang":
        time.sleep(10)
    line = measured if what == "measured" else base | {"failed": "ValueError: off"}
    line = measured | {"host sync": "RuntimeError: waits"} if what == "waits" else line
    line = base | {"missing": "out of time"} if what == "missing" else line
    print(json.dumps(line), flush=True)
"""


@pytest.fixture
def command(tmp_path):
    """``gpu.py`` over a stand-in for the GPU; returns a function of what each row does."""
    text = (BENCHMARKS / "gpu.py").read_text()
    text = text.replace("GRACE = 40.0", "GRACE = 0.5").replace(
        "ROW_SECONDS = 240.0", "ROW_SECONDS = 1.0"
    )
    (tmp_path / "gpu.py").write_text(text)
    (tmp_path / "gpu_rows.py").write_text(STAND_IN)

    def start(plan, *options):
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        return subprocess.Popen(
            [sys.executable, tmp_path / "gpu.py", *options, "--folder", tmp_path / "out"],
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def results(tmp_path):
    text = (tmp_path / "out" / "gpu_fake_1.jsonl").read_text()
    assert (tmp_path / "out" / "gpu_fake_1.md").read_text().startswith("# All kernels")
    return {line["row"][0]: line for line in map(json.loads, text.splitlines())}


def test_crashes_hangs_and_errors_cost_their_row_only(command, tmp_path):
    plan = {"1": ["crash"], "4": ["measured"], "2": ["failed"], "6": ["hang"], "3": ["measured"]}
    process = command(plan | {"5": ["measured"]})
    table, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    found = results(tmp_path)
    assert {row for row, line in found.items() if "ms" in line} == {"4", "3", "5"}
    assert f"status {-signal.SIGABRT}" in found["1"]["failed"]
    assert found["2"]["failed"] == "ValueError: off"
    assert f"status {-signal.SIGKILL}" in found["6"]["failed"]
    assert all(found[row]["failed"] in table for row in ("1", "2", "6"))
    assert "a library says" not in table


@pytest.mark.parametrize(
    ("what", "status"), [("measured", 0), ("missing", 0), ("failed", 1), ("waits", 1)]
)
def test_the_exit_status_tells_whether_a_row_failed(command, what, status):
    process = command({"3": [what]}, "--rows", "3")
    process.communicate(timeout=30)
    assert process.returncode == status


def test_a_kill_keeps_what_was_measured(command, tmp_path):
    process = command({"1": ["measured"], "4": ["hang"]}, "--rows", "1", "4")
    assert process.stdout is not None
    assert any(text.startswith("| 1 made up") for text in process.stdout)
    process.kill()
    process.communicate()
    assert "ms" in results(tmp_path)["1"]


def test_a_second_command_adds_to_the_first(command, tmp_path):
    for plan, expected in (
        ({"1": ["measured"], "3": ["missing"]}, {"1": "ms", "3": "missing"}),
        ({"3": ["measured"]}, {"1": "ms", "3": "ms"}),
        ({"3": ["missing"]}, {"1": "ms", "3": "ms"}),
        ({"3": ["failed"]}, {"1": "ms", "3": "failed"}),
        ({"1": ["missing"]}, {"1": "ms", "3": "failed"}),
    ):
        command(plan, "--rows", *plan).communicate(timeout=30)
        found = results(tmp_path)
        assert found.keys() == expected.keys()
        assert all(what in found[row] for row, what in expected.items())
