"""Layouts of ``test_elastic_resume.py``, and what each does with another's checkpoint.

    ranks.py RANKS elastic_ranks FOLDER LAYOUT ...

FOLDER/LAYOUT/checkpoint holds step 2 of a run by one process. Each layout resumes it to the end,
then once more from its own step 4, with step 6 damaged. The first also does so with a full disk.
"""

import gc
import os
import shutil
from pathlib import Path

import torch
from tiny_runs import MAMBAS, THRESHOLDS, tiny_config
from torch.distributed.checkpoint.filesystem import FileSystem

GLOBAL_BATCH = 8
STEPS = 6

TENSOR, EXPERT = {"tensor_parallel_degree": 2}, {"expert_parallel_degree": 2}
PIPELINE = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}

# Name → ranks, fields of the parallelism config. Layouts of equal ranks share one launch.
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "fsdp2": (2, {}),
    "tp2": (2, TENSOR),
    "ep2": (2, EXPERT),
    "fsdp2-tp2": (4, TENSOR),
    "hsdp2-fsdp2-ep2": (4, {"data_parallel_replicate_degree": 2, **EXPERT}),
    "cp2": (2, {"context_parallel_degree": 2}),
    "pp2": (2, PIPELINE),
    "pp2-fsdp2": (4, PIPELINE),
}

WITH_FULL_DISK = "fsdp2"


def config_of(folder: Path, data: Path, layout: str, *, alone: bool = False):
    """The run of a layout, or the same by one process. Experts that choose need whole rows."""
    degrees = LAYOUTS[layout][1]
    model = MAMBAS["hybrid"]() if is_hybrid(layout) else THRESHOLDS["moma_threshold"]()
    config = tiny_config(folder, data, model, steps=STEPS)
    config.training.global_batch_size = config.validator.batch_rows = GLOBAL_BATCH
    config.metrics.enable_tensorboard = False
    config.checkpoint.interval = 2
    config.checkpoint.keep_latest_k = 0
    for name, degree in ({} if alone else degrees).items():
        setattr(config.parallelism, name, degree)
    # as many micro-batches as a pipeline has stages
    config.training.local_batch_size *= config.parallelism.pipeline_parallel_degree
    return config


def is_hybrid(layout: str) -> bool:
    return layout.startswith("cp")


def train(trainer) -> None:
    """Train to the end, without drawing curves."""
    trainer._finish = lambda saved: None
    trainer.train()
    trainer.close()


def copy_run(source: Path, target: Path, *steps: int) -> None:
    """A run folder with only these checkpoints of ``source``; by rank 0, the others wait."""
    if torch.distributed.get_rank() == 0:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("step-*", "latest"))
        for step in steps:
            name = f"checkpoint/step-{step}"
            shutil.copytree(source / name, target / name)
    torch.distributed.barrier()


def pass_over_a_damaged_one(config) -> None:
    """The last rank's file of step 6 has a flipped byte: refused on all ranks, then passed over."""
    world = torch.distributed.get_world_size()
    file = Path(config.dump_folder) / "checkpoint" / "step-6" / f"__{world - 1}_0.distcp"
    if torch.distributed.get_rank() == 0:
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    trainer = config.build()
    try:
        trainer.checkpointer.load()
    except ValueError as error:
        (file.parents[2] / f"refusal-{torch.distributed.get_rank()}").write_text(str(error))
    trainer.checkpointer.fallback = True
    train(trainer)


def meet_a_full_disk(config) -> None:
    """The last rank's disk is full at step 4, while saving in the background."""
    config.checkpoint.async_mode = "async"
    create_stream = FileSystem.create_stream

    def full(self, path, mode):
        is_full = "step-4.partial" in str(path) and "w" in mode
        return create_stream(self, "/dev/full" if is_full else path, mode)

    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        FileSystem.create_stream = full
    try:
        train(config.build())
    finally:
        FileSystem.create_stream = create_stream


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    for name in names:
        ranks, _ = LAYOUTS[name]
        assert ranks == int(os.environ["WORLD_SIZE"])
        train(config_of(root / name, root / "data", name).build())
        copy_run(root / name, root / f"{name}-damaged", 4, 6)
        pass_over_a_damaged_one(config_of(root / f"{name}-damaged", root / "data", name))
        if name == WITH_FULL_DISK:
            copy_run(root / name, root / f"{name}-full", 2)
            meet_a_full_disk(config_of(root / f"{name}-full", root / "data", name))
        gc.collect()  # a trainer is in reference cycles
    torch.distributed.destroy_process_group()
