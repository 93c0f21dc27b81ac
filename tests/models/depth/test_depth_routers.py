"""Depth routers: what they learn, what they weigh, and what fits their budgets."""

import math
from dataclasses import replace

import pytest
import torch
from batches import batch_of
from tiny_runs import DEPTHS, SHAPE
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from earlyfuse.configs import decoders, depth, embedded, stages
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.depth.depth_router import DepthRouter
from earlyfuse.models.depth.mixture_of_depths import MixtureOfDepths, Weighting
from earlyfuse.models.depth.selection import Selection, compact
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.running_threshold import RunningThreshold
from earlyfuse.models.upcycle import upcycle
from earlyfuse.parallel.strategies.activation_checkpointing import checkpoint_activations

DENSE = decoders.dense(SHAPE)


def built(config) -> torch.nn.Module:
    config.init_std = 0.2
    model = config.build()
    model.init_states()
    return model


def mixed(images: bool = True) -> MixedBatch:
    tokens_BS = torch.randint(48, (2, 16), generator=torch.Generator().manual_seed(0))
    modality_BS = (tokens_BS >= 24).to(torch.uint8) if images else None
    batch = batch_of(tokens_BS, modality_BS)
    batch.span_BS = (tokens_BS >= 24).int()
    return batch


def gradients(model, batch, **settings) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(batch, ForwardSettings(**settings)).square().mean().backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", DEPTHS)
def test_without_images_every_router_has_a_gradient(name):
    """A missing one would leave a rank out of FSDP's reduction."""
    found = gradients(built(DEPTHS[name]()), mixed(images=False))
    routers = {n: g for n, g in found.items() if "depth" in n}
    assert routers and all(g is not None and g.isfinite().all() for g in routers.values())
    if name in ("p_mod", "videollm_mod"):
        assert all(not g.any() for g in routers.values())


@pytest.mark.parametrize("policy", [FullAC.Config(), SelectiveAC.Config()], ids=["full", "some"])
@pytest.mark.parametrize("name", DEPTHS)
def test_recomputed_blocks_keep_the_same_rows(name, policy):
    model = built(DEPTHS[name]())
    expected = gradients(model, mixed())
    checkpoint_activations(model, policy, "")
    for parameter, grad in gradients(model, mixed()).items():
        assert grad is expected[parameter] is None or grad.equal(expected[parameter]), parameter


@pytest.mark.parametrize(
    "name",
    [
        "mod",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("moma_mod", "gamma_mod", "static")),
    ],
)
def test_a_block_with_a_static_budget_compiles_into_one_graph(name):
    model = built(DEPTHS[name]())
    batch = mixed()
    expected = gradients(model, batch)
    for block in model.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    for parameter, grad in gradients(model, batch).items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[parameter], msg=parameter)


def test_the_predictor_moves_nothing_but_itself():
    predicted = depth.mod(DENSE, 0.5, every=1, start=0, causal="predictor")
    alone = depth.mod(DENSE, 0.5, every=1, start=0, causal=None)
    found, expected = (gradients(built(config).train(), mixed()) for config in (predicted, alone))
    own = {name for name in found if ".causal." in name}
    assert own and all(found[name].any() for name in own)
    for name in found.keys() - own:
        assert found[name].equal(expected[name]), name


def test_a_predictor_is_normalised_by_the_tokens_that_it_decides_about():
    """Competing tokens; forced ones inside the capacity too, as some of them are dropped."""
    router = DepthRouter.Config(inference="predictor", predictor=CausalRouter.Config())
    shares = [
        MixtureOfDepths.Config(
            selection=Selection(capacity=0.5, competing_share=0.25, **kind), router=router
        )
        .build(dim=8)
        .router.causal.share
        for kind in ({"competing": (1,)}, {"forced": (0,)})
    ]
    assert shares == [0.25, 1.0]


def test_bce_teaches_the_score_what_was_kept():
    config = depth.mod(DENSE, 0.25, every=1, start=0, causal="logit")
    model = built(config).train()
    block = model.layers["0"]
    x_TD = torch.randn(32, SHAPE.dim, generator=torch.Generator().manual_seed(1))
    context = _context(config, mixed())
    weight = block.depth.router.projection.weight
    optimizer = torch.optim.SGD([weight], lr=20.0)
    for _ in range(300):
        weight.grad = None
        _, decision = block.depth.run(x_TD, context, block)
        kept_T = torch.zeros(32, dtype=torch.bool).index_fill_(0, decision.kept.row_R, True)
        scores = block.depth.router(x_TD, context)
        carried = block.depth.router.learn(
            scores, decision, torch.ones(len(decision.kept.row_R)), context.settings
        )
        carried.sum().mul(0).backward()
        optimizer.step()
    agreed = (scores.logits_T > 0) == kept_T
    assert agreed.float().mean() > 0.95
    assert kept_T.sum() == 8


