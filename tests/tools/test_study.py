"""The comparison of runs: what is trained, what is read from it, and what is said of it."""

import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import ROOT, SUPPORT
from tiny_runs import MAMBAS, tiny_config
from toy import make_data

from earlyfuse.configs import registry
from earlyfuse.data.folder_lock import FolderLock
from earlyfuse.tools.study import report as study_report
from earlyfuse.tools.study import study


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
    return study_report.curves([run.lines() for run in runs])


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
    study_report.report(tmp_path, {"mamba": base, "mixture_of_mamba": better})
    table = (tmp_path / "study.md").read_text()
    assert "| mamba | 3.100 (3.000-3.200) | 100.0% |" in table
    reached = 1 + 99 * (5 - 3.1) / (5 - 2.1)
    assert f"| mixture_of_mamba | 2.100 (2.100-2.100) | {reached:.1f}% |" in table
    assert (tmp_path / "study.png").stat().st_size > 5000 and table in capsys.readouterr().out
    assert json.loads((tmp_path / "study.json").read_text())["mamba"]["flops"] == [1, 100]


def test_losses_under_rules_of_inference_stand_beside_those_of_the_batch(tmp_path):
    run = written(tmp_path / "a", {4: 4.0, 8: 2.0})
    log = tmp_path / "a" / "metrics.jsonl"
    log.write_text(
        log.read_text().replace('"loss/text": 2.0', '"loss/text": 2.0, "causal_loss/text": 3.0')
    )
    ruled = curve([run])
    assert str(ruled["text, causal"].tolist()) == "[[nan, 3.0]]"
    study_report.report(tmp_path, {"dense": points([40.0, 80.0], [4.0, 2.0]), "mod": ruled})
    text = (tmp_path / "study.md").read_text()
    assert "| config | text loss | text, causal | FLOPs to dense's text |" in text
    assert "| dense | 2.000 (2.000-2.000) | – | 100.0% |" in text
    assert "| mod | 2.000 (2.000-2.000) | 3.000 (3.000-3.000) | 100.0% |" in text
    saved = json.loads((tmp_path / "study.json").read_text())
    assert saved["mod"]["at_equal_flops"]["text, causal"] == [3.0]


def points(flops, text, *more):
    return {"flops": np.array(flops), "text": np.array([text, *more])}


def test_configs_are_compared_at_flops_that_all_have_reached(tmp_path):
    """Three sizes, of which the smallest ends first: nothing is said of it beyond its end."""
    found = {
        "small": points([1.0, 10.0], [6.0, 4.0]),
        "middle": points([2.0, 8.0, 20.0], [7.0, 5.0, 2.0]),
        "large": points([12.0, 100.0], [6.0, 1.0]),
    }
    study_report.report(tmp_path, found)
    text = (tmp_path / "study.md").read_text()
    assert "after 10 training FLOPs, the most that all runs have reached" in text
    assert "| small | 4.000 (4.000-4.000) | 100.0% | 10 | 4.000 (4.000-4.000) |" in text
    # 5 at 8 FLOPs and 2 at 20: 4.5 at 10, and 4 at 12
    assert "| middle | 4.500 (4.500-4.500) | 120.0% | 20 | 2.000 (2.000-2.000) |" in text
    assert "| large | none | " in text and "text of large, whose first validation is later" in text
    saved = json.loads((tmp_path / "study.json").read_text())
    assert saved["middle"]["at_equal_flops"] == {"flops": 10, "text": [4.5]}
    assert saved["large"]["at_equal_flops"]["text"] == [None]


def test_seeds_that_validated_elsewhere_are_interpolated(tmp_path):
    runs = [
        written(tmp_path / "a", {1: 8.0, 4: 4.0, 8: 2.0}),
        written(tmp_path / "b", {2: 6.0, 6: 2.0}),
    ]
    found = curve(runs)
    assert found["flops"].tolist() == [20, 40, 60]
    assert found["text"].tolist() == [[8 - 4 / 3, 4, 3], [6, 4, 2]]


def test_losses_that_are_not_finite_are_gaps_and_said(tmp_path):
    run = written(tmp_path / "a", {1: 8.0, 4: 4.0, 6: float("nan"), 8: 2.0})
    found = curve([run])
    assert str(found["text"].tolist()) == "[[8.0, 4.0, nan, 2.0]]"
    study_report.report(tmp_path, {"mamba": found, "other": points([10.0, 70.0], [8.0, 3.0])})
    text = (tmp_path / "study.md").read_text()
    assert "1 of 4 text losses of mamba" in text and "| mamba | none |" in text
    saved = (tmp_path / "study.json").read_text()
    assert json.loads(saved)["mamba"]["text"] == [[8, 4, None, 2]] and "NaN" not in saved


