"""Attention masks: who sees whom, defined once.

B rows, S positions here, L positions of their row up to the last.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from earlyfuse.kernels.checks import readable
from earlyfuse.models.batch import PADDING, places_in_documents


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
    document_BL: torch.Tensor,
    first: int = 0,
    span_BL: torch.Tensor | None = None,
    *,
    padding_is_read: bool = True,
) -> "torch.Tensor | BlockMask | None":
    """The mask of positions from ``first`` on, over their whole row up to the last.

    ``span_BL``: for an objective that is bidirectional inside media. ``padding_is_read`` False:
    what padding at the end of a row computes is discarded, so that it may see any position. On CUDA
    a FlexAttention ``BlockMask``; elsewhere a boolean (B, 1, S, L) tensor for SDPA, or None (plain
    causal) where every row is whole and one document.
    """
    if document_BL.device.type == "cuda":
        return block_mask(document_BL, first, span_BL)
    padding_BL = document_BL == PADDING
    ascending = False
    if span_BL is None and readable(document_BL):  # and so contiguous, padding last
        number_BL = document_BL.long().masked_fill(padding_BL, torch.iinfo(torch.int64).max)
        ascending = bool((number_BL[:, 1:] >= number_BL[:, :-1]).all())
    if ascending and first == 0:
        same_BL = document_BL == document_BL[:, :1]
        one_document = same_BL & ~padding_BL if padding_is_read else same_BL | padding_BL
        if bool(one_document.all()):
            return None
    place_L = torch.arange(document_BL.shape[1], device=document_BL.device)
    if ascending:  # ``visible`` in one pass
        begin_BL = place_L - places_in_documents(document_BL)
        return (place_L >= begin_BL[:, None, first:, None]).tril_(first)
    pairs = [
        value
        for value_BL in (document_BL, span_BL)
        if value_BL is not None
        for value in (value_BL[:, None, first:, None], value_BL[:, None, None, :])
    ]
    return visible(place_L[first:, None], place_L, *pairs)


class MergedMasks(NamedTuple):
    """Masks of rows that hold the tokens of several rows one after another, then padding: a
    (rows, parts) list of the number of tokens of each part and its ``attention_mask``.
    """

    parts: list[list[tuple[int, torch.Tensor | BlockMask | None]]]


def merged_masks(document_BL: torch.Tensor, row_BL: torch.Tensor) -> MergedMasks | None:
    """The masks of rows whose real tokens come from the ascending rows ``row_BL``, so that
    attention is over each of these rows alone; None if padding is not last, or where values cannot
    be read for free: on CUDA, FlexAttention leaves out what a mask hides.
    """
    if not readable(document_BL):
        return None
    real_BL = document_BL != PADDING
    if bool((real_BL[:, 1:] & ~real_BL[:, :-1]).any()):  # padding in between
        return None
    found = []
    for document_L, row_L, real_L in zip(document_BL, row_BL, real_BL, strict=True):
        lengths = row_L[real_L].unique_consecutive(return_counts=True)[1].tolist()
        parts = document_L[real_L].split(lengths)
        found.append([(len(one_L), attention_mask(one_L[None])) for one_L in parts])
    return MergedMasks(found)


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
    # a compiled block traces it as a part of itself
    traced = torch.compiler.is_compiling()
    create = create_block_mask if traced else compiled_create_block_mask()
    return create(mask_mod, rows, None, upto - first, upto, device=document_BL.device)


@cache
def compiled_create_block_mask() -> Any:
    """``create_block_mask``, compiled: eager, it allocates several S × L tables of int64."""
    return torch.compile(create_block_mask)
