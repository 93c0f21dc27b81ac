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
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
from places import ROOT, SUPPORT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import MAMBAS, MODELS, SHAPE, metrics, moma, run, state, tiny_config
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    FullAC,
    SelectiveAC,
)
from toy import VOCABULARY, make_data

from earlyfuse.configs import decoders, embedded
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import validation_batches
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.models.blocks.mamba import Conv, Scan
from earlyfuse.parallel import compat
from earlyfuse.parallel.evaluation.eval_tasks import Task
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.data_config import DataSet
from earlyfuse.parallel.training.lr_schedule import LearningRate

# what torchtitan imports for other runs than ours
UNUSED = ("datasets", "pandas", "torch._inductor.compile_fx")


@pytest.mark.parametrize(
    ("name", "dropout"), [("moma", 0.2), ("mixture_of_mamba", 0.2), ("token_choice", 0.0)]
)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, data, name, dropout):
    def config(folder: str) -> Trainer.Config:
        model = (MODELS | MAMBAS)[name]()
        for layer in model.layers:
            layer.dropout = dropout
        return tiny_config(tmp_path / folder, data, model)

    unbroken = run(config("unbroken"))
    run(config("broken"), stop_after=4)  # one step beyond the checkpoint of step 3, which is lost
    resumed = run(config("broken"))
    expected, found = state(unbroken), state(resumed)
    assert expected.keys() == found.keys() and any(key.startswith("optimizer") for key in found)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["moma", "mixture_of_mamba"])
def test_recomputation_in_bf16_on_one_process_changes_nothing(tmp_path, data, name):
    """With dropout, whose places recomputed blocks must drop again."""

    def config(folder: str, policy: ActivationCheckpointing.Config | None) -> Trainer.Config:
        model = (MODELS | MAMBAS)[name]()
        for layer in model.layers:
            layer.dropout = 0.2
        config = tiny_config(tmp_path / folder, data, model, steps=2)
        config.training.mixed_precision_param = "bfloat16"
        config.checkpoint.enable = config.validator.enable = False
        config.activation_checkpoint = policy
        return config

    def learned(folder: str, policy: ActivationCheckpointing.Config | None) -> list:
        run(config(folder, policy))
        return [[line[key] for key in ("loss", "grad_norm")] for line in metrics(tmp_path / folder)]

    plain = learned("plain", None)
    assert learned("full", FullAC.Config()) == learned("selective", SelectiveAC.Config()) == plain
    forgetful = config("forgetful", FullAC.Config(preserve_rng_state=False))
    with pytest.raises(ValueError, match=r"preserve_rng_state \(False\) must be True with dropout"):
        forgetful.build()


def test_a_scan_has_fp32_parameters_where_all_else_computes_in_bf16(tmp_path, data):
    config = tiny_config(tmp_path, data, MAMBAS["mixture_of_mamba"](), steps=2)
    config.training.mixed_precision_param = "bfloat16"
    config.checkpoint.enable = config.validator.enable = False
    seen: dict[str, set[torch.dtype]] = {"scan": set(), "inputs": set(), "conv": set()}
    scan, conv = Scan.forward, Conv.forward

    def noted_scan(self, u_BSI, *others):
        seen["scan"] |= {parameter.dtype for parameter in self.parameters()}
        seen["inputs"] |= {u_BSI.dtype}
        return scan(self, u_BSI, *others)

    def noted_conv(self, *inputs):
        seen["conv"] |= {parameter.dtype for parameter in self.parameters()}
        return conv(self, *inputs)

    with (
        mock.patch.object(Scan, "forward", noted_scan),
        mock.patch.object(Conv, "forward", noted_conv),
    ):
        trainer = run(config)
    bf16, fp32 = {torch.bfloat16}, {torch.float32}
    assert seen == {"scan": fp32, "inputs": bf16, "conv": bf16}
    parameters = dict(trainer.model.named_parameters())
    assert {p.dtype for p in parameters.values()} == fp32
    assert {p.grad.dtype for p in parameters.values() if p.grad is not None} == fp32
    steps = parameters["layers.0.mamba.scan.dt_bias"].to_local()
    assert not steps.equal(steps.bfloat16().float())


