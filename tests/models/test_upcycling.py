"""Upcycling: the child computes what its parent did, and the run continues in its data."""

import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from batches import batch_of, random_batch, with_modality
from tiny_runs import (
    MAMBA_SHAPE,
    MAMBAS,
    SHAPE,
    SHARES,
    metrics,
    moma,
    run,
    tiny_config,
    with_vectors,
)

from earlyfuse.configs import decoders, depth, mamba_decoders, stages
from earlyfuse.configs.transfusion import PAPER
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.routing.gumbel_noise import RouterNoise, noise_of_step
from earlyfuse.models.upcycle import shapes, upcycle
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.training.warm_start import Parent, WarmStart, load_inherited

DENSE, UNTIED = decoders.dense(SHAPE), decoders.moe_1t1i(SHAPE)
MAMBA = mamba_decoders.mamba(MAMBA_SHAPE)
THREE_LAYERS = decoders.dense(replace(SHAPE, layers=3))
THREE_EXPERTS, FOUR_EXPERTS = (
    decoders.moma(SHAPE, dict.fromkeys(SHARES, count), SHARES, routing_rows=2) for count in (3, 4)
)
MOT, MIXED = decoders.mixture_of_transformers(SHAPE), decoders.moe(SHAPE, 4, routing_rows=2)


ABLATIONS = [["in_proj"], ["x_proj", "dt_proj"], ["out_proj"], mamba_decoders.PROJECTIONS]


@pytest.fixture(scope="module")
def seed(tmp_path_factory, data):
    """The folder of a run of moe_1t1i."""
    folder = tmp_path_factory.mktemp("seed") / "run"
    run(tiny_config(folder, data, UNTIED, steps=3))
    return folder


def filled(config, seed: int = 0):
    model = config.build()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def child_of(parent, config):
    model = filled(config, seed=1)
    tensors = parent.state_dict()
    for name, origin in upcycle(parent.config, config).items():
        if origin is not None:
            with torch.no_grad():
                model.get_parameter(name).copy_(origin.make(tensors[origin.name]))
    return model


def outputs(model, settings: ForwardSettings | None = None) -> torch.Tensor:
    tokens_BS = torch.randint(48, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(batch_of(tokens_BS, (tokens_BS >= 32).to(torch.uint8)), settings)


def all_tokens(config):
    """Every expert takes every token that it may, weights normalised."""
    experts = max(p.experts for _, p, _, _ in config.traverse(decoders.ExpertPool.Config))
    return decoders.with_routers(
        config, capacity_factor=float(experts), budget="exact", weights="normalised"
    )


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        (DENSE, all_tokens(moma())),
        (DENSE, all_tokens(MIXED)),
        (UNTIED, all_tokens(moma())),
        (DENSE, UNTIED),
        (DENSE, MOT),
        (UNTIED, MOT),
        (all_tokens(moma()), all_tokens(FOUR_EXPERTS)),
    ],
    ids=["dense-moma", "dense-moe", "1t1i-moma", "dense-1t1i", "dense-mot", "1t1i-mot", "2-4"],
)
def test_a_child_that_routes_every_token_everywhere_is_its_parent(parent, child):
    model = filled(parent)
    sparse = any(".experts." in name for name in shapes(parent))
    if sparse:  # experts that differ, all of them used: equal weights make both sums means
        silence_routers(model)
    grown = child_of(model, child)
    if sparse:
        silence_routers(grown)
    expected = outputs(model)
    atol = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(outputs(grown), expected, rtol=1e-6, atol=atol)


def silence_routers(model):
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("untied", ABLATIONS, ids="+".join)
@pytest.mark.parametrize("modalities", [MAMBA_SHAPE.modalities, tuple(Modality)], ids=len)
def test_a_mixture_of_mamba_begins_as_the_dense_mamba_it_grew_out_of(modalities, untied):
    """Each modality alone bit for bit; mixed but for the order of sums in a kernel."""
    shape = replace(MAMBA_SHAPE, modalities=modalities)
    parent = filled(mamba_decoders.mamba(shape))
    config = mamba_decoders.grown(parent.config, untied)
    assert config == mamba_decoders.mixture_of_mamba(shape, untied)
    child = child_of(parent, config)
    assert all(upcycle(parent.config, config).values()), "nothing is new"
    mixed = random_batch(len(modalities))
    with torch.no_grad():
        for modality in modalities:
            alone = with_modality(mixed, modality)
            assert torch.equal(child(alone), parent(alone))
        expected = parent(mixed)
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(child(mixed), expected, rtol=0, atol=atol)


