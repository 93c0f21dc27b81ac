"""Load balancing of token choice: moves selection biases once a step by the load over all ranks.

No auxiliary loss (arXiv 2408.15664). Each router counts the rows of its experts over the
micro-batches of a step; their sums over ranks, and so the biases, are equal on all ranks. A skipped
step moves no bias. Recomputation counts every row twice, which changes no sign.

E experts of a pool.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from earlyfuse.models.routing.router import Router
from earlyfuse.parallel.training.rank_sums import BufferSums


class ExpertBias:
    """Moves the biases of all routers with a ``bias_rate``."""

    def __init__(self, parts: Sequence[nn.Module], parallel_dims: ParallelDims):
        self.routers = {
            name: module
            for part in parts
            for name, module in part.named_modules()
            if isinstance(module, Router) and module.config.bias_rate
        }
        self.loads = BufferSums(self.routers, "load_E", parallel_dims)

    @torch.no_grad()
    def __call__(self, taken: torch.Tensor) -> None:
        """Move the biases if the step was taken; reset the counts."""
        for name, load_E in self.loads(taken.device).items():
            self.routers[name].balance(load_E, taken)
            self.routers[name].load_E.zero_()
