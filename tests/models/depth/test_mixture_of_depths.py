"""Depth-routed blocks: what they compute is the block on the kept tokens alone."""

import math

import pytest
import torch
from tiny_runs import MAMBAS, MODELS

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.depth.mixture_of_depths import MixtureOfDepths, Weighting
from earlyfuse.models.depth.selection import Selection, keep
from earlyfuse.models.init_weights import init_weights

B, S = 2, 12
DOCUMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3, [1] * 2 + [2] * 10], dtype=torch.int32)
SPANS = torch.tensor([[0, 1, 1, 1, 1, 0, 2, 2, 2, 0, 0, 0], [0, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0]])
FORMS = MODELS | MAMBAS
WHOLE = (
    {},
    {"group": "document"},
    {"group": "routing_group", "routing_rows": 2},
    {"group": "span", "competing": (1,), "competing_share": 0.5},
    {"forced": (0,), "competing_share": 0.5},
)


def inputs() -> MixedBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 48, DOCUMENTS.shape, generator=generator)
    batch = MixedBatch.of(tokens, (SPANS > 0).to(torch.uint8), DOCUMENTS)
    batch.span_BS = SPANS.int()
    return batch


def context(batch: MixedBatch, config, **settings) -> ForwardContext:
    options = {"head_dim": config.head_dim, "rope_theta": config.rope_theta}
    settings = ForwardSettings(**settings)
    return ForwardContext.build(batch, settings, modalities=config.modalities, **options)


def layers(name: str, weighting: Weighting | None = None, **selection):
    """Each different layer of a model, depth-routed, and the model's config."""
    config = FORMS[name]()
    for layer in config.layers[:2]:
        layer.depth = MixtureOfDepths.Config(
            selection=Selection(**selection), weighting=weighting or Weighting()
        )
        model = layer.build()
        init_weights(model, std=0.2, branches=4, seed=0)
        yield model, config


def states(dim: int) -> torch.Tensor:
    return torch.randn(B * S, dim, generator=torch.Generator().manual_seed(1))


def route(model, x_TD: torch.Tensor, whole: ForwardContext):
    return model.depth.run(x_TD, whole, model)[1]


@pytest.mark.parametrize("selection", WHOLE)
@pytest.mark.parametrize("name", FORMS)
def test_capacity_1_and_weight_1_is_the_block_to_the_bit(name, selection):
    for model, config in layers(name, Weighting(map="one"), capacity=1.0, **selection):
        batch = context(inputs(), config)
        x_TD = states(config.dim)
        torch.testing.assert_close(model(x_TD, batch), model.run(x_TD, batch), rtol=0, atol=0)


@pytest.mark.parametrize(
    "weighting", [Weighting(), Weighting(map="tanh", scales="feed_forward", skipped="scaled")]
)
@pytest.mark.parametrize("selection", WHOLE)
@pytest.mark.parametrize("name", ["dense", "mot", "moma", "token_choice"])
def test_compaction_is_the_whole_block_with_masks(name, selection, weighting):
    """Outputs and gradients, against tokens that are hidden instead of left out."""
    for model, config in layers(name, weighting, capacity=0.5, **selection):
        batch = inputs()
        whole = context(batch, config, budgets="exact")
        found = []
        for masked in (False, True):
            x_TD = states(config.dim).requires_grad_()
            model.zero_grad()
            out_TD, depth = model.depth.run(x_TD, whole, model)
            if masked:
                row_R, real_R = depth.kept
                kept_T = torch.zeros(B * S, dtype=torch.bool)
                kept_T[row_R[real_R]] = True
                hidden = batch.document_BS.masked_fill(~kept_T.view(B, S), 0)
                oracle = context(
                    MixedBatch(**(batch.tensors() | {"document_BS": hidden})),
                    config,
                    budgets="exact",
                )
                oracle.real_T = kept_T
                weight_T = depth.weight_T.masked_fill(depth.forced_T, 1.0)
                block_TD = model.run(x_TD, oracle, weight_T, weighting.scales)
                skipped = weighting.skipped == "scaled"
                scaled_T = depth.decided_T & ~depth.forced_T & skipped
                scale_T = torch.where(scaled_T, depth.weight_T, 1.0)
                out_TD = torch.where(kept_T[:, None], block_TD, x_TD * scale_T[:, None])
            out_TD.square().sum().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append((out_TD.detach(), x_TD.grad, grads))
        (out, dx, grads), (expected, expected_dx, expected_grads) = found
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-4)
        for parameter, grad in expected_grads.items():
            torch.testing.assert_close(grads[parameter], grad, rtol=1e-4, atol=2e-4, msg=parameter)