def test_gradient_accumulation_computes_the_same_step(tmp_path, data):
    parameters = []
    for rows in (2, 4):
        config = tiny_config(tmp_path / str(rows), data, steps=2)
        config.training.local_batch_size = rows
        parameters.append(run(config).model.state_dict())
    for name, value in parameters[0].items():
        torch.testing.assert_close(value, parameters[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["moe_8x", "token_choice", "mot", "moma_causal"])
def test_every_model_learns_the_toy_data(tmp_path, data, name):
    config = tiny_config(tmp_path, data, MODELS[name](), steps=30)
    config.checkpoint.enable = False
    config.validator.freq = 100
    run(config)
    lines = metrics(tmp_path)
    first, last = (line for line in lines if line["kind"] == "validation")
    assert (
        last["loss/image"] < first["loss/image"] - 0.3
        and last["loss/text"] < first["loss/text"] - 0.2
    )


def test_metrics_are_per_modality_everywhere(tmp_path, data):
    trainer = run(tiny_config(tmp_path, data))
    train = [line for line in metrics(tmp_path) if line["kind"] == "train"]
    validation = [line for line in metrics(tmp_path) if line["kind"] == "validation"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validation] == [1, 3, 6]
    for key in (
        "loss/text",
        "loss/image",
        "tokens/text",
        "tokens/image",
        "flops/text",
        "flops/image",
        "grad_norm",
    ):
        assert all(key in line for line in train), key
    assert {"output_norm", "router/layer0.pool0/load_max", "router/layer1.pool1/reached"} <= train[
        0
    ].keys()
    assert {"loss/text", "loss/image", "unigram_entropy/image"} <= validation[0].keys()
    assert (
        train[-1]["tokens/text"] + train[-1]["tokens/image"] == 6 * 4 * 32 == trainer.ntokens_seen
    )
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss/image")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    description = json.loads((tmp_path / "run.json").read_text())
    assert description["config"]["training"]["seq_len"] == 32 and description["revision"]


def test_validation_does_not_change_the_run(tmp_path, data):
    losses = []
    for folder, freq in (("often", 1), ("never", 1000)):
        config = tiny_config(tmp_path / folder, data)
        for layer in config.model_spec.model.layers:
            layer.dropout = 0.2  # a model left in evaluation mode would show
        config.validator.freq = freq
        run(config)
        losses.append(
            [line["loss"] for line in metrics(tmp_path / folder) if line["kind"] == "train"]
        )
    assert losses[0] == losses[1]


def test_parameters_that_are_not_finite_stop_the_run_before_they_are_saved(tmp_path, data):
    config = tiny_config(tmp_path, data)
    config.metrics.log_freq = 100
    trainer = config.build()
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


def test_a_closed_trainer_draws_no_more_batches(tmp_path, data):
    config = tiny_config(tmp_path, data, steps=1)
    config.checkpoint.enable = config.validator.enable = False
    before = set(threading.enumerate())
    trainer = run(config)
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if thread.name == "earlyfuse-prefetch"]
    assert trainer.dataloader.lanes[:, -1].tolist() == [1] * 4, "what was drawn ahead is forgotten"


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
    job = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    for line in job.stdout:
        if line.startswith("step"):
            job.send_signal(signal.SIGTERM)
            break
    rest = job.stdout.read()
    assert job.wait(60) == 0 and "the same command resumes" in rest
    stopped = max(
        int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoint").glob("step-*")
    )
    assert stopped < 40
    again = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=120
    )
    assert "done: 40 steps" in again.stdout
    assert "imported []" in again.stdout, "seconds and memory of every rank"
    assert [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "train"] == list(
        range(1, 41)
    )


