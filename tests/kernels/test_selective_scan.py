"""Selective scan: every backend = its definition = transformers' Mamba; resets, states, groups."""

from itertools import pairwise

import pytest
import torch
from kernel_checks import outputs_and_gradients, rms_ratio
from scan_cases import OPTIONS, converted, results, scan_inputs
from torch.utils.flop_counter import FlopCounterMode

from earlyfuse.kernels.selective_scan import (
    op,
    segment_decay,
    selective_scan,
    torch_impl,
)

FLOATS = (0, 1, 2, 3, 4, 5, 6, 7, 10)


CASES = {
    "all options, odd sizes": ((2, 37, 5, 3), ()),
    "no option": ((2, 21, 5, 16), OPTIONS),
    "one bias for all tokens, no gate": ((1, 33, 4, 4), ("group", "z")),
    "no skip": ((1, 18, 4, 4), ("skip",)),
    "whole chunks": ((1, 32, 3, 2), ()),
    "one token": ((3, 1, 2, 16), ()),
    "one of everything": ((1, 1, 1, 1), ()),
    "no sequence": ((0, 5, 3, 4), ()),
    "no channel": ((2, 5, 0, 4), ()),
}


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("case", CASES)
def test_fast_path_equals_the_definition_in_outputs_and_every_gradient(case, monkeypatch):
    sizes, without = CASES[case]
    monkeypatch.setattr(torch_impl, "STEP", 2 * sizes[3])  # two channels at a time
    inputs = scan_inputs(*sizes, without)
    expected, actual = results(inputs, "reference"), results(inputs, "torch")
    assert (
        len(actual)
        == len(expected)
        == 2 + sum(t is not None for t in inputs) - sum(inputs[i] is not None for i in (8, 9))
    )
    for have, want in zip(actual, expected, strict=True):
        assert have.dtype == want.dtype and have.shape == want.shape
        assert rms_ratio(have, want) < 1e-6


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_without_tokens_the_state_and_its_gradient_pass_unchanged(backend):
    inputs = scan_inputs(2, 0, 3, 4)
    y, final = selective_scan(*inputs, backend=backend)
    assert y.shape == (2, 0, 3) and torch.equal(final, inputs[10])
    dA, dstate = torch.autograd.grad(
        final.sum(), [inputs[2], inputs[10]], allow_unused=True, materialize_grads=True
    )
    assert not dA.any() and dstate.eq(1).all()


def test_the_definition_is_that_of_transformers_mamba():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    inputs = scan_inputs(2, 19, 6, 16, ("group", "reset", "state"))
    u, delta, A, B, C, skip, z, bias = inputs[:8]
    y_BDL, final_BDN = modeling.mamba_selective_scan(
        *(u.mT, delta.mT, A, B.mT, C.mT, skip, z.mT, bias[0]),
        delta_softplus=True,
        return_last_state=True,
    )
    y, final = selective_scan(*inputs, backend="reference")
    assert rms_ratio(y, y_BDL.mT) < 1e-6
    assert rms_ratio(final, final_BDN) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_those_of_the_function(backend):
    inputs = scan_inputs(1, 4, 2, 2, dtype=torch.float64)
    group, reset = inputs[8:10]

    def scan(*floats):
        return selective_scan(*floats[:8], group, reset, floats[8], backend=backend)

    assert torch.autograd.gradcheck(scan, [inputs[i] for i in FLOATS])


@pytest.mark.parametrize("needed", FLOATS)
def test_each_gradient_comes_right_when_no_other_is_asked_for(needed):
    full = scan_inputs(2, 19, 3, 4)

    def gradient(of):
        leaves = [
            t.detach().clone().requires_grad_() if i in of else t.detach()
            for i, t in enumerate(full)
        ]
        y, final = selective_scan(*leaves, backend="torch")
        return torch.autograd.grad(y.sin().sum() + final.sin().sum(), leaves[needed])[0]

    torch.testing.assert_close(gradient({needed}), gradient(set(FLOATS)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1], ids=["output", "final state"])
def test_gradients_come_through_one_result_alone(which):
    inputs = scan_inputs(1, 19, 3, 4)
    wanted = [inputs[i] for i in FLOATS]

    def gradients(backend):
        result = selective_scan(*inputs, backend=backend)[which]
        found = torch.autograd.grad(result.sin().sum(), wanted, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]

    for have, want in zip(gradients("torch"), gradients("reference"), strict=True):
        assert torch.equal(have, want) or rms_ratio(have, want) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_documents_in_one_row_are_scanned_as_if_each_stood_alone(backend):
    inputs = scan_inputs(1, 40, 3, 4, ("state",))
    borders = [0, 7, 16, 33, 40]
    inputs[9] = torch.zeros(1, 40, dtype=torch.bool)
    inputs[9][0, borders[:-1]] = True
    packed, final = selective_scan(*inputs, backend=backend)
    for start, stop in pairwise(borders):
        document = [
            t[:, start:stop] if i in (0, 1, 3, 4, 6, 8) else t for i, t in enumerate(inputs)
        ]
        document[9] = None
        alone, last = selective_scan(*document, backend=backend)
        assert rms_ratio(packed[:, start:stop], alone) < 1e-6
    assert rms_ratio(final, last) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_gradient_crosses_a_reset(backend):
    inputs = scan_inputs(1, 20, 3, 4, ("skip", "z"))
    inputs[9] = torch.zeros(1, 20, dtype=torch.bool)
    inputs[9][0, 12] = True
    y, final = selective_scan(*inputs, backend=backend)
    du, ddelta, dstate = torch.autograd.grad(
        y[:, 12:].sum() + final.sum(), [inputs[0], inputs[1], inputs[10]]
    )
    assert not du[:, :12].any() and not ddelta[:, :12].any() and not dstate.any()
    assert du[:, 12:].all()


