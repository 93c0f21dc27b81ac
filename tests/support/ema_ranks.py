"""Layouts of ``test_ema.py``: runs with averages, alone and on ranks.

    ranks.py RANKS ema_ranks FOLDER LAYOUT ...

FOLDER/alone/checkpoint holds step 2 of a run by one process. Each layout trains the same from the
beginning, then resumes that step, and compares what a rank can see of swaps and of training.
"""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from elastic_ranks import EXPERT, train
from tiny_runs import changed, moma, tiny_config

from earlyfuse.parallel.checkpoint.files.dcp import DcpFolder
from earlyfuse.parallel.training.ema import Ema, local

STEPS = 4
# Name → degrees; FSDP takes the other ranks. Validation at each step leaves gathered parameters.
LAYOUTS: dict[str, dict[str, int]] = {
    "hsdp2-accumulated": {"data_parallel_replicate_degree": 2},
    "ep2": EXPERT,
}


def ema_config(folder: Path, data: Path, layout: str = "", **fields):
    """The run of a layout; by one process without."""
    config = tiny_config(folder, data, moma(), steps=STEPS)
    fields = {
        "ema.decay": 0.4,
        "training.global_batch_size": 8,
        "training.local_batch_size": 2 if "accumulated" in layout else 4,
        "checkpoint.interval": 2,
        "checkpoint.keep_latest_k": 0,
        "metrics.enable_tensorboard": False,
        "validator.freq": 1,
        "validator.max_batches": 1,
        "validator.tasks": False,
    } | fields
    degrees = LAYOUTS.get(layout, {})
    return changed(config, fields | {f"parallelism.{n}": degree for n, degree in degrees.items()})


def averages(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """The averaged parameters in a checkpoint of a run."""
    opened = DcpFolder(folder / "checkpoint" / f"step-{step}", averaged=True)
    return {name: opened.read(name) for name in opened.averages}


def shards(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: local(tensor).detach().clone() for name, tensor in tensors.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def check_swap(ema: Ema) -> None:
    """Averages are laid out like the weights, are those inside the block, and both come back."""
    for name, average in ema.averages.items():
        assert average.placements == ema.parameters[name].placements, name
    trained, averaged = shards(ema.parameters), shards(ema.averages)
    assert not equal(trained, averaged)
    try:
        with ema.weights(True) as which:
            assert which == {"weights": "ema"} and equal(shards(ema.parameters), averaged)
            raise KeyError("in validation")
    except KeyError:
        pass
    assert equal(shards(ema.parameters), trained) and equal(shards(ema.averages), averaged)


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    for name in names:
        trainer = ema_config(root / name, root / "data", name).build()
        train(trainer)
        check_swap(trainer.ema)
        fields = {"ema.decay": 0.0, "checkpoint.enable": False}
        without = ema_config(root / f"{name}-off", root / "data", name, **fields).build()
        train(without)
        ours, theirs = (dict(t.model_parts[0].state_dict()) for t in (trainer, without))
        assert equal(shards(ours), shards(theirs)), "averages change the training"
        resumed = root / f"{name}-resumed"
        if dist.get_rank() == 0:
            shutil.copytree(root / "alone/checkpoint/step-2", resumed / "checkpoint/step-2")
        dist.barrier()
        train(ema_config(resumed, root / "data", name).build())
    dist.destroy_process_group()