def test_a_router_that_layers_share_is_one_and_reads_their_norms():
    model = built(DEPTHS["gamma_mod"]())
    names = [name for name, _ in model.named_parameters() if "depth" in name]
    assert names == ["depth_projection.weight"]
    first, *_ = (layer for layer in model.layers.values())
    x_TD = torch.randn(32, SHAPE.dim)
    context = _context(model.config, mixed(), model.depth_projection())
    scores = first.depth.run(x_TD, context, first)[1].logits_T
    weight = model.depth_projection.weight
    normed = first.first_norm(x_TD, context)
    torch.testing.assert_close(scores, normed @ (weight[1] - weight[0]))


def test_positions_can_count_the_kept_tokens():
    config = depth.mod(DENSE, 0.5, every=1, start=0)
    found = {}
    for positions in ("original", "compacted"):
        model = built(replace(config, layers=[_positions(x, positions) for x in config.layers]))
        block, batch = model.layers["0"], mixed()
        x_TD = torch.randn(32, SHAPE.dim, generator=torch.Generator().manual_seed(1))
        out_TD, decision = block.depth.run(x_TD, _context(config, batch), block)
        row_R = decision.kept.row_R
        if positions == "compacted":
            batch.positions_BS = torch.zeros(32, dtype=torch.int64)
            batch.positions_BS[row_R] = torch.arange(8).repeat(2)
            batch.positions_BS = batch.positions_BS.view(2, 16)
            original = _positions(config.layers[0], "original").build()
            original.load_state_dict(block.state_dict())
            out_again = original.depth.run(x_TD, _context(config, batch), original)[0]
            torch.testing.assert_close(out_TD, out_again)
        found[positions] = out_TD
    assert not torch.allclose(found["original"], found["compacted"], atol=1e-3)


@pytest.mark.parametrize(
    ("forced", "share", "slots"), [((), 0.5, 24), ((0,), 0.5, 16)], ids=["outside", "inside"]
)
def test_forced_tokens_outside_the_capacity_stay_and_those_inside_are_the_first_to(
    forced, share, slots
):
    """A row of text alone: p-MoD keeps all, gamma-MoD what fits its capacity."""
    competing = () if forced else (1,)
    selection = Selection(
        capacity=0.5,
        competing=competing,
        forced=forced,
        competing_share=share,
        budget="static" if forced else "exact",
    )
    block = _routed(selection)
    context = _context(DENSE, mixed(images=False))
    _, decision = block.depth.run(torch.randn(32, SHAPE.dim), context, block)
    kept = int(decision.kept.real_R.sum())
    assert kept == (16 if forced else 32)
    assert len(decision.kept.row_R) == (16 if forced else 32)


def test_what_does_not_fit_a_static_budget_is_dropped_by_score_and_counted():
    block = _routed(
        Selection(capacity=0.5, competing=(1,), group="document", competing_share=0.9)
    ).train()
    batch = mixed()
    x_TD = torch.randn(32, SHAPE.dim, generator=torch.Generator().manual_seed(1))
    context = _context(DENSE, batch, recording=True)
    _, decision = block.depth.run(x_TD, context, block)
    chosen, fitting = int(decision.chosen_T.sum()), int(decision.kept.real_R.sum())
    assert chosen > fitting == len(decision.kept.row_R) == 2 * math.ceil(0.55 * 16)
    lost_T = decision.chosen_T.clone()
    lost_T[decision.kept.row_R] = False
    for row in range(2):
        part = slice(16 * row, 16 * row + 16)
        lost = decision.logits_T[part][lost_T[part] & ~decision.forced_T[part]]
        kept = decision.logits_T[decision.kept.row_R.view(2, -1)[row]]
        routed = kept[~decision.forced_T[decision.kept.row_R.view(2, -1)[row]]]
        assert not len(lost) or not len(routed) or lost.max() <= routed.min()
    dropped = block.depth.router.stats.pop()["dropped"]
    assert dropped == pytest.approx(1 - fitting / chosen)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inference": "predictor"}, "predictor if and only if"),
        ({"bce": -1.0}, r"bce \(-1.0\) must be at least 0"),
        ({"at": 0.5}, "need inference logit"),
        ({"inference": "selection"}, "decoding .* must be all"),
        ({"outputs": 3}, r"outputs \(3\) must be 1 or 2"),
        ({"bias_init": 1.0}, "needs bias"),
    ],
)
def test_routers_that_cannot_work_are_refused_by_field(fields, says):
    with pytest.raises(ValueError, match=says):
        DepthRouter.Config(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"capacity": 0.0}, r"capacity \(0.0\) must be in \(0, 1\]"),
        ({"capacity": 0.5, "competing": (1,), "forced": (0,)}, "forced .* must be"),
        ({"capacity": 0.5, "slack": 0.5}, r"slack \(0.5\) must be at least 1"),
        ({"capacity": 0.5, "group": "frame"}, "group"),
    ],
)
def test_selections_that_cannot_work_are_refused_by_field(fields, says):
    with pytest.raises(ValueError, match=says):
        Selection(**fields)