def test_what_torchtitan_imports_late_is_there_when_it_is_used():
    import datasets.distributed

    found = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        for name in ("datasets", "datasets.distributed"):
            patch.delitem(sys.modules, name)
        with compat.light_imports():
            from datasets import Dataset as Late
            from datasets.distributed import split_dataset_by_node

            twice = torch.compile(lambda x: 2 * x, backend="eager")
        assert "datasets" not in sys.modules and torch.compile is found
        patch.setitem(sys.modules, "datasets", datasets)
        patch.setitem(sys.modules, "datasets.distributed", datasets.distributed)
        rows = datasets.Dataset.from_dict({"row": [0, 1, 2, 3]})
        assert isinstance(rows, Late) and not isinstance([], Late)
        assert split_dataset_by_node(rows, rank=1, world_size=2)["row"] == [2, 3]
        with compat.light_imports():
            from datasets import Dataset
        assert Dataset is datasets.Dataset, "what is there already stays"
    assert twice(torch.ones(2)).tolist() == [2, 2]


# ---------------------------------------------------------------- refusals


def refused(config: Trainer.Config, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run(config)


def test_wrong_configs_are_refused_before_anything_is_written(tmp_path, data):
    out = tmp_path / "out"

    def changed(section: str, **values) -> Trainer.Config:
        config = tiny_config(out, data)
        target = getattr(config, section) if section else config
        for name, value in values.items():
            setattr(target, name, value)
        return config

    refused(
        changed("training", seq_len=5),
        r"seq_len \(5\) must be at least 6: a block of 4 image codes",
    )
    refused(changed("training", steps=0), r"training.steps \(0\)")
    refused(changed("training", max_norm=0.0), r"training.max_norm \(0.0\) must be above 0")
    refused(changed("training", global_batch_size=0), r"training.global_batch_size \(0\)")
    refused(changed("lr_scheduler", warmup_steps=-1), r"lr_scheduler.warmup_steps \(-1\)")
    refused(changed("validator", freq=0), r"validator.freq \(0\) must be at least 1")
    refused(changed("validator", max_batches=0), r"validator.max_batches \(0\)")
    refused(changed("validator", batch_rows=3), r"validator.batch_rows \(3\) must be a multiple")
    refused(changed("metrics", log_freq=0), r"metrics.log_freq \(0\) must be at least 1")
    refused(changed("data", folder=__file__), r"data.folder \(.*\) must be a folder; it is a file")
    refused(
        changed("training", local_batch_size=3, global_batch_size=3),
        r"local_batch_size \(3\) must be a multiple of routing_rows \(2\)",
    )
    refused(changed("training", global_batch_size=5), r"global_batch_size|global batch size")
    refused(changed("data", shares={"text": 0.5, "pairs": 0.4}), r"must sum to 1, not 0.9")
    refused(
        changed("data", shares={"text": 0.5, "films": 0.5}),
        r"data.shares names \['films'\].*\['pairs', 'text'\]",
    )
    refused(changed("data", folder=str(tmp_path / "nothing")), r"must be a folder written by")
    refused(changed("dataloader", media_share=0.99), r"media_share \(0.99\) must lie between")
    refused(
        changed("parallelism", tensor_parallel_degree=2),
        r"tensor_parallel_degree \(2\) must make up the 1 ranks",
    )
    task = Task("toy", [[0] * 31], [(10,), (11, 12, 13)], [0], VOCABULARY)
    with mock.patch("earlyfuse.parallel.evaluation.validation.load_tasks", return_value=[task]):
        refused(
            changed("training"),
            r"training.seq_len \(32\) must hold a prompt of the task 'toy' \(33 tokens\)",
        )
    model = decoders.dense(replace(SHAPE, vocab_size=50))
    refused(
        tiny_config(out, data, model),
        r"vocab_size \(50\) must equal the vocabulary of the data \(48",
    )
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, data):
    (tmp_path / "file").write_text("in the way")
    refused(
        tiny_config(tmp_path / "file" / "run", data),
        "must be a folder that can be written, but .*file is a file",
    )


def test_a_truncated_or_missing_shard_is_refused(tmp_path, data):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    shard = broken / "train" / "text" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(tiny_config(tmp_path / "run", broken), "shard-000000.tar")
    shard.unlink()
    refused(tiny_config(tmp_path / "run", broken), "shard-000000.tar")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64])
