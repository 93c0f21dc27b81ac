"""What a run says of itself: opening lines, losses as means, times of training alone, what changed
since the last start.
"""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import MODELS, changed, run, tiny_config
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import get_peak_flops

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.models.batch import IGNORE_LABEL
from earlyfuse.models.flops import count_parameters
from earlyfuse.parallel import compat
from earlyfuse.parallel.checkpoint.files.dcp import LOSS_MEAN
from earlyfuse.parallel.reporting import metrics as run_metrics
from earlyfuse.parallel.reporting import run_folder
from earlyfuse.parallel.reporting.opening import quantity
from earlyfuse.parallel.reporting.plots import _Run
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.resume_settings import changed_beside, plain_config
from earlyfuse.parallel.training.step_metrics import LossMean

A100 = 312e12


def config_of(folder, data, **fields):
    fields = {"metrics.log_freq": 4, "validator.freq": 5, "sampler.enable": False} | fields
    return changed(tiny_config(folder, data, MODELS["dense"](), steps=6), fields)


def noted(config, micro, until=None) -> Trainer:
    """Train; ``micro``: step → (sum, labels) of each of its micro-batches."""
    trainer = config.build()
    loss_of = trainer.loss_fn.loss_of

    def noting(batch, sources):
        loss = loss_of(batch, sources)

        def note(*head):
            found = loss(*head)
            if torch.is_grad_enabled():
                labels = int((batch.labels_BS != IGNORE_LABEL).sum())
                micro[trainer.step].append((float(found.sums["loss"].sum()), labels))
            return found

        return note

    trainer.loss_fn.loss_of = noting
    if until:
        trainer.should_continue_training = lambda: trainer.step < until
    trainer.train()
    trainer.close()
    return trainer


@pytest.fixture(scope="module")
def restarted(tmp_path_factory, data):
    """A run stopped at step 5, after its checkpoint of step 3, and started again with changes:
    folder, losses of micro-batches by step of the later start, both outputs.
    """
    folder, capture = tmp_path_factory.mktemp("restarted") / "run", pytest.MonkeyPatch()
    said: list[list[str]] = [[], []]
    micro = defaultdict(list)
    for start, fields in enumerate(({}, {"checkpoint.interval": 2, "training.max_norm": 0.5})):
        capture.setattr("builtins.print", lambda line, *_, n=start, **__: said[n].append(line))
        for step in (4, 5, 6):
            micro.pop(step, None)
        noted(config_of(folder, data, **fields), micro, until=None if start else 5)
    capture.undo()
    return SimpleNamespace(folder=folder, micro=micro, said=said, data=data)


def lines_of(folder, kind) -> dict[int, dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["kind"] == kind}


def test_the_logged_loss_is_the_mean_over_labels_since_the_last_line_across_a_resume(restarted):
    lines = lines_of(restarted.folder, "train")
    for step, since in {1: (1,), 4: (2, 3, 4), 6: (5, 6)}.items():
        micro = [pair for number in since for pair in restarted.micro[number]]
        assert len(micro) == 2 * len(since)
        by_hand = sum(loss for loss, _ in micro) / sum(labels for _, labels in micro)
        assert lines[step]["loss"] == pytest.approx(by_hand, rel=1e-6)
    assert lines.keys() == {1, 4, 6}


def test_a_skipped_step_is_not_in_the_mean_unless_there_is_no_other():
    mean, count = LossMean(), {"labels": torch.tensor([[3, 1]])}
    nan, four = ({"loss": torch.tensor([[value, value]])} for value in (float("nan"), 4.0))
    mean.add(nan, count, torch.tensor(False))
    assert mean.pop(nan, count)[0]["loss"].isnan().all()
    for sums, taken in ((four, True), (nan, False), (four, True)):
        mean.add(sums, count, torch.tensor(taken))
    sums, counts = mean.pop(nan, count)
    assert (sums["loss"].tolist(), counts["labels"].tolist()) == ([[8, 8]], [[6, 2]])


def test_a_checkpoint_from_before_the_mean_is_resumed(tmp_path, data, monkeypatch):
    save, config = Trainer.state_dict, config_of(tmp_path, data, **{"validator.enable": False})
    old = lambda trainer: {k: v for k, v in save(trainer).items() if k != LOSS_MEAN}  # noqa: E731
    with monkeypatch.context() as before:
        before.setattr(Trainer, "state_dict", old)
        changed(config, {"training.steps": 2})
        run(config)
    changed(config, {"training.steps": 3})
    assert run(config).step == 3 and 3 in lines_of(tmp_path, "train")


def test_validation_lines_carry_tokens_flops_and_epochs(restarted):
    train, held_out = (lines_of(restarted.folder, kind) for kind in ("train", "validation"))
    assert held_out.keys() == {1, 5, 6}
    for kind in ("tokens/", "flops/", "tokens_by_source/", "epochs_by_source/"):
        last = {name: value for name, value in train[6].items() if name.startswith(kind)}
        assert last and last.items() <= held_out[6].items()
    tokens = [
        sum(v for k, v in held_out[5].items() if k.startswith(kind))
        for kind in ("tokens/", "tokens_by_source/")
    ]
    assert tokens == [5 * 4 * 32] * 2, "the toy data need no padding"


