"""Attention masks: who sees whom, defined once.

Causal within each document; inside the spans of ``attention_spans`` bidirectional.

B rows, S positions here, L positions of their row up to the last.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from earlyfuse.kernels.checks import readable
from earlyfuse.models.batch import (
    PADDING,
    MixedBatch,
    directly_after_another,
    places_in_documents,
    vector_spans,
)


def visible(
    query: torch.Tensor,
    key: torch.Tensor,
    query_document: torch.Tensor,
    key_document: torch.Tensor,
    query_span: torch.Tensor | None = None,
    key_span: torch.Tensor | None = None,
) -> torch.Tensor:
    """True where positions ``query`` of a row see positions ``key``: same document, not later.

    With spans (``attention_spans``) also later positions of the same span, and positions of a
    negative span from inside it alone. A padding token sees itself alone. All tensors broadcast.
    """
    seen = key <= query
    if query_span is not None and key_span is not None:
        same_span = (query_span == key_span) & (key_span != 0)
        seen = (seen & (key_span >= 0)) | same_span
    same_document = (query_document == key_document) & (key_document != PADDING)
    return (same_document & seen) | (query == key)


def attention_spans(batch: MixedBatch, noised_hidden: bool = False) -> torch.Tensor | None:
    """(B, S): numbers of the spans of vectors, 0 elsewhere; None if the batch has none.

    ``noised_hidden``: where a span follows another directly, the two are copies of one item, first
    noised, then clean. The number of a noised copy is negative: later tokens see the clean one.
    """
    span_BS = vector_spans(batch)
    if span_BS is None or not noised_hidden:
        return span_BS
    noised_BS = directly_after_another(span_BS.flip(1)).flip(1)
    return torch.where(noised_BS, -span_BS, span_BS)


SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256


class QueryBlocks(NamedTuple):
    """A mask in blocks of successive queries: the keys that any of them sees, and the mask between
    them, boolean (B, 1, queries, keys). SDPA on CPU computes all keys that a mask hides.
    """

    parts: list[tuple[slice, torch.Tensor]]


class MergedMasks(NamedTuple):
    """Masks of rows that hold the tokens of several rows one after another, then padding: a
    (rows, parts) list of the number of tokens of each part and its ``attention_mask``.
    """

    parts: "list[list[tuple[int, Mask]]]"


Mask = torch.Tensor | BlockMask | QueryBlocks | MergedMasks | None


def attention_mask(
    document_BL: torch.Tensor,
    first: int = 0,
    span_BL: torch.Tensor | None = None,
    *,
    padding_is_read: bool = True,
) -> Mask:
    """The mask of positions from ``first`` on, over their whole row up to the last.

    ``span_BL``: see ``attention_spans``. ``padding_is_read`` False: what padding at the end of a
    row computes is discarded, so that it may see any position. On CUDA a FlexAttention
    ``BlockMask``; elsewhere a boolean (B, 1, S, L) tensor for SDPA, with spans in ``QueryBlocks``,
    or None (plain causal) where every row is whole and one document.
    """
    if document_BL.device.type == "cuda":
        return block_mask(document_BL, first, span_BL)
    if span_BL is not None and readable(span_BL) and not bool(span_BL.any()):
        span_BL = None
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
    mask = visible(place_L[first:, None], place_L, *pairs)
    return mask if span_BL is None or not readable(mask) else query_blocks(mask)


def query_blocks(mask: torch.Tensor) -> QueryBlocks | torch.Tensor:
    """``mask`` (B, 1, S, L) in about four blocks, or as it is where it is small."""
    queries = mask.shape[2]
    parts, size = [], min(max(queries // 4, SMALLEST_BLOCK), LARGEST_BLOCK)
    if queries <= size:
        return mask
    for start in range(0, queries, size):
        block = mask[:, :, start : start + size]
        seen = block.flatten(0, 2).any(0).nonzero()[:, 0].tolist()
        keys = slice(seen[0], seen[-1] + 1)
        parts.append((keys, block[..., keys]))
    return QueryBlocks(parts)


def merged_masks(
    document_BL: torch.Tensor, row_BL: torch.Tensor, span_BL: torch.Tensor | None = None
) -> MergedMasks | None:
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
    for row, real_L in enumerate(real_BL):
        lengths = row_BL[row][real_L].unique_consecutive(return_counts=True)[1].tolist()
        masks, stop = [], 0
        for length in lengths:
            part = slice(row, row + 1), slice(stop, stop := stop + length)
            span_1L = None if span_BL is None else span_BL[part]
            masks.append((length, attention_mask(document_BL[part], 0, span_1L)))
        found.append(masks)
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
