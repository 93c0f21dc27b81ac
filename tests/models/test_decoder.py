"""Properties of the decoder: which models are the same function, losses, stages, initial values.

``test_visibility.py`` has what may look at what.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import built, random_batch, with_modality
from tiny_runs import MODELS, SHAPE, THRESHOLDS

from earlyfuse.configs import decoders
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.routing.expert_choice import ExpertChoice
from earlyfuse.models.vocabulary import Modality

FORMS = MODELS | THRESHOLDS
ONE_EACH = {Modality.TEXT: 1, Modality.IMAGE: 1}


@pytest.mark.parametrize("make", [decoders.mixture_of_transformers, decoders.moe_1t1i])
@pytest.mark.parametrize("modality", [Modality.TEXT, Modality.IMAGE])
def test_one_modality_only_equals_the_dense_model(make, modality):
    untied, dense = built(make(SHAPE), seed=3), built(decoders.dense(SHAPE))
    shapes = {key: value.shape for key, value in dense.state_dict().items()}
    dense.load_state_dict(
        {
            key: value if value.shape == shapes[key] else value[int(modality)]
            for key, value in untied.state_dict().items()
        }
    )
    inputs = with_modality(random_batch(), modality)
    torch.testing.assert_close(untied(inputs), dense(inputs), rtol=0, atol=1e-5)


def test_one_expert_that_takes_everything_is_the_dense_model_with_its_weight():
    """moe with one expert and all tokens: each gets sigmoid(0) = 1/2 of the dense feed-forward."""
    moe, dense = built(decoders.moe(SHAPE, experts=1)), built(decoders.dense(SHAPE))
    renamed = {}
    for key, value in moe.state_dict().items():
        if ".pools.0." in key:
            value = value[0] / 2 if key.endswith("w2") else value[0]
        if not key.endswith("router.weight"):
            renamed[key.replace(".pools.0.experts.", ".")] = value
    dense.load_state_dict(renamed)
    for module in moe.modules():
        if isinstance(module, ExpertChoice):
            torch.nn.init.zeros_(module.weight)
    torch.testing.assert_close(moe(random_batch()), dense(random_batch()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_a_loss_in_the_head_is_the_loss_of_the_logits(name):
    model, batch = built(FORMS[name]()).train(), random_batch()
    labels = batch.tokens_BS.roll(-1, 1)
    labels[:, :5] = -100
    labelled = replace(batch, labels_BS=labels, label_modality_BS=batch.modality_BS)
    objective = ChameleonObjective.Config(z_loss=0.1).build()
    total = model(labelled, loss=objective.loss_of(labelled)).total
    logits = model(batch)
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
    model, batch = built(MODELS["dense"]()), random_batch()
    found = model(batch, loss=lambda x, w: {"logits": F.linear(x, w)})["logits"]
    torch.testing.assert_close(found, model(batch).flatten(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_stages_one_after_another_are_the_whole(name):
    """Each initialised by itself, as in a pipeline."""
    whole, stages = FORMS[name]().build(), [FORMS[name]().build() for _ in range(2)]
    whole.init_states()
    values: dict[str, torch.Tensor] = {}
    for blocks, stage in zip((range(1), range(1, 2)), stages, strict=True):
        stage.keep(blocks)
        stage.init_states()
        assert values.keys().isdisjoint(stage.state_dict())
        values |= stage.state_dict()
    assert values.keys() == whole.state_dict().keys()
    assert all(torch.equal(values[key], value) for key, value in whole.state_dict().items())
    first, second = (stage.eval() for stage in stages)
    batch = random_batch()
    assert torch.equal(second(batch, x_TD=first(batch)), whole.eval()(batch))


def test_initial_values_follow_from_seed_and_name_alone():
    """wq of layer 0 is the same tensor in a dense model and in MoMa."""
    dense, moma = built(MODELS["dense"]()), built(MODELS["moma"]())
    wq = dense.layers["0"].attention.wq.weight
    assert torch.equal(wq, moma.layers["0"].attention.wq.weight)
    assert not torch.equal(wq, dense.layers["1"].attention.wq.weight)
    other = built(MODELS["dense"](), seed=1).layers["0"].attention.wq.weight
    assert not torch.equal(wq, other)


def test_initial_values_have_the_scales_of_their_draws():
    shape = decoders.Shape(dim=128, layers=8, heads=2, hidden_dim=256, vocab_size=512)
    model = decoders.dense(shape).build()
    model.init_states()
    block = model.layers["3"]
    for weight, std in (
        (model.tok_embeddings.weight, 0.98),
        (block.attention.wq.weight, 0.02),
        (block.feed_forward.w2, 0.02 / 4),
        (block.attention.wo.weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert (block.attention_norm.weight == 1).all()
    assert (block.attention.q_norm.bias == 0).all()


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (
            lambda: decoders.dense(replace(SHAPE, dim=48, heads=3, kv_heads=2)),
            r"heads \(3\) must be a multiple of kv_heads \(2\)",
        ),
        (
            lambda: decoders.moma(SHAPE, ONE_EACH, {Modality.TEXT: 0.5, Modality.IMAGE: 0.4}),
            "must sum to 1",
        ),
        (
            lambda: decoders.moma(SHAPE, ONE_EACH, {Modality.TEXT: 1, Modality.IMAGE: 0}),
            r"share \(0\).*must be in \(0, 1\]",
        ),
        (
            lambda: decoders.moma(SHAPE, {Modality.TEXT: 1}, {Modality.TEXT: 1}),
            r"experts \{'text': 1\} and shares .* exactly the modalities",
        ),
        (
            lambda: replace(decoders.dense(SHAPE), rope_theta=0),
            r"rope_theta \(0\) must be positive",
        ),
        (lambda: decoders.dense(replace(SHAPE, norm_order="post")), 'must be "pre" or "swin"'),
    ],
)
def test_impossible_shapes_are_refused_when_the_config_is_built(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()
