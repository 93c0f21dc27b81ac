"""Running thresholds: they follow the k-th score, choose without looking ahead, fill budgets in
expectation, and starve nobody.
"""

import pytest
import torch
from batches import batch_of, context_of
from tiny_runs import MODELS, SHAPE, THRESHOLDS, moma, token_choice
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.distributed.activation_checkpoint import FullAC

from earlyfuse.configs import decoders
from earlyfuse.models.blocks.branch import Microbatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.flops import forward_flops
from earlyfuse.models.routes import group_of_rows
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.routing.router import causal_rules, check_causal, inference_rule
from earlyfuse.models.routing.running_threshold import RunningThreshold, running_thresholds
from earlyfuse.parallel.strategies.activation_checkpointing import checkpoint_activations

THRESHOLD = ForwardSettings(rule="threshold")
TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)
E, N, L = 4, 2, 256  # experts, routing groups, tokens of a group
K = L // E


def router(capacity_factor: float = 1.0, **fields) -> ExpertChoice:
    threshold = RunningThreshold.Config(**{"half_life": 2048.0} | fields)
    config = ExpertChoice.Config(threshold=threshold, capacity_factor=capacity_factor)
    module = config.build(dim=8, experts=E, share=1.0)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module


def context(groups: int = N, **settings):
    modality_BS = torch.zeros(groups, L, dtype=torch.uint8)
    settings = ForwardSettings(**settings)
    return context_of(modality_BS, torch.arange(L).expand(groups, -1), settings=settings)


def step(module: ExpertChoice, x_TD: torch.Tensor, taken=TAKEN, **settings):
    """A training step; returns the routes."""
    routes = module(x_TD, None, context(len(x_TD) // L, **settings))
    module.threshold.update(module.threshold.sums_2E, len(x_TD), taken)
    return routes


def tokens(generator: torch.Generator, groups: int = N) -> torch.Tensor:
    return torch.randn(groups * L, 8, generator=generator)


def rows_of(routes) -> list[set[int]]:
    """Tokens of each expert whose row weighs anything."""
    expert_R = group_of_rows(routes.offset_G1, len(routes.row_R))
    pairs = zip(expert_R.tolist(), routes.row_R.tolist(), routes.weight_R.tolist(), strict=True)
    taken: list[set[int]] = [set() for _ in range(E)]
    for expert, row, weight in pairs:
        if weight:
            taken[expert].add(row)
    return taken


# ---------------------------------------------------------------- what a threshold follows


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0])
def test_thresholds_converge_to_the_quantile_of_known_scores(capacity_factor):
    module, generator = router(capacity_factor, half_life=1e5), torch.Generator().manual_seed(1)
    for _ in range(8):
        step(module, tokens(generator, groups=64))
    # a logit is normal, with the norm of its router's row as standard deviation
    normal = torch.distributions.Normal(0.0, module.weight.detach().norm(dim=1))
    above_E = 1 - normal.cdf(module.threshold())
    torch.testing.assert_close(above_E, torch.full((E,), capacity_factor / E), rtol=0.02, atol=0)


def test_the_first_step_counts_whole_and_a_shift_is_half_followed_after_the_half_life():
    module = RunningThreshold.Config(half_life=8 * 100.0).build(experts=2)
    assert module().tolist() == [torch.inf] * 2, "no threshold: an expert takes nothing"

    def steps(count: int, score: float) -> None:
        for _ in range(count):
            module.follow(torch.full((2, 3, 4), score), budget=4)
            module.update(module.sums_2E, 100, TAKEN)

    steps(1, 5.0)
    assert module().tolist() == [5.0] * 2
    steps(200, 1.0)
    steps(8, 3.0)
    torch.testing.assert_close(module(), torch.full((2,), 2.0), rtol=0, atol=1e-4)


def test_the_sample_of_a_group_is_its_kth_score_or_its_last_token():
    module = RunningThreshold.Config(chooses=True).build(experts=1)
    scores = torch.tensor([[[5.0, 4.0, 3.0, 2.0], [9.0, -torch.inf, -torch.inf, -torch.inf]]])
    module.follow(scores, budget=2)
    empty = torch.full((1, 1, 4), -torch.inf)
    module.follow(empty, budget=2)
    assert module.sums_2E.flatten().tolist() == [4.0 + 9.0, 2.0]


