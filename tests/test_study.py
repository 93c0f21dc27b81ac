"""The comparison of runs: what is trained, what is read from it, and what is said of it."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_runs import MAMBAS, tiny_config
from toy import make_data

from earlyfuse.configs import catalogue
from earlyfuse.tools import study, study_report


def written(folder, losses, kind="text"):
    """A run's metrics: 10 FLOPs a step, a training line every second step."""
    folder.mkdir(parents=True)
    lines = [
        {"kind": "train", "step": step, "flops/text": 6 * step, "flops/image": 4 * step}
        for step in range(0, 10, 2)
    ]
    lines += [
        {"kind": "validation", "step": step, f"loss/{kind}": loss} for step, loss in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return study.Run("mamba", 0, folder, max(losses), ())


def curve(runs):
    return study.curves([run.lines() for run in runs])


def test_losses_stand_over_the_flops_of_all_modalities(tmp_path):
    runs = [
        written(tmp_path / "a", {1: 8.0, 4: 4.0, 8: 2.0}),
        written(tmp_path / "b", {1: 6.0, 4: 2.0, 8: 1.0}),
    ]
    found = curve(runs)
    assert found["flops"].tolist() == [10, 40, 80]
    assert found["text"].tolist() == [[8, 4, 2], [6, 2, 1]] and "image" not in found


@pytest.mark.parametrize(("target", "flops"), [(7.0, 10), (3.0, 40), (2.25, 60), (1.0, None)])
def test_flops_to_reach_a_loss(tmp_path, target, flops):
    runs = [
        written(tmp_path / "a", {1: 8.0, 4: 4.0, 8: 2.0}),
        written(tmp_path / "b", {1: 6.0, 4: 2.0, 8: 1.0}),
    ]
    assert study_report.flops_to_reach(curve(runs), "text", target) == flops


def test_the_last_line_of_a_repeated_step_counts(tmp_path):
    run = written(tmp_path / "a", {8: 2.0})
    with (tmp_path / "a" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "validation", "step": 8, "loss/text": 1.5}) + "\n")
    assert run.finished() and curve([run])["text"].tolist() == [[1.5]]


def test_the_table_compares_with_the_first_config(tmp_path, capsys):
    base = {"flops": np.array([1.0, 100.0]), "text": np.array([[5.0, 3.0], [5.0, 3.2]])}
    better = {"flops": np.array([1.0, 100.0]), "text": np.array([[5.0, 2.1], [5.0, 2.1]])}
    study.report(tmp_path, {"mamba": base, "mixture_of_mamba": better})
    table = (tmp_path / "study.md").read_text()
    assert "| mamba | 3.100 (3.000-3.200) | 100.0% |" in table
    reached = 1 + 99 * (5 - 3.1) / (5 - 2.1)
    assert f"| mixture_of_mamba | 2.100 (2.100-2.100) | {reached:.1f}% |" in table
    assert (tmp_path / "study.png").stat().st_size > 5000 and table in capsys.readouterr().out
    assert json.loads((tmp_path / "study.json").read_text())["mamba"]["flops"] == [1, 100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "mamba", "mumba"], "configs (mumba) are unknown"),
        (["--configs", "mamba", "mamba"], "configs (mamba mamba) must be different"),
        (["--configs", "mamba", "--seeds", "1", "1"], "seeds (1 1) must be different"),
        (["--configs", "mamba", "--", "--validator.no-enable"], "validator.enable"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    tmp_path, capsys, arguments, message
):
    assert study.main([str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_seeds_differ_and_runs_are_run_once(tmp_path, monkeypatch, capsys):
    """The real thing at a tiny size, twice: the second time nothing is left to do."""
    data = make_data(tmp_path / "data")

    def tiny():
        return tiny_config(tmp_path / "unused", data, MAMBAS["mixture_of_mamba"](), steps=2)

    monkeypatch.setattr(catalogue, "sections", lambda: {"tiny": {"tiny": tiny}})
    overrides = ["--", "--validator.freq", "2", "--sampler.no-enable"]
    launcher = tmp_path / "train.py"
    launcher.write_text(LAUNCHER.format(data=str(data)))
    monkeypatch.setattr(study, "TRAIN", launcher)
    arguments = [str(tmp_path / "out"), "--configs", "tiny", "--seeds", "0", "1", *overrides]
    assert study.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"tiny-seed(\d): \d+ s", printed) == ["0", "1"]
    found = json.loads((tmp_path / "out" / "study.json").read_text())["tiny"]
    first, second = found["text"]
    assert first[0] != second[0]
    assert study.main(arguments) == 0
    assert "seed" not in capsys.readouterr().out.split("Held-out")[0]


def test_the_seed_of_a_run_is_that_of_its_first_values(tmp_path):
    def head(name, seed):
        config = tiny_config(tmp_path / name, data, MAMBAS["mamba"]())
        config.debug.seed = seed
        trainer = config.build()
        trainer.close()
        return trainer.model.lm_head.weight

    data = make_data(tmp_path / "data")
    assert torch.equal(head("a", None), head("b", 0))
    assert not torch.equal(head("c", 0), head("d", 1))


LAUNCHER = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from tiny_runs import MAMBAS, tiny_config
from earlyfuse.configs.command_line import override

config = tiny_config(Path("unused"), Path({{data!r}}), MAMBAS["mixture_of_mamba"](), steps=2)
trainer = override(config, sys.argv[2:]).build()
trainer.train()
trainer.close()
""".format(tests=str(__import__("pathlib").Path(__file__).parent))