def test_a_hybrid_unties_its_mamba_and_then_the_rest():
    """Parameters that the parent unties keep their modality."""
    parent = filled(mamba_decoders.hybrid(THREE_LAYERS, "ams", untied=["in_proj"]))
    expected, model = outputs(parent), parent
    for form in (mamba_decoders.grown, partial(decoders.grown, form="1t1i")):
        model = child_of(model, form(model.config))
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(outputs(model), expected, rtol=0, atol=atol)
    assert model.layers["0"].feed_forward.w1.ndim == 3


@pytest.mark.parametrize("form", ["0x", "4i4t", "4t", "12345x"])
def test_unknown_forms_are_refused(form):
    with pytest.raises(ValueError, match=rf"form \('{form}'\) must be .* 4t4i, from 1 to 9999"):
        decoders.grown(DENSE, form)


def test_a_seed_grows_into_any_number_of_experts_of_each_modality():
    parent = filled(UNTIED)
    experts = {Modality.TEXT: 3, Modality.IMAGE: 1}
    child = child_of(parent, decoders.moma(SHAPE, experts, SHARES))
    for index, count in enumerate(experts.values()):
        grown = child.layers["1"].feed_forward.pools[index].experts
        for leaf in ("w1", "w2", "w3"):
            seed_GFD = parent.layers["1"].feed_forward.get_parameter(leaf)
            for expert in range(count):
                assert grown.get_parameter(leaf)[expert].equal(seed_GFD[index])
    fresh = {name for name, origin in upcycle(UNTIED, child.config).items() if origin is None}
    assert fresh == {name for name in shapes(child.config) if ".router." in name}


MIXTURE, HYBRID = MAMBAS["mixture_of_mamba"](), MAMBAS["hybrid"]()
EIGHT_STATES = mamba_decoders.mamba(replace(MAMBA_SHAPE, states=8))
WIDER = decoders.moma(replace(SHAPE, hidden_dim=64), dict.fromkeys(SHARES, 2), SHARES)


@pytest.mark.parametrize(
    ("parent", "child", "says"),
    [
        (UNTIED, MIXED, "all experts.*serve 2 modalities.*begin with a dense parent"),
        (MOT, moma(), r"attention_norm.weight is \(32,\), in the parent \(2, 32\)"),
        (moma(), DENSE, r"feed_forward.w1 is not in the parent"),
        (MIXED, moma(), "the pools of .* serve the groups"),
        (DENSE, WIDER, r"an expert of .*w1 is \(64, 32\), .* of the parent \(48, 32\)"),
        (DENSE, decoders.dense(replace(SHAPE, heads=4)), r"attention.heads \(4\) must be .* \(2\)"),
        (DENSE, decoders.dense(replace(SHAPE, norm_order="pre")), "norm_order"),
        (DENSE, THREE_LAYERS, r"layers \(3\)"),
        (THREE_LAYERS, HYBRID, r"layers\[1\] is made of mamba and .*, in the parent of attention"),
        (MAMBA, EIGHT_STATES, r"mamba.states \(8\) .* \(16\)"),
        (MIXTURE, MAMBA, r"in_proj.weight is \(128, 32\), in the parent \(2, 128, 32\)"),
        (MIXTURE, replace(MIXTURE, modalities=(0, 2)), r"modalities \(\[0, 2\]\) .* \(\[0, 1\]\)"),
        (THREE_EXPERTS, FOUR_EXPERTS, r"w1 is \(4, 48, 32\), in the parent \(3, 48, 32\)"),
    ],
)
def test_impossible_parents_are_refused_by_name(parent, child, says):
    with pytest.raises(ValueError, match=says):
        upcycle(parent, child)


WHOLE = (1.0, 1.0)  # every token is kept: what differs are weights


