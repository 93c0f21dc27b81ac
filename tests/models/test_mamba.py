"""Properties of Mamba blocks: which are the same function, what may look at what, how they begin.

All with the scan made to matter: at the usual first values it is under a hundredth of the output.
"""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from batches import batch_of, context_of
from tiny_runs import MAMBA_SHAPE, MAMBAS, loud
from torch import nn

from earlyfuse.configs import mamba_decoders
from earlyfuse.configs.mamba_decoders import PROJECTIONS
from earlyfuse.configs.optimizers import adamw
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import Modality

B, S, WORDS = 2, 24, 48
THREE = replace(MAMBA_SHAPE, modalities=tuple(Modality))


def build(config: Decoder.Config, seed: int = 0) -> Decoder:
    config.seed = seed
    model = config.build()
    model.init_states()
    loud(model)
    return model.eval()


def batch(modalities: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (B, S), generator=generator)
    modality = torch.randint(0, modalities, (B, S), generator=generator).to(torch.uint8)
    return tokens, modality, torch.arange(S).expand(B, S).clone()


def copies(dense: Decoder, mixture: Decoder) -> Decoder:
    """``mixture`` with the parameters of ``dense``, each set the same."""
    ours = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            parameter.copy_(ours[name])
    return mixture


def test_the_scan_is_heard_here():
    model = build(MAMBAS["mixture_of_mamba"]())
    tokens, modality, positions = batch()
    before = model(batch_of(tokens, modality, positions))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter += 0.1
    after = model(batch_of(tokens, modality, positions))
    assert (before - after).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("name", MAMBAS)
def test_later_tokens_do_not_move_earlier_outputs(name):
    model = build(MAMBAS[name]())
    tokens, modality, positions = batch()
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % WORDS
    before, after = (
        model(batch_of(tokens, modality, positions)),
        model(batch_of(changed, modality, positions)),
    )
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-6)
    assert (before[:, 23] - after[:, 23]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MAMBAS)
