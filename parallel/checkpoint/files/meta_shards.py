"""Meta's ``consolidated.NN.pth``: one file of ``torch.save`` for each shard."""

import re
from collections.abc import Sequence
from pathlib import Path

from earlyfuse.models.state_dicts.meta import ROPE, shard_name
from earlyfuse.models.state_dicts.tensor_map import Made, Tensors, renamed
from earlyfuse.parallel.checkpoint.files.torch_save import TorchFiles, write_torch_file

_MOST_SHARDS = 1000  # the largest released model has 4


def shard_files(folder: Path) -> list[Path]:
    """The shards in order; ``ValueError`` if one is missing. [] if there are none."""
    if (single := folder / "consolidated.pth").is_file():
        return [single]
    found = {
        int(match[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    if max(found, default=0) >= _MOST_SHARDS:
        raise ValueError(
            f"{folder} holds {found[max(found)].name}, and shards are numbered below "
            f"{_MOST_SHARDS}; rename or remove it"
        )
    missing = [f"consolidated.{n:02d}.pth" for n in range(max(found, default=-1)) if n not in found]
    if missing:
        raise ValueError(f"{folder} lacks {missing} of its {max(found) + 1} shards; copy them")
    return [found[number] for number in sorted(found)]


class MetaShards(TorchFiles):
    """The tensors of all shards; tensor ``name`` of shard i is ``0i/name``."""

    def __init__(self, files: Sequence[Path]):
        self.files = files
        super().__init__({shard_name(i, ""): path for i, path in enumerate(files)}, (ROPE,))


def write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    """Write ``consolidated.00.pth`` …, from tensors that are named as those of ``MetaShards``."""
    for shard in range(shards):
        prefix = shard_name(shard, "")
        own = {
            name.removeprefix(prefix): renamed(name, entry.shape)
            for name, entry in tensors.entries.items()
            if name.startswith(prefix)
        }
        write_torch_file(folder / f"consolidated.{shard:02d}.pth", Made(own, tensors))
