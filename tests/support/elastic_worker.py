"""What one layout does with another's checkpoint; run by test_elastic_resume.py.

    ranks.py RANKS elastic_worker FOLDER LAYOUT ...

FOLDER/LAYOUT/checkpoint holds step 2 of a run by one process. Each layout continues it to the end,
then once more from its own step 4, with step 6 damaged. The first also does so with a full disk.
"""

import os
import shutil
from pathlib import Path

import torch
from elastic_layouts import LAYOUTS, WITH_FULL_DISK, config_of, train
from torch.distributed.checkpoint.filesystem import FileSystem


def copy_run(source: Path, target: Path, *steps: int) -> None:
    """A run folder with only these checkpoints of ``source``; by rank 0, the others wait."""
    if torch.distributed.get_rank() == 0:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("step-*", "latest"))
        for step in steps:
            name = f"checkpoint/step-{step}"
            shutil.copytree(source / name, target / name)
    torch.distributed.barrier()


def finish(config) -> None:
    """Train to the end."""
    train(config.build())


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
        finish(config)
    finally:
        FileSystem.create_stream = create_stream


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    for name in names:
        ranks, _ = LAYOUTS[name]
        assert ranks == int(os.environ["WORLD_SIZE"])
        finish(config_of(root / name, root / "data", name))
        copy_run(root / name, root / f"{name}-damaged", 4, 6)
        pass_over_a_damaged_one(config_of(root / f"{name}-damaged", root / "data", name))
        if name == WITH_FULL_DISK:
            copy_run(root / name, root / f"{name}-full", 2)
            meet_a_full_disk(config_of(root / f"{name}-full", root / "data", name))
    torch.distributed.destroy_process_group()
