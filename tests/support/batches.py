"""Batches, contexts and models of a few tensors, for tests of models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tiny_runs import loud
from torch import nn

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.decoder import Decoder

WORDS = 48


def batch_of(
    tokens_BS: torch.Tensor,
    modality_BS: torch.Tensor | None = None,
    positions_BS: torch.Tensor | None = None,
    **fields: torch.Tensor,
) -> MixedBatch:
    """A document begins where a position is 0."""
    if positions_BS is not None:
        begins_BS = positions_BS == 0
        begins_BS[:, 0] = True
        document_BS = begins_BS.cumsum(1, dtype=torch.int32)
        fields |= {"document_BS": document_BS, "positions_BS": positions_BS}
    return MixedBatch.of(tokens_BS, modality_BS, **fields)


def random_batch(
    modalities: int = 2, rows: int = 2, seq_len: int = 24, **fields: torch.Tensor
) -> MixedBatch:
    """Random tokens and modalities, one document per row unless ``document_BS`` is given."""
    generator, shape = torch.Generator().manual_seed(0), (rows, seq_len)
    tokens_BS = torch.randint(WORDS, shape, generator=generator)
    modality_BS = torch.randint(modalities, shape, generator=generator).to(torch.uint8)
    return MixedBatch.of(tokens_BS, modality_BS, **fields)


def with_modality(batch: MixedBatch, modality: int) -> MixedBatch:
    return replace(batch, modality_BS=torch.full_like(batch.modality_BS, modality))


def context_of(
    modality_BS: torch.Tensor,
    positions_BS: torch.Tensor,
    modalities: tuple[int, ...] = (0, 1),
    head_dim: int = 0,
    theta: float = 1e4,
    **options: Any,
) -> ForwardContext:
    """The context of a batch without tokens."""
    batch = batch_of(positions_BS, modality_BS, positions_BS)
    return ForwardContext.build(
        batch, modalities=modalities, head_dim=head_dim, rope_theta=theta, **options
    )


def built(config: Decoder.Config, seed: int = 0) -> Decoder:
    """In evaluation mode, with initial values large enough that a wrong mask, route or state shows
    in fp32.
    """
    config.seed, config.init_std = seed, 0.2
    model = config.build()
    model.init_states()
    loud(model)
    return model.eval()


def assert_same_function(
    module: nn.Module, context: ForwardContext, oracle: Callable, x: torch.Tensor
) -> None:
    """``module(x, context)`` equals ``oracle(x)``, and so do their gradients of ``x`` and of all
    parameters of ``module``, each of which has one.
    """
    results = []
    for function in (lambda y: module(y, context), oracle):
        module.zero_grad()
        y = x.clone().requires_grad_()
        out = function(y)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        results.append([out.detach(), y.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


MIXES = ("balanced", "one image", "no image")


def modality_of(mix: str, tokens: int) -> torch.Tensor:
    """(T,) uint8: every third token, the fourth alone, or none is an image's."""
    modality_T = torch.zeros(tokens, dtype=torch.uint8)
    if mix != "no image":
        modality_T[[3] if mix == "one image" else torch.arange(0, tokens, 3)] = 1
    return modality_T
