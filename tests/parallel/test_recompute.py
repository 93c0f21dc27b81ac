"""Activation checkpointing recomputes blocks in backward, but not routing."""

import pytest
import torch
from op_counts import forward_and_backward
from tiny_runs import THRESHOLDS, moma
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.parallel.strategies.activation_checkpointing import checkpoint_activations

TOPK = torch.ops.earlyfuse.select_top_k.default
COUNT = torch.ops.earlyfuse.count_above.default


def model(policy, config=moma):
    built = config().build()
    built.init_states()
    if policy:
        checkpoint_activations(built, policy, "")
    return built


@pytest.mark.parametrize("policy", [FullAC.Config(), SelectiveAC.Config()])
def test_blocks_are_recomputed_but_nothing_is_chosen_again(policy):
    forward, backward = forward_and_backward(model(policy))
    _, plain = forward_and_backward(model(None))
    assert forward[TOPK] == 2 * len(moma().layers)  # a choice per pool
    assert backward[TOPK] == 0
    forward, backward = forward_and_backward(model(policy, THRESHOLDS["moma_threshold"]))
    assert forward[COUNT] == forward[TOPK] == 2 * len(moma().layers)
    assert backward[COUNT] == backward[TOPK] == 0
    assert backward.total() > plain.total() + 20 * len(moma().layers)
