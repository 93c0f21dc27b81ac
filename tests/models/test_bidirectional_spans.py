"""Attention inside spans of vectors: bidirectional inside a span, causal between items.

Rows are written as letters: ``b`` begins a document, ``t`` is text, ``i`` and ``e`` begin and end
an image, ``p`` is one of its vectors, ``c`` one of its clean copy, ``.`` padding.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from batches import built
from tiny_runs import DEPTHS, MAMBAS, MODELS
from torch.nn.attention.flex_attention import create_block_mask

from earlyfuse.models import masks
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.attention import attend
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.depth import attention_rank
from earlyfuse.models.masks import QueryBlocks, attention_mask, attention_spans, block_mask
from earlyfuse.models.routes import Routes

ROWS = ("btippppeippetbippet.....", "bipppeippptbtttippetippe")
COPIES = ("btippccetipccetbippcce..", "bipppccceippccebtipcetbt")
LONG = tuple((unit * 9)[:150] for unit in ("btippppeippetbippet", "b" + "t" * 40 + "ippppeippe"))
LONG_COPIES = tuple(row.replace("pppp", "ppcc") for row in LONG)
FORMS = {name: MODELS[name] for name in ("dense", "mot", "token_choice")} | MAMBAS
DECODED = FORMS | {name: DEPTHS[name] for name in ("mod", "moma_mod", "depth_threshold")}
RULES = {"mod": "causal", "moma_mod": "causal", "depth_threshold": "threshold"}


def batch_of(*rows: str) -> MixedBatch:
    document, span = [], []
    for row in rows:
        starts = [letter in "pc" and row[n - 1] != letter for n, letter in enumerate(row)]
        span.append([sum(starts[: n + 1]) * (row[n] in "pc") for n in range(len(row))])
        document.append([row[: n + 1].count("b") * (row[n] != ".") for n in range(len(row))])
    span_BS, document_BS = torch.tensor(span).int(), torch.tensor(document).int()
    has_vector_BS = span_BS != 0
    batch = MixedBatch.of(
        torch.zeros_like(document_BS, dtype=torch.int64),
        has_vector_BS.to(torch.uint8),
        document_BS,
        has_vector_BS=has_vector_BS,
    )
    return replace(batch, span_BS=span_BS)


@cache
def seen(row: str) -> torch.Tensor:
    """(S, S) bool: which positions see which, position by position."""
    size, seen_SS = len(row), torch.eye(len(row), dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            between = row[min(q, k) : max(q, k) + 1]
            same_document = "." not in (row[q], row[k]) and "b" not in between[1:]
            same_span = row[q] in "pc" and between == row[q] * len(between)
            hidden = row[k:].lstrip("p").startswith("c") and row[k] == "p"
            seen_SS[q, k] |= same_document and (same_span or (k < q and not hidden))
    return seen_SS


def seen_in(*rows: str) -> torch.Tensor:
    return torch.stack([seen(row) for row in rows])[:, None]


def dense(mask, size: int) -> torch.Tensor:
    """(B, 1, S, L) of any mask of SDPA."""
    if not isinstance(mask, QueryBlocks):
        return mask
    whole = torch.zeros(len(mask.parts[0][1]), 1, size, size, dtype=torch.bool)
    start = 0
    for keys, own in mask.parts:
        whole[:, :, start : start + own.shape[2], keys] = own
        start += own.shape[2]
    return whole


def context_of(model: torch.nn.Module, batch: MixedBatch, settings=None, **options):
    config = model.config
    return ForwardContext.build(
        batch,
        settings,
        modalities=config.modalities,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        **({"bidirectional": True} | options),
    )


def run(model: torch.nn.Module, x_BSD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """The blocks alone: what they add to ``x_BSD``."""
    x_TD = x_BSD.flatten(0, 1)
    for layer in model.layers.values():
        x_TD = layer(x_TD, context)
    return x_TD.view_as(x_BSD) - x_BSD


def hidden(model: torch.nn.Module, rows, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows), len(rows[0]), model.config.dim, generator=generator)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("rows", [ROWS, COPIES, LONG, LONG_COPIES], ids=lambda rows: rows[0][:12])
def test_masks_are_the_definition_on_every_device(monkeypatch, rows):
    batch, size = batch_of(*rows), len(rows[0])
    span_BS = attention_spans(batch, noised_hidden=True)
    mask = attention_mask(batch.document_BS, 0, span_BS)
    assert isinstance(mask, QueryBlocks) == (size > 64)
    assert dense(mask, size).equal(seen_in(*rows))
    monkeypatch.setattr(
        masks,
        "compiled_create_block_mask",
        lambda: lambda *given, **named: create_block_mask(*given, **named, BLOCK_SIZE=1),
    )
    on_cuda = block_mask(batch.document_BS, 0, span_BS)
    assert on_cuda.to_dense()[..., :size, :size].bool().equal(seen_in(*rows))


def test_spans_are_hidden_only_where_a_copy_follows():
    copied = attention_spans(batch_of("bipppccceippettippcce"), noised_hidden=True)
    assert copied.tolist() == [[0, 0, *[-1] * 3, *[2] * 3, 0, 0, 3, 3, *[0] * 4, -4, -4, 5, 5, 0]]
    assert attention_spans(batch_of(*ROWS), noised_hidden=True).min() == 0
    batch = batch_of(*COPIES)
    assert attention_spans(batch).equal(batch.span_BS)
    # discrete images have spans too, and stay causal
    assert not attention_spans(replace(batch, has_vector_BS=batch.span_BS < 0)).any()
    assert attention_spans(replace(batch, has_vector_BS=None)) is None


def test_blocks_of_queries_leave_out_keys_that_none_of_them_sees():
    """As one mask, gradients too, with fewer keys than causal attention in blocks."""
    batch = batch_of(*LONG_COPIES)
    mask = attention_mask(batch.document_BS, 0, attention_spans(batch, noised_hidden=True))
    assert sum(own.numel() for _, own in mask.parts) < 0.75 * 2 * 150**2
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 150, n, 8, generator=generator) for n in (4, 2, 2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    found = []
    for one in (mask, seen_in(*LONG_COPIES)):
        out_BSNH = attend(*inputs, one)
        found.append([out_BSNH, *torch.autograd.grad(out_BSNH.square().sum(), inputs)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_without_vectors_attention_is_that_of_other_models_to_the_bit():
    model = built(MODELS["dense"]())
    rows = ("btttttttttttttttttttttttt", "bttttttbttttttttttttttt..")
    batch = batch_of(*rows)
    for given in (rows[:1], rows):
        batch, x_BSD = batch_of(*given), hidden(model, given)
        causal = run(model, x_BSD, context_of(model, batch, bidirectional=False))
        for has_vector_BS in (batch.has_vector_BS, None):
            context = context_of(model, replace(batch, has_vector_BS=has_vector_BS))
            assert run(model, x_BSD, context).equal(causal)
    assert context_of(model, batch_of(rows[0])).mask is None


# ---------------------------------------------------------------- models


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS, COPIES], ids=["images", "copies"])
@pytest.mark.parametrize("name", ["dense", "mot", "token_choice"])
def test_a_position_moves_those_that_see_it_and_no_others(name, rows):
    """One layer: outputs move exactly where the definition says; of two images in a row, the
    first does not move with the second.
    """
    config = MODELS[name]()
    del config.layers[1:]
    model = built(config)
    context, x_BSD = context_of(model, batch_of(*rows), noised_hidden=True), hidden(model, rows)
    before = run(model, x_BSD, context)
    for row, letters in enumerate(rows):
        for place in range(len(letters)):
            other_BSD = x_BSD.clone()
            other_BSD[row, place] = -other_BSD[row, place].flip(0)
            moved = ((run(model, other_BSD, context) - before).abs() > 1e-6).any(-1)
            assert moved[row].equal(seen(letters)[:, place]), (row, place)
            assert not moved[1 - row].any()


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_packed_documents_equal_separate_ones(name):
    model = built(FORMS[name]())
    x_BSD = hidden(model, ROWS)
    packed = run(model, x_BSD, context_of(model, batch_of(*ROWS)))
    for row, start, stop in ((0, 0, 13), (0, 13, 19), (1, 0, 11), (1, 11, 24)):
        context = context_of(model, batch_of(ROWS[row][start:stop]))
        alone = run(model, x_BSD[row : row + 1, start:stop], context)
        torch.testing.assert_close(packed[row, start:stop], alone[0], rtol=1e-4, atol=1e-4)
    assert packed.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "mot", "token_choice"])
def test_noised_copies_change_nothing_but_themselves(name):
    """Without them, at the same rotary positions, all other outputs are the same."""
    model = built(MODELS[name]())
    x_BSD, batch = hidden(model, COPIES), batch_of(*COPIES)
    whole = run(model, x_BSD, context_of(model, batch, noised_hidden=True))
    seen_later = run(model, x_BSD, context_of(model, batch))
    assert (seen_later - whole).abs().max() > 0.1, "they would show"
    for row, letters in enumerate(COPIES):
        kept = [n for n, letter in enumerate(letters) if letter != "p"]
        part = {name: t[row : row + 1, kept] for name, t in batch.tensors().items()}
        without = run(model, x_BSD[row : row + 1, kept], context_of(model, MixedBatch(**part)))
        torch.testing.assert_close(whole[row, kept], without[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("parts", [1, 2], ids=["merged", "rows"])
@pytest.mark.parametrize("rows", [ROWS, COPIES], ids=["images", "copies"])
@pytest.mark.parametrize("merging", [True, False], ids=["parts", "one mask"])
def test_a_selection_sees_what_its_tokens_saw(monkeypatch, rows, parts, merging):
    """Sentinels between copies may be missing; the last slot of each row is padding."""
    if not merging:
        monkeypatch.setattr("earlyfuse.models.context.merged_masks", lambda *_: None)
    model, size = built(MODELS["dense"]()), len(rows[0])
    whole = context_of(model, batch_of(*rows), noised_hidden=True)
    places = [0, 2, 3, 5, 6, 8, 9, 10, 13, 15, 16, 18]
    row_R = torch.tensor([row * size + place for row in (0, 1) for place in places])
    weight_R = torch.ones(24)
    weight_R[-1] = 0
    selected = whole.select(Routes(row_R, torch.tensor([0, 24]), weight_R), parts)
    assert selected.attention_span_BS.flatten().equal(whole.attention_span_BS.flatten()[row_R])
    seen_BKK = seen_in(*rows)[:, 0][:, places][:, :, places]
    seen_BKK[1, -1] = seen_BKK[1, :, -1] = False
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, 2, 4, generator=generator) for _ in range(3))
    expected = attend(q, k, v, (seen_BKK | torch.eye(12, dtype=torch.bool))[:, None])
    found = attend(*(tensor.view(parts, -1, 2, 4) for tensor in (q, k, v)), selected.mask)
    torch.testing.assert_close(found.view_as(expected)[:, :-1], expected[:, :-1])
    torch.testing.assert_close(found.view_as(expected)[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("name", DECODED)
def test_cached_calls_equal_the_whole_document(name):
    """Calls hold whole images, with text around them; documents are of different lengths, and a
    call reads different numbers of tokens of them.
    """
    model, settings = built(DECODED[name]()), ForwardSettings(rule=RULES.get(name, "batch"))
    rows = ("bttippppeippett", "btippppeippet", "bippetttt")
    cuts = ((0, 3, 9, 13, 15), (0, 2, 7, 12, 13), (0, 1, 5, 6, 9))
    x_BLD = hidden(model, ("." * 20,) * 3)
    decoding, found = DecodeCache(3, 20), [[] for _ in rows]
    for call in range(4):
        start_B, stop_B = torch.tensor(cuts)[:, call], torch.tensor(cuts)[:, call + 1]
        real_B = stop_B - start_B
        longest = int(real_B.max())
        places_BS = start_B[:, None] + torch.arange(longest)
        # vectors behind the real tokens of a row are padding too
        calls = zip(rows, start_B, stop_B, strict=True)
        parts = [row[a:b].ljust(longest, row[b - 1]) for row, a, b in calls]
        batch = batch_of(*parts)
        batch = replace(
            batch, document_BS=torch.ones_like(batch.document_BS), positions_BS=places_BS
        )
        decoding.start_step(real_B, int(places_BS.max()) + 1, start_B == 0)
        x_BSD = x_BLD.gather(1, places_BS[..., None].expand(-1, -1, x_BLD.shape[-1]))
        out_BSD = run(model, x_BSD, context_of(model, batch, settings, cache=decoding))
        for row, real in enumerate(real_B.tolist()):
            found[row].append(out_BSD[row, :real])
    for row, letters in enumerate(rows):
        x_1SD = x_BLD[row : row + 1, : len(letters)]
        whole = run(model, x_1SD, context_of(model, batch_of(letters), settings))
        torch.testing.assert_close(torch.cat(found[row]), whole[0], rtol=1e-4, atol=1e-4)


def test_maps_that_are_ranked_are_bidirectional_inside_spans(monkeypatch):
    model, given = built(MODELS["dense"]()), []
    context = context_of(model, batch_of(*ROWS))
    kept = attention_rank.attention_map
    monkeypatch.setattr(
        attention_rank, "attention_map", lambda q, k, seen: given.append(seen) or kept(q, k, seen)
    )
    q_BSNH = torch.randn(2, 24, 1, 4, generator=torch.Generator().manual_seed(0))
    attention_rank._head_ranks(q_BSNH, q_BSNH, context, attention_rank.Sample(1, 11, 24))
    assert given[0].equal(seen(ROWS[1][11:]))


def test_hidden_copies_without_bidirectional_spans_and_parts_of_rows_are_refused():
    model, batch = built(MODELS["dense"]()), batch_of(*COPIES)
    with pytest.raises(ValueError, match=r"noised_hidden \(True\) needs bidirectional"):
        context_of(model, batch, bidirectional=False, noised_hidden=True)

    class Half:
        index, parts = 0, 2

    with pytest.raises(ValueError, match="no context parallelism"):
        context_of(model, batch, ForwardSettings(sequence_shard=Half()))
