"""EMA of the weights: a second set of parameters, averaged over the steps, for use after training.

After step n, counted from 0 over the steps that were taken,

    average += (1 - d) · (weight - average),   d = min(decay, (1 + n) / (10 + n)),

in fp32. The ratio is the warm-up: the average forgets the initial weights within some ten steps. It
begins with the weights that the run has when averaging begins. Parameters are averaged, frozen ones
too; buffers are not: running thresholds and the biases of token choice are state that follows the
trained weights, and the averaged weights use them as they are.

A rank averages its own shards, in the layout of the parameters, by ops that round each element
alone: so averages are equal on all layouts where weights are, and need no communication.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.config import Configurable

CHUNK = 1 << 26  # elements of the differences that exist at once


class Ema(Configurable):
    """Averages the parameters of a model's ``parts``; does nothing if ``decay`` is 0.

    ``averages``: by the parameters' names in checkpoints, fp32, with their shapes and placements.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        decay: float = 0.0
        """Weight of the past in the average of the weights, in [0, 1): 0.9999 is usual; 0: off."""

        validation: bool = True
        """Validate the averaged weights instead of the trained ones."""

        samples: bool = True
        """Generate samples by the averaged weights."""

    def __init__(self, config: Config, *, parts: Sequence[nn.Module]):
        self.config, self.parts = config, parts
        self.parameters: dict[str, nn.Parameter] = {}
        if config.decay:
            self.parameters = {
                name: value
                for part in parts
                for name, value in part.state_dict(keep_vars=True).items()
                if isinstance(value, nn.Parameter)
            }
        twice = len(self.parameters) - len({*map(id, self.parameters.values())})
        assert not twice, "a parameter of two names would be exchanged twice"
        self.averages = {
            name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in self.parameters.items()
        }
        device = next((local(average).device for average in self.averages.values()), None)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self._loaded = False

    def __bool__(self) -> bool:
        """True if there are averages."""
        return bool(self.averages)

    @torch.no_grad()
    def begin(self) -> str:
        """Begin with the present weights unless averages were loaded; a remark for the resume."""
        if not self or self._loaded:
            return ""
        for name, parameter in self.parameters.items():
            local(self.averages[name]).copy_(local(parameter))
        return "; the average of the weights begins with those of this step"

    @torch.no_grad()
    def __call__(self, taken: torch.Tensor) -> None:
        """Average the weights after a step, if it was ``taken``.

        No host synchronisation, except with CPU offload, whose optimizer waits too.
        """
        taken = taken.to(self.updates.device)
        ratio = (1 + self.updates).double() / (10 + self.updates)
        weight = ((1 - ratio.clamp_max(self.config.decay)) * taken).float()
        for averages, parameters in self._chunks():
            differences = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(averages, differences)
        self.updates += taken

    def _chunks(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """This rank's shards of averages and parameters, some at a time."""
        averages: list[torch.Tensor] = []
        parameters: list[torch.Tensor] = []
        size = 0
        for name, parameter in self.parameters.items():
            averages.append(local(self.averages[name]))
            parameters.append(local(parameter))  # not kept: FSDP replaces it at its first forward
            size += averages[-1].numel()
            if size >= CHUNK:
                yield averages, parameters
                averages, parameters, size = [], [], 0
        if averages:
            yield averages, parameters

    @contextmanager
    def weights(self, averaged: bool) -> Iterator[dict[str, str]]:
        """The model has its averaged weights inside the block, if that is wanted and there are any.

        Yields which ones it has, for metrics: {} without averages. Nothing may train or save there.
        """
        if not (self and averaged):
            yield {"weights": "trained"} if self else {}
            return
        narrow: dict[str, torch.Tensor] = {}
        self._exchange(narrow)
        try:
            yield {"weights": "ema"}
        finally:
            self._exchange(narrow)

    @torch.no_grad()
    def _exchange(self, narrow: dict[str, torch.Tensor]) -> None:
        """Exchange weights and averages in place, with one temporary at a time.

        An average does not fit into a narrower weight: ``narrow`` keeps such weights meanwhile, and
        the averages stay where they are.
        """
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # FSDP keeps the gathered head for the next forward
        for name, parameter in self.parameters.items():
            here, average = local(parameter), local(self.averages[name])
            if name in narrow:
                here.copy_(narrow.pop(name))
                continue
            weight = here.clone()
            here.copy_(average)
            if weight.dtype == average.dtype:
                average.copy_(weight)
            else:
                narrow[name] = weight

    def state_dict(self) -> dict[str, Any]:
        """Averages by name, and ``updates``, the steps that they have seen."""
        return {**self.averages, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        for name, value in self.state_dict().items():
            local(value).copy_(local(state_dict[name]))
        self._loaded = True


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
