"""Training runs: exact resume, metrics per modality, and wrong configs refused before anything is
written.
"""

import json
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from places import ROOT, SUPPORT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import MAMBAS, MODELS, SHAPE, changed, metrics, run, state, tiny_config
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from toy import BLOCK, VOCABULARY, make_data

from earlyfuse.configs import decoders, embedded
from earlyfuse.data.media import MEDIA
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.mamba import Conv, Scan
from earlyfuse.models.vocabulary import MediaCodes, Modality
from earlyfuse.parallel import compat
from earlyfuse.parallel.evaluation.eval_tasks import Task
from earlyfuse.parallel.training.lr_schedule import LearningRate

# imported by torchtitan, but not for our runs
UNUSED = ("datasets", "pandas", "torch._inductor.compile_fx")
NOT_SAVED = {"checkpoint.enable": False, "validator.enable": False}


def config_of(folder, data, name="moma", dropout=0.0, steps=6, **fields):
    model = (MODELS | MAMBAS)[name]()
    for layer in model.layers:
        layer.dropout = dropout
    return changed(tiny_config(folder, data, model, steps), fields)


def logged(folder, kind="train"):
    return [line for line in metrics(folder) if line["kind"] == kind]


@pytest.mark.parametrize(
    ("name", "dropout"), [("moma", 0.2), ("mixture_of_mamba", 0.2), ("token_choice", 0.0)]
)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, data, name, dropout):
    unbroken = run(config_of(tmp_path / "unbroken", data, name, dropout))
    broken = config_of(tmp_path / "broken", data, name, dropout)
    run(broken, stop_after=4)  # one step beyond the checkpoint of step 3, which is lost
    expected, found = state(unbroken), state(run(broken))
    assert expected.keys() == found.keys() and any(key.startswith("optimizer") for key in found)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["moma", "mixture_of_mamba"])
def test_recomputation_in_bf16_on_one_process_changes_nothing(tmp_path, data, name):
    """With dropout, whose places recomputed blocks must drop again."""

    def config(folder, policy):
        fields = NOT_SAVED | {"training.mixed_precision_param": "bfloat16"}
        fields["activation_checkpoint"] = policy
        return config_of(tmp_path / folder, data, name, 0.2, 2, **fields)

    learned = []
    for folder, policy in (("no", None), ("full", FullAC), ("selective", SelectiveAC)):
        run(config(folder, policy and policy.Config()))
        learned.append([(x["loss"], x["grad_norm"]) for x in logged(tmp_path / folder)])
    assert learned[0] == learned[1] == learned[2]
    with pytest.raises(ValueError, match="needs preserve_rng_state with dropout"):
        config("forgetful", FullAC.Config(preserve_rng_state=False)).build()


def test_a_scan_has_fp32_parameters_where_all_else_computes_in_bf16(tmp_path, data, monkeypatch):
    fields = NOT_SAVED | {"training.mixed_precision_param": "bfloat16"}
    seen: dict[str, set[torch.dtype]] = {"Scan": set(), "inputs": set(), "Conv": set()}

    def note(kind):
        forward = kind.forward

        def noted(self, x_BSI, *others):
            seen[kind.__name__] |= {parameter.dtype for parameter in self.parameters()}
            seen["inputs"] |= {x_BSI.dtype}
            return forward(self, x_BSI, *others)

        monkeypatch.setattr(kind, "forward", noted)

    note(Scan)
    note(Conv)
    trainer = run(config_of(tmp_path, data, "mixture_of_mamba", steps=2, **fields))
    bf16, fp32 = {torch.bfloat16}, {torch.float32}
    assert seen == {"Scan": fp32, "inputs": bf16, "Conv": bf16}
    parameters = dict(trainer.model.named_parameters())
    assert {p.dtype for p in parameters.values()} == fp32
    assert {p.grad.dtype for p in parameters.values() if p.grad is not None} == fp32
    steps = parameters["layers.0.mamba.scan.dt_bias"].to_local()
    assert not steps.equal(steps.bfloat16().float())


def test_gradient_accumulation_computes_the_same_step(tmp_path, data):
    two, four = (
        run(config_of(tmp_path / f"{n}", data, steps=2, **{"training.local_batch_size": n}))
        for n in (2, 4)
    )
    for name, value in two.model.state_dict().items():
        torch.testing.assert_close(value, four.model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["moe_8x", "token_choice", "mot", "moma_causal"])
