"""Counts the operations of a forward and its backward."""

from collections import Counter

import torch
from batches import batch_of
from tiny_runs import SHAPE
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function] += 1
        return function(*args, **(kwargs or {}))


def forward_and_backward(built) -> tuple[Counter, Counter]:
    """Operation counts of each, on rows of text and images."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(SHAPE.vocab_size, (2, 16), generator=generator)
    with Ops() as forward:
        loss = built(batch_of(tokens_BS, (tokens_BS >= 32).to(torch.uint8))).square().sum()
    with Ops() as backward:
        loss.backward()
    return forward.count, backward.count
