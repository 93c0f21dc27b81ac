"""Precision below fp32: what is rounded, and what is not whatever a model is cast to."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from batches import batch_of, context_of
from exported_models import export
from tiny_runs import MAMBAS, MODELS

from earlyfuse.models.blocks.branch import Matrix
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.indexed_parameters import masked_sums, sums_by_group
from earlyfuse.models.blocks.linear import HeadNorm, Linear, RMSNorm
from earlyfuse.models.blocks.mamba import GROUPS, Mamba
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.decoder import Embedding
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model

ROWS, S, D = 4, 2048, 16
T = ROWS * S
# rounding once to bf16 errs by 0.2 %
BOUND = 0.01
FAMILIES = MODELS | MAMBAS


def layout_of(groups: int = 2, present: int | None = None) -> ForwardContext:
    """Random groups for T tokens; the first ``present`` alone."""
    generator = torch.Generator().manual_seed(1)
    modality = torch.randint(0, present or groups, (ROWS, S), generator=generator)
    positions = torch.arange(S).expand(ROWS, S)
    return context_of(modality.to(torch.uint8), positions, tuple(range(groups)), 0, 1e4)


LAYERS = {
    "rms_norm": partial(RMSNorm, D),
    "head_norm": partial(HeadNorm, 2, D // 2),
    "linear": lambda groups: Linear(Matrix(D, 8, groups)),
    "feed_forward": lambda groups: FeedForward.Config(dim=D, hidden_dim=8, groups=groups).build(),
    "mamba": lambda groups: Mamba.Config(
        dim=D, inner_dim=D, dt_rank=2, states=2, **dict.fromkeys(GROUPS, groups)
    ).build(),
}


def gradients(layer, x, dy, *others):
    out = layer(x, *others)
    return torch.autograd.grad(out, list(layer.parameters()), dy.to(out.dtype))


def errors(layer, x, *others) -> dict[str, float]:
    """Relative error of each parameter's gradient in bf16, against fp32."""
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.data = 0.5 + 0.3 * torch.randn(parameter.shape, generator=generator)
    rounded = layer.bfloat16()
    dy = torch.randn(rounded(x, *others).shape, generator=generator) + 0.3  # biases sum to much
    dy = dy.bfloat16()
    found = gradients(rounded, x, dy, *others)
    wide = x.float() if x.is_floating_point() else x
    expected = gradients(deepcopy(rounded).float(), wide, dy.float(), *others)
    names = [name for name, _ in layer.named_parameters()]
    return {
        name: float((a.float() - b).norm() / b.norm())
        for name, a, b in zip(names, found, expected, strict=True)
    }


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_bf16_are_those_in_fp32_rounded(name, groups):
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.view(T, 2, -1) if name == "head_norm" else x
    found = errors(LAYERS[name](groups), x, layout_of(max(groups, 2)))
    assert {key: error for key, error in found.items() if not error <= BOUND} == {}


@pytest.mark.parametrize("words", [4, 64, 4096])
def test_gradients_of_frequent_words_in_bf16_are_those_in_fp32_rounded(words):
    tokens = torch.randint(0, words, (T,), generator=torch.Generator().manual_seed(0))
    tokens[::4] = 0  # what begins or ends something is every so many tokens
    found = errors(Embedding(words, D), tokens)
    assert found["weight"] <= BOUND


@pytest.mark.parametrize("sums", [sums_by_group, masked_sums])
def test_sums_by_group_are_of_their_own_tokens_alone(sums):
    group, values = layout_of(3, present=2).group_T, torch.randn(T, 2, 3, dtype=torch.float64)
    expected = torch.stack([values[group == g].sum(0) for g in range(3)])
    torch.testing.assert_close(sums(values, group, 3), expected)
    assert (expected[2] == 0).all()  # of no tokens
    values[group == 0] = torch.nan
    found = sums(values.bfloat16(), group, 3)
    assert found.dtype == torch.float32
    assert found[0].isnan().all() and found[1:].isfinite().all()


def test_untied_norms_compile_into_one_graph_and_read_nothing_on_the_host():
    layout, x = layout_of(), torch.randn(T, 2, D // 2, requires_grad=True)
    norms = LAYERS["rms_norm"](2), LAYERS["head_norm"](2)
    for parameter in (p for norm in norms for p in norm.parameters()):
        torch.nn.init.normal_(parameter)

    def both(x):
        return norms[0](norms[1](x, layout).flatten(1), layout)

    weights = [p for norm in norms for p in norm.parameters()]
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for function in (both, compiled):
        out = function(x)
        found = torch.autograd.grad(out.square().sum(), [x, *weights])
        if function is both:
            expected = found
    torch.testing.assert_close(found, expected)

    meta = deepcopy(layout)
    meta.group_T = meta.group_T.to("meta")  # whoever asks for a value there fails
    norm = norms[0].to("meta")
    norm(torch.randn(T, D, device="meta"), meta).sum().backward()
    assert norm.weight.grad.shape == norm.weight.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_in_the_type_that_it_is_cast_to(name, dtype):
    model = FAMILIES[name]().build()
    model.init_states()
    tokens = torch.randint(0, 48, (2, 32), generator=torch.Generator().manual_seed(0))
    inputs = batch_of(tokens, (tokens >= 32).to(torch.uint8))
    expected = model.eval()(inputs)
    assert model.to(dtype)(inputs).dtype == dtype
    # of the median token: where rounding changes a choice of experts, a token is another
    error = (model(inputs) - expected).abs().flatten(0, 1).amax(-1) / expected.abs().max()
    assert error.median() <= (1e-5 if dtype == torch.float64 else 0.05)
    model.train()(inputs).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["dense", "moma", "mot", "mixture_of_mamba"])
def test_autocast_is_refused_by_name(name):
    model, tokens = FAMILIES[name]().build(), torch.zeros(2, 32, dtype=torch.int64)
    model.init_states()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"torch.autocast \(cpu, torch.bfloat16\) must be off"):
            model(batch_of(tokens))
        with torch.autocast("cpu", enabled=False):
            assert model(batch_of(tokens)).dtype == torch.float32


@pytest.mark.parametrize("name", ["moma_causal", "token_choice", "mixture_of_mamba"])
def test_a_model_loaded_in_bf16_keeps_scans_and_routers_in_fp32(tmp_path, name):
    exported = export(FAMILIES[name](), tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model", dtype=torch.bfloat16)
    kept = (".scan.", ".router.")
    for key, value in exported.named_parameters():
        wanted = value if any(part in key for part in kept) else value.bfloat16()
        found = loaded.get_parameter(key)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), key
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, torch.bfloat16}
    tokens = torch.randint(0, 48, (1, 16), generator=torch.Generator().manual_seed(0))
    assert loaded(batch_of(tokens)).dtype == torch.bfloat16
    loaded, _ = load_model(tmp_path / "model", dtype=torch.float64)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
