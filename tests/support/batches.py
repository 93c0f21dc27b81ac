"""Batches and contexts of a few tensors, for tests of models."""

from typing import Any

import torch

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardContext


def batch_of(
    tokens_BS: torch.Tensor,
    modality_BS: torch.Tensor | None = None,
    positions_BS: torch.Tensor | None = None,
    **fields: torch.Tensor,
) -> MixedBatch:
    """A document begins where a position is 0."""
    if positions_BS is not None:
        fields |= {"document_BS": documents_of(positions_BS), "positions_BS": positions_BS}
    return MixedBatch.of(tokens_BS, modality_BS, **fields)


def documents_of(positions_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) int32, from 1."""
    begins_BS = positions_BS == 0
    begins_BS[:, 0] = True
    return begins_BS.cumsum(1, dtype=torch.int32)


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
