"""Gumbel-sigmoid noise in a router's choice: exploration after upcycling (arXiv 2407.21770, 2.5).

sigmoid(x + G' - G'') with independent Gumbel samples G', G''; their difference is logistic noise.
Here it moves which tokens an expert takes, not the weight that they get: experts that are copies
of one another find different tokens, while a token's output stays that of inference, and the
router's gradient is that of its own score. The paper says neither which of the two it does, nor a
temperature, nor when the noise ends.

A sample is a hash of (step, router, expert, place of the token in the global batch): the same on
any number of ranks, in any micro-batch, after a resumption, and whenever a block is computed again.

T tokens, E experts.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.protocols.module import Module

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class RouterNoise(Module):
    """Logistic noise for the logits of one router, by a key for each step."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``temperature``: scale of the noise at first; it falls linearly to 0 at ``end_step``, so
        that the choice does not jump there."""

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
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("scale", torch.zeros(()), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.key.zero_()
        self.scale.zero_()

    def set_step(self, name: str, step: int) -> None:
        """Noise of ``step`` (from 1) for the router called ``name``."""
        digest = hashlib.blake2b(f"{name}/{step}".encode(), digest_size=8).digest()
        self.key.fill_(int.from_bytes(digest, "little", signed=True))
        left = max(0.0, 1 - (step - 1) / self.config.end_step)
        self.scale.fill_(self.config.temperature * left)

    def forward(self, logits_TE: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """Logits with noise, without gradient; ``place_T`` int64, place in the global batch."""
        experts = logits_TE.shape[1]
        expert_E = torch.arange(experts, device=logits_TE.device)
        bits_TE = _scrambled(self.key + _scrambled(place_T[:, None] * experts + expert_E))
        # 23 bits and a half: exact in fp32, and never 0 or 1
        uniform_TE = ((bits_TE & 0x7FFFFF).float() + 0.5) * 2.0**-23
        return logits_TE.detach() + self.scale * uniform_TE.logit()


def _scrambled(value: torch.Tensor) -> torch.Tensor:
    """Every bit of an int64 into all bits of the result: the finaliser of splitmix64."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift of an int64 as if it had no sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def router_noises(models: Iterable[nn.Module]) -> dict[str, RouterNoise]:
    """Name → noise of every router that has one; names are the same however a model is wrapped."""
    found = {}
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, RouterNoise):
                for wrapper in WRAPPERS:
                    name = name.replace(wrapper, "")
                found[name] = module
    return found
