"""Activation checkpointing: what is computed again in backward, and what is not."""

from collections import Counter

import pytest
import torch
from tiny_runs import SHAPE, moma
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.parallel.recompute import checkpoint_activations

TOPK = torch.ops.earlyfuse.select_top_k.default


class Ops(TorchDispatchMode):
    """Counts the operations that are run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function] += 1
        return function(*args, **(kwargs or {}))


def model(policy):
    built = moma().build()
    built.init_states()
    if policy:
        checkpoint_activations(built, policy, "")
    return built


def forward_and_backward(built) -> tuple[Counter, Counter]:
    """Operations of each, on rows of text and images."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(SHAPE.vocab_size, (2, 16), generator=generator)
    with Ops() as forward:
        loss = built(tokens_BS, (tokens_BS >= 32).to(torch.uint8)).square().sum()
    with Ops() as backward:
        loss.backward()
    return forward.count, backward.count


@pytest.mark.parametrize("policy", [FullAC.Config(), SelectiveAC.Config()])
def test_blocks_are_recomputed_but_nothing_is_chosen_again(policy):
    forward, backward = forward_and_backward(model(policy))
    _, plain = forward_and_backward(model(None))
    assert forward[TOPK] == 2 * len(moma().layers)  # a choice per pool
    assert backward[TOPK] == 0
    assert backward.total() > plain.total() + 20 * len(moma().layers)


def test_gradients_are_those_without():
    whole, recomputed = model(None), model(FullAC.Config())
    for built in (whole, recomputed):
        forward_and_backward(built)
    for (name, a), (_, b) in zip(
        whole.named_parameters(), recomputed.named_parameters(), strict=True
    ):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-7, msg=name)
