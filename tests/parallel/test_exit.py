"""The end of a process: one cause on the console, an exit status that tells, nothing lost by a
console or a disk that takes no more.
"""

import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import ending_ranks
import pytest
from tiny_runs import tiny_config
from toy import make_data

from earlyfuse.data.console import console_stream, error_text
from earlyfuse.parallel.reporting import metrics as run_metrics
from earlyfuse.parallel.reporting import plots
from earlyfuse.parallel.reporting.optional_files import append_line
from earlyfuse.tools.command import run_command

HOST = socket.gethostname()

# ---------------------------------------------------------------- consoles

PRINTS = """
import sys
from earlyfuse.data.console import protect_console
protect_console()
for line in range(3000):
    print("a name: \\x1b[2Jcaf\\u00e9\\u202e")
print("an error", file=sys.stderr)
"""


def test_a_console_that_is_full_or_closed_ends_nothing():
    with open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, "-c", PRINTS], stdout=full, stderr=full)
    assert found.returncode == 0
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run([sys.executable, "-c", PRINTS], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert found.returncode == 0 and found.stderr == b"an error\n"
    closed = ["bash", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, PRINTS]
    assert subprocess.run(closed).returncode == 0


def test_what_a_console_cannot_show_is_escaped():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, env=environment, text=True
    )
    assert found.stdout.splitlines()[0] == r"a name: \x1b[2Jcaf\xe9\u202e"
    assert found.stdout.count("\n") == 3000


def test_a_terminal_keeps_colours_and_the_return_of_a_progress_bar():
    leader, follower = os.openpty()
    with console_stream(follower) as stream:
        stream.write("\x1b[31mred\x1b[0m \x1b[2J\r1 of 2\n")
    assert os.read(leader, 100) == b"\x1b[31mred\x1b[0m \\x1b[2J\r1 of 2\r\n"
    os.close(leader)
    os.close(follower)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("field (\x1b[2J) must be 1"), 2, r"tool: field (\x1b[2J) must be 1"),
        (PermissionError(13, "Permission denied", "a\x07b"), 2, r"tool: a\x07b: Permission denied"),
        (OSError("no room"), 2, "tool: no room"),
        (KeyboardInterrupt(), 130, "tool: stopped; nothing was written"),
    ],
)
def test_every_tool_says_in_one_line_what_to_change(capsys, error, status, said):
    def command():
        raise error

    assert run_command("tool", command, interrupted="stopped; nothing was written") == status
    assert capsys.readouterr().err == f"{said}\n"


def test_an_unexpected_error_of_a_tool_keeps_its_traceback():
    def command():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("tool", command, interrupted="stopped")


# ---------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def endings(tmp_path_factory) -> dict[str, tuple[list[int], str]]:
    """Exit statuses of both ranks, and their console, by ending."""
    folder = tmp_path_factory.mktemp("endings")
    command = [sys.executable, ending_ranks.__file__, str(folder), *ending_ranks.ENDINGS]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    statuses = {
        name: list(map(int, rest)) for name, *rest in map(str.split, found.stdout.splitlines())
    }
    return {n: (statuses[n], (folder / f"{n}.txt").read_text()) for n in ending_ranks.ENDINGS}


@pytest.mark.parametrize(
    "name", ["refused-0", "refused-1", "refused-both", "refused-unconnected", "no-file"]
)
def test_a_refusal_of_any_rank_is_said_once_and_ends_all_with_2(endings, name):
    statuses, console = endings[name]
    assert statuses == [2, 2], console
    reason = r"shard\x1b[2J.tar: No such file or directory"
    reason = reason if name == "no-file" else "field (1) must be 2"
    rank = name[-1] if name[-1].isdigit() else "1" if name == "no-file" else r"\d"
    assert re.fullmatch(rf"\[rank {rank} on {HOST}\] error: {re.escape(reason)}\n", console)


