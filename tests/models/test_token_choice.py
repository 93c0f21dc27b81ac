"""Token choice and shared experts: routes by definition, layers against an oracle, biases that
even out the load.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from batches import MIXES, assert_same_function, context_of, modality_of
from tiny_runs import SHAPE, metrics, moma, run, tiny_config, token_choice

from earlyfuse.configs import decoders
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.flops import count_parameters, forward_flops
from earlyfuse.models.routing.token_choice import TokenChoice
from earlyfuse.models.vocabulary import Modality

B, S = 2, 12
T = B * S
TEXT, IMAGE = Modality.TEXT, Modality.IMAGE
TAKEN = torch.tensor(True)


MODALITY = modality_of("balanced", T)
SERVES = (0, 1, 0, 0, 1, 0)


def layout_of(modality: torch.Tensor = MODALITY, **settings) -> ForwardContext:
    positions_BS = torch.arange(S).expand(B, S)
    settings = ForwardSettings(**settings)
    return context_of(modality.view(B, S), positions_BS, head_dim=8, settings=settings)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(T, SHAPE.dim, generator=torch.Generator().manual_seed(seed))


def router(experts: int = 6, **fields) -> TokenChoice:
    module = TokenChoice.Config(**fields).build(dim=SHAPE.dim, experts=experts, share=1.0)
    torch.nn.init.normal_(module.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return module


def layer(**fields) -> MixtureOfExperts:
    module = token_choice(**fields).layers[0].feed_forward.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def weights_TE(routes) -> torch.Tensor:
    experts = len(routes.offset_G1) - 1
    expert_R = torch.repeat_interleave(torch.arange(experts), routes.offset_G1.diff())
    return torch.zeros(T, experts).index_put((routes.row_R, expert_R), routes.weight_R)


def chosen(routes) -> list[list[int]]:
    """Experts of each token, in order."""
    return [row.nonzero().flatten().tolist() for row in weights_TE(routes)]


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize("serves", [(), SERVES])
@pytest.mark.parametrize("top_k", [1, 2])
def test_each_token_takes_the_best_experts_that_serve_it(serves, top_k):
    module, x = router(serves=serves, top_k=top_k), tokens()
    routes = module(x, None, layout_of())
    logits = x @ module.weight.T
    for token, experts in enumerate(chosen(routes)):
        candidates = [e for e in range(6) if not serves or serves[e] == MODALITY[token]]
        best = sorted(candidates, key=lambda e: (-logits[token, e].item(), e))[:top_k]
        assert experts == sorted(best)
    torch.testing.assert_close(weights_TE(routes), logits.sigmoid() * (weights_TE(routes) > 0))


def test_ties_go_to_the_lower_index():
    module = router(serves=(1, 0, 0, 1, 0, 1), top_k=2)
    torch.nn.init.zeros_(module.weight)
    taken = chosen(module(tokens(), None, layout_of()))
    assert taken == [[0, 3] if m else [1, 2] for m in MODALITY.tolist()]


def test_the_bias_decides_who_is_chosen_but_not_the_weight():
    module, x = router(), tokens()
    module.bias_E.copy_(torch.tensor([0.0, 0, 9, 0, 0, 0]))
    routes = module(x, None, layout_of())
    assert chosen(routes) == [[2]] * T
    torch.testing.assert_close(routes.weight_R, (x @ module.weight[2]).sigmoid())


@pytest.mark.parametrize("scale", [1.0, 4.9])
def test_normalised_weights_of_a_token_sum_to_the_scale(scale):
    routes = router(top_k=3, normalise=True, scale=scale)(tokens(), None, layout_of())
    torch.testing.assert_close(weights_TE(routes).sum(1), torch.full((T,), scale))


def test_routing_reads_no_value_on_the_host():
    # tensors of the meta device have no values: whoever asks for one fails
    module = router(serves=SERVES, top_k=2).to("meta")
    layout = layout_of(recording=True)
    layout.group_T = layout.group_T.to("meta")
    routes = module(tokens().to("meta").requires_grad_(), None, layout)
    routes.weight_R.sum().backward()
    assert routes.row_R.shape == (2 * T,), "no row for nothing"
    module.balance(module.load_E, torch.ones((), dtype=torch.bool, device="meta"))


# ---------------------------------------------------------------- layers


def masked_dense(module, x_TD, modality_T):
    """The same layer without any routing: every expert computes every token, then masks choose."""

    def swiglu(w1, w3, w2):
        return F.linear(F.silu(F.linear(x_TD, w1)) * F.linear(x_TD, w3), w2)

    (pool,), config = module.pools, module.pools[0].router.config
    out = sum(swiglu(shared.w1, shared.w3, shared.w2) for shared in module.shared)
    logits = x_TD @ pool.router.weight.T
    mask = torch.zeros_like(logits)
    for token in range(T):
        allowed = [e for e, group in enumerate(config.serves) if group == modality_T[token]]
        best = sorted(allowed, key=lambda e: -logits[token, e].item())[: config.top_k]
        mask[token, best] = 1.0
    weight = logits.sigmoid() * mask
    if config.normalise:
        weight = weight / weight.sum(1, keepdim=True)
    experts = zip(pool.experts.w1, pool.experts.w3, pool.experts.w2, strict=True)
    for e, matrices in enumerate(experts):
        out = out + config.scale * weight[:, e : e + 1] * swiglu(*matrices)
    return out


@pytest.mark.parametrize("fields", [{}, {"top_k": 1, "normalise": False}])
@pytest.mark.parametrize("mix", MIXES)
def test_routed_layer_equals_the_masked_dense_oracle(fields, mix):
    """With experts that nobody chooses, and batches without a modality, gradients included."""
    module, modality = layer(**fields), modality_of(mix, T)
    oracle = partial(masked_dense, module, modality_T=modality)
    assert_same_function(module, layout_of(modality), oracle, tokens())


def test_shared_experts_are_added_to_what_the_pools_give():
    config = moma(shared=decoders.Shared(everyone=1, by_modality=2)).layers[0].feed_forward
    assert [(s.hidden_dim, s.groups) for s in config.shared] == [(12, 1), (24, 2)]
    module, x, context = config.build(), tokens(), layout_of()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    together = module(x, context)
    alone = replace(config, shared=[]).build()
    alone.load_state_dict(module.state_dict(), strict=False)
    everyone, own = module.shared
    expected = alone(x, context) + everyone(x, context)
    for group in (0, 1):
        one = FeedForward.Config(dim=SHAPE.dim, hidden_dim=24).build()
        one.load_state_dict({name: p[group] for name, p in own.state_dict().items()})
        expected += one(x, context) * (group == MODALITY)[:, None]
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


SHARED = [decoders.Shared(), decoders.Shared(1, 0), decoders.Shared(0, 2), decoders.Shared(1, 1)]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("kind", ["moe", "moma", "token choice"])
def test_shared_experts_leave_the_flops_of_a_token_as_they_are(kind, shared):
    shape, experts = replace(SHAPE, hidden_dim=120), {TEXT: 4, IMAGE: 4}
    if kind == "moe":
        config = decoders.moe(shape, 8, shared=shared)
    elif kind == "moma":
        config = decoders.moma(shape, experts, {TEXT: 0.7, IMAGE: 0.3}, shared=shared)
    else:
        router = TokenChoice.Config(top_k=2)
        config = decoders.token_choice(shape, experts, shared=shared, router=router)
    dense, layers = decoders.dense(shape), shape.dim * shape.layers
    expected = [flops + 2 * 8 * layers for flops in forward_flops(dense, 64)]
    assert forward_flops(config, 64) == pytest.approx(expected)
    served = 4 if kind == "moma" else 8
    expected = [active + served * layers for active in count_parameters(dense).active]
    assert list(count_parameters(config).active) == expected


# ---------------------------------------------------------------- balance


def test_biases_move_against_the_load_of_their_modality():
    module = router(serves=SERVES, bias_rate=0.5)
    module.balance(torch.tensor([1, 10, 5, 4, 30, 2]), TAKEN)  # means: 3 for text, 20 for image
    assert module.bias_E.tolist() == [0.5, 0.5, -0.5, -0.5, -0.5, 0.5]
    module.balance(torch.tensor([0, 7, 0, 0, 7, 0]), TAKEN)
    assert module.bias_E.tolist() == [0.5, 0.5, -0.5, -0.5, -0.5, 0.5], "even load moves nothing"


def test_balancing_evens_out_the_load():
    module, layout = router(bias_rate=0.01), layout_of()
    x = tokens() + 1.0  # a common direction, along which one expert is ahead

    def loads() -> torch.Tensor:
        return module(x, None, layout).offset_G1.diff()

    before = loads()
    for _ in range(400):
        module.balance(loads(), TAKEN)
    assert before.max() > 2 * T / 6 and loads().max() <= T / 6 + 2 and loads().min() >= T / 6 - 2


def test_only_training_counts_the_load():
    module, layout = router(top_k=2), layout_of()
    module(tokens(), None, layout)
    assert module.load_E.sum() == 2 * T
    module.eval()(tokens(), None, layout)
    assert module.load_E.sum() == 2 * T
    assert "load_E" not in module.state_dict() and "bias_E" in module.state_dict()


def test_a_skipped_step_moves_no_bias_and_its_load_is_discarded(tmp_path, data):
    def buffers(trainer, leaf):
        return torch.cat([b for n, b in trainer.model.named_buffers() if n.endswith(leaf)])

    config = tiny_config(tmp_path, data, token_choice(), steps=3)
    config.optimizer.param_groups[-1].optimizer_kwargs["lr"] = 0.0
    trainer = config.build()
    decide, step, seen = trainer.skip.decide, trainer.train_step, []
    trainer.skip.decide = lambda number, *rest: decide(number, *rest) & (number != 2)

    def noting(batches):
        step(batches)
        assert not buffers(trainer, "router.load_E").any(), "the next step counts from 0"
        seen.append(buffers(trainer, "bias_E").clone())

    trainer.train_step = noting
    trainer.train()
    trainer.close()
    assert seen[0].any() and torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])


def test_load_is_told_by_modality(tmp_path, data):
    config = tiny_config(tmp_path, data, token_choice(), steps=1)
    run(config)
    line = next(line for line in metrics(tmp_path) if line["kind"] == "train")
    for group in ("text", "image"):
        at = f"router/layer1.pool0.{group}"
        assert line[f"{at}/reached"] == line[f"{at}/filled"] == 1.0, "dropless, no padding"
        assert line[f"{at}/load_min"] <= 1.0 <= line[f"{at}/load_max"]
    # two image experts, and each image token takes two
    assert line["router/layer0.pool0.image/load_max"] == line["router/layer0.pool0.image/load_min"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"top_k": 0}, r"top_k \(0\) must be at least 1"),
        ({"top_k": 5}, r"top_k \(5\) must be at most the number of experts \(4\)"),
        ({"top_k": 2, "serves": (0, 0, 0, 1)}, r"top_k \(2\).* serve modality group 1 \(1\)"),
        ({"serves": (0, 1)}, r"serves .* for each of the 4 experts"),
        ({"scale": 0}, r"scale \(0\) must be positive"),
        ({"bias_rate": -1}, r"bias_rate \(-1\) must be at least 0"),
        ({"normalise": True}, r"normalise \(True\) needs top_k \(1\)"),
    ],
)
def test_impossible_routers_are_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        TokenChoice.Config(**fields).build(dim=4, experts=4, share=1.0)


def test_pools_by_modality_are_refused():
    options = {"name": "text", "dim": 4, "hidden_dim": 4, "experts": 4}
    with pytest.raises(ValueError, match=r"groups \(\(0,\)\) .* router.serves"):
        ExpertPool.Config(**options, groups=(0,), router=TokenChoice.Config())


def test_experts_that_leave_a_modality_out_are_refused():
    config = token_choice()
    with pytest.raises(ValueError, match=r"serves .* each of the model's 3 modality groups"):
        replace(config, modalities=(0, 1, 2))
    config = moma(shared=decoders.Shared(by_modality=1))
    with pytest.raises(ValueError, match=r"groups \(2\) of a shared expert must be 1, .* or 3"):
        replace(config, modalities=(0, 1, 2))
    with pytest.raises(ValueError, match=r"hidden_dim \(48\) must be a multiple of the 5 experts"):
        moma(shared=decoders.Shared(everyone=4))
    with pytest.raises(ValueError, match="exactly the modalities"):
        decoders.token_choice(SHAPE, {TEXT: 4})


@pytest.mark.parametrize("counts", [(4, 4), (6, 2), (7, 1), (2, 4)])
def test_equal_parts_of_all_experts_are_equal_parts_of_each_modality_s(counts):
    experts = dict(zip((TEXT, IMAGE), counts, strict=True))
    config = decoders.token_choice(replace(SHAPE, hidden_dim=96), experts)
    serves = config.layers[0].feed_forward.pools[0].router.serves
    for ranks in (r for r in (1, 2, 4) if not any(count % r for count in counts)):
        part = len(serves) // ranks
        for first in range(0, len(serves), part):
            own = serves[first : first + part]
            assert [own.count(group) for group in (0, 1)] == [count // ranks for count in counts]
