"""Configs in a user's own Python file: found, listed, run by every tool, and refused by name."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from places import ROOT, SUPPORT
from toy import make_data

from earlyfuse.configs.registry import load_config
from earlyfuse.tools import convert, doctor, generate
from earlyfuse.tools.study import study

OWN = """
'''Runs of mine

More about them.
'''
from dataclasses import dataclass

import sibling
from earlyfuse.configs import embedded
from .sibling import steps

WRONG = 3

@dataclass
class Settings:
    steps: int

def tiny():
    '''two steps on toy data'''
    return sibling.config(Settings(2).steps)

def with_default(more=1):
    return sibling.config(steps + more)

def needs(steps):
    return tiny()

def nothing():
    tiny()

def broken():
    config = tiny()
    config.trainning.steps = 3
    return config

def ends():
    raise SystemExit(0)

def _helper():
    pass

CONFIGS = {f"swept_{n}": lambda n=n: sibling.config(n) for n in (3, 4)}
with open("imported", "a") as imported:
    imported.write("x")
"""
SIBLING = """
import sys
from pathlib import Path

sys.path.insert(0, {support!r})
from tiny_runs import tiny_config

steps = 5

def config(steps):
    found = tiny_config(Path({folder!r}) / "run", Path({data!r}), steps=steps)
    found.sampler.enable = False
    return found
"""
BAD = {
    "bad_import.py": "import os\nimport no_such_module",
    "bad_syntax.py": "def f(:\n  pass",
    "bad_call.py": "\nfrom earlyfuse.configs import decoders\ndecoders.Shape()",
}
# neighbours are imported by name once in a process, so each folder has its own
_number = iter(range(10**6))


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))  # and out of it again
    monkeypatch.chdir(tmp_path)
    sibling = f"sibling_{next(_number)}"
    make_data(tmp_path / "data")
    values = {"support": str(SUPPORT), "folder": str(tmp_path), "data": str(tmp_path / "data")}
    (tmp_path / f"{sibling}.py").write_text(SIBLING.format(**values))
    (tmp_path / "my_runs.py").write_text(OWN.replace("sibling", sibling))
    for name, text in BAD.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def train(*arguments: str) -> int:
    return runpy.run_path(str(ROOT / "train.py"))["main"](list(arguments))


def test_a_file_beside_its_modules_is_imported_once_and_its_configs_are_found(own):
    assert load_config("my_runs.py:tiny").training.steps == 2
    assert load_config(f"{own}/my_runs.py:with_default").training.steps == 6
    assert load_config("my_runs.py:swept_4").training.steps == 4
    assert load_config("my_runs.py:tiny") is not load_config("my_runs.py:tiny")
    assert (own / "imported").read_text() == "x"
    assert sys.path[-1] == str(own), "behind installed packages, which a neighbour must not hide"


@pytest.mark.parametrize("words", ["my_runs.py", "--list my_runs.py", "my_runs.py --list"])
def test_a_file_s_configs_are_listed(own, capsys, words):
    assert train(*words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Runs of mine"
    assert "  my_runs.py:tiny          two steps on toy data" in lines
    names = [line.split()[0].partition(":")[2] for line in lines[1:]]
    assert names == ["broken", "ends", "nothing", "tiny", "with_default", "swept_3", "swept_4"]


def test_a_config_of_one_s_own_trains_with_overrides_and_goes_on_in_the_tools(own, capsys):
    assert train("my_runs.py:tiny", "--help") == 0
    assert "training.steps" in (shown := capsys.readouterr().out) and "[2]" in shown
    assert train("my_runs.py:tiny", "--dry-run", "2") == 0
    assert "my_runs.py:tiny on 2 ranks" in capsys.readouterr().out
    assert train("my_runs.py:tiny", "--training.steps", "1") == 0
    described = json.loads((own / "run" / "run.json").read_text())
    assert described["config"]["training"]["steps"] == 1
    assert train("my_runs.py:tiny") == 0
    assert "resumed at step 1, from here with" in capsys.readouterr().out
    assert convert.main(["run", "exported"]) == 0
    assert (own / "exported" / "config.json").is_file()
    assert doctor.main(["traffic", "my_runs.py:tiny", "--gpus", "2"]) == 0
    assert "my_runs.py:tiny, 64 tokens" in capsys.readouterr().out
    # toy data have no tokenizers
    assert generate.main(["run", "--out", "written", "--prompt", "a"]) == 2
    assert "no tokenizers" in capsys.readouterr().err


def test_a_study_names_runs_of_a_file_by_their_functions(own, capsys):
    names = ["my_runs.py:tiny", "my_runs.py:swept_3"]
    runs = study.plan(own / "out", names, [0], ("--sampler.no-enable",))
    assert [run.folder.name for run in runs] == ["tiny-seed0", "swept_3-seed0"]
    assert [run.command[3] for run in runs] == names and [run.steps for run in runs] == [2, 3]
    (own / "other.py").write_text((own / "my_runs.py").read_text())
    with pytest.raises(ValueError, match=r"configs \(tiny tiny\) must differ"):
        study.plan(own / "out", ["my_runs.py:tiny", "other.py:tiny"], [0], ())


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("mine.py:tiny", ["config file (mine.py) does not exist", "from the current folder"]),
        ("data.py", ["config file (data.py) does not exist"]),
        ("my_runs.py:tinny", ["config (my_runs.py:tinny) must name a function", "my_runs.py:tiny"]),
        ("my_runs.py:", ["must name a function", "my_runs.py:tiny"]),
        ("my_runs.py:WRONG", ["config (my_runs.py:WRONG) must name a function"]),
        ("my_runs.py:needs", ["without required arguments", "requires steps", "defaults"]),
        ("my_runs.py:nothing", ["must return a Trainer.Config", "returned None"]),
        ("my_runs.py:broken", ["my_runs.py, line 33, raised AttributeError", "trainning"]),
        ("my_runs.py:ends", ["my_runs.py, line 37, raised SystemExit"]),
        ("bad_import.py", ["bad_import.py, line 2, raised ModuleNotFoundError"]),
        ("bad_syntax.py:f", ["bad_syntax.py, line 1, raised SyntaxError"]),
        ("bad_call.py", ["bad_call.py, line 3, raised TypeError"]),
    ],
)
def test_what_is_no_config_is_refused_by_name(own, capsys, name, rules):
    assert train(name, "--dry-run") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert all(rule in message for rule in rules), message
    assert doctor.main(["traffic", name]) == 2
    assert study.main(["out", "--configs", name]) == 2
    assert all(capsys.readouterr().err.count(rule) >= 2 for rule in rules[:1])