@pytest.mark.parametrize("scale", [3.0, torch.nan])
def test_a_skipped_step_moves_nothing_whatever_its_scores(scale):
    module, generator = router(), torch.Generator().manual_seed(1)
    step(module, tokens(generator))
    before = module.threshold.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    step(module, tokens(generator) * scale, SKIPPED)
    assert all(before[name].equal(value) for name, value in module.threshold.state_dict().items())
    assert not module.threshold.sums_2E.any(), "the next step counts from 0"
    assert before.keys() == {"threshold_E", "weight_E"}


def test_sums_count_training_alone_and_micro_batches_add_up_to_the_step():
    module, generator = router(), torch.Generator().manual_seed(1)
    x_TD = tokens(generator)
    module.eval()(x_TD, None, context())
    assert not module.threshold.sums_2E.any()
    module.train()(x_TD, None, context())
    whole = module.threshold.sums_2E.clone()
    module.threshold.sums_2E.zero_()
    for half in x_TD.chunk(N):
        alone = context_of(torch.zeros(1, L, dtype=torch.uint8), torch.arange(L)[None])
        module(half, None, alone)
    torch.testing.assert_close(module.threshold.sums_2E, whole)


# ---------------------------------------------------------------- training by thresholds


def test_training_takes_what_is_above_within_slots_and_floor():
    """Against the definition, with the thresholds of the step before."""
    module, generator = router(chooses=True, slack=1.5, floor=0.5), torch.Generator().manual_seed(2)
    step(module, tokens(generator))
    theta_E = module.threshold().clone()
    theta_E[0], theta_E[1] = -99.0, 99.0  # expert 0 overflows, expert 1 would starve
    module.threshold.threshold_E.copy_(theta_E)
    x_TD = tokens(generator)
    logits_TE = (x_TD @ module.weight.T).detach()
    expected: list[set[int]] = [set() for _ in range(E)]
    for n in range(N):
        for e in range(E):
            inside = sorted(range(n * L, (n + 1) * L), key=lambda t: -logits_TE[t, e].item())
            above = sum(logits_TE[t, e] > theta_E[e] for t in inside)
            expected[e] |= set(inside[: min(max(int(above), K // 2), 3 * K // 2)])
    assert [len(taken) for taken in expected[:2]] == [3 * K, K]
    routes = step(module, x_TD)
    assert rows_of(routes) == expected
    assert len(routes.row_R) == E * N * 3 * K // 2, "shapes are static"
    assert module.threshold()[0] > -99.0 and module.threshold()[1] < 99.0


def test_the_first_step_takes_the_top_k():
    x_TD = tokens(torch.Generator().manual_seed(1))
    module = router(chooses=True)
    assert rows_of(module(x_TD, None, context())) == rows_of(router()(x_TD, None, context()))


@pytest.mark.parametrize("rule", ["training", "inference"])
def test_capacity_used_over_a_long_run_is_k(rule):
    module, generator = router(chooses=True, half_life=2e4), torch.Generator().manual_seed(3)
    taken, steps, groups = 0, 40, 8
    for number in range(-10, steps):
        x_TD = tokens(generator, groups)
        routes = step(module, x_TD)
        if rule == "inference":
            with torch.no_grad():
                routes = module(x_TD, None, context(groups, rule="threshold"))
        taken += (number >= 0) * int((routes.weight_R > 0).sum())
    assert taken / steps == pytest.approx(groups * L, rel=0.02)


def test_an_expert_whose_threshold_is_above_all_scores_gets_tokens_and_recovers():
    module, generator = router(chooses=True, floor=0.0), torch.Generator().manual_seed(4)
    step(module, tokens(generator))
    module.threshold.threshold_E[2] = 100.0
    routes = module(tokens(generator), None, context())
    assert len(rows_of(routes)[2]) == N, "its best one of each group"
    (gradient,) = torch.autograd.grad(routes.weight_R.sum(), module.weight)
    assert gradient[2].any()
    for _ in range(60):
        routes = step(module, tokens(generator))
    assert len(rows_of(routes)[2]) > N * K / 2


def test_statistics_tell_real_rows_overflow_floor_and_agreement():
    module, generator = router(chooses=True), torch.Generator().manual_seed(2)
    module(tokens(generator), None, context(recording=True))
    assert module.threshold.stats.pop() == {}, "there is no threshold yet"
    module.stats.pop()
    step(module, tokens(generator))
    module.threshold.threshold_E.copy_(torch.tensor([-99.0, 99.0, -99.0, 99.0]))
    module(tokens(generator), None, context(recording=True))
    found, routing = module.threshold.stats.pop(), module.stats.pop()
    slots, floor = 3 * K // 2, K // 4
    assert found["overflow"] == pytest.approx(1 - slots / L)
    assert found["floor"] == pytest.approx(floor / (slots + floor))
    assert found["used"] == pytest.approx((slots + floor) / (2 * K))
    assert (found["precision"], found["recall"]) == pytest.approx((K / L, 0.5))
    assert found["taken"] == pytest.approx(0.5)
    assert routing["filled"] == pytest.approx((slots + floor) / (2 * slots))
    assert (routing["load_min"], routing["load_max"]) == pytest.approx((floor / K, slots / K))
    module.threshold.weight_E[3] = 0.0  # an expert without a threshold does not count
    module(tokens(generator), None, context(recording=True))
    found = module.threshold.stats.pop()
    assert (found["recall"], found["taken"]) == pytest.approx((2 / 3, 2 / 3))
    assert found["used"] == pytest.approx((2 * slots + floor) / (3 * K))


def test_in_training_nothing_of_a_threshold_reads_a_value_on_the_host():
    module = router(chooses=True).to("meta")
    inputs = context(recording=True)
    x_TD = torch.randn(N * L, 8, device="meta", requires_grad=True)
    eligible_T = torch.ones(N * L, dtype=torch.bool, device="meta")
    module(x_TD, eligible_T, inputs).weight_R.sum().backward()
    module.threshold.update(module.threshold.sums_2E, 1, torch.ones((), device="meta").bool())
    assert module.weight.grad is not None


# ---------------------------------------------------------------- models


def model(name: str = "moma_threshold", std: float = 0.3) -> torch.nn.Module:
    """With thresholds that about half of all tokens are above, and weights that matter."""
    built = THRESHOLDS[name]().build()
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    for buffer in built.buffers():
        buffer.zero_()
    for number, (_, threshold) in enumerate(running_thresholds(built)):
        threshold.threshold_E.fill_(0.1 * number)
        threshold.weight_E.fill_(1.0)
    return built


def batch(first: int = 0):
    """Two rows; with ``first``, other tokens from there on and in all of the second row."""
    tokens_BS = torch.randint(SHAPE.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    if first:
        tokens_BS[0, first:] = (tokens_BS[0, first:] + 7) % SHAPE.vocab_size
        tokens_BS[1] = (tokens_BS[1] + 11) % SHAPE.vocab_size
    return batch_of(tokens_BS, (tokens_BS >= 32).to(torch.uint8))


@torch.no_grad()
def test_under_thresholds_later_tokens_and_other_rows_move_nothing():
    built, inputs = model().eval(), (batch(), batch(8))
    by_batch, other = (built(each)[0, :8] for each in inputs)
    assert not torch.allclose(by_batch, other, atol=1e-3), "batch routing does look ahead"
    before, after = (built(each, THRESHOLD)[0, :8] for each in inputs)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    for _, threshold in running_thresholds(built):
        threshold.threshold_E.fill_(torch.inf)
    assert not torch.allclose(built(inputs[0], THRESHOLD)[0, :8], before, atol=1e-3)


def test_recomputed_blocks_choose_alike_and_leave_the_mean():
    plain, recomputed = model(), model()
    checkpoint_activations(recomputed, FullAC.Config(), "")
    for built in (plain, recomputed):
        built(batch(), ForwardSettings(step=1)).square().sum().backward()
    for expected, found in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    pairs = zip(running_thresholds(plain), running_thresholds(recomputed), strict=True)
    for (_, once), (_, twice) in pairs:
        assert twice.sums_2E.equal(2 * once.sums_2E) and once.sums_2E.any()
        for threshold in (once, twice):
            threshold.update(threshold.sums_2E, 32, TAKEN)
        torch.testing.assert_close(twice(), once(), rtol=1e-6, atol=0)


def test_flops_are_those_of_rows_in_expectation_and_estimates_those_of_slots():
    plain = decoders.moe(SHAPE, experts=4, routing_rows=2)
    threshold = RunningThreshold.Config(chooses=True, slack=1.5)
    config = decoders.with_routers(plain, threshold=threshold)
    built, (rows, seq_len) = config.build(), (32, 64)
    built.init_states()
    generator = torch.Generator().manual_seed(0)

    def counted(training: bool, **settings) -> float:
        inputs = batch_of(torch.randint(SHAPE.vocab_size, (rows, seq_len), generator=generator))
        built.train(training)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            built(inputs, ForwardSettings(**settings))
        return counter.get_total_flops()

    pools = [layer.feed_forward.pools[0] for layer in config.layers]
    experts = sum(2 * pool.expert_parameters * rows * seq_len for pool in pools)
    top_k = counted(training=False)
    # the first step takes the top k, in slots that are there all the same
    assert counted(training=True) - top_k == pytest.approx(0.5 * experts)
    routed = {pool.routed_rows(Microbatch(rows, seq_len)) for pool in pools}
    assert routed == {rows * seq_len * 3 // 2}
    for _, found in running_thresholds(built):
        found.update(found.sums_2E, rows * seq_len, TAKEN)
    by_threshold = counted(training=False, rule="threshold")
    assert by_threshold - top_k == pytest.approx(0, abs=0.02 * experts)
    assert forward_flops(config, seq_len) == forward_flops(plain, seq_len)


# ---------------------------------------------------------------- the contract


def test_the_rules_of_a_model_are_those_that_all_its_routers_have():
    both = ["causal", "threshold"]
    rules = {
        "dense": (decoders.dense(SHAPE), both),
        "token choice": (token_choice(), both),
        "without": (moma(), []),
        "causal": (MODELS["moma_causal"](), ["causal"]),
        "threshold": (THRESHOLDS["moma_threshold"](), ["threshold"]),
        "both": (THRESHOLDS["moma_both"](), both),
    }
    assert {name: causal_rules(config.build()) for name, (config, _) in rules.items()} == {
        name: expected for name, (_, expected) in rules.items()
    }
    assert check_causal(model("moma_both")) == "causal"
    assert inference_rule(model("moma_both"), "threshold") == "threshold"
    assert inference_rule(model("moma_threshold")) == "threshold"


def test_a_rule_that_a_model_lacks_is_refused_with_what_to_train():
    at = r"layers\.0\.feed_forward\.pools\.0\.router cannot route"
    with pytest.raises(ValueError, match=f"{at} by the causal rule.*--train-only causal_routers"):
        check_causal(model("moma_threshold"), "causal")
    with pytest.raises(ValueError, match=f"{at} by thresholds.*thresholds_only"):
        check_causal(MODELS["moma_causal"]().build(), "threshold")
    with pytest.raises(ValueError, match=f"{at} causally.*causal_routers.*thresholds_only"):
        check_causal(moma().build())
    with pytest.raises(ValueError, match=r"rule \('batch'\) must be one of causal, threshold"):
        check_causal(model("moma_threshold"), "batch")
    mixed = THRESHOLDS["moma_threshold"]()
    mixed.layers[1] = MODELS["moma_causal"]().layers[1]
    with pytest.raises(ValueError, match=f"{at} by the causal rule"):
        check_causal(mixed.build())
    with pytest.raises(ValueError, match="has none; measure running thresholds"):
        moma().build()(batch(), THRESHOLD)


def test_thresholds_that_no_step_measured_are_refused():
    fresh = THRESHOLDS["moma_threshold"]().build()
    fresh.init_states()
    assert check_causal(fresh) == "threshold"
    with pytest.raises(ValueError, match="not measured: no training step"):
        inference_rule(fresh)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"half_life": 0.0}, r"half_life \(0.0\) must be positive"),
        ({"slack": 0.9}, r"slack \(0.9\) must be at least 1"),
        ({"floor": 1.5}, r"floor \(1.5\) must be in \[0, 1\]"),
    ],
)
def test_impossible_thresholds_are_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        RunningThreshold.Config(**fields)


def test_thresholds_that_contradict_their_router_are_refused():
    with pytest.raises(ValueError, match=r"budget \('exact'\) must be \"static\""):
        ExpertChoice.Config(threshold=RunningThreshold.Config(), budget="exact")
    causal = MODELS["moma_causal"]()
    with pytest.raises(ValueError, match="causal must be None where thresholds choose"):
        decoders.with_routers(causal, threshold=RunningThreshold.Config(chooses=True))
