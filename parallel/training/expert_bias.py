"""Even load with token choice: selection biases follow what all ranks counted, once a step.

No auxiliary loss (arXiv 2408.15664). Every rank counts the rows that its tokens gave each expert,
over all micro-batches of a step; the sums over ranks are the same everywhere, so the biases stay so
too. A skipped step moves no bias. Recomputation counts twice, but everything, so that no sign
changes.

E experts of a pool.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing.router import Router
from earlyfuse.parallel.training.step_metrics import pools_by_place, routers_by_place


class ExpertBalance:
    """The routers of a model that balance themselves; of a pipeline, also those of other ranks."""

    def __init__(self, parts: Iterable[nn.Module], model: Decoder.Config, device: torch.device):
        here = routers_by_place(parts)
        self.routers: list[Router | None] = []
        self.loads: list[torch.Tensor] = []  # (E,) each, int64
        for place, pool in pools_by_place(model):
            if pool.router.bias_rate:
                router = here.get(place)
                elsewhere = torch.zeros(pool.experts, dtype=torch.int64, device=device)
                self.routers.append(router)
                self.loads.append(elsewhere if router is None else router.load_E)

    def update(
        self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], counts: bool, taken: bool
    ) -> None:
        """After a step: move the biases if it was ``taken``, and count anew.

        ``counts``: whether this rank's tokens are not another's too.
        """
        if not self.routers:
            return
        if taken:
            total = sum_over_ranks(torch.cat(self.loads) * counts)
            for router, load_E in zip(
                self.routers, total.split([len(load_E) for load_E in self.loads]), strict=True
            ):
                if router is not None:
                    router.balance(load_E)
        for load_E in self.loads:
            load_E.zero_()