def test_any_number_of_ranks_shares_the_same_validation_rows(ranks, tmp_path, data):
    config = tiny_config(tmp_path, data)
    config.training.global_batch_size = -1
    config.validator.batch_rows, config.validator.max_batches = 4, 5
    config = DataSet(config.data).resolve(config, ranks)
    sources = tuple(TokenSource(folder) for folder in config.validator.sources)
    mixture = Mixture(sources, (0.5, 0.5))
    alone = torch.cat([batch.tokens_BS for batch in validation_batches(mixture, 32, 4, 5)])
    shared = config.validator.batch_rows, config.validator.max_batches
    parts = [validation_batches(mixture, 32, *shared, rank, ranks) for rank in range(ranks)]
    assert all(len(batch.tokens_BS) % 2 == 0 for batch in parts[0]), "whole routing groups"
    together = [batch.tokens_BS for batches in zip(*parts, strict=True) for batch in batches]
    rows = torch.cat(together)
    assert torch.equal(rows[:20], alone) and len(rows) < 20 + 2 * ranks
    assert len(rows) == 20 or ranks in (3, 4, 8, 64), "no more rows than asked for if they divide"


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path, data):
    run(tiny_config(tmp_path, data, MODELS["dense"](), steps=3))
    description = (tmp_path / "run.json").read_text()
    refused(
        tiny_config(tmp_path, data, MODELS["dense"](), steps=2),
        r"training.steps \(2\) must be at least 3, the step of the checkpoint in",
    )
    assert (tmp_path / "run.json").read_text() == description
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tiny_config(tmp_path, data, MODELS["dense"](), steps=4))


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, data):
    run(tiny_config(tmp_path, data, MODELS["dense"](), steps=3))
    description = (tmp_path / "run.json").read_text()
    refused(
        tiny_config(tmp_path, data, moma()),
        r"is of another model: layers.0.feed_forward.pools.0.router.weight: not in",
    )
    wider = decoders.dense(replace(SHAPE, hidden_dim=64))
    refused(
        tiny_config(tmp_path, data, wider),
        r"feed_forward.w1: \(64, 32\) here, \(48, 32\) in the checkpoint",
    )
    assert (tmp_path / "run.json").read_text() == description


def test_a_checkpoint_trained_with_other_tokenizers_or_data_is_refused(tmp_path, data):
    run(tiny_config(tmp_path / "run", data, steps=3))
    other_tokenizer = make_data(tmp_path / "tokenizer", tokenizer="cc")
    refused(
        tiny_config(tmp_path / "run", other_tokenizer),
        "tokenizers of the data .*cc.* must be that of the checkpoint",
    )
    other_data = make_data(tmp_path / "data", seed=1)
    refused(
        tiny_config(tmp_path / "run", other_data),
        "data of the data|data .* must be that of the checkpoint",
    )


def test_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train = runpy.run_path(str(ROOT / "train.py"))
    assert train["main"](["--list"]) == 0
    listed = capsys.readouterr().out
    assert "moma_4t4i" in listed and "Mixture-of-Transformers" in listed
    assert train["main"](["dense", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "runs/dense" in shown and len(shown.splitlines()) < 40
    assert train["main"](["mamma"]) == 2
    message = capsys.readouterr().err
    assert isinstance(embedded.moma_4t4i_stage2().lr_scheduler, LearningRate.Config), "its fields"
    assert "config ('mamma') is unknown; did you mean mamba" in message and "--list" in message
    with pytest.raises(SystemExit):
        train["main"](["dense", "--training.step", "3"])
    assert "--training.steps" in capsys.readouterr().err
    arguments = ["dense", "--data.folder", "nowhere", "--data.no-embedded"]
    assert train["main"](arguments) == 2
    assert "error: data.folder ('nowhere')" in capsys.readouterr().err
    assert not any(tmp_path.iterdir()), "nothing is written for a wrong command line"
