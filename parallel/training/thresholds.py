"""Moves running thresholds once a step by the k-th scores of all ranks and micro-batches."""

from collections.abc import Sequence

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from earlyfuse.models.routing.running_threshold import running_thresholds
from earlyfuse.parallel.training.rank_sums import BufferSums


class Thresholds:
    """Moves all running thresholds of a model. ``step_tokens``: tokens of the global batch."""

    def __init__(self, parts: Sequence[nn.Module], parallel_dims: ParallelDims, step_tokens: int):
        self.step_tokens = step_tokens
        self.thresholds = dict(found for part in parts for found in running_thresholds(part))
        self.scores = BufferSums(self.thresholds, "sums_2E", parallel_dims)

    @torch.no_grad()
    def __call__(self, taken: torch.Tensor) -> None:
        """Move the thresholds if the step was taken; reset the sums."""
        for name, sums_2E in self.scores(taken.device).items():
            self.thresholds[name].update(sums_2E, self.step_tokens, taken)
