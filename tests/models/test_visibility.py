"""Who sees whom follows from documents and spans; rotary positions decide nothing of it."""

import pytest
import torch
from batches import batch_of
from tiny_runs import MAMBAS, MODELS, loud

from earlyfuse.models.batch import MixedBatch, places_in_documents
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.masks import attention_mask
from earlyfuse.models.routes import Routes

B, S = 2, 12
DOCUMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [1] * 2 + [2] * 10], dtype=torch.int32)
FORMS = {name: (MODELS | MAMBAS)[name] for name in ("dense", "mot", "mixture_of_mamba", "hybrid")}


def built(name: str) -> torch.nn.Module:
    config = FORMS[name]()
    config.init_std = 0.2
    model = config.build()
    model.init_states()
    loud(model)
    return model.eval()


def inputs(document_BS: torch.Tensor = DOCUMENTS, **fields: torch.Tensor) -> MixedBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 48, document_BS.shape, generator=generator)
    return MixedBatch.of(tokens, (tokens >= 24).to(torch.uint8), document_BS, **fields)


def moved_by(model: torch.nn.Module, batch: MixedBatch, row: int, place: int) -> torch.Tensor:
    """(S,) bool: which outputs of a row another token at ``place`` moves."""
    before = model(batch)
    tokens = batch.tokens_BS.clone()
    tokens[row, place] = (tokens[row, place] + 1) % 48
    changed = MixedBatch(**(batch.tensors() | {"tokens_BS": tokens}))
    return ((model(changed) - before)[row].abs() > 1e-6).any(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_rotary_positions_do_not_decide_who_sees_whom(name):
    """All zero, falling, far apart, or going on over a boundary."""
    model, place = built(name), torch.arange(S).expand(B, S)
    for positions in (place * 0, 50 - place, place * 100, place):
        batch = inputs(positions_BS=positions)
        for row, at in ((0, 0), (0, 3), (0, 5), (1, 1), (1, 2)):
            moved = moved_by(model, batch, row, at)
            same_document = DOCUMENTS[row] == DOCUMENTS[row, at]
            assert not (moved & ~(same_document & (place[row] >= at))).any()
            assert moved[at]


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_padding_is_finite_and_moves_nothing(name):
    model, batch = built(name), inputs()
    assert model(batch).isfinite().all()
    assert moved_by(model, batch, 0, 10).nonzero().flatten().tolist() == [10]


def test_places_count_the_tokens_of_the_same_document():
    expected = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [0, 1, *range(10)]]
    assert places_in_documents(DOCUMENTS).tolist() == expected


def test_a_mask_is_the_definition():
    span = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 2, 2, 0, 0, 0], [0] * 2 + [1] * 5 + [2] * 5])
    for spans in (None, span):
        mask = attention_mask(DOCUMENTS, span_BL=spans)
        for b in range(B):
            for q in range(S):
                for k in range(S):
                    same = DOCUMENTS[b, q] == DOCUMENTS[b, k] and DOCUMENTS[b, q] != 0
                    both = spans is not None and spans[b, q] == spans[b, k] != 0
                    assert bool(mask[b, 0, q, k]) == bool((same and (k <= q or both)) or q == k)


# ---------------------------------------------------------------- a selection of tokens


def context(batch: MixedBatch, model: torch.nn.Module) -> ForwardContext:
    config = model.config
    options = {"head_dim": config.head_dim, "rope_theta": config.rope_theta}
    return ForwardContext.build(batch, modalities=config.modalities, **options)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("name", FORMS)
def test_a_block_on_a_selection_is_the_block_on_rows_without_the_other_tokens(name, rows):
    """Positions keep their gaps, documents stay apart, and rows may lose different numbers."""
    model, batch = built(name), inputs()
    x_TD = torch.randn(B * S, model.config.dim, generator=torch.Generator().manual_seed(1))
    kept = [[0, 2, 3, 5, 8, 10], [0, 1, 2, 5, 6, 11] if rows == B else [1, 4, 11]]
    row_R = torch.tensor([row * S + place for row in range(B) for place in kept[row]])
    routes = Routes(row_R, torch.tensor([0, len(row_R)]))
    selected = context(batch, model).select(routes, rows)
    for layer in model.layers.values():
        found_RD = layer(x_TD[row_R], selected)
        expected = []
        for row in range(B):
            alone = MixedBatch(
                **{n: t[row : row + 1, kept[row]] for n, t in batch.tensors().items()}
            )
            expected.append(layer(x_TD[row * S :][kept[row]], context(alone, model)))
        torch.testing.assert_close(found_RD, torch.cat(expected), rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_of_weight_zero_only_fill_a_selection_up():
    model, batch = built("hybrid"), inputs(torch.ones(B, S, dtype=torch.int32))
    x_TD = torch.randn(B * S, model.config.dim, generator=torch.Generator().manual_seed(1))
    row_R, weight_R = torch.tensor([1, 2, 4, 7]), torch.tensor([1.0, 0, 1, 1])
    whole = context(batch, model)
    filled = whole.select(Routes(row_R, torch.tensor([0, 4]), weight_R))
    real = weight_R > 0
    without = whole.select(Routes(row_R[real], torch.tensor([0, 3])))
    for name, layer in model.layers.items():
        if not hasattr(layer, "mamba"):  # a scan would have to be told to pass them over
            found = layer(x_TD[row_R], filled)[real]
            torch.testing.assert_close(found, layer(x_TD[row_R[real]], without), msg=name)


def test_a_batch_keeps_the_documents_of_whole_rows_in_its_parts():
    batch = batch_of(torch.arange(24).view(B, S))
    part = batch.part(slice(6, 12))
    assert part.tokens_BS.shape == (B, 6) and part.document_BS.shape == (B, S)