def test_a_selection_of_rows_cannot_be_the_rule_of_inference():
    router = DepthRouter.Config(inference="selection", decoding="all")
    with pytest.raises(ValueError, match="media"):
        MixtureOfDepths.Config(selection=Selection(capacity=0.5), router=router)


def test_without_a_causal_rule_the_error_says_what_to_train():
    model = built(depth.mod(DENSE, 0.5, causal=None)).eval()
    with pytest.raises(ValueError, match="a predictor, for depth"):
        model(mixed(), ForwardSettings(rule="causal"))


def test_shared_routers_of_two_shapes_are_refused():
    config = DEPTHS["gamma_mod"]()
    router = replace(config.layers[0].depth.router, bias=True)
    config.layers[0].depth = replace(config.layers[0].depth, router=router)
    with pytest.raises(ValueError, match="must be equal in all depth routers that are shared"):
        replace(config)


def test_predictors_need_to_be_used():
    with pytest.raises(ValueError, match="another would not be used"):
        DepthRouter.Config(predictor=CausalRouter.Config(), inference="logit")


def test_forced_tokens_are_the_last_to_lose_their_slot():
    kept_T, forced_T = torch.ones(12, dtype=torch.bool), torch.arange(12) % 3 == 0
    logits_T = torch.where(forced_T, -9.0, torch.arange(12.0))
    kept = compact(kept_T, forced_T, logits_T, rectangles=2, slots=3)
    assert kept.row_R.tolist() == [0, 3, 5, 6, 9, 11] and kept.real_R.all()


def test_a_token_decides_in_a_batch_of_fewer_rows_than_compete():
    """Generation has any number of rows; rows of their own also leave no other row a trace."""
    config = depth.moma_mod(DENSE, 0.5, every=1, routing_rows=4)
    model, batch = built(config).eval(), mixed()
    with torch.no_grad():
        both = model(batch, ForwardSettings(rule="causal"))
        for row in range(2):
            alone = MixedBatch(**{n: t[row : row + 1] for n, t in batch.tensors().items()})
            found = model(alone, ForwardSettings(rule="causal"))[0]
            torch.testing.assert_close(found, both[row])


@pytest.mark.parametrize("group", ["row", "document"])
def test_a_running_threshold_keeps_as_many_as_the_selection(group):
    """Also where groups are smaller than a row."""
    selection = Selection(capacity=0.25, group=group)
    block = _routed(selection, threshold=RunningThreshold.Config(half_life=256)).train()
    threshold = block.depth.router.threshold
    document_BS = torch.arange(32).repeat_interleave(8).expand(4, -1) + 1
    batch = batch_of(torch.zeros(4, 256, dtype=torch.int64), document_BS=document_BS.int())
    counts = []
    for step in range(12):
        x_TD = torch.randn(4 * 256, SHAPE.dim, generator=torch.Generator().manual_seed(step))
        context = _context(DENSE, batch)
        block.depth.run(x_TD, context, block)
        threshold.update(threshold.sums_2E.clone(), 1024, torch.tensor(True))
        ruled = _context(DENSE, batch, rule="threshold")
        counts.append(int(block.depth.run(x_TD, ruled, block)[1].kept.real_R.sum()))
    assert sum(counts[4:]) / (8 * 1024) == pytest.approx(0.25, abs=0.015)


