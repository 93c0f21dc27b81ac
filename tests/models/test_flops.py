"""Closed-form parameters and FLOPs against counted ones."""

from dataclasses import replace

import pytest
import torch
from batches import batch_of
from tiny_runs import DEPTHS, MODELS, SHAPE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from earlyfuse.configs import decoders, depth
from earlyfuse.models.flops import count_parameters, forward_flops, training_flops
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.vocabulary import Modality

HALF = {Modality.TEXT: 0.5, Modality.IMAGE: 0.5}
EXPERTS = {Modality.TEXT: 2, Modality.IMAGE: 4}
ALL = {**MODELS, "moe_1t1i": lambda: decoders.moe_1t1i(SHAPE)}
# the tokens of a row compete: merged rows would attend over more than their formula counts
COUNTED = {
    **ALL,
    "moma": lambda: decoders.moma(SHAPE, EXPERTS, HALF),
    "mod": DEPTHS["mod"],
    "moma_mod": lambda: depth.moma_mod(decoders.moma(SHAPE, EXPERTS, HALF), 0.5),
    "p_mod": lambda: depth.p_mod(decoders.moma(SHAPE, EXPERTS, HALF), (None, 0.5), media_share=0.5),
    "gamma_mod": lambda: depth.gamma_mod(
        decoders.dense(replace(SHAPE, norm_order="pre")), (0, 1), media_share=0.5
    ),
}


@pytest.mark.parametrize("name", ALL | DEPTHS)
def test_total_parameters_equal_the_model_s(name):
    config = (ALL | DEPTHS)[name]()
    model = config.build()
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_active_parameters_of_a_dense_model_are_all_but_the_other_embeddings(kv_heads):
    shape = decoders.Shape(
        dim=32, layers=2, heads=2, kv_heads=kv_heads, hidden_dim=48, vocab_size=48
    )
    parameters = count_parameters(decoders.dense(shape))
    assert parameters.active == (parameters.total - 47 * 32,) * 2


@pytest.mark.parametrize("name", COUNTED)
def test_flops_equal_counted_matrix_products(name):
    """Half of the tokens are images: a step costs the mean of both modalities' FLOPs per token,
    with logits and with the loss that makes none.
    """
    config = COUNTED[name]()
    rows, seq_len = 2, 16
    model = config.build()
    model.init_states()
    tokens = torch.randint(0, 48, (rows, seq_len))
    modality = (torch.arange(seq_len) % 2).to(torch.uint8).expand(rows, seq_len)
    batch = batch_of(tokens, modality, labels_BS=tokens, label_modality_BS=modality)
    # only plain matrix products are counted by the counter, and attention as its math form
    expected = sum(forward_flops(config, seq_len)) / 2 * rows * seq_len
    trained = sum(training_flops(config, seq_len)) / 2 * rows * seq_len
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(batch)
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
        logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(trained, rel=0.02)
    loss = ChameleonObjective.Config().build().loss_of(batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, loss=loss).total.backward()
    assert counter.get_total_flops() == pytest.approx(trained, rel=0.02)


def test_moma_costs_what_dense_costs_besides_its_routers():
    seq_len = 64
    dense = forward_flops(decoders.dense(SHAPE), seq_len)
    for name in ("moe_8x", "moma"):
        config = ALL[name]()
        routers = sum(
            pool.experts * SHAPE.dim * 2
            for layer in config.layers
            for pool in layer.feed_forward.pools
        )
        assert forward_flops(config, seq_len) == pytest.approx([flops + routers for flops in dense])
    assert training_flops(ALL["mot"](), seq_len) == pytest.approx([3 * flops for flops in dense])