def test_packed_documents_are_separate_documents(name):
    model = build(MAMBAS[name]())
    tokens, modality, positions = batch()
    starts = [0, 2, 7, 15]  # one shorter than the convolution reaches
    for start, stop in zip(starts, [*starts[1:], S], strict=True):
        positions[:, start:stop] = torch.arange(stop - start)
    packed = model(batch_of(tokens, modality, positions))
    for start, stop in zip(starts, [*starts[1:], S], strict=True):
        alone = model(batch_of(tokens[:, start:stop], modality[:, start:stop]))
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("untied", list(product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("shape", [MAMBA_SHAPE, THREE], ids=["two", "three"])
def test_a_mixture_of_copies_is_the_dense_model(shape, untied):
    """Outputs and, summed over the copies, gradients; for each ablation."""
    names = [name for name, chosen in zip(PROJECTIONS, untied, strict=True) if chosen]
    dense = build(mamba_decoders.mamba(shape))
    mixture = copies(dense, mamba_decoders.mixture_of_mamba(shape, names).build())
    inputs = batch(len(shape.modalities))
    expected, found = dense(batch_of(*inputs)), mixture(batch_of(*inputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected.sum().backward()
    found.sum().backward()
    for name, parameter in dense.named_parameters():
        gradient = mixture.get_parameter(name).grad
        if gradient.ndim > parameter.ndim:
            assert any(part in name for part in names) or name.endswith("dt_bias")
            gradient = gradient.sum(0)
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * float(scale))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_untied_projection_serves_its_modality_alone(name):
    """Another set for images moves a sequence of text nowhere, and one of images everywhere."""
    model = build(mamba_decoders.mixture_of_mamba(MAMBA_SHAPE, [name]))
    tokens, _, _ = batch()
    text, image = (torch.full_like(tokens, kind, dtype=torch.uint8) for kind in (0, 1))
    before = model(batch_of(tokens, text)), model(batch_of(tokens, image))
    with torch.no_grad():
        for layer in model.layers.values():
            getattr(layer.mamba, name).weight[1].mul_(1.1)
    after = model(batch_of(tokens, text)), model(batch_of(tokens, image))
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_step_bias_is_that_of_the_token_s_modality():
    model = build(mamba_decoders.mixture_of_mamba(MAMBA_SHAPE, ["dt_proj"]))
    tokens, _, _ = batch()
    text = torch.zeros_like(tokens, dtype=torch.uint8)
    before = model(batch_of(tokens, text)), model(batch_of(tokens, text + 1))
    with torch.no_grad():
        for layer in model.layers.values():
            layer.mamba.scan.dt_bias[1].add_(0.5)
    after = model(batch_of(tokens, text)), model(batch_of(tokens, text + 1))
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_modalities_are_names_only(order):
    """Parameters and ids renamed alike compute the same."""
    model = build(mamba_decoders.mixture_of_mamba(THREE))
    other = mamba_decoders.mixture_of_mamba(THREE).build()
    tokens, modality, positions = batch(3)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            ours = model.get_parameter(name)
            untied = "_proj" in name or name.endswith("dt_bias")
            parameter.copy_(ours[list(order)] if untied else ours)
    renamed = torch.tensor(order).argsort()[modality.long()].to(torch.uint8)
    expected = model(batch_of(tokens, modality, positions))
    torch.testing.assert_close(
        other(batch_of(tokens, renamed, positions)), expected, rtol=0, atol=1e-5
    )


def test_a_modality_that_is_absent_gets_gradients_of_zero():
    model = build(mamba_decoders.mixture_of_mamba(THREE))
    tokens, modality, positions = batch(2)
    model(batch_of(tokens, modality, positions)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "_proj" in name or name.endswith("dt_bias"):
            assert not parameter.grad[2].any(), name
            assert parameter.grad[:2].flatten(1).any(1).all(), name


def test_first_values_are_mamba_s():
    """Steps between a thousandth and a tenth, each modality's its own; rates 1 … N; skip 1."""
    shape = replace(MAMBA_SHAPE, dim=256)
    model = mamba_decoders.mixture_of_mamba(shape).build()
    model.init_states()
    mixer = model.layers["0"].mamba
    steps = nn.functional.softplus(mixer.scan.dt_bias.detach())
    assert steps.min() >= 0.99e-3 and steps.max() <= 1.01e-1
    assert abs(float(steps.log().mean()) - float(torch.tensor([1e-3, 1e-1]).log().mean())) < 0.15
    assert not torch.equal(steps[0], steps[1])
    rates = mixer.scan.A_log.detach().exp()
    torch.testing.assert_close(rates, torch.arange(1.0, 17).expand(512, 16))
    assert (mixer.scan.D == 1).all()
    for name, inputs in (("in_proj", 256), ("x_proj", 512), ("dt_proj", 16)):
        bound = inputs**-0.5
        weight = getattr(mixer, name).weight.detach()
        assert 0.99 * bound < weight.abs().max() <= bound, name
    writing = mixer.out_proj.weight.detach().abs().max()
    assert 0.99 * (512 * 2) ** -0.5 < writing <= (512 * 2) ** -0.5
    assert (
        0.4 < mixer.conv.weight.detach().abs().max() <= 0.5 >= mixer.conv.bias.detach().abs().max()
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"in_proj_groups": 3}, "in_proj_groups"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"conv_width": 5}, "conv_width"),
    ],
)
def test_what_cannot_be_a_mixer_is_refused(change, field):
    with pytest.raises(ValueError, match=field):
        config = mamba_decoders.mamba(MAMBA_SHAPE)
        config.layers[0].mamba = replace(config.layers[0].mamba, **change)
        replace(config, layers=config.layers)


def test_unknown_projections_and_patterns_are_refused():
    with pytest.raises(ValueError, match="untied"):
        mamba_decoders.mixture_of_mamba(MAMBA_SHAPE, ["conv"])
    with pytest.raises(ValueError, match="pattern"):
        mamba_decoders.hybrid(MAMBAS["hybrid"](), "x")


def test_blocks_take_vectors_as_well_as_tokens():
    """Continuous patches at image positions: later ones move no earlier output, and all of them
    get gradients.
    """
    config = mamba_decoders.mixture_of_mamba(MAMBA_SHAPE)
    model = build(config)
    _, modality, positions = batch()
    layout = context_of(modality, positions, config.modalities, config.head_dim, 1e4)

    def through(x_TD):
        for layer in model.layers.values():
            x_TD = layer(x_TD, layout)
        return x_TD.unflatten(0, (B, S))

    x_TD = torch.randn(B * S, config.dim, generator=torch.Generator().manual_seed(0))
    x_TD.requires_grad_()
    out_BSD = through(x_TD)
    (gradient,) = torch.autograd.grad(out_BSD[:, 15].sum(), x_TD)
    moved = gradient.unflatten(0, (B, S)).abs().amax((0, 2)) > 0
    assert moved[:16].all() and not moved[16:].any()


def test_rates_of_decay_skip_and_biases_are_not_decayed():
    settings = adamw(1e-3).param_groups
    undecayed = set()
    for name, _ in MAMBAS["hybrid"]().build().named_parameters():
        group = next(g for g in settings if re.search(g.pattern, name))
        if not group.optimizer_kwargs["weight_decay"]:
            undecayed.add(re.sub(r"layers\.\d+\.", "", name))
    mamba = {name for name in undecayed if name.startswith("mamba.")}
    assert mamba == {f"mamba.{x}" for x in ("conv.bias", "scan.A_log", "scan.D", "scan.dt_bias")}
