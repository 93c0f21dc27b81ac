"""Counts the collectives of a training step per layout, and their closed form: started by
``test_traffic.py``.

    ranks.py RANKS traffic_ranks FOLDER LAYOUT...

``FOLDER`` holds toy data in ``data``; rank N writes ``FOLDER/counted-N.json``.
"""

import gc
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from collective_counter import CollectiveCounter
from layouts import BY_NAME
from tiny_runs import tiny_config
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.parallel.compat import can_pipeline
from earlyfuse.parallel.estimates.communication import microbatch_calls
from earlyfuse.parallel.estimates.fsdp_units import fsdp_units
from earlyfuse.parallel.estimates.memory import in_flight
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.parallel.trainer import Trainer

# ranks → name → model, parallelism, activation checkpointing, parameter dtype
TWO = {
    "fsdp": ("dense", {}, None, "float32"),
    "fsdp, kept gathered": ("moma", {"fsdp_reshard_after_forward": "never"}, None, "float32"),
    "fsdp, bf16, full": ("moma", {}, FullAC.Config(), "bfloat16"),
    "replicated": ("moe_8x", {"data_parallel_replicate_degree": 2}, None, "float32"),
    "tensor, full": ("moma", {"tensor_parallel_degree": 2}, FullAC.Config(), "float32"),
    "experts, full": ("moma", {"expert_parallel_degree": 2}, FullAC.Config(), "float32"),
    "shared, tensor": ("shared", {"tensor_parallel_degree": 2}, None, "float32"),
    "token choice": ("token_choice", {}, None, "float32"),
    "token choice, experts": ("token_choice", {"expert_parallel_degree": 2}, None, "float32"),
    "token choice, experts, selective": (
        "token_choice",
        {"expert_parallel_degree": 2},
        SelectiveAC.Config(),
        "float32",
    ),
    "sequence": ("hybrid", {"context_parallel_degree": 2}, None, "float32"),
    "sequence, bf16, full": ("hybrid", {"context_parallel_degree": 2}, FullAC.Config(), "bfloat16"),
    "sequence, selective": (
        "hybrid",
        {"context_parallel_degree": 2},
        SelectiveAC.Config(),
        "float32",
    ),
}
PIPELINE = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}
INTERLEAVED = PIPELINE | {
    "pipeline_parallel_schedule": "Interleaved1F1B",
    "pipeline_parallel_first_stage_less_layers": 0,
    "pipeline_parallel_last_stage_less_layers": 0,
}
if can_pipeline():
    TWO["pipeline"] = ("dense", PIPELINE, None, "float32")
    gpipe = PIPELINE | {"pipeline_parallel_schedule": "GPipe"}
    TWO["pipeline, bf16, full"] = ("moma", gpipe, FullAC.Config(), "bfloat16")
TENSOR, EXPERTS = {"tensor_parallel_degree": 2}, {"expert_parallel_degree": 2}
FOUR = {
    "pipeline of shards": ("moma", PIPELINE, None, "float32"),
    "pipeline of shards, interleaved": ("deep", INTERLEAVED, None, "float32"),
    "pipeline of split tensors": ("moma", PIPELINE | TENSOR, None, "float32"),
    "pipeline of experts": ("moma", PIPELINE | EXPERTS, None, "float32"),
}
LAYOUTS = {2: TWO, 4: FOUR if can_pipeline() else {}}


def counted_step(folder, name):
    model, parallelism, ac_config, dtype = (TWO | FOUR)[name]
    config = tiny_config(folder / name.replace(" ", "_"), folder / "data", BY_NAME[model]())
    config.training.local_batch_size *= parallelism.get("pipeline_parallel_degree", 1)
    for field, value in parallelism.items():
        setattr(config.parallelism, field, value)
    config.activation_checkpoint = ac_config
    config.training.mixed_precision_param = dtype
    config.training.global_batch_size = 8
    config.metrics.log_freq = 100
    config.checkpoint.enable = config.validator.enable = False
    config.validator.batch_rows = 8
    trainer = Trainer(config)
    batches = trainer.batch_generator(trainer.dataloader)
    for trainer.step in (2, 3):  # step 1 would log
        with CollectiveCounter() as counter, noted_forwards(trainer) as in_flight_then:
            trainer.train_step(batches)
    planned = Step.of(trainer.config, dist.get_world_size())
    stage = dist.get_rank() * planned.dims.pp // dist.get_world_size()
    expected = Counter()
    for call in microbatch_calls(planned, stage):
        if (ranks := planned.axis_ranks(call.axis)) > 1:
            expected[call.kind, ranks, call.size] += planned.microbatches
    seen = Counter(tuple(call) for call in counter.seen)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters()]
    held = sum(p.numel() for p in local)
    trainer.close()
    return {
        "expected": sorted(expected.items()),
        "seen": sorted(seen.items()),
        "held": held,
        "predicted": sum(unit.shard for unit in fsdp_units(planned, stage)),
        "host_reads": counter.host_reads,
        "in_flight": max(in_flight_then, default=0),
        "in_flight_predicted": in_flight(planned, stage) if planned.dims.pp > 1 else 0,
    }


@contextmanager
def noted_forwards(trainer):
    """Yields a list: at each forward of this rank's stages, how many still wait for backward."""
    waiting = []

    def note(*_):
        waiting.append(1 + sum(len(stage.fwd_cache) for stage in trainer.model.stages))

    if not trainer.parallel_dims.pp_enabled:
        yield waiting
        return
    hooks = [part.register_forward_hook(note) for part in trainer.model_parts]
    yield waiting
    for hook in hooks:
        hook.remove()


def main(root, *names):
    torch.set_num_threads(1)
    folder = Path(root)
    counted = {}
    for name in names:
        counted[name] = counted_step(folder, name)
        gc.collect()  # a trainer is in reference cycles
    (folder / f"counted-{dist.get_rank()}.json").write_text(json.dumps(counted))
    dist.destroy_process_group()