def test_a_validation_of_an_earlier_version_is_drawn_at_its_training_line():
    old = [{"kind": "train", "step": 2, "tokens/text": 8}, {"kind": "validation", "step": 2}]
    assert _Run(old).tokens_at == {2: 8}
    assert _Run([*old, {"kind": "validation", "step": 3, "tokens/text": 9}]).tokens_at[3] == 9


def test_the_opening_lines_say_model_batch_place_and_what_is_left_of_the_data(restarted):
    first, again = ("\n".join(map(str, lines)) for lines in restarted.said)
    assert f"{quantity(count_parameters(MODELS['dense']()).total)} parameters" in first
    assert "128 tokens of a step: 4 rows x 32 positions" in first and "6 steps: 768 tokens" in first
    assert "1 rank on 1 host; CPU" in first and "computes in float32" in first
    assert "losses are means over the steps since the last line" in first
    text = TokenSource(restarted.data / "train" / "text")
    assert f"text: {len(text):,} documents" in first and "3 steps left: 384 tokens" in again
    begun = lines_of(restarted.folder, "validation")
    assert "from epoch" in again and "from epoch" not in first and begun


def test_what_changed_since_the_last_start_is_named_and_the_history_is_kept(restarted):
    again = "\n".join(map(str, restarted.said[1]))
    assert "resumed at step 3, from here with training.max_norm 1.0 → 0.5\n" in again
    assert "also changed since the last start: checkpoint.interval 3 → 2\n" in again
    path = restarted.folder / run_folder.HISTORY
    starts = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(start["step"], start["ranks"]) for start in starts] == [(0, 1), (3, 1)]
    assert all(start["command"] and start["time"] for start in starts)
    fields = {change["field"] for change in starts[1]["changed"]}
    assert fields == {"training.max_norm", "checkpoint.interval"} and not starts[0]["changed"]
    last = config_of(restarted.folder, restarted.data, **{"metrics.log_freq": 2})
    found = changed_beside(restarted.folder, plain_config(last), 2)
    assert {"field": "ranks", "before": 1, "now": 2} in found
    assert {"field": "metrics.log_freq", "before": 4, "now": 2} in found


def test_half_a_line_of_the_history_goes_and_damage_to_it_stops_no_start(tmp_path):
    run_folder.append_start(tmp_path, 0, ["a"], [])
    path = tmp_path / run_folder.HISTORY
    path.write_bytes(path.read_bytes() + b'{"time": "2')
    run_folder.append_start(tmp_path, 7, ["a", "b"], [])
    assert [json.loads(line)["ranks"] for line in path.read_text().splitlines()] == [1, 2]
    path.write_bytes(b"\xff\n")
    assert changed_beside(tmp_path, {}, 1) == []


def test_times_and_eta_leave_out_the_first_step_and_a_slow_validation(
    tmp_path, monkeypatch, capsys
):
    compat.apply()
    compat.join_process_group_alone()
    dims = ParallelDims(1, 1, 1, 1, 1, 1, 1)
    clock, seen = [0.0], []
    fake = SimpleNamespace(perf_counter=lambda: clock[0])
    monkeypatch.setattr(run_metrics, "time", fake)
    config = run_metrics.RunMetrics.Config(enable_tensorboard=False)
    metrics = config.build(parallel_dims=dims, dump_folder=str(tmp_path))
    metrics.logger.log = lambda line, step: seen.append(line)
    metrics.gpu_peak_flops = 4e12
    metrics.start(0, 100)
    for step in range(1, 21):
        clock[0] += 50.0 if step == 1 else 2.0  # the first compiles
        metrics.ntokens_since_last_log += 1000
        if step in (1, 10, 20):
            line = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "flops/text": step * 2e12}
            metrics.log_step(step, line)
        metrics.tick(step, step * 2e12)
        if step in (1, 12):
            clock[0] += 500.0  # a validation
            metrics.restart_clock()
    assert seen[0]["first_step_seconds"] == 50 and "tokens_per_second" not in seen[0]
    for line in seen[1:]:
        rates = [line[k] for k in ("step_seconds", "tokens_per_second", "tflops_per_rank", "mfu")]
        assert rates == pytest.approx([2, 500, 1, 0.25])
    assert metrics.seconds_left(20) == 160
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("first step 50 s | eta unknown yet")
    assert shown[2].endswith("500 tok/s | 1 TFLOP/s (25.0% mfu) | step 2 s | eta 02:40")


@pytest.mark.parametrize("name", run_folder.PEAKS_KNOWN)
def test_no_peak_is_invented(name):
    """torchtitan takes a device that it does not know for an A100."""
    assert name == "A100" or get_peak_flops(f"NVIDIA {name}") != A100
