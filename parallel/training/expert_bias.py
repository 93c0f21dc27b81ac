"""Load balancing of token choice: selection biases follow the load over all ranks, once a step.

No auxiliary loss (arXiv 2408.15664). Every rank counts the rows that its tokens gave each expert,
over all micro-batches of a step; the sums over ranks are the same everywhere, and so are the
biases. A skipped step moves no bias. Recomputation counts everything twice, which changes no sign.

E experts of a pool.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from earlyfuse.models.routing.router import Router
from earlyfuse.parallel.training.rank_sums import all_stages, is_first_along, sum_over_ranks


class ExpertBias:
    """Moves the biases of all routers that balance their own load."""

    def __init__(self, parts: Sequence[nn.Module], parallel_dims: ParallelDims):
        routers = {
            name: module
            for part in parts
            for name, module in part.named_modules()
            if isinstance(module, Router) and module.config.bias_rate
        }
        self.routers = routers
        # ranks of one tensor-parallel group have the same tokens: one of them counts
        self.counts = is_first_along(parallel_dims, "tp")
        sizes = {name: len(router.load_E) for name, router in routers.items()}
        self.sizes: dict[str, int] = all_stages(sizes, parallel_dims)

    @torch.no_grad()
    def __call__(self, taken: torch.Tensor) -> None:
        """Move the biases if the step was taken; count from 0 again."""
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
