"""Mixers of the public Mixture-of-Mamba compute here what they do there, and go back.

What they do there is written out here once more from its published mechanics: boolean masks for
each projection, one step of the recurrence at a time.
"""

import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from batches import context_of

from earlyfuse.models.context import ForwardContext
from earlyfuse.models.state_dicts.mixture_of_mamba import (
    load_mixture_of_mamba,
    load_mixture_of_mamba_stack,
    save_mixture_of_mamba,
    save_mixture_of_mamba_stack,
)

DIM, INNER, STATES, RANK, TAPS = 12, 20, 5, 3, 4
ROWS, LENGTH = 2, 19
PROJECTIONS = {
    "in_proj": (2 * INNER, DIM),
    "x_proj": (RANK + 2 * STATES, INNER),
    "dt_proj": (INNER, RANK),
    "out_proj": (DIM, INNER),
}
ABLATIONS = [
    [name for name, split in zip(PROJECTIONS, choice, strict=True) if split]
    for choice in product((False, True), repeat=4)
]


def public_state(modalities: int, split: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values for the public class; large enough for the recurrence to matter."""
    random = torch.Generator().manual_seed(seed)

    def values(*shape: int, scale: float = 0.5) -> torch.Tensor:
        return scale * torch.randn(shape, generator=random)

    state = {
        "conv1d.weight": values(INNER, 1, TAPS),
        "conv1d.bias": values(INNER),
        "A_log": values(INNER, STATES) - 1.0,
        "D": values(INNER),
    }
    for name, shape in PROJECTIONS.items():
        experts = [f"local_experts_{name}.{i}" for i in range(modalities)]
        parts = experts if name in split else [name]
        for part in parts:
            state[f"{part}.weight"] = values(*shape)
            if name == "dt_proj":
                state[f"{part}.bias"] = values(INNER) - 1.0
    return state


def public_forward(
    state: dict[str, torch.Tensor], x_BSD: torch.Tensor, masks: list[torch.Tensor]
) -> torch.Tensor:
    """The public block; the bias of a shared dt_proj is added, as its dense baseline does."""

    def project(name: str, x_TF: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" in state:
            return F.linear(x_TF, state[f"{name}.weight"], state.get(f"{name}.bias"))
        out = None
        for i, mask_T in enumerate(masks):
            expert = f"local_experts_{name}.{i}"
            part = F.linear(x_TF[mask_T], state[f"{expert}.weight"], state.get(f"{expert}.bias"))
            out = torch.empty(len(x_TF), part.shape[1]) if out is None else out
            out[mask_T] = part
        return out

    rows, length, _ = x_BSD.shape
    x, z = project("in_proj", x_BSD.flatten(0, 1)).split(INNER, -1)
    padded = F.pad(x.view(rows, length, INNER), (0, 0, TAPS - 1, 0))
    mixed = state["conv1d.bias"] + sum(
        padded[:, tap : tap + length] * state["conv1d.weight"][:, 0, tap] for tap in range(TAPS)
    )
    u = F.silu(mixed)
    low, b, c = project("x_proj", u.flatten(0, 1)).split([RANK, STATES, STATES], -1)
    step = F.softplus(project("dt_proj", low)).view(rows, length, INNER, 1)
    b, c = b.view(rows, length, 1, STATES), c.view(rows, length, 1, STATES)
    rates = -state["A_log"].exp()
    held, outputs = torch.zeros(rows, INNER, STATES), []
    for t in range(length):
        held = (step[:, t] * rates).exp() * held + step[:, t] * b[:, t] * u[:, t, :, None]
        outputs.append((held * c[:, t]).sum(-1) + state["D"] * u[:, t])
    y = torch.stack(outputs, 1) * F.silu(z.view(rows, length, INNER))
    return project("out_proj", y.flatten(0, 1)).view(rows, length, DIM)


def inputs(modalities: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    x_BSD = torch.randn(ROWS, LENGTH, DIM, generator=random)
    return x_BSD, torch.randint(modalities, (ROWS, LENGTH), generator=random)


def layout_of(modality_BS: torch.Tensor, modalities: int) -> ForwardContext:
    positions_BS = torch.arange(LENGTH).expand(ROWS, LENGTH)
    ids = tuple(range(modalities))
    return context_of(modality_BS.to(torch.uint8), positions_BS, ids, 0, 1e4)


@pytest.mark.parametrize("split", ABLATIONS, ids="+".join)
def test_a_public_mixer_computes_the_same_here_and_goes_back_as_it_was(split):
    modalities = 2 + len(split) % 2
    state = public_state(modalities, split)
    mixer = load_mixture_of_mamba(state)
    x_BSD, modality_BS = inputs(modalities)
    masks = [(modality_BS == i).flatten() for i in range(modalities)]
    expected = public_forward(state, x_BSD, masks)
    quiet = public_forward(state | {"A_log": state["A_log"] + 0.1}, x_BSD, masks)
    assert (quiet - expected).norm() > 0.01 * expected.norm(), "the scan matters"
    with torch.no_grad():
        found = mixer(x_BSD.flatten(0, 1), layout_of(modality_BS, modalities))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.view_as(expected), expected, rtol=0, atol=2e-6 * scale)
    back = save_mixture_of_mamba(mixer)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype, name


def test_a_shared_step_bias_counts_though_the_public_mixture_forgets_it():
    state = public_state(2, ["in_proj"])
    x_BSD, modality_BS = inputs(2)
    layout = layout_of(modality_BS, 2)
    with torch.no_grad():
        with_bias = load_mixture_of_mamba(state)(x_BSD.flatten(0, 1), layout)
        without = load_mixture_of_mamba(state | {"dt_proj.bias": torch.zeros(INNER)})
        assert (without(x_BSD.flatten(0, 1), layout) - with_bias).abs().max() > 1e-2


def test_what_is_loaded_is_a_copy_with_gradients_in_the_types_of_the_tensors():
    state = public_state(3, list(PROJECTIONS))
    kept = {name: t.bfloat16() if "local" in name else t for name, t in state.items()}
    mixer = load_mixture_of_mamba(kept)
    assert mixer.in_proj.weight.dtype == torch.bfloat16 == mixer.scan.dt_bias.dtype
    assert mixer.scan.A_log.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in mixer.parameters())
    with torch.no_grad():
        mixer.scan.A_log.zero_()
        mixer.conv.weight.zero_()
    assert kept["A_log"].any() and kept["conv1d.weight"].any()


def without(*names: str):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


ALL = list(PROJECTIONS)
WRONG = [
    (ALL, without("local_experts_x_proj.1.weight"), [r"missing    local_experts_x_proj.1.weight"]),
    (ALL, without("conv1d.bias"), [r"missing    conv1d.bias \(20,\)"]),
    (ALL, without("A_log", "D"), [r"missing    A_log", r"missing    D \(20,\)"]),
    ([], without("dt_proj.bias"), [r"missing    dt_proj.bias \(20,\)"]),
    ([], without("in_proj.weight"), [r"missing    in_proj.weight \(40, 12\)"]),
    # the public class has one or the other
    (ALL, lambda s: s | public_state(2, []), [f"unexpected {name}.weight" for name in ALL]),
    (ALL, lambda s: s | {"norm.weight": torch.ones(DIM)}, [r"unexpected norm.weight \(12,\)"]),
    ([], lambda s: s | {"in_proj.bias": torch.ones(40)}, [r"unexpected in_proj.bias \(40,\)"]),
    (
        ALL,
        lambda s: s | {"local_experts_out_proj.2.weight": torch.ones(DIM, INNER)},
        [r"missing    local_experts_in_proj.2.weight", "missing    local_experts_dt_proj.2.bias"],
    ),
    ([], lambda s: s | {"conv1d.weight": torch.ones(TAPS, 1, INNER)}, ["mis-shaped conv1d.weight"]),
    (
        [],
        lambda s: s | {"conv1d.weight": torch.ones(INNER, TAPS)},
        [r"mis-shaped conv1d.weight: \(20, 4\) instead of \(20, 1, 4\)"],
    ),
    (ALL, lambda s: s | {"D": torch.ones(7)}, [r"mis-shaped D: \(7,\) instead of \(20,\)"]),
    (
        ALL,  # of tensors that disagree, the sizes are those of A_log
        lambda s: s | {"A_log": torch.ones(INNER, 9), "extra": torch.ones(1)},
        [r"mis-shaped local_experts_x_proj.0.weight: \(13, 20\) instead of", r"unexpected extra"],
    ),
    (
        ALL,
        lambda s: s | {"local_experts_in_proj.0.weight": torch.ones(DIM, 40)},
        [r"mis-shaped local_experts_in_proj.0.weight: \(12, 40\) instead of \(40, 12\)"],
    ),
    ([], lambda s: s | {"D": torch.ones(INNER, dtype=torch.int64)}, ["mis-typed  D"]),
    ([], lambda s: {}, ["missing    in_proj.weight", "missing    A_log", "missing    conv1d"]),
    ([], lambda s: s | {"A_log": torch.ones(4)}, ["holds a Mamba-2: A_log.*rate of decay for all"]),
    ([], lambda s: s | {"dt_bias": torch.ones(4)}, ["holds a Mamba-2: dt_bias"]),
]


@pytest.mark.parametrize(("split", "change", "says"), WRONG)
def test_keys_that_are_wrong_are_all_named(split, change, says):
    state = change(public_state(2, split))
    with pytest.raises(ValueError) as raised:
        load_mixture_of_mamba(state)
    for line in says:
        assert re.search(line, str(raised.value)), str(raised.value)


# ---------------------------------------------------------------- the example's stack


def stack_of(first: dict, second: dict) -> dict[str, torch.Tensor]:
    state = {
        "block1.norm.weight": torch.linspace(0.5, 1.5, DIM),
        "block2.norm.weight": torch.ones(DIM),
    }
    state |= {f"block1.mamba_model.{name}": tensor for name, tensor in first.items()}
    return state | {f"block2.mamba_model.{name}": tensor for name, tensor in second.items()}


def test_the_public_stack_is_two_blocks_of_ours():
    mixers = [public_state(2, list(PROJECTIONS)), public_state(2, ["x_proj"], seed=1)]
    state = stack_of(*mixers)
    blocks = load_mixture_of_mamba_stack(state)
    x_BSD, modality_BS = inputs(2)
    masks = [(modality_BS == i).flatten() for i in range(2)]
    expected, found = x_BSD, x_BSD.flatten(0, 1)
    for number, (mixer, block) in enumerate(zip(mixers, blocks, strict=True), 1):
        normed = F.rms_norm(expected, (DIM,), state[f"block{number}.norm.weight"], 1e-5)
        expected = expected + public_forward(mixer, normed, masks)
        with torch.no_grad():
            found = block(found, layout_of(modality_BS, 2))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.view_as(expected), expected, rtol=0, atol=5e-6 * scale)
    back = save_mixture_of_mamba_stack(blocks)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="two blocks of a mixer alone"):
        save_mixture_of_mamba_stack(blocks[:1])
    lost = ("block2.norm.weight", "block1.mamba_model.local_experts_x_proj.1.weight")
    with pytest.raises(ValueError) as raised:
        load_mixture_of_mamba_stack(without(*lost)(state))
    assert all(f"missing    {name} (" in str(raised.value) for name in lost)
    assert "2 of its keys" in str(raised.value)
