"""Updates after each optimizer step, one explicit list, in order.

An entry is called on all ranks with ``taken``, a bool tensor on the device: whether the step was
taken or skipped. It must not wait for the device: what a skipped step must not change is multiplied
by ``taken``. Moving averages of weights or a clip of attention logits would be one file each, and a
line below.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from earlyfuse.parallel.training.expert_bias import ExpertBias

AfterStep = Callable[[torch.Tensor], None]


def after_step(parts: Sequence[nn.Module], parallel_dims: ParallelDims) -> list[AfterStep]:
    """The updates of a model of these ``parts``."""
    return [ExpertBias(parts, parallel_dims)]
