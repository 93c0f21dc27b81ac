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
from earlyfuse.parallel.training.rank_sums import all_stages, is_first_along, sum_over_ranks


class ExpertBias:
    """Moves the biases of all routers with a ``bias_rate``."""

    def __init__(self, parts: Sequence[nn.Module], parallel_dims: ParallelDims):
        self.routers = {
            name: module
            for part in parts
            for name, module in part.named_modules()
            if isinstance(module, Router) and module.config.bias_rate
        }
        # the ranks of a tensor-parallel group have the same tokens: one of them counts
        self.counts = is_first_along(parallel_dims, "tp")
        sizes = {name: len(router.load_E) for name, router in self.routers.items()}
        self.sizes: dict[str, int] = all_stages(sizes, parallel_dims)

    @torch.no_grad()
    def __call__(self, taken: torch.Tensor) -> None:
        """Move the biases if the step was taken; reset the counts."""
        if not self.sizes:
            return
        loads = {
            name: self.routers[name].load_E * self.counts
            if name in self.routers
            else torch.zeros(size, dtype=torch.int64, device=taken.device)
            for name, size in self.sizes.items()
        }
        loads = sum_over_ranks(loads)
        for name, router in self.routers.items():
            router.balance(loads[name], taken)
            router.load_E.zero_()