@pytest.mark.parametrize(
    ("child", "most"),
    [
        (depth.p_mod(UNTIED, WHOLE, media_share=0.3), 0.0),
        (depth.mod(UNTIED, 1.0, every=1, start=0), 0.02),
        (depth.moma_mod(all_tokens(moma()), 1.0, every=1), 0.02),
    ],
    ids=["p_mod", "mod", "moma_mod"],
)
def test_a_depth_routed_child_begins_near_its_parent(child, most):
    """Also where the same start makes experts."""
    parent = filled(UNTIED)
    model = depth.near_parent(child).build()
    model.init_states()
    load = child_of(parent, model.config).state_dict()
    model.load_state_dict(
        {n: v if ".router." in n else load[n] for n, v in model.state_dict().items()}
    )
    expected, found = outputs(parent), outputs(model)
    assert float((found - expected).norm() / expected.norm()) <= most


# ---------------------------------------------------------------- a run that begins with another


def test_a_checkpoint_read_in_regions_gives_what_the_map_says(seed, data):
    config = stages.upcycled(tiny_config(seed, seed), str(seed)).model_spec.model
    found = WarmStart.Config(model=str(seed)).build().find(config, data)
    parent = UNTIED.build()
    torch.distributed.checkpoint.load(parent.state_dict(), checkpoint_id=found.opened.folder)
    model = filled(config, seed=1)
    routers = {n: p.clone() for n, p in model.named_parameters() if ".router." in n}
    load_inherited(model, found.origins, found.opened)
    expected = child_of(parent, config).state_dict() | routers
    for name, value in model.state_dict().items():
        assert value.equal(expected[name]), name


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"diffusion": PAPER}, "vectors.diffusion.schedule"),
        ({"later_see": "clean"}, "vectors.later_see"),
        ({"rotary": "shared"}, "vectors.rotary"),
    ],
)
def test_vectors_of_another_function_are_not_inherited(fields, field):
    parent, child = with_vectors(DENSE), with_vectors(MOT)
    assert upcycle(parent, child)
    with pytest.raises(ValueError, match=rf"{field} \(.*\) must be that of the parent"):
        upcycle(parent, with_vectors(MOT, **fields))


def test_an_upcycled_run_goes_on_in_the_data_and_begins_all_else_anew(tmp_path, data, seed):
    config = stages.upcycled(tiny_config(tmp_path, data, moma()), str(seed), noise_steps=4)
    trainer = run(config)
    lines = metrics(tmp_path)
    validation = [line for line in lines if line["kind"] == "validation"]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in validation] == [0, 1, 3, 6]
    assert [line["lr"] for line in train][:2] == pytest.approx([2e-3, 4e-3])
    assert trainer.dataloader.lanes[:, -1].tolist() == [3 + 6] * 4
    assert int(trainer.tokens_M.sum()) == 6 * 4 * 32
    # the same folder goes on with its own checkpoint, not with the seed's
    config.training.steps = 7
    assert run(config).dataloader.lanes[:, -1].tolist() == [3 + 7] * 4


def test_a_run_is_adapted_to_depth_routing_in_its_data(tmp_path, data, seed):
    model = depth.p_mod(UNTIED, (None, 0.5), media_share=0.3)
    trainer = run(stages.depth_adapted(tiny_config(tmp_path, data, model, steps=2), str(seed)))
    assert trainer.dataloader.lanes[:, -1].tolist() == [3 + 2] * 4
    before, after = metrics(seed)[-1], metrics(tmp_path)[0]
    assert before["kind"] == after["kind"] == "validation" and after["step"] == 0
    assert after["loss"] == pytest.approx(before["loss"], abs=0.05)


def test_without_its_data_a_run_begins_at_their_beginning(tmp_path, data, seed):
    config = stages.upcycled(tiny_config(tmp_path, data, moma(), steps=1), str(seed))
    config.start.data = False
    config.dataloader.seed = 7
    assert run(config).dataloader.lanes[:, -1].tolist() == [1] * 4


