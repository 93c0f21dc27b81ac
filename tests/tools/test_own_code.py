"""Models with classes of a user's file are read by the tools once ``--code`` names it."""

import subprocess
import sys

from exported_models import export
from places import ROOT
from tiny_runs import MODELS

from earlyfuse.configs.registry import import_file

OWN = """
from dataclasses import dataclass

from earlyfuse.models.blocks.feed_forward import FeedForward


class OwnFeedForward(FeedForward):
    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        pass
"""
# a process that has imported nothing else
PROGRAM = """
import sys
from earlyfuse.parallel.checkpoint.open_checkpoint import open_model
from pathlib import Path
source, target, code = sys.argv[1:]
try:
    open_model(Path(source))
except ValueError as error:
    print(error)
from earlyfuse.tools import convert
print(convert.main([source, target, "--code", code]))
"""


def test_a_branch_of_ones_own_and_every_router_of_the_tree_are_read(tmp_path):
    code = tmp_path / "own.py"
    code.write_text(OWN)
    config = MODELS["token_choice"]()
    width = config.dim
    own = import_file(code).OwnFeedForward.Config(dim=width, hidden_dim=width)
    config.layers[-1].extra_branches = {"own": own}
    export(config, tmp_path / "model")
    folders = (tmp_path / "model", tmp_path / "converted", code)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    refused, *_, status = done.stdout.splitlines()
    assert "own.kind ('OwnFeedForward') must be one of" in refused and "--code FILE.py" in refused
    assert status == "0", done.stderr
    names = ("model.safetensors", "config.json")
    before, after = (
        (tmp_path / folder / names[1]).read_text() for folder in ("model", "converted")
    )
    assert '"TokenChoice"' in before and '"OwnFeedForward"' in after
