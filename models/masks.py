"""Attention masks: who sees whom, defined once.

B rows, S positions here, L positions of their row up to the last.
"""

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from earlyfuse.models.batch import PADDING


def visible(
    query: torch.Tensor,
    key: torch.Tensor,
    query_document: torch.Tensor,
    key_document: torch.Tensor,
    query_span: torch.Tensor | None = None,
    key_span: torch.Tensor | None = None,
) -> torch.Tensor:
    """True where positions ``query`` of a row see positions ``key``: same document, not later.

    With spans, for objectives that are bidirectional inside media, also later positions of the same
    span. A padding token sees itself alone. All tensors broadcast.
    """
    seen = key <= query
    if query_span is not None and key_span is not None:
        seen = seen | ((query_span == key_span) & (query_span != 0))
    same_document = (query_document == key_document) & (query_document != PADDING)
    return (same_document & seen) | (query == key)


def attention_mask(
    document_BL: torch.Tensor, first: int = 0, span_BL: torch.Tensor | None = None
) -> "torch.Tensor | BlockMask | None":
    """The mask of positions from ``first`` on, over their whole row up to the last.

    ``span_BL``: for an objective that is bidirectional inside media. On CUDA a FlexAttention
    ``BlockMask``; elsewhere a boolean (B, 1, S, L) tensor for SDPA, or None (plain causal) where
    every row is whole and one document.
    """
    if document_BL.device.type == "cuda":
        return block_mask(document_BL, first, span_BL)
    one_document = (document_BL == document_BL[:, :1]) & (document_BL != PADDING)
    if first == 0 and span_BL is None and bool(one_document.all()):
        return None
    place_L = torch.arange(document_BL.shape[1], device=document_BL.device)
    pairs = [
        value
        for value_BL in (document_BL, span_BL)
        if value_BL is not None
        for value in (value_BL[:, None, first:, None], value_BL[:, None, None, :])
    ]
    return visible(place_L[first:, None], place_L, *pairs)


def block_mask(
    document_BL: torch.Tensor, first: int = 0, span_BL: torch.Tensor | None = None
) -> BlockMask:
    """``attention_mask`` for FlexAttention, built without S × L tables."""

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        query = query + first
        spans = () if span_BL is None else (span_BL[b, query], span_BL[b, key])
        return visible(query, key, document_BL[b, query], document_BL[b, key], *spans)

    rows, upto = document_BL.shape
    create = compiled_create_block_mask()
    return create(mask_mod, rows, None, upto - first, upto, device=document_BL.device)


@cache
def compiled_create_block_mask() -> Any:
    """``create_block_mask``, compiled: eager, it allocates several S × L tables of int64."""
    return torch.compile(create_block_mask)
