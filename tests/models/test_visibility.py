"""Visibility follows from documents and spans, not from rotary positions; masks; selections."""

from dataclasses import replace

import pytest
import torch
from batches import WORDS, batch_of, built, random_batch
from tiny_runs import MAMBAS, MODELS, moma
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import profile

from earlyfuse.models import masks
from earlyfuse.models.batch import MixedBatch, places_in_documents
from earlyfuse.models.blocks.attention import attend
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.masks import attention_mask, block_mask, merged_masks, visible
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.expert_choice import ExpertChoice

B, S = 2, 12
DOCUMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [1] * 2 + [2] * 10], dtype=torch.int32)
SPANS = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 2, 2, 0, 0, 0], [0] * 2 + [-1] * 5 + [2] * 5])
PLACE = torch.arange(S).expand(B, S)
FORMS = {name: MODELS[name] for name in ("dense", "mot", "token_choice")} | MAMBAS


def inputs(document_BS: torch.Tensor = DOCUMENTS, **fields: torch.Tensor) -> MixedBatch:
    return random_batch(rows=B, seq_len=S, document_BS=document_BS, **fields)


def moved_by(model: torch.nn.Module, batch: MixedBatch, row: int, place: int) -> torch.Tensor:
    """(S,) bool: which outputs of a row another token at ``place`` moves."""
    tokens = batch.tokens_BS.clone()
    tokens[row, place] = (tokens[row, place] + 1) % WORDS
    return ((model(replace(batch, tokens_BS=tokens)) - model(batch))[row].abs() > 1e-6).any(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_a_token_moves_itself_and_later_tokens_of_its_document_whatever_the_positions(name):
    """Rotary positions all zero, falling, far apart, or continuing over a boundary."""
    model = built(FORMS[name]())
    for positions in (PLACE * 0, 50 - PLACE, PLACE * 100, PLACE):
        batch = inputs(positions_BS=positions)
        for row, at in ((0, 0), (0, 3), (0, 5), (1, 1), (1, 2)):
            moved = moved_by(model, batch, row, at)
            later = (DOCUMENTS[row] == DOCUMENTS[row, at]) & (PLACE[row] >= at)
            assert not (moved & ~later).any()
            assert moved[at] and moved[at + 1] == later[at + 1]


@torch.no_grad()
def test_later_tokens_do_not_move_earlier_outputs_of_moma_with_routing_fixed(monkeypatch):
    model, chosen, choose = built(moma()), {}, ExpertChoice._choose

    def once(router, logits, eligible, context):
        """The first forward's choice of rows, with the weights of the present logits."""
        kept, taken = chosen.setdefault(router, choose(router, logits, eligible, context))
        expert = torch.repeat_interleave(torch.arange(logits.shape[1]), kept.offset_G1.diff())
        weight = logits[kept.row_R, expert].sigmoid() * eligible[kept.row_R]
        return kept._replace(weight_R=weight), taken

    monkeypatch.setattr(ExpertChoice, "_choose", once)
    moved = moved_by(model, inputs(torch.ones(B, S, dtype=torch.int32)), 0, 7)
    assert not moved[:7].any() and moved[7:].all()


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_packed_documents_equal_separate_ones_and_padding_moves_nothing(name):
    """One document is shorter than Mamba's convolution."""
    model, batch = built(FORMS[name]()), inputs()
    packed = model(batch)
    for row, start, stop in ((0, 0, 5), (0, 5, 9), (1, 0, 2), (1, 2, 12)):
        part = slice(row, row + 1), slice(start, stop)
        alone = model(batch_of(batch.tokens_BS[part], batch.modality_BS[part]))[0]
        torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-5, atol=2e-5)
    assert packed.isfinite().all()
    assert moved_by(model, batch, 0, 10).nonzero().flatten().tolist() == [10]


