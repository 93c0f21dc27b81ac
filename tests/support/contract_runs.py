"""Short runs of a model with a branch or router that a test file defines; also on several ranks.

    ranks.py RANKS TEST_MODULE FOLDER DATA

with ``main = contract_runs.on_ranks(model)`` in the test file.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from places import SUPPORT
from ranks import forked, output_of
from tiny_runs import run, tiny_config
from torch.distributed.tensor import DTensor

STEPS = 4


def config(folder, data, model):
    config = tiny_config(folder, data, model, steps=STEPS)
    config.checkpoint.interval = STEPS // 2
    config.metrics.enable_tensorboard = config.sampler.enable = False
    config.validator.batch_rows = 4
    return config


def parameters(trainer):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in trainer.model.named_parameters()
    }


def on_ranks(model):
    """A ``main`` for ``ranks.py``: trains, and writes what parameters became."""

    def main(folder, data):
        torch.set_num_threads(1)
        trainer = run(config(Path(folder), Path(data), model()))
        found = parameters(trainer)
        if dist.get_rank() == 0:
            torch.save(found, Path(folder) / "parameters.pt")
        dist.destroy_process_group()

    return main


def trained_on_two_ranks(test_file, folder, data, monkeypatch):
    """(parameters, logged lines) after the run of ``test_file``'s ``main`` on two ranks."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(test_file).parent}:{SUPPORT}")
    output_of(forked(2, Path(test_file), str(folder), str(data)))
    return torch.load(folder / "parameters.pt"), lines(folder)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
