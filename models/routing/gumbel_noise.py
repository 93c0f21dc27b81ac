"""Gumbel-sigmoid noise in a router's choice: exploration after upcycling (arXiv 2407.21770, 2.5).

sigmoid(x + G' - G'') with independent Gumbel samples G', G''; their difference is logistic noise.
It moves which tokens an expert takes, not their weights: experts that are copies of one another
find different tokens, while a token's output is that of inference, and the router's gradient that
of its own score. The paper states neither this, nor a temperature, nor when the noise ends.

A sample is a hash of (step, router, expert, position of the token in the global batch): the same on
any number of ranks, in any micro-batch, after a resume, and when a block is recomputed.

T tokens, E experts, N routers with noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.models.context import ForwardContext
from earlyfuse.models.hashed_noise import key_of, uniform


class RouterNoise(Module):
    """Logistic noise for the logits of one router, by a key for each step.

    ``name`` and ``number`` identify it among the noises of a model (``name_noises``).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``temperature``: initial scale of the noise; it falls linearly to 0 at ``end_step``."""

        end_step: int
        temperature: float = 1.0

        def __post_init__(self) -> None:
            if self.end_step < 1 or not 0 < self.temperature < math.inf:
                raise ValueError(
                    f"end_step ({self.end_step}) of the router noise must be at least 1 and its "
                    f"temperature ({self.temperature}) positive; without noise leave noise None"
                )

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.name, self.number = "", 0
        # a tensor: a Python number would compile every block separately
        self.register_buffer("index_1", torch.zeros(1, dtype=torch.int64), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.index_1.fill_(self.number)

    def key(self, step: int) -> int:
        """64-bit key of the noise of ``step``."""
        return key_of(self.name, step)

    def scale(self, step: int) -> float:
        """The temperature at ``step``, from 1."""
        return self.config.temperature * max(0.0, 1 - (step - 1) / self.config.end_step)

    def forward(self, logits_TE: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Logits with noise, without gradient."""
        if context.noise_2N is None:
            return logits_TE.detach()
        key, scale = (values_N.index_select(0, self.index_1) for values_N in context.noise_2N)
        experts = logits_TE.shape[1]
        expert_E = torch.arange(experts, device=logits_TE.device)
        index_TE = context.row_place_T[:, None] * experts + expert_E
        return logits_TE.detach() + scale * uniform(key, index_TE).logit()


def name_noises(model: nn.Module) -> list[RouterNoise]:
    """All router noises of a model that is not wrapped yet, each with its name and number."""
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, RouterNoise)]
    for number, (name, noise) in enumerate(named):
        noise.name, noise.number = name, number
    return [noise for _, noise in named]


def noise_of_step(
    noises: Sequence[RouterNoise], step: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys (N,) int64 and scales (N,) fp32 of ``step``; None without noise or before the first.

    Filled in on the device: the host would wait for copies.
    """
    if not noises or not step:
        return None
    keys = [torch.full((), noise.key(step), device=device) for noise in noises]
    scales = [torch.full((), noise.scale(step), device=device) for noise in noises]
    return torch.stack(keys), torch.stack(scales)