def test_an_infinite_decay_exponent_at_a_reset_keeps_gradients_finite():
    inputs = scan_inputs(1, 18, 2, 4)
    inputs[1] = (inputs[1].detach() + 80).requires_grad_()  # every decay underflows
    for gradient in results(inputs, "torch"):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("step", [16, 21, 1])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_segments_joined_by_the_state_are_the_whole(step, backend):
    """A step of 1 is decoding."""
    inputs = scan_inputs(2, 40, 3, 4)
    timed = (0, 1, 3, 4, 6, 8, 9)

    def joined_segments(*arguments, backend):
        ys, state = [], arguments[10]
        for start in range(0, 40, step):
            at = slice(start, start + step)
            part = [t[:, at] if i in timed else t for i, t in enumerate(arguments)]
            y, state = selective_scan(*part[:10], state, backend=backend)
            ys.append(y)
        return torch.cat(ys, 1), state

    whole = results(inputs, backend)
    joined = outputs_and_gradients(joined_segments, inputs, backend=backend)
    for have, want in zip(joined, whole, strict=True):
        assert rms_ratio(have, want) < 1e-6


def test_the_final_state_is_affine_in_the_initial_one_by_the_segments_decay():
    for without, alive in ((("reset",), True), ((), False)):
        inputs = scan_inputs(2, 19, 3, 4, without)
        _, delta, A, *_, bias, group, reset, state = inputs
        _, final = selective_scan(*inputs)
        _, from_zero = selective_scan(*inputs[:10])
        decay = segment_decay(delta, A, bias, group, reset)
        assert decay.any().item() is alive
        assert rms_ratio(from_zero + decay * state, final) < 1e-6


def test_ranks_mirror_backward_with_the_decay_and_the_state_gradient_alone():
    """dfinal of a segment = state gradient of the next one's own outputs + its decay · dfinal."""
    inputs = scan_inputs(1, 24, 3, 4, ("reset",))
    start = inputs[10].detach().requires_grad_()
    y, final = selective_scan(*inputs[:10], start, backend="torch")
    dfinal = torch.randn(final.shape, generator=torch.Generator().manual_seed(1))
    (whole,) = torch.autograd.grad((y, final), start, (y.detach(), dfinal), retain_graph=True)
    (own,) = torch.autograd.grad(y, start, y.detach())
    decay = segment_decay(inputs[1], inputs[2], inputs[7], inputs[8])
    assert rms_ratio(own + decay * dfinal, whole) < 1e-6


def test_a_group_bias_is_that_bias_added_to_each_of_its_tokens():
    inputs = scan_inputs(2, 19, 3, 4, groups=3)
    added = list(inputs)
    added[1] = (inputs[1] + inputs[7][inputs[8]]).detach().requires_grad_()
    added[7] = added[8] = None
    grouped, plain = results(inputs, "torch"), results(added, "torch")
    assert rms_ratio(grouped[0], plain[0]) < 1e-6
    for group in range(3):
        assert rms_ratio(grouped[9][group], plain[3][inputs[8] == group].sum(0)) < 1e-5


def test_slices_of_a_projections_output_are_read_as_they_are():
    inputs = scan_inputs(2, 19, 4, 4)
    joined = torch.cat([inputs[i] for i in (0, 1, 3, 4, 6)], 2).detach()
    sliced = list(inputs)
    for i, part in zip((0, 1, 3, 4, 6), joined.split([4, 4, 4, 4, 4], 2), strict=True):
        sliced[i] = part.requires_grad_()
    for have, want in zip(results(sliced, "torch"), results(inputs, "torch"), strict=True):
        assert rms_ratio(have, want) < 1e-6


@pytest.mark.parametrize("offset", [-14.0, 25.0])
def test_tiny_and_large_steps_keep_their_precision(offset):
    inputs = scan_inputs(1, 17, 3, 4, ("group", "bias"))
    inputs[1] = (inputs[1].detach() + offset).requires_grad_()
    exact = converted(inputs, torch.float64)
    for have, want in zip(results(inputs, "torch"), results(exact, "reference"), strict=True):
        assert rms_ratio(have, want) < 2e-6


def test_bf16_stays_within_its_rounding():
    inputs = scan_inputs(2, 37, 5, 16, dtype=torch.bfloat16)
    exact = converted(inputs)
    inputs[8] = inputs[8].to(torch.uint8)
    expected = results(exact, "reference")
    for name in ("torch", "reference"):
        actual = results(inputs, name)
        assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
        for have, want in zip(actual, expected, strict=True):
            assert rms_ratio(have, want) < 1e-2


def test_only_the_states_before_each_chunk_are_kept():
    inputs = scan_inputs(2, 100, 6, 16)
    given = {t.data_ptr() for t in inputs}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in given:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(*inputs, backend="torch")
    assert [t.shape for t in kept] == [(2, 7, 16, 6)]  # ceil(100 / 16) chunks
    assert op.selective_scan(*inputs, False, "torch")[2].numel() == 0
    with torch.no_grad():
        assert selective_scan(*inputs, backend="torch")[0].grad_fn is None


def test_flops_are_those_counted_by_hand():
    inputs = scan_inputs(2, 9, 5, 4)
    elements = 2 * 9 * 5 * 4
    with FlopCounterMode(display=False) as forward:
        y, _ = selective_scan(*inputs, backend="torch")
    # decay: product, exponential; input: product; state: product, sum; output: product, sum
    assert forward.get_total_flops() == 7 * elements
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    # state again 5, output 2; dh 3, dC 2, dB 2, dx 2; decayed state 1, gradient of dt A 1,
    # of dt 2, of A 2
    assert backward.get_total_flops() == 22 * elements