def test_places_count_the_tokens_of_the_same_document():
    expected = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [0, 1, *range(10)]]
    assert places_in_documents(DOCUMENTS).tolist() == expected


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("span", [None, SPANS], ids=["causal", "spans"])
@pytest.mark.parametrize("first", [0, 4])
def test_masks_are_the_definition(monkeypatch, span, first):
    mask = attention_mask(DOCUMENTS, first, span)
    for b in range(B):
        for q in range(first, S):
            for k in range(S):
                same = DOCUMENTS[b, q] == DOCUMENTS[b, k] and DOCUMENTS[b, q] != 0
                both = span is not None and span[b, q] == span[b, k] != 0
                shown = span is None or span[b, k] >= 0
                expected = (same and ((k <= q and shown) or both)) or q == k
                assert bool(mask[b, 0, q - first, k]) == bool(expected)
    monkeypatch.setattr(masks, "compiled_create_block_mask", lambda: _create_token_mask)
    assert block_mask(DOCUMENTS, first, span).to_dense()[..., : S - first, :S].bool().equal(mask)


def test_masks_of_interrupted_documents_are_the_definition():
    """A document with padding inside, as where tokens are hidden, and documents out of order."""
    for documents in ([[1, 0, 1, 1, 2, 0, 2, 0]], [[2, 2, 1, 1, 2, 0, 0, 0]]):
        document_BL, place_L = torch.tensor(documents), torch.arange(8)
        expected = visible(
            place_L[:, None], place_L, document_BL[:, None, :, None], document_BL[:, None, None, :]
        )
        for read in (True, False):
            assert attention_mask(document_BL, padding_is_read=read).equal(expected)


def test_padding_that_nothing_reads_leaves_attention_plain_causal():
    one, padded = torch.ones(2, 6, dtype=torch.int32), torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert attention_mask(one) is None and attention_mask(padded, padding_is_read=False) is None
    assert attention_mask(padded)[0, 0, 4].tolist() == [False] * 4 + [True, False]
    context = ForwardContext.build(
        MixedBatch.of(one), modalities=(0, 1), head_dim=2, rope_theta=1e4
    )
    row_R, weight_R = torch.tensor([0, 2, 5, 7, 8, 9]), torch.tensor([1.0, 1, 0, 1, 1, 1])
    selected = context.select(Routes(row_R, torch.tensor([0, 6]), weight_R), rows=2)
    assert selected.mask is None