def test_every_model_learns_the_toy_data(tmp_path, data, name):
    fields = {"checkpoint.enable": False, "validator.freq": 100}
    run(config_of(tmp_path, data, name, steps=30, **fields))
    first, last = logged(tmp_path, "validation")
    assert last["loss/image"] < first["loss/image"] - 0.3
    assert last["loss/text"] < first["loss/text"] - 0.2


def test_metrics_are_per_modality_everywhere_and_a_closed_trainer_draws_no_more(tmp_path, data):
    before = set(threading.enumerate())
    trainer = run(tiny_config(tmp_path, data))
    train, validation = logged(tmp_path), logged(tmp_path, "validation")
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validation] == [1, 3, 6]
    names = {f"{kind}/{m}" for kind in ("loss", "tokens", "flops") for m in ("text", "image")}
    names |= {"grad_norm", "output_norm"}
    names |= {"router/layer0.pool0/load_max", "router/layer1.pool1/reached"}
    assert all(names <= line.keys() for line in train)
    assert {"loss/text", "loss/image", "unigram_entropy/image"} <= validation[0].keys()
    tokens = train[-1]["tokens/text"] + train[-1]["tokens/image"]
    assert tokens == 6 * 4 * 32 == trainer.ntokens_seen
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss/image")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    description = json.loads((tmp_path / "run.json").read_text())
    assert description["config"]["training"]["seq_len"] == 32 and description["revision"]
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if thread.name == "earlyfuse-prefetch"]
    assert trainer.dataloader.lanes[:, -1].tolist() == [6] * 4, "what was drawn ahead is forgotten"


def test_a_medium_registered_at_run_time_has_a_loss_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Modality, "LABELS", [*Modality.LABELS])
    dice = Modality.register("dice")
    row = replace(MEDIA["image"], modality=dice, colour="#000000")
    monkeypatch.setitem(MEDIA, "dice", row)
    codes = (MediaCodes(dice, 32, 16, begin=3, end=4, block=BLOCK),)
    data = make_data(tmp_path / "data", vocabulary=replace(VOCABULARY, media=codes))
    model = replace(decoders.dense(SHAPE), modalities=(0, int(dice)))
    run(tiny_config(tmp_path / "run", data, model, steps=2))
    for line in metrics(tmp_path / "run"):
        assert line["loss/dice"] > 0 and line["loss/text"] > 0 and "loss/image" not in line
        assert line["kind"] == "validation" or line["tokens/dice"] > 0 < line["flops/dice"]


def test_batches_are_copied_to_the_device_without_blocking(tmp_path, data, monkeypatch):
    copies, to = [], MixedBatch.to

    def noted(batch, device, non_blocking=False):
        copies.append(non_blocking)
        return to(batch, device, non_blocking)

    monkeypatch.setattr(MixedBatch, "to", noted)
    run(config_of(tmp_path, data, steps=1, **NOT_SAVED))
    assert copies == [True, True], "two micro-batches"


def test_validation_does_not_change_the_run(tmp_path, data):
    losses = []
    for freq in (1, 1000):  # with dropout: a model left in evaluation mode would show
        folder = tmp_path / str(freq)
        run(config_of(folder, data, dropout=0.2, **{"validator.freq": freq}))
        losses.append([line["loss"] for line in logged(folder)])
    assert losses[0] == losses[1]


def test_parameters_that_are_not_finite_stop_the_run_before_they_are_saved(tmp_path, data):
    trainer = config_of(tmp_path, data, **{"metrics.log_freq": 100}).build()
    step = trainer.train_step

    def poisoned(iterator):
        if trainer.step == 2:
            with torch.no_grad():
                trainer.model.lm_head.weight[0] = torch.nan
        step(iterator)

    trainer.train_step = poisoned
    with pytest.raises(RuntimeError, match=r"non-finite parameters on ranks \[0\] at step 2"):
        trainer.train()
    trainer.close()
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(tmp_path, data):
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "from pathlib import Path\nfrom tiny_runs import tiny_config\n"
        f"config = tiny_config(Path({str(tmp_path / 'run')!r}), Path({str(data)!r}), steps=40)\n"
        "config.checkpoint.interval = 1000\nconfig.validator.freq = 1000\n"
        "trainer = config.build(); trainer.train(); trainer.close()\n"
        f"print('imported', [name for name in {UNUSED} if name in sys.modules])\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as job:
        next(line for line in job.stdout if line.startswith("step"))
        job.send_signal(signal.SIGTERM)
        assert "the same command resumes" in job.stdout.read()
    assert job.returncode == 0
    saved = [p.name for p in (tmp_path / "run" / "checkpoint").glob("step-*")]
    assert saved and "step-40" not in saved
    again = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=120
    )
    assert "done: 40 steps" in again.stdout
    assert "imported []" in again.stdout, "seconds and memory of every rank"
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 41))


