"""Run by torchrun: one counted training step per layout, beside its closed form.

    torchrun tests/traffic_ranks.py FOLDER LAYOUT...

``FOLDER`` holds toy data in ``data``; rank 0 writes ``FOLDER/counted.json``.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch.distributed as dist
from tiny_runs import MODELS, tiny_config
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.parallel.collective_counter import CollectiveCounter
from earlyfuse.parallel.traffic import microbatch_calls
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.units import accumulation, axis_ranks, fsdp_units

# name → model, parallelism, activation checkpointing, parameter dtype
LAYOUTS = {
    "fsdp": ("dense", {}, None, "float32"),
    "fsdp, kept gathered": ("moma", {"fsdp_reshard_after_forward": "never"}, None, "float32"),
    "fsdp, bf16, full": ("moma", {}, FullAC.Config(), "bfloat16"),
    "replicated": ("moe_8x", {"data_parallel_replicate_degree": 2}, None, "float32"),
    "tensor": ("dense", {"tensor_parallel_degree": 2}, None, "float32"),
    "tensor, full": ("moma", {"tensor_parallel_degree": 2}, FullAC.Config(), "float32"),
    "experts, full": ("moma", {"expert_parallel_degree": 2}, FullAC.Config(), "float32"),
    "experts, selective": ("moma", {"expert_parallel_degree": 2}, SelectiveAC.Config(), "float32"),
}


class AnotherTrainer(Trainer):
    """A trainer in a process that has joined its group already."""

    def init_distributed(self):
        if not dist.is_initialized():
            return super().init_distributed()
        self.watchdog = self.config.watchdog.build(folder=Path(self.config.dump_folder))
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())


def counted_step(folder, name):
    model, parallelism, ac_config, dtype = LAYOUTS[name]
    config = tiny_config(folder / name.replace(" ", "_"), folder / "data", MODELS[model]())
    for field, value in parallelism.items():
        setattr(config.parallelism, field, value)
    config.activation_checkpoint = ac_config
    config.training.mixed_precision_param = dtype
    config.training.global_batch_size = 8
    config.metrics.log_freq = 100
    config.checkpoint.enable = config.validator.enable = False
    config.validator.batch_rows = 8
    trainer = AnotherTrainer(config)
    batches = trainer.batch_generator(trainer.dataloader)
    for trainer.step in (2, 3):  # step 1 would log
        with CollectiveCounter() as counter:
            trainer.train_step(batches)
    dims, training = trainer.parallel_dims, config.training
    arguments = (config.model_spec.model, dims, training, config.parallelism)
    expected = Counter()
    for call in microbatch_calls(*arguments, ac_config):
        if axis_ranks(dims, call.axis) > 1:
            key = call.kind, axis_ranks(dims, call.axis), call.size
            expected[key] += accumulation(training, dims)
    seen = Counter(tuple(call) for call in counter.seen)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters()]
    held = sum(p.numel() for p in local)
    predicted = sum(unit.shard for unit in fsdp_units(*arguments[:2], config.parallelism))
    trainer.watchdog.close()
    trainer.close()
    return {
        "expected": sorted(expected.items()),
        "seen": sorted(seen.items()),
        "held": held,
        "predicted": predicted,
        "host_reads": counter.host_reads,
    }


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    folder = Path(folder)
    counted = {name: counted_step(folder, name) for name in names}
    if dist.get_rank() == 0:
        (folder / "counted.json").write_text(json.dumps(counted))
    dist.destroy_process_group()