def test_where_thresholds_choose_a_group_keeps_its_floor_and_a_forced_token_its_place():
    chooses = RunningThreshold.Config(half_life=1.0, chooses=True, floor=0.25)
    x_TD = torch.randn(32, SHAPE.dim, generator=torch.Generator().manual_seed(1))
    for selection in (
        Selection(capacity=1 / 8),
        Selection(capacity=0.5, forced=(0,), competing_share=0.5),
    ):
        block = _routed(selection, threshold=chooses).train()
        context = _context(DENSE, mixed())
        first = block.depth.run(x_TD, context, block)[1]
        plain = _routed(selection)
        plain.load_state_dict(block.state_dict(), strict=False)
        expected = plain.depth.run(x_TD, context, plain)[1].chosen_T
        assert first.chosen_T.equal(expected), "without a threshold yet, the selection"
        block.depth.router.threshold.threshold_E.fill_(1e9)
        block.depth.router.threshold.weight_E.fill_(1.0)
        decision = block.depth.run(x_TD, context, block)[1]
        forced_T = decision.forced_T & expected
        assert decision.chosen_T[forced_T].all()
        for row_T in (decision.chosen_T & ~forced_T).view(2, 16):
            assert int(row_T.sum()) <= 1
        assert decision.chosen_T.view(2, 16).any(1).all()


def test_reading_norms_needs_norms_before_branches():
    swin = depth.gamma_mod(decoders.dense(replace(SHAPE, norm_order="pre")), (0,), media_share=0.3)
    with pytest.raises(ValueError, match=r"norm_order \('swin'\) must be \"pre\""):
        replace(swin.layers[0], norm_order="swin")


def test_a_second_stage_adds_predictors_or_thresholds_and_nothing_else():
    config = depth.mod(DENSE, 0.5, every=1, start=0, causal=None)
    run = replace(embedded.dense(), dump_folder="unused")
    run.model_spec = replace(run.model_spec, model=config)
    staged = stages.causal_routers_only(run, "parent").model_spec.model
    inference = {layer.depth.router.inference for layer in staged.layers}
    assert inference == {"predictor"} and config.layers[0].depth.router.inference is None
    new = {name for name, origin in upcycle(config, staged).items() if origin is None}
    assert new == {n for n, _ in staged.build().named_parameters() if ".causal." in n} != set()
    measured = stages.thresholds_only(run, "parent").model_spec.model
    assert all(layer.depth.router.threshold is not None for layer in measured.layers)


class Linear(torch.nn.Module):
    """x + w (x A), for a weight w of each token: a block of numbers from elsewhere."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = matrix

    def run(self, x_TD, context, weight_T=None, scales="block"):
        out_TD = x_TD @ self.matrix
        return x_TD + (out_TD if weight_T is None else weight_T[:, None] * out_TD)


def test_a_layer_is_driven_alone_with_any_block():
    """By hand: z = x · w, the best half of the row, x + z · x A."""
    config = MixtureOfDepths.Config(
        selection=Selection(capacity=0.5), weighting=Weighting(map="identity")
    )
    layer = config.build(dim=2)
    layer.router.projection.load_state_dict({"weight": torch.tensor([[1.0, 0.0]])})
    x_TD = torch.tensor([[3.0, 1], [1, 1], [2, 1], [-1, 1], [5, 1], [0, 1]])
    batch = MixedBatch.of(torch.zeros(1, 6, dtype=torch.int64))
    context = ForwardContext.build(batch, modalities=(0, 1), head_dim=0, rope_theta=1e4)
    matrix = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    out_TD, decision = layer.run(x_TD, context, Linear(matrix))
    assert decision.kept.row_R.tolist() == [0, 2, 4]
    assert out_TD.tolist() == [[9, 10], [1, 1], [6, 5], [-1, 1], [15, 26], [0, 1]]


def _routed(selection: Selection, **router) -> torch.nn.Module:
    block = replace(
        DENSE.layers[0],
        depth=MixtureOfDepths.Config(
            selection=selection,
            weighting=Weighting(map="tanh"),
            router=DepthRouter.Config(**router),
        ),
    )
    return built(replace(DENSE, layers=[block])).layers["0"]


def _positions(layer, positions: str):
    return replace(layer, depth=replace(layer.depth, positions=positions))


def _context(config, batch, weights=None, **settings) -> ForwardContext:
    return ForwardContext.build(
        batch,
        ForwardSettings(**settings),
        modalities=config.modalities,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        depth_weights=weights,
    )