def test_a_folder_with_a_run_of_other_settings_is_refused_by_field(tmp_path, monkeypatch, capsys):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"

    def tiny():
        return tiny_config(tmp_path / "unused", data, MAMBAS["mamba"](), steps=8)

    monkeypatch.setattr(registry, "sections", lambda: {"tiny": {"tiny": tiny}})
    monkeypatch.setattr(study, "train", lambda runs, jobs: None)
    arguments = [str(out), "--configs", "tiny", "--seeds", "0"]

    def main(*overrides) -> str:
        status = study.main([*arguments, "--", *overrides])
        error = capsys.readouterr().err
        assert status == (2 if error else 0)
        return error

    run = written(out / "tiny-seed0", {1: 8.0, 8: 2.0})
    (planned,) = study.plan(out, ["tiny"], [0], ())
    with pytest.raises(ValueError, match=r"holds a run without run.json"):
        planned.check_settings()
    (run.folder / "run.json").write_text("[")
    with pytest.raises(ValueError, match=r"run.json is not valid JSON"):
        planned.check_settings()
    described = {"config": planned.settings, "changes": []}
    (run.folder / "run.json").write_text(json.dumps(described))
    assert main("--metrics.log_freq", "3") == "", "what is logged is no other setting"
    before = (out / "study.md").read_bytes()
    error = main("--optimizer.param-groups.0.optimizer-kwargs.lr", "0.5")
    assert "tiny-seed0 holds a run of other settings: optimizer.param_groups[0]" in error
    assert "lr is 0.004 there and 0.5 here; compare in another OUT" in error
    for section, name, value in (
        ("training", "steps", 9),
        ("training", "global_batch_size", 2),
        ("data", "shares", {"text": 1.0}),
        ("data", "shares", {"text": 0.5, "pairs": 0.5, "more": 0.0}),
        ("loss", "z_loss", 0.0),
    ):
        settings = planned.settings | {section: planned.settings[section] | {name: value}}
        with pytest.raises(ValueError, match=rf"of other settings: {section}.{name} is"):
            replace(planned, settings=settings).check_settings()
    described["changes"] = [{"step": 3, "field": "training.max_norm", "before": 1.0, "now": 2.0}]
    (run.folder / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"whose settings were changed on the way"):
        planned.check_settings()
    assert (out / "study.md").read_bytes() == before


def test_runs_are_started_with_the_entry_of_this_tree():
    assert study.TRAIN == ROOT / "tools" / "train.py" and study.TRAIN.is_file()


def test_two_studies_in_one_folder_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "plan", lambda *_: [])
    lock = FolderLock(tmp_path, print)
    assert lock.acquire()
    assert study.main([str(tmp_path), "--configs", "mamba"]) == 2
    assert "is in use by another study" in capsys.readouterr().err


RUN = """
import signal, sys, time
from pathlib import Path
from earlyfuse.data.folder_lock import FolderLock
from earlyfuse.parallel.reliability import preemption

preemption.end_with_parent()
folder = Path(sys.argv[-1])
lock = FolderLock(folder, print)
assert lock.acquire()

def save(number, frame):
    (folder / "saved").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_runs_end_with_the_study(tmp_path, monkeypatch, number):
    """Killed, at once; terminated or interrupted, when they have saved."""
    (tmp_path / "train.py").write_text(RUN)
    monkeypatch.setattr(study, "TRAIN", tmp_path / "train.py")
    runs = [study.Run("mamba", seed, tmp_path / str(seed), 1, ()) for seed in (0, 1)]
    job = multiprocessing.get_context("fork").Process(target=study.train, args=(runs, 2))
    job.start()
    while not all((run.folder / "started").exists() for run in runs):
        assert job.is_alive()
        time.sleep(0.02)
    os.kill(job.pid, number)
    job.join()
    assert job.exitcode == (-number if number == signal.SIGKILL else 1)
    for run in runs:
        assert FolderLock(run.folder, print).acquire(60), "it is gone, and with it its lock"
        assert (run.folder / "saved").exists() == (number != signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "mamba", "mumba"], "config ('mumba') is unknown; did you mean mamba"),
        (["--configs", "mamba", "mamba"], "configs (mamba mamba) must differ from each other"),
        (["--configs", "mamba", "--seeds", "1", "1"], "seeds (1 1) must differ from each other"),
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

    monkeypatch.setattr(registry, "sections", lambda: {"tiny": {"tiny": tiny}})
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


LAUNCHER = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(SUPPORT)!r})
from tiny_runs import MAMBAS, tiny_config
from earlyfuse.configs.command_line import override

config = tiny_config(Path("unused"), Path({{data!r}}), MAMBAS["mixture_of_mamba"](), steps=2)
trainer = override(config, sys.argv[2:]).build()
trainer.train()
trainer.close()
"""