def test_what_torchtitan_imports_late_is_there_when_it_is_used(monkeypatch):
    import datasets.distributed

    modules = {name: sys.modules[name] for name in ("datasets", "datasets.distributed")}
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    compile = torch.compile
    with compat.light_imports():
        from datasets import Dataset as Late
        from datasets.distributed import split_dataset_by_node

        twice = torch.compile(lambda x: 2 * x, backend="eager")
    assert "datasets" not in sys.modules and torch.compile is compile
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    rows = datasets.Dataset.from_dict({"row": [0, 1, 2, 3]})
    assert isinstance(rows, Late) and not isinstance([], Late)
    assert split_dataset_by_node(rows, rank=1, world_size=2)["row"] == [2, 3]
    assert twice(torch.ones(2)).tolist() == [2, 2]
    with compat.light_imports():
        from datasets import Dataset
    assert Dataset is datasets.Dataset, "what is there already stays"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (
            {"training.seq_len": 5},
            r"seq_len \(5\) must be at least 6: each image block has 4 codes",
        ),
        ({"validator.batch_rows": 3}, r"validator.batch_rows \(3\) must be a multiple"),
        ({"data.folder": __file__}, r"data.folder \(.*\) must be a folder; it is a file"),
        ({"data.folder": "nothing"}, "must be a folder written by"),
        (
            {"training.local_batch_size": 3, "training.global_batch_size": 3},
            r"local_batch_size \(3\) must be a multiple of routing_rows \(2\)",
        ),
        ({"training.global_batch_size": 5}, r"training.global_batch_size \(5\) must be a multiple"),
        ({"data.shares": {"text": 0.5, "pairs": 0.4}}, "must sum to 1, not 0.9"),
        (
            {"data.shares": {"text": 0.5, "films": 0.5}},
            r"data.shares names \['films'\].*\['pairs', 'text'\]",
        ),
        ({"dataloader.media_share": 0.99}, r"media_share \(0.99\) must lie between"),
        ({"parallelism.tensor_parallel_degree": 2}, "must make up the 1 ranks"),
        ({"checkpoint.initial_load_path": "/b"}, r"'/b'\) must be None.*: start.model takes"),
    ],
)
def test_wrong_configs_are_refused_before_anything_is_written(tmp_path, data, fields, rule):
    with pytest.raises(ValueError, match=rule):
        config_of(tmp_path / "out", data, **fields).build()
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_its_data_or_folder_is_refused(tmp_path, data, monkeypatch):
    def refused(config, rule):
        with pytest.raises(ValueError, match=rule):
            config.build()

    task = Task("toy", [[0] * 31], [(10,), (11, 12, 13)], [0], VOCABULARY)
    monkeypatch.setattr("earlyfuse.parallel.evaluation.validation.load_tasks", lambda _: [task])
    rule = r"training.seq_len \(32\) must hold a prompt of the task 'toy' \(33 tokens\)"
    refused(tiny_config(tmp_path / "out", data), rule)
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    shard = broken / "train" / "text" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(tiny_config(tmp_path / "out", broken), "shard-000000.tar")
    shard.unlink()
    refused(tiny_config(tmp_path / "out", broken), "shard-000000.tar")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    refused(tiny_config(tmp_path / "file" / "run", data), "must be writable, but .*file is a file")


def test_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train = runpy.run_path(str(ROOT / "train.py"))["main"]
    assert train(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "moma_4t4i" in listed and "Mixture-of-Transformers" in listed
    assert train(["dense", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "runs/dense" in shown and len(shown.splitlines()) < 48
    assert train(["mamma"]) == 2
    message = capsys.readouterr().err
    assert isinstance(embedded.moma_4t4i_stage2().lr_scheduler, LearningRate.Config), "its fields"
    assert "config ('mamma') is unknown; did you mean mamba" in message and "--list" in message
    assert train(["dense", "--training.step", "3"]) == 2
    assert "--training.steps" in capsys.readouterr().err
    assert train(["dense", "--data.folder", "nowhere", "--data.no-embedded"]) == 2
    assert "error: data.folder ('nowhere')" in capsys.readouterr().err
    assert not any(tmp_path.iterdir()), "nothing is written for a wrong command line"
