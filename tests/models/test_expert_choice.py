"""Expert choice: routes against their definition, budgets against each other, layers against an
oracle.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from batches import MIXES, assert_same_function, context_of, modality_of
from tiny_runs import SHAPE, SHARES

from earlyfuse.configs import decoders
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.routing.expert_choice import expert_choice, static_budget
from earlyfuse.models.vocabulary import Modality

T, E, N = 24, 3, 2  # tokens, experts, routing groups


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed))


def by_hand(logits, eligible, groups, counts):
    """Sets of tokens per expert: top counts[n] eligible tokens of each routing group, by
    definition.
    """
    length = T // groups
    taken = [set() for _ in range(E)]
    for n in range(groups):
        tokens = [t for t in range(n * length, (n + 1) * length) if eligible is None or eligible[t]]
        for e in range(E):
            best = sorted(tokens, key=lambda t: (-logits[t, e].item(), t))
            taken[e] |= set(best[: counts[n]])
    return taken


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("rule", ["static", "exact"])
def test_routes_are_the_top_tokens_of_each_routing_group(restricted, rule):
    logits = scores()
    eligible = torch.arange(T) % 3 != 0 if restricted else None
    per_group = 8 if restricted else 12
    budget = 2 if rule == "static" else None
    routes = expert_choice(logits, eligible, N, budget=budget, capacity_factor=1.0)
    counts = [2 if rule == "static" else round(per_group / E)] * N
    expected = by_hand(logits, eligible, N, counts)
    for e in range(E):
        rows = routes.row_R[routes.offset_G1[e] : routes.offset_G1[e + 1]].tolist()
        assert set(rows) == expected[e] and len(rows) == sum(counts)
    expert = torch.repeat_interleave(torch.arange(E), routes.offset_G1.diff())
    torch.testing.assert_close(routes.weight_R, logits[routes.row_R, expert].sigmoid())


def test_ties_go_to_the_lower_index():
    logits = torch.zeros(T, E)
    routes = expert_choice(logits, None, 1, budget=5, capacity_factor=1.0)
    assert routes.row_R.view(E, 5).sort().values.tolist() == [[0, 1, 2, 3, 4]] * E


def test_rows_without_an_eligible_token_weigh_nothing():
    eligible = torch.zeros(T, dtype=torch.bool)
    eligible[[1, 5, 20]] = True
    routes = expert_choice(scores(), eligible, N, budget=4, capacity_factor=1.0)
    weights = routes.weight_R.view(E, N, 4)
    assert ((weights > 0).sum(-1) == torch.tensor([2, 1])).all()
    assert set(routes.row_R[routes.weight_R > 0].tolist()) == {1, 5, 20}


@pytest.mark.parametrize("counts", [(6, 6), (3, 9), (12, 0)])
def test_static_budgets_equal_the_exact_rule_when_counts_agree(counts):
    """Same count in the static budget and in each group: same function. Unequal counts: not."""
    eligible = torch.cat([torch.arange(T // N) < count for count in counts])
    static = expert_choice(scores(), eligible, N, budget=2, capacity_factor=1.0)
    exact = expert_choice(scores(), eligible, N, budget=None, capacity_factor=1.0)
    chosen = []
    for row, offset, weight in (static, exact):
        expert = torch.repeat_interleave(torch.arange(E), offset.diff())
        chosen.append(set(zip(expert[weight > 0].tolist(), row[weight > 0].tolist(), strict=True)))
    assert (chosen[0] == chosen[1]) == (counts == (6, 6))


def test_a_static_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="each of 64 experts would take 0 of the 24 tokens"):
        static_budget(0.5, 1.0, T, 64)
    with pytest.raises(ValueError, match="between 1 and 24"):
        static_budget(1.0, 8.0, T, 4)
    assert static_budget(0.5, 1.0, T, 4) == 3


def layer(budget: str = "static"):
    torch.manual_seed(0)
    experts = {Modality.TEXT: 2, Modality.IMAGE: 3}
    config = decoders.moma(SHAPE, experts, SHARES, routing_rows=1)
    config = decoders.with_routers(config, budget=budget)
    module = config.layers[0].feed_forward.build()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def layout(modality_BS: torch.Tensor, **settings) -> ForwardContext:
    positions_BS = torch.arange(T // N).expand(N, -1)
    return context_of(modality_BS, positions_BS, head_dim=8, settings=ForwardSettings(**settings))


def masked_dense(module, x_TD, modality_T):
    """The same layer without any routing: every expert computes every token, then masks choose."""
    out = torch.zeros_like(x_TD)
    for m, pool in enumerate(module.pools):
        logits = x_TD @ pool.router.weight.T
        w1, w3, w2 = pool.experts.w1, pool.experts.w3, pool.experts.w2
        eligible = modality_T == m
        length = T // pool.router.config.routing_rows // N
        for n in range(N):
            inside = (torch.arange(T) // length) == n
            candidates = torch.where((eligible & inside)[:, None], logits, -torch.inf)
            k = static_budget(pool.config.share, 1.0, length, len(logits.T))
            if pool.router.config.budget == "exact":
                k = round(int((eligible & inside).sum()) / len(logits.T))
            for e in range(len(logits.T)):
                best = candidates[:, e].topk(k).indices
                mask = torch.zeros(T).index_fill(0, best, 1.0) * (eligible & inside)
                expert = F.linear(F.silu(F.linear(x_TD, w1[e])) * F.linear(x_TD, w3[e]), w2[e])
                out = out + (mask * logits[:, e].sigmoid())[:, None] * expert
    return out


@pytest.mark.parametrize("budget", ["static", "exact"])
@pytest.mark.parametrize("mix", MIXES)
def test_routed_layer_equals_the_masked_dense_oracle(budget, mix):
    module, modality = layer(budget), modality_of(mix, T)
    x = torch.randn(T, SHAPE.dim, generator=torch.Generator().manual_seed(1))
    oracle = partial(masked_dense, module, modality_T=modality)
    assert_same_function(module, layout(modality.view(N, -1)), oracle, x)


def test_routing_does_not_depend_on_which_rows_share_a_micro_batch():
    module = layer()
    x = torch.randn(T, SHAPE.dim, generator=torch.Generator().manual_seed(2))
    modality = (torch.arange(T) % 3 == 0).to(torch.uint8).view(N, -1)
    together = module(x, layout(modality))
    apart = [
        module(
            x[n * T // N : (n + 1) * T // N],
            context_of(modality[n : n + 1], torch.arange(T // N)[None], (0, 1), 8, 1e4),
        )
        for n in range(N)
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=2e-5)


def test_a_batch_that_does_not_hold_whole_routing_groups_is_refused():
    module = layer()
    module.pools[0].router.config.routing_rows = 4
    with pytest.raises(ValueError, match=r"batch of 2 rows.*routing_rows \(4\)"):
        module(torch.randn(T, SHAPE.dim), layout(torch.zeros(N, T // N, dtype=torch.uint8)))


def test_statistics_count_what_the_routers_did():
    module = layer()
    stats = module.pools[1].router.stats
    modality = torch.zeros(T, dtype=torch.uint8)
    # group 0 has two image tokens, group 1 none; each of 3 experts takes one per group
    modality[:2] = 1
    module(torch.randn(T, SHAPE.dim), layout(modality.view(N, -1), recording=True))
    summary = stats.pop()
    assert summary["filled"] == pytest.approx(3 / 6)
    assert summary["load_max"] == pytest.approx(3 / 2)
    assert 0.5 <= summary["reached"] <= 1
    assert 0 < summary["weight"] < 1
    assert stats.pop()["filled"] == 0, "pop counts from 0 again"


def test_a_pool_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"experts \(0\).*must be positive"):
        ExpertPool.Config(name="text", dim=4, hidden_dim=4, experts=0)