def test_merged_rows_attend_over_each_row_alone():
    """As under one mask of all their tokens, gradients included."""
    generator = torch.Generator().manual_seed(0)
    row_BL = torch.tensor([[0] * 5 + [1] * 4 + [0] * 3])
    document_BL = torch.tensor([[1, 1, 1, 2, 2, 9, 9, 9, 9, 0, 0, 0]])
    inputs = [torch.randn(1, 12, 2, 4, generator=generator).requires_grad_() for _ in range(3)]
    found = []
    for mask in (merged_masks(document_BL, row_BL), attention_mask(document_BL)):
        out_BSNH = attend(*inputs, mask)[:, :9]
        found.append([out_BSNH, *torch.autograd.grad(out_BSNH.square().sum(), inputs)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("span", [None, "images of 200"])
def test_a_block_mask_is_built_inside_a_compiled_block(span):
    """As depth-routed blocks do, whose rows are their own."""
    fields = (DOCUMENTS_LONG,) if span is None else (DOCUMENTS_LONG, SPANS_LONG)

    def blocks(document_BL, span_BL=None):
        mask = block_mask(document_BL, 0, span_BL)
        return mask.kv_num_blocks, mask.full_kv_num_blocks

    def seen(b, h, q, k):
        return visible(q, k, *(pair for field in fields for pair in (field[b, q], field[b, k])))

    expected = create_block_mask(seen, 2, None, 384, 384, device="cpu")
    found = torch.compile(blocks, fullgraph=True, backend="aot_eager")(*fields)
    assert found[0].equal(expected.kv_num_blocks) and found[1].equal(expected.full_kv_num_blocks)


DOCUMENTS_LONG = torch.arange(384).div(300, rounding_mode="floor").int().expand(2, -1) + 1
SPANS_LONG = torch.tensor([0] * 60 + [1] * 200 + [0] * 124).int().expand(2, -1)


def _create_token_mask(*arguments, **options):
    return create_block_mask(*arguments, **options, BLOCK_SIZE=1)


def test_block_masks_are_built_without_tables_of_all_pairs():
    """The compiled builder allocates less than a byte per pair; eager, eight."""
    document_BL = torch.arange(1024)[None].div(300, rounding_mode="floor").int() + 1
    block_mask(document_BL)  # compiles
    with profile(profile_memory=True) as profiled:
        block_mask(document_BL)
    assert max(event.self_cpu_memory_usage for event in profiled.events()) < 1024**2 // 8


def test_cuda_uses_the_block_mask(monkeypatch):
    monkeypatch.setattr(masks, "block_mask", lambda *arguments: arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        document_BL = torch.empty(B, S, dtype=torch.int32, device="cuda")
        assert attention_mask(document_BL, 4) == (document_BL, 4, None)


# ---------------------------------------------------------------- a selection of tokens


def context(batch: MixedBatch, model: torch.nn.Module) -> ForwardContext:
    config = model.config
    options = {"head_dim": config.head_dim, "rope_theta": config.rope_theta}
    return ForwardContext.build(batch, modalities=config.modalities, **options)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("name", ["dense", "mot", "mixture_of_mamba", "hybrid"])
def test_a_block_on_a_selection_is_the_block_on_rows_without_the_other_tokens(name, rows):
    """Positions keep their gaps, documents stay separate, and rows may lose different numbers."""
    model, batch = built(FORMS[name]()), inputs()
    x_TD = torch.randn(B * S, model.config.dim, generator=torch.Generator().manual_seed(1))
    kept = [[0, 2, 3, 5, 8, 10], [0, 1, 2, 5, 6, 11] if rows == B else [1, 4, 11]]
    row_R = torch.tensor([row * S + place for row in range(B) for place in kept[row]])
    selected = context(batch, model).select(Routes(row_R, torch.tensor([0, len(row_R)])), rows)
    for layer in model.layers.values():
        expected = []
        for row in range(B):
            fields = {n: t[row : row + 1, kept[row]] for n, t in batch.tensors().items()}
            alone = context(MixedBatch(**fields), model)
            expected.append(layer(x_TD[row * S :][kept[row]], alone))
        found_RD = layer(x_TD[row_R], selected)
        torch.testing.assert_close(found_RD, torch.cat(expected), rtol=0, atol=2e-5)


@torch.no_grad()
def test_rows_of_weight_zero_are_padding_of_a_selection():
    model, batch = built(FORMS["hybrid"]()), inputs(torch.ones(B, S, dtype=torch.int32))
    x_TD = torch.randn(B * S, model.config.dim, generator=torch.Generator().manual_seed(1))
    row_R, weight_R = torch.tensor([1, 2, 4, 7]), torch.tensor([1.0, 0, 1, 1])
    whole, real = context(batch, model), weight_R > 0
    padded = whole.select(Routes(row_R, torch.tensor([0, 4]), weight_R))
    without = whole.select(Routes(row_R[real], torch.tensor([0, 3])))
    layer = model.layers["0"]  # attention: scans are interrupted by padding
    found = layer(x_TD[row_R], padded)[real]
    torch.testing.assert_close(found, layer(x_TD[row_R[real]], without))


def test_a_batch_keeps_the_documents_of_whole_rows_in_its_parts():
    part = batch_of(torch.arange(24).view(B, S)).part(slice(6, 12))
    assert part.tokens_BS.shape == (B, 6) and part.document_BS.shape == (B, S)
