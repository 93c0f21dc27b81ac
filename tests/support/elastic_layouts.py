"""Layouts of test_elastic_resume.py, and the run of each."""

from pathlib import Path

from tiny_runs import MAMBAS, moma, tiny_config

GLOBAL_BATCH = 8


STEPS = 6


TENSOR, EXPERT = {"tensor_parallel_degree": 2}, {"expert_parallel_degree": 2}
PIPELINE = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2}


# Name → ranks, fields of the parallelism config. Layouts of equal ranks share one launch.
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "fsdp2": (2, {}),
    "hsdp2": (2, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}),
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
    model = MAMBAS["hybrid"]() if is_hybrid(layout) else moma()
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
