"""Properties of Mamba blocks: which are the same function, and their initial values.

``built`` amplifies the scan: at the usual initial values it is under 1 % of the output.
"""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from batches import built, context_of, random_batch, with_modality
from tiny_runs import MAMBA_SHAPE, MAMBAS
from torch import nn

from earlyfuse.configs import mamba_decoders
from earlyfuse.configs.mamba_decoders import PROJECTIONS, mixture_of_mamba
from earlyfuse.configs.optimizers import adamw
from earlyfuse.models.vocabulary import Modality

THREE = replace(MAMBA_SHAPE, modalities=tuple(Modality))


@torch.no_grad()
def test_the_scan_matters_here():
    model = built(MAMBAS["mixture_of_mamba"]())
    before = model(random_batch())
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter += 0.1
    assert (before - model(random_batch())).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("untied", list(product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("shape", [MAMBA_SHAPE, THREE], ids=["two", "three"])
def test_a_mixture_of_copies_is_the_dense_model(shape, untied):
    """Outputs and, summed over the copies, gradients; for each ablation."""
    names = [name for name, chosen in zip(PROJECTIONS, untied, strict=True) if chosen]
    dense, mixture = built(mamba_decoders.mamba(shape)), mixture_of_mamba(shape, names).build()
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            parameter.copy_(dense.get_parameter(name))
    batch = random_batch(len(shape.modalities))
    expected, found = dense(batch), mixture(batch)
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


@torch.no_grad()
@pytest.mark.parametrize("parameter", [*(f"{name}.weight" for name in PROJECTIONS), "scan.dt_bias"])
def test_an_untied_parameter_serves_its_modality_alone(parameter):
    """Another set for images moves a sequence of text nowhere, and one of images everywhere."""
    untied = "dt_proj" if parameter == "scan.dt_bias" else parameter.removesuffix(".weight")
    model = built(mixture_of_mamba(MAMBA_SHAPE, [untied]))
    text, image = (with_modality(random_batch(), kind) for kind in (0, 1))
    before = model(text), model(image)
    for layer in model.layers.values():
        layer.mamba.get_parameter(parameter)[1] *= 1.1
    assert torch.equal(before[0], model(text))
    assert (before[1] - model(image)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_modalities_are_names_only(order):
    """Parameters and ids renamed alike compute the same."""
    model, other, batch = (
        built(mixture_of_mamba(THREE)),
        mixture_of_mamba(THREE).build(),
        random_batch(3),
    )
    for name, parameter in other.named_parameters():
        ours = model.get_parameter(name)
        untied = "_proj" in name or name.endswith("dt_bias")
        parameter.copy_(ours[list(order)] if untied else ours)
    renamed = torch.tensor(order).argsort()[batch.modality_BS.long()].to(torch.uint8)
    found = other(replace(batch, modality_BS=renamed))
    torch.testing.assert_close(found, model(batch), rtol=0, atol=1e-5)


def test_a_modality_that_is_absent_gets_gradients_of_zero():
    model = built(mixture_of_mamba(THREE))
    model(random_batch(2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "_proj" in name or name.endswith("dt_bias"):
            assert not parameter.grad[2].any(), name
            assert parameter.grad[:2].flatten(1).any(1).all(), name


def test_initial_values_are_mamba_s():
    """Steps between 0.001 and 0.1, different for each modality; rates 1 … N; skip 1."""
    model = mixture_of_mamba(replace(MAMBA_SHAPE, dim=256)).build()
    model.init_states()
    mixer = model.layers["0"].mamba.requires_grad_(False)
    steps = nn.functional.softplus(mixer.scan.dt_bias)
    assert steps.min() >= 0.99e-3 and steps.max() <= 1.01e-1
    assert abs(float(steps.log().mean()) - float(torch.tensor([1e-3, 1e-1]).log().mean())) < 0.15
    assert not torch.equal(steps[0], steps[1])
    torch.testing.assert_close(mixer.scan.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert (mixer.scan.D == 1).all()
    for weight, inputs in (
        (mixer.in_proj.weight, 256),
        (mixer.x_proj.weight, 512),
        (mixer.dt_proj.weight, 16),
        (mixer.out_proj.weight, 512 * 2),  # two branches write into the residual
        (mixer.conv.weight, 4),
    ):
        assert 0.9 * inputs**-0.5 < weight.abs().max() <= inputs**-0.5
    assert 0.4 < mixer.conv.bias.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"in_proj_groups": 3}, "in_proj_groups"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"conv_width": 5}, "conv_width"),
    ],
)
def test_impossible_mixers_are_refused(change, field):
    config = mamba_decoders.mamba(MAMBA_SHAPE)
    with pytest.raises(ValueError, match=field):
        config.layers[0].mamba = replace(config.layers[0].mamba, **change)
        replace(config, layers=config.layers)


def test_unknown_projections_and_patterns_are_refused():
    with pytest.raises(ValueError, match="untied"):
        mixture_of_mamba(MAMBA_SHAPE, ["conv"])
    with pytest.raises(ValueError, match="pattern"):
        mamba_decoders.hybrid(MAMBAS["hybrid"](), "x")


def test_blocks_take_vectors_as_well_as_tokens():
    """Continuous patches: later ones move no earlier output, and all earlier ones get gradients."""
    model, batch = built(mixture_of_mamba(MAMBA_SHAPE)), random_batch()
    context = context_of(batch.modality_BS, batch.positions_BS, model.config.modalities)
    x_TD = torch.randn(48, model.config.dim, generator=torch.Generator().manual_seed(0))
    out_TD = x_TD.requires_grad_()
    for layer in model.layers.values():
        out_TD = layer(out_TD, context)
    (gradient,) = torch.autograd.grad(out_TD.unflatten(0, (2, 24))[:, 15].sum(), x_TD)
    moved = gradient.unflatten(0, (2, 24)).abs().amax((0, 2)) > 0
    assert moved[:16].all() and not moved[16:].any()


def test_rates_of_decay_skip_and_biases_are_not_decayed():
    settings, undecayed = adamw(1e-3).param_groups, set()
    for name, _ in MAMBAS["hybrid"]().build().named_parameters():
        group = next(g for g in settings if re.search(g.pattern, name))
        if ".mamba." in name and not group.optimizer_kwargs["weight_decay"]:
            undecayed.add(re.sub(r"layers\.\d+\.mamba\.", "", name))
    assert undecayed == {"conv.bias", "scan.A_log", "scan.D", "scan.dt_bias"}
