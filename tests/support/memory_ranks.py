"""Run alone: peak host memory of building a sharded model as one of many ranks, no others needed.

    python tests/support/memory_ranks.py RANKS WIDTH...

Prints, for each width, bytes of the whole model, bytes of the rank's shard and bytes by which
resident memory grew at most. The other ranks are pretended: a fake process group answers for them.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims

from earlyfuse.configs import decoders, embedded
from earlyfuse.models.flops import count_parameters
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel import compat


def status(field):
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def growth(width, ranks):
    config = embedded.moma_4t4i()
    shape = decoders.Shape(
        dim=width, layers=2, heads=4, hidden_dim=2 * width, vocab_size=16 * width
    )
    experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
    model = decoders.moma(shape, experts, embedded.SHARES)
    dims = ParallelDims.from_config(config.parallelism, ranks)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    with torch.device("meta"):
        built = model.build()
    built = config.model_spec.parallelize_fn(
        built,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder="",
    )
    built.to_empty(device="cpu")
    built.init_states()
    peak = status("VmHWM") - before
    shard = sum(p.to_local().nbytes for p in built.parameters())
    assert all(p.to_local().isfinite().all() for p in built.parameters())
    return 4 * count_parameters(model).total, shard, peak


if __name__ == "__main__":
    compat.apply()
    ranks, *widths = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    growth(64, ranks)  # what the first one loads is not the model's
    for width in widths:
        print(*growth(width, ranks), flush=True)
