"""Properties of the decoder: what may look at what, and which models are the same function."""

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of
from tiny_runs import MODELS, SHAPE

from earlyfuse.configs import decoders
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.vocabulary import Modality

B, S = 2, 24


def build(config: Decoder.Config, seed: int = 0) -> Decoder:
    config.seed = seed
    config.init_std = 0.2  # large enough that a wrong mask or route is seen in fp32
    model = config.build()
    model.init_states()
    return model.eval()


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 48, (B, S), generator=generator)
    modality = torch.randint(0, 2, (B, S), generator=generator).to(torch.uint8)
    positions = torch.arange(S).expand(B, S).clone()
    return tokens, modality, positions


def packed(positions: torch.Tensor, starts: list[int]) -> torch.Tensor:
    positions = positions.clone()
    for start, stop in zip(starts, [*starts[1:], S], strict=True):
        positions[:, start:stop] = torch.arange(stop - start)
    return positions


@pytest.mark.parametrize("name", ["dense", "mot", "token_choice"])
@pytest.mark.parametrize("several_documents", [False, True])
def test_later_tokens_do_not_move_earlier_outputs(name, several_documents):
    model = build(MODELS[name]())
    tokens, modality, positions = batch()
    if several_documents:
        positions = packed(positions, [0, 5, 11])
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 48
    before, after = (
        model(batch_of(tokens, modality, positions)),
        model(batch_of(changed, modality, positions)),
    )
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-6)
    assert (before[:, 15:] - after[:, 15:]).abs().max() > 1e-3


