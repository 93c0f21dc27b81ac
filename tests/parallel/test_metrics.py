"""``metrics.jsonl``: strict JSON; half a line that a killed run left is dropped, other damage is
refused by file and line.
"""

import json
import math
from pathlib import Path

import pytest
from tiny_runs import MODELS, run, tiny_config
from toy import make_data

from earlyfuse.parallel.reporting.metrics import RunLogger
from earlyfuse.parallel.reporting.metrics_file import (
    LONGEST_LINE,
    METRICS_FILE,
    read_metrics,
)
from earlyfuse.parallel.reporting.plots import plot_curves

GOOD = [
    {"step": step, "kind": kind, "loss": 5.0 / step, "loss/text": 0.1 + step, "tokens/text": step}
    for step, kind in ((1, "train"), (1, "validation"), (2, "train"), (3, "train"))
]


def written(folder: Path, lines=GOOD, then: bytes = b"") -> Path:
    path = folder / METRICS_FILE
    path.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + then)
    return path


def resumed(folder: Path, step: int) -> list[dict]:
    logger = RunLogger(folder, None)
    logger.start(step)
    logger.close()
    return read_metrics(folder / METRICS_FILE)


@pytest.mark.parametrize(
    "half", [b"", b'{"step": 3, "ki', b"\x00\x00\xff", b"[" * 100_000, b"\xff" * 9, b"{}"]
)
def test_half_a_line_at_the_end_goes_and_so_do_later_steps(tmp_path, half):
    written(tmp_path, then=half)
    assert resumed(tmp_path, 2) == GOOD[:3]
    assert (tmp_path / METRICS_FILE).read_text() == "".join(json.dumps(x) + "\n" for x in GOOD[:3])


def test_a_last_line_that_lacks_only_its_end_stays(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert resumed(tmp_path, 3) == GOOD


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (b'{"step": 2, "ki', "is not valid JSON"),
        (b"[" * 100_000, "nested more than"),
        (b"null", "must hold a JSON object"),
        (b'{"kind": "train"}', "has no field 'step'"),
        (b'{"step": -1, "kind": "train"}', r"step \(-1\)"),
        (b'{"step": 2}', "has no field 'kind'"),
        (b'{"step": 2, "kind": "test"}', "must be one of train, validation"),
        (b'{"step": 2, "kind": "train", "loss": "low"}', r"loss \('low'\) must be a number"),
        (b'{"step": 2, "kind": "train", "flops/text": {}}', r"flops/text \({}\) must be a number"),
        (b'{"step": 2, "kind": "train", "loss": 1' + b"0" * 400 + b"}", "must be a number"),
        (b" " * (LONGEST_LINE + 1), "is longer than"),
    ],
)
def test_damage_is_refused_by_file_and_line_and_left_as_it_is(tmp_path, damage, rule):
    path = written(tmp_path, GOOD[:2], then=damage + b"\n" + json.dumps(GOOD[3]).encode() + b"\n")
    before = path.read_bytes()
    for read in (lambda: resumed(tmp_path, 3), lambda: plot_curves(tmp_path)):
        with pytest.raises(ValueError, match=rf"{METRICS_FILE}, line 3.* {rule}") as refusal:
            read()
        assert "correct or remove that line" in str(refusal.value)
        assert len(str(refusal.value)) < 1000
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_and_read_as_nan(tmp_path, value):
    logger = RunLogger(tmp_path, "tb")
    logger.start(0)
    logger.log({"kind": "train", "loss": value, "loss/text": value, "slowest_host": "a"}, 1)
    logger.close()
    path = tmp_path / METRICS_FILE
    line = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word}: no JSON"))
    assert line["loss"] is None and line["slowest_host"] == "a"
    assert math.isnan(read_metrics(path)[0]["loss/text"])
    assert plot_curves(tmp_path).exists()


def test_nan_of_an_earlier_version_is_read_and_rewritten_as_null(tmp_path):
    path = written(tmp_path, then=b'{"step": 4, "kind": "train", "loss": NaN}\n')
    assert math.isnan(read_metrics(path)[-1]["loss"])
    resumed(tmp_path, 4)
    assert path.read_text().splitlines()[-1] == '{"step": 4, "kind": "train", "loss": null}'


def test_weights_and_biases_get_the_same_numbers_and_the_config(tmp_path, monkeypatch):
    """Offline, as on a cluster without internet; torchtitan's own logger writes."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path / "run", make_data(tmp_path / "data"), MODELS["dense"](), steps=3)
    config.metrics.enable_wandb = True
    config.sampler.enable = False
    init, began, seen = wandb.init, {}, {}

    def begin(**options):
        began.update(options)
        session = init(**options)  # replaces wandb.log by the session's
        log = wandb.log
        monkeypatch.setattr(wandb, "log", lambda values, step: note(log, values, step))
        return session

    def note(log, values, step):
        seen.update({(step, name): value for name, value in values.items()})
        log(values, step=step)

    monkeypatch.setattr(wandb, "init", begin)
    run(config)
    assert began["config"]["training"]["steps"] == 3
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"validation/loss" in file.read_bytes()
    logged = {
        (line["step"], f"{line['kind']}/{name}"): value
        for line in read_metrics(tmp_path / "run" / METRICS_FILE)
        for name, value in line.items()
        if name not in ("kind", "step")
    }
    assert seen == pytest.approx(logged) and (3, "validation/loss") in seen
    assert {path.name for path in tmp_path.iterdir()} == {"run", "data"}, "nothing beside the run"


def test_weights_and_biases_without_a_login_are_refused_with_the_remedy(tmp_path, monkeypatch):
    import wandb

    def init(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"enable_wandb .*not configured.*WANDB_MODE=offline"):
        RunLogger(tmp_path, None, {}).start(0)