def test_impossible_starts_are_refused_before_anything_is_written(tmp_path, data, seed):
    def refused(match: str, data_seed: int = 0, **fields) -> None:
        config = tiny_config(tmp_path / "out", data, moma())
        config.start = WarmStart.Config(**{"model": str(seed)} | fields)
        config.dataloader.seed = data_seed
        with pytest.raises(ValueError, match=match):
            run(config)
        assert not (tmp_path / "out" / "run.json").exists()

    refused(r"start.model \(.*nowhere\) must be .* not exist", model=str(tmp_path / "nowhere"))
    refused(r"start.step \(5\) must be a step with a checkpoint in .*: \[3\]", step=5)
    refused(r"seed of the data \(7\).*--start.no-data", data_seed=7)
    damaged = shutil.copytree(seed, tmp_path / "damaged")
    for file in damaged.glob("checkpoint/step-*/*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    refused("is damaged: .* bytes instead of", model=str(damaged))


def test_a_run_of_mamba_goes_on_as_a_mixture(tmp_path, data):
    first = run(tiny_config(tmp_path / "dense", data, MAMBA, steps=2))
    config = tiny_config(tmp_path / "mixture", data, mamba_decoders.grown(MAMBA), steps=1)
    config.start = WarmStart.Config(model=str(tmp_path / "dense"))
    second = config.build()
    seed = config.start.build().find(config.model_spec.model, data)
    load_inherited(second.model, seed.origins, seed.opened)
    for name, tensor in second.model.named_parameters():
        theirs = first.model.get_parameter(name)
        assert torch.equal(tensor, theirs.expand_as(tensor)), name
    second.close()
    third = run(config)
    assert third.dataloader.lanes[:, -1].tolist() == [2 + 1] * 4


def test_a_seed_tells_its_parameters_without_reading_them(seed, data):
    found = WarmStart.Config(model=str(seed)).build().find(UNTIED, data)
    assert isinstance(found, Parent) and found.shapes() == shapes(UNTIED)


# ---------------------------------------------------------------- noise


def noise(step: int, name: str = "router", place_T: torch.Tensor | None = None) -> torch.Tensor:
    module = RouterNoise.Config(end_step=10, temperature=2.0).build()
    module.name = name
    place_T = torch.arange(20_000) if place_T is None else place_T
    of_step = noise_of_step([module], step, torch.device("cpu"))
    context = SimpleNamespace(row_place_T=place_T, noise_2N=of_step)
    return module(torch.zeros(len(place_T), 2), context)


def test_noise_is_logistic_and_falls_to_nothing():
    for step, scale in ((1, 2.0), (6, 1.0)):
        sample = noise(step)
        assert sample.mean().abs() < 0.06 * scale
        assert sample.var() == pytest.approx(scale**2 * math.pi**2 / 3, rel=0.03)
        share = (sample < scale * math.log(3)).float().mean()  # three quarters, by its definition
        assert share == pytest.approx(0.75, abs=0.01)
    assert noise(11).abs().max() == 0 == noise(1000).abs().max()


def test_noise_follows_the_place_of_a_token_and_nothing_else():
    place_T = torch.randperm(20_000)[:100]
    assert noise(3, place_T=place_T).equal(noise(3)[place_T])
    whole = noise(3)
    for other in (noise(4) * whole.std() / noise(4).std(), noise(3, "another")):
        both = torch.stack([whole.flatten(), other.flatten()])
        assert torch.corrcoef(both)[0, 1].abs() < 0.03
    assert torch.corrcoef(whole.t())[0, 1].abs() < 0.03, "experts have noise of their own"


def test_noise_moves_the_choice_in_training_alone():
    config = decoders.with_routers(moma(), noise=RouterNoise.Config(end_step=10))
    model, plain = filled(config), filled(moma())
    step = ForwardSettings(step=1)
    assert not torch.allclose(outputs(model, step), outputs(plain), atol=1e-3)
    torch.testing.assert_close(outputs(model), outputs(plain))
    torch.testing.assert_close(outputs(model.eval(), step), outputs(plain))


def test_a_step_with_noise_is_the_same_however_the_batch_is_cut(tmp_path, data, seed):
    parameters = []
    for rows in (2, 4):
        config = tiny_config(tmp_path / str(rows), data, moma(), steps=2)
        config = stages.upcycled(config, str(seed), noise_steps=10, temperature=4.0)
        config.training.local_batch_size = rows
        parameters.append(run(config).model.state_dict())
    for name, value in parameters[0].items():
        torch.testing.assert_close(value, parameters[1][name], rtol=1e-4, atol=1e-5)