def test_later_tokens_do_not_move_earlier_outputs_of_moma_with_routing_fixed(monkeypatch):
    model = build(MODELS["moma"]())
    tokens, modality, positions = batch()
    chosen = {}
    choose = ExpertChoice._choose

    def once(router, logits, eligible, layout):
        """The first forward's choice of rows, with the weights of the present logits."""
        routes = choose(router, logits, eligible, layout)
        row, offset, _ = chosen.setdefault(router, routes)
        expert = torch.repeat_interleave(torch.arange(logits.shape[1]), offset.diff())
        return routes._replace(
            row_R=row, offset_G1=offset, weight_R=logits[row, expert].sigmoid() * eligible[row]
        )

    monkeypatch.setattr(ExpertChoice, "_choose", once)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 48
    before, after = (
        model(batch_of(tokens, modality, positions)),
        model(batch_of(changed, modality, positions)),
    )
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-6)
    assert (before[:, 15:] - after[:, 15:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dense", "mot", "token_choice"])
def test_packed_documents_do_not_see_each_other(name):
    model = build(MODELS[name]())
    tokens, modality, positions = batch()
    together = model(batch_of(tokens, modality, packed(positions, [0, 7])))
    first = model(batch_of(tokens[:, :7], modality[:, :7], positions[:, :7]))
    second = model(batch_of(tokens[:, 7:], modality[:, 7:], positions[:, : S - 7]))
    torch.testing.assert_close(together, torch.cat([first, second], 1), rtol=0, atol=1e-5)


def test_a_document_boundary_matters():
    """The test above could not fail if the mask were never used."""
    model = build(MODELS["dense"]())
    tokens, modality, positions = batch()
    assert (
        model(batch_of(tokens, modality, positions))
        - model(batch_of(tokens, modality, packed(positions, [0, 7])))
    ).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mot", "moe_1t1i"])
@pytest.mark.parametrize("modality", [Modality.TEXT, Modality.IMAGE])
def test_one_modality_only_equals_the_dense_model(name, modality):
    configs = {"mot": decoders.mixture_of_transformers, "moe_1t1i": decoders.moe_1t1i}
    untied, dense = build(configs[name](SHAPE), seed=3), build(decoders.dense(SHAPE))
    shapes = {key: value.shape for key, value in dense.state_dict().items()}
    dense.load_state_dict(
        {
            key: value if value.shape == shapes[key] else value[int(modality)]
            for key, value in untied.state_dict().items()
        }
    )
    tokens, _, positions = batch()
    ids = torch.full_like(tokens, int(modality)).to(torch.uint8)
    torch.testing.assert_close(
        untied(batch_of(tokens, ids, positions)),
        dense(batch_of(tokens, ids, positions)),
        rtol=0,
        atol=1e-5,
    )


def test_one_expert_that_takes_everything_is_the_dense_model_with_its_weight():
    """moe with one expert and all tokens: each gets sigmoid(0) = 1/2 of the dense feed-forward."""
    config = decoders.moe(SHAPE, experts=1)
    moe, dense = build(config), build(decoders.dense(SHAPE))
    state = moe.state_dict()
    for key in list(state):
        if key.endswith("router.weight"):
            state.pop(key)
    renamed = {}
    for key, value in state.items():
        if ".pools.0." in key:
            value = value[0] / 2 if key.endswith("w2") else value[0]
        renamed[key.replace(".pools.0.experts.", ".")] = value
    dense.load_state_dict(renamed)
    for module in moe.modules():
        if isinstance(module, ExpertChoice):
            torch.nn.init.zeros_(module.weight)
    inputs = batch()
    torch.testing.assert_close(moe(batch_of(*inputs)), dense(batch_of(*inputs)), rtol=0, atol=1e-5)


def test_missing_modality_and_positions_mean_one_text_document_per_row():
    model = build(MODELS["mot"]())
    tokens, modality, positions = batch()
    torch.testing.assert_close(
        model(batch_of(tokens)), model(batch_of(tokens, torch.zeros_like(modality), positions))
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_in_the_head_is_the_loss_of_the_logits(name):
    model = build(MODELS[name]()).train()
    tokens, modality, positions = batch()
    labels = torch.where(positions < 5, -100, tokens.roll(-1, 1))
    objective = ChameleonObjective.Config(z_loss=0.1).build()
    labelled = batch_of(tokens, modality, positions, labels_BS=labels, label_modality_BS=modality)
    total = model(labelled, loss=objective.loss_of(labelled)).total
    logits = model(batch_of(tokens, modality, positions))
    z = logits.logsumexp(-1)[labels != -100].square().sum()
    nll = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    expected = nll + 0.1 * z
    torch.testing.assert_close(total, expected)
    gradients = [torch.autograd.grad(loss, model.parameters()) for loss in (total, expected)]
    for (key, _), found, wanted in zip(model.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=key)


def test_a_loss_gets_hidden_states_and_the_head_and_its_result_is_returned():
    model = build(MODELS["dense"]())
    tokens, modality, positions = batch()
    found = model(
        batch_of(tokens, modality, positions), loss=lambda x, w: {"logits": F.linear(x, w)}
    )
    torch.testing.assert_close(
        found["logits"],
        model(batch_of(tokens, modality, positions)).flatten(0, 1),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", MODELS)
def test_parts_one_after_another_are_the_whole(name):
    """Initialised by themselves, as stages of a pipeline are."""
    whole, parts = build(MODELS[name]()), [MODELS[name]().build() for _ in range(2)]
    values: dict[str, torch.Tensor] = {}
    for blocks, part in zip((range(1), range(1, 2)), parts, strict=True):
        part.config.init_std = whole.config.init_std
        part.keep(blocks)
        part.init_states()
        assert values.keys().isdisjoint(part.state_dict())
        values |= part.state_dict()
    assert values.keys() == whole.state_dict().keys()
    assert all(torch.equal(values[key], value) for key, value in whole.state_dict().items())
    tokens, *others = batch()
    inputs = batch_of(tokens, *others)
    activations = parts[0].eval()(inputs)
    assert torch.equal(parts[1].eval()(inputs, x_TD=activations), whole(inputs))


def test_initial_values_do_not_depend_on_the_other_parameters():
    """wq of layer 0 is the same tensor in a dense model and in MoMa: seeds go by name."""
    dense, moma = build(MODELS["dense"]()), build(MODELS["moma"]())
    wq = dense.layers["0"].attention.wq.weight
    assert torch.equal(wq, moma.layers["0"].attention.wq.weight)
    assert not torch.equal(wq, dense.layers["1"].attention.wq.weight)
    assert not torch.equal(
        dense.tok_embeddings.weight, build(MODELS["dense"](), seed=1).tok_embeddings.weight
    )


def test_initial_values_follow_the_table():
    config = decoders.dense(
        decoders.Shape(dim=128, layers=8, heads=2, hidden_dim=256, vocab_size=512)
    )
    model = config.build()
    model.init_states()
    block = model.layers["3"]
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.98, rel=0.02)
    assert block.attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.feed_forward.w2.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.attention.wo.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert (block.attention_norm.weight == 1).all()
    assert (block.attention.q_norm.bias == 0).all()


def test_wrong_shapes_are_refused_when_the_config_is_built():
    with pytest.raises(ValueError, match=r"heads \(3\) must be a multiple of kv_heads \(2\)"):
        decoders.dense(
            decoders.Shape(dim=48, layers=1, heads=3, kv_heads=2, hidden_dim=8, vocab_size=8)
        )
    with pytest.raises(ValueError, match="must sum to 1"):
        decoders.moma(
            SHAPE, {Modality.TEXT: 1, Modality.IMAGE: 1}, {Modality.TEXT: 0.5, Modality.IMAGE: 0.4}
        )
    with pytest.raises(ValueError, match=r"share \(0\).*must be in \(0, 1\]"):
        decoders.moma(
            SHAPE, {Modality.TEXT: 1, Modality.IMAGE: 1}, {Modality.TEXT: 1, Modality.IMAGE: 0}
        )
    with pytest.raises(ValueError, match="exactly the modalities"):
        decoders.moma(SHAPE, {Modality.TEXT: 1}, {Modality.TEXT: 1})
