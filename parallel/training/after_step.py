"""Updates after each optimizer step: one explicit list, in order.

All ranks call each entry with ``taken``, a bool tensor () on the device, true if the step was not
skipped. An entry must not synchronise the host: it multiplies by ``taken`` what a skipped step must
not change. QK-clip would be a file, and a line below.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from earlyfuse.parallel.training.ema import Ema
from earlyfuse.parallel.training.expert_bias import ExpertBias
from earlyfuse.parallel.training.thresholds import Thresholds

AfterStep = Callable[[torch.Tensor], None]


def after_step(
    parts: Sequence[nn.Module], parallel_dims: ParallelDims, step_tokens: int, ema: Ema
) -> list[AfterStep]:
    """The updates for a model of these ``parts``; ``step_tokens``: tokens of the global batch."""
    return [
        ExpertBias(parts, parallel_dims),
        Thresholds(parts, parallel_dims, step_tokens),
        *([ema] if ema else []),
    ]