def test_a_crash_is_said_once_in_a_line_and_its_traceback_is_in_the_log(endings):
    statuses, console = endings["crashed-1"]
    assert statuses == [1, 1], console
    pointer, cause = console.splitlines()
    assert cause == f"[rank 1 on {HOST}] RuntimeError: lost a wheel"
    log = Path(pointer.rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    other = log.with_name("rank-0.log").read_text()
    assert "rank 1 failed first, with: RuntimeError: lost a wheel" in other
    assert "Connection closed by peer" in other and "Connection closed" not in console


def test_ranks_that_are_done_say_nothing(endings):
    assert endings["done"] == ([0, 0], "")


def test_a_refused_config_is_not_started_again_by_the_launcher(tmp_path):
    (tmp_path / "job.py").write_text("import sys; print('started'); sys.exit(2)")
    command = ["-m", "earlyfuse.tools.launch", "--standalone", "--nproc-per-node=1"]
    found = subprocess.run(
        [sys.executable, *command, "--max-restarts=3", str(tmp_path / "job.py")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (found.returncode, found.stdout, found.stderr) == (2, "started\n", "")


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk():
    """``limit(size)``: no file may grow beyond it; for the kernel a full disk, to the byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_of_a_line_that_does_not_fit_nothing_stays(tmp_path, small_disk):
    path = tmp_path / "lines"
    append_line(path, "first")
    small_disk(10)  # half of the second
    with pytest.raises(OSError, match="too large"):
        append_line(path, "second")
    assert path.read_text() == "first\n"
    small_disk(resource.RLIM_INFINITY)
    append_line(path, "third")
    assert path.read_text() == "first\nthird\n"


def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path):
    for content in ("one\nhal", "hal", "", "one\n" + "x" * 200_000):
        path = tmp_path / "lines"
        path.write_text(content)
        append_line(path, "next")
        assert path.read_text() == content[: content.rfind("\n") + 1] + "next\n"


def test_a_deleted_file_is_an_error_until_its_folder_is_back(tmp_path):
    path = tmp_path / "run" / "lines"
    path.parent.mkdir()
    append_line(path, "first")
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError):
        append_line(path, "second")
    path.parent.mkdir()
    append_line(path, "third")
    assert path.read_text() == "third\n"


def test_an_error_of_the_system_names_its_file():
    assert error_text(OSError(errno.EMFILE, "Too many open files", "a/b")) == (
        "a/b: Too many open files"
    )
    assert error_text(OSError(errno.EIO, "Input/output error")) == "[Errno 5] Input/output error"


@pytest.fixture
def full_disk(monkeypatch):
    """Lets ``metrics.jsonl`` fail in steps 2 and 3, and ``run.json`` altogether."""
    replace = Path.replace

    def failing(path: Path, line: str) -> None:
        if json.loads(line)["step"] in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append_line(path, line)

    def no_room(path: Path, target: Path) -> Path:
        if Path(target).name == "run.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(path, target)

    monkeypatch.setattr(run_metrics, "append_line", failing)
    monkeypatch.setattr(Path, "replace", no_room)


def test_a_full_disk_costs_lines_and_pictures_and_a_late_stop_nothing(
    tmp_path, full_disk, monkeypatch, capsys
):
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append("nobody listened"))

    def stopped_while_drawing(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "loss_curves.png"))

    monkeypatch.setattr(plots, "plot_curves", stopped_while_drawing)
    config = tiny_config(tmp_path / "run", make_data(tmp_path / "data"), steps=4)
    trainer = config.build()
    trainer.train()
    trainer.close()
    signal.signal(signal.SIGTERM, before)
    assert asked == []
    shown = capsys.readouterr()
    assert "done: 4 steps" in shown.out and "Writes lost: run.json 1, metrics.jsonl 3" in shown.out
    for name in ("run.json", "metrics.jsonl", "loss_curves.png"):
        path = tmp_path / "run" / name
        assert shown.err.count(f"{path} is not written: No space left on device") == 1
    assert "metrics.jsonl is written again; 3 writes were lost" in shown.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert steps == [1, 4]
    assert (tmp_path / "run" / "checkpoint" / "step-4").is_dir()


def test_a_run_whose_last_checkpoint_fails_says_so(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path / "run", make_data(tmp_path / "data"), steps=4)
    config.validator.enable = config.metrics.enable_tensorboard = False
    trainer = config.build()
    prepare = trainer.checkpointer.disk.prepare

    def no_room(step: int) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        prepare(step)

    monkeypatch.setattr(trainer.checkpointer.disk, "prepare", no_room)
    with pytest.raises(OSError, match=r"of step 4, could not be written; .*: step-3"):
        trainer.train()
    trainer.close()
    assert (tmp_path / "run" / "loss_curves.png").exists(), "what there is is shown first"
    assert "done" not in capsys.readouterr().out