@pytest.mark.parametrize("name", MAMBAS)
def test_skipped_tokens_are_not_in_the_scan(name):
    """Outputs and gradients of rows of the kept tokens alone."""
    for model, config in layers(name, capacity=0.5):
        batch, x_TD = inputs(), states(config.dim).requires_grad_()
        out_TD, depth = model.depth.run(x_TD, context(batch, config), model)
        weight_T, total = depth.weight_T.detach(), 0.0
        x_alone_TD = states(config.dim).requires_grad_()
        kept_T = torch.zeros(B * S, dtype=torch.bool)
        for row in range(B):
            kept = depth.kept.row_R.view(B, -1)[row][depth.kept.real_R.view(B, -1)[row]]
            kept_T[kept] = True
            alone = MixedBatch(
                **{n: t.flatten(0, 1)[kept][None] for n, t in batch.tensors().items()}
            )
            expected = model.run(x_alone_TD[kept], context(alone, config), weight_T[kept])
            torch.testing.assert_close(out_TD[kept], expected, rtol=0, atol=1e-5)
            total = total + expected.square().sum()
        out_TD = model.depth.run(x_TD, context(batch, config), _Weighed(model))[0]
        found, wanted = (
            torch.autograd.grad(loss, [x, *branch_parameters(model)])
            for loss, x in ((out_TD[kept_T].square().sum(), x_TD), (total, x_alone_TD))
        )
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class _Weighed(torch.nn.Module):
    """A block whose weights have no gradient, as those of the rows alone."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def run(self, x_RD, context, weight_R, scales):
        return self.block.run(x_RD, context, weight_R.detach(), scales)


def branch_parameters(model) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if not name.startswith("depth.")]


@torch.no_grad()
def test_a_document_routed_by_itself_is_the_same_in_any_row():
    for model, config in layers("dense", capacity=0.5, group="document"):
        batch, x_TD = inputs(), states(config.dim)
        out_TD = model(x_TD, context(batch, config, budgets="exact"))
        for row, places in ((0, range(5)), (0, range(5, 9)), (1, range(2, 12))):
            rows = [row * S + place for place in places]
            alone = MixedBatch(
                **{n: t.flatten(0, 1)[rows][None] for n, t in batch.tensors().items()}
            )
            found = model(x_TD[rows], context(alone, config, budgets="exact"))
            torch.testing.assert_close(found, out_TD[rows], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("group", "moves"), [("span", False), ("row", True)])
def test_a_frame_does_not_move_what_others_keep(group, moves):
    options = {"group": group, "competing": (1,), "competing_share": 0.5}
    for model, config in layers("dense", capacity=0.4, **options):
        batch, x_TD = inputs(), states(config.dim)
        whole = context(batch, config, budgets="exact")
        frame = torch.arange(S, S + 4)
        others = (SPANS.flatten() > 0).index_fill(0, frame, False)
        kept = []
        for scale in (1, 30, -30):
            changed = x_TD.clone()
            changed[frame] *= scale
            row_R, real_R = route(model, changed, whole).kept
            kept_T = torch.zeros(B * S, dtype=torch.bool)
            kept_T[row_R[real_R]] = True
            kept.append(kept_T[others])
        assert (not all(torch.equal(kept[0], one) for one in kept)) == moves


@pytest.mark.parametrize("rounding", ["floor", "ceil", "nearest"])
@pytest.mark.parametrize("in_budget", [False, True])
@pytest.mark.parametrize("capacity", [0.1, 0.25, 0.5, 1.0])
def test_keep_is_its_definition(capacity, in_budget, rounding):
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(60, generator=generator).mul(2).round()  # with ties
    group = torch.randint(0, 5, (60,), generator=generator)
    kind = torch.randint(0, 3, (60,), generator=generator)
    options = {"capacity": capacity, "rounding": rounding, "forced_in_budget": in_budget}
    kept = keep(score, group, kind == 0, kind == 1, **options)
    function = {"floor": math.floor, "ceil": math.ceil, "nearest": round}[rounding]
    expected = set() if in_budget else {i for i in range(60) if kind[i] == 1}
    for number in range(5):
        counted = [
            i
            for i in range(60)
            if group[i] == number and kind[i] in ((0, 1) if in_budget else (0,))
        ]
        counted.sort(key=lambda i: (kind[i] != 1, -score[i].item(), i))
        expected |= set(counted[: function(capacity * len(counted))])
    assert set(kept.nonzero().flatten().tolist()) == expected


@torch.no_grad()
def test_saturated_scores_keep_the_highest_and_no_padding():
    options = {"competing": (1,), "competing_share": 1.0, "group": "document"}
    for model, config in layers("dense", Weighting(map="tanh"), capacity=0.5, **options):
        whole = context(inputs(), config, budgets="exact")
        x_TD = states(config.dim)
        score_T = route(model, x_TD, whole).logits_T
        row_R, real_R = route(model, x_TD, whole).kept
        model.depth.router.projection.weight *= 1e4
        scaled = route(model, x_TD, whole)
        assert scaled.weight_T.unique().numel() == 2 and score_T.unique().numel() == B * S
        assert scaled.kept.row_R.tolist() == row_R.tolist()
        assert (DOCUMENTS.flatten()[row_R[real_R]] > 0).all()
