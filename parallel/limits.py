"""Numbers of a config that would end a run in the middle of it, or let it learn nothing."""

from typing import Any


def check_limits(config: Any) -> None:
    """Refuse such numbers of a ``Trainer.Config`` by ``ValueError``, before anything is made."""
    training, validator = config.training, config.validator
    numbers = (
        ("training.steps", training.steps, 1),
        ("training.local_batch_size", training.local_batch_size, 1),
        ("training.seq_len", training.seq_len, 2),
        ("lr_scheduler.warmup_steps", config.lr_scheduler.warmup_steps, 0),
        ("validator.freq", validator.freq, 1),
        ("validator.max_batches", validator.max_batches, 1),
        ("metrics.log_freq", config.metrics.log_freq, 1),
    )
    for name, value, least in numbers:
        if value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}; raise it")
    for name, value in (
        ("training.global_batch_size", training.global_batch_size),
        ("validator.batch_rows", validator.batch_rows),
    ):
        if value < 1 and value != -1:
            raise ValueError(
                f"{name} ({value}) must be at least 1, or -1: what local_batch_size makes over "
                "all ranks"
            )
    recompute = config.activation_checkpoint
    dropout = max(layer.dropout for layer in config.model_spec.model.layers)
    if dropout and recompute is not None and not recompute.preserve_rng_state:
        raise ValueError(
            f"activation_checkpoint.preserve_rng_state (False) must be True with dropout ({dropout}"
            "): recomputed blocks would drop other places than those that the loss is of"
        )
    if not training.max_norm > 0:
        raise ValueError(
            f"training.max_norm ({training.max_norm}) must be above 0: gradients are scaled down "
            "to it; inf clips nothing"
        )
