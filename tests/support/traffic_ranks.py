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
from layouts import BY_NAME, RECOMPUTE
from tiny_runs import VECTORS, changed, tiny_config

from earlyfuse.parallel.compat import can_pipeline
from earlyfuse.parallel.estimates.communication import microbatch_calls
from earlyfuse.parallel.estimates.fsdp_units import fsdp_units
from earlyfuse.parallel.estimates.memory import in_flight
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.parallel.trainer import Trainer

TENSOR, EXPERTS = {"tensor_parallel_degree": 2}, {"expert_parallel_degree": 2}
SEQUENCE, REPLICAS = {"context_parallel_degree": 2}, {"data_parallel_replicate_degree": 2}
PIPELINE = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}
INTERLEAVED = PIPELINE | {
    "pipeline_parallel_schedule": "Interleaved1F1B",
    "pipeline_parallel_first_stage_less_layers": 0,
    "pipeline_parallel_last_stage_less_layers": 0,
}
# name → model, parallelism, and "full", "selective" or "bf16"
TWO = {
    "fsdp": ("dense", {}),
    "fsdp, kept gathered": ("moma", {"fsdp_reshard_after_forward": "never"}),
    "fsdp, bf16, full": ("moma", {}, "bf16", "full"),
    "replicated": ("moe_8x", REPLICAS),
    "tensor, full": ("moma", TENSOR, "full"),
    "experts, full": ("moma", EXPERTS, "full"),
    "shared, tensor": ("shared", TENSOR),
    "token choice": ("token_choice", {}),
    "token choice, experts": ("token_choice", EXPERTS),
    "token choice, experts, selective": ("token_choice", EXPERTS, "selective"),
    "depth, experts, full": ("moma_mod", EXPERTS, "full"),
    "depth, tensor": ("gamma_mod", TENSOR),
    "vectors": ("tf_mot", {}),
    "sequence": ("hybrid", SEQUENCE),
    "sequence, bf16, full": ("hybrid", SEQUENCE, "bf16", "full"),
    "sequence, selective": ("hybrid", SEQUENCE, "selective"),
}
PIPELINES = {
    "pipeline": ("dense", PIPELINE),
    "pipeline, bf16, full": (
        *("moma", PIPELINE | {"pipeline_parallel_schedule": "GPipe"}),
        *("bf16", "full"),
    ),
}
FOUR = {
    "pipeline of shards": ("moma", PIPELINE),
    "pipeline of shards, interleaved": ("deep", INTERLEAVED),
    "pipeline of split tensors": ("moma", PIPELINE | TENSOR),
    "pipeline of experts": ("moma", PIPELINE | EXPERTS),
}
LAYOUTS = {2: TWO | PIPELINES, 4: FOUR} if can_pipeline() else {2: TWO, 4: {}}


def counted_step(folder, name):
    model, parallelism, *words = (TWO | PIPELINES | FOUR)[name]
    data = folder / ("vectors" if model in VECTORS else "data")
    config = tiny_config(folder / name.replace(" ", "_"), data, BY_NAME[model]())
    fields = {f"parallelism.{field}": value for field, value in parallelism.items()}
    fields |= {"training.global_batch_size": 8, "validator.batch_rows": 8}
    fields |= {"metrics.log_freq": 100, "checkpoint.enable": False, "validator.enable": False}
    changed(config, fields)
    config.training.local_batch_size *= parallelism.get("pipeline_parallel_degree", 1)
    for word in words:
        if word == "bf16":
            config.training.mixed_precision_param = "bfloat16"
        else:
            config.activation_checkpoint = RECOMPUTE[word]
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
