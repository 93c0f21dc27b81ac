"""Causal convolution: fast paths = reference = torch's convolution of each document alone."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_equal, outputs_and_gradients, rms_ratio
from torch.utils.flop_counter import FlopCounterMode

from earlyfuse.kernels.causal_conv1d import causal_conv1d

pytest.importorskip("triton")


def documents(*lengths, began=0):
    """Positions of one row; the first document is ``began`` tokens old."""
    parts = [torch.arange(length) for length in lengths]
    parts[0] = parts[0] + began
    return torch.cat(parts).to(DEVICE)


def problem(rows, tokens, channels, width, dtype=torch.float32, bias=True, state=True):
    """x, weight, bias and initial state; all want gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(DEVICE, dtype).requires_grad_()

    return (
        normal(rows, tokens, channels),
        normal(channels, width),
        normal(channels) if bias else None,
        normal(rows, width - 1, channels) if state else None,
    )


def convolve(x, weight, bias, state, **options):
    return causal_conv1d(x, weight, bias, initial_state_BVD=state, **options)


# rows, tokens, channels, width, bias, state, silu, lengths of documents, age of the first
CASES = {
    "two pieces on a CPU": (1, 40, 4100, 4, True, True, True, (3, 13, 1, 23), 5),
    "two chunks of Triton": (1, 129, 3, 4, True, True, True, (60, 5, 63, 1), 1),
    "several documents": (2, 12, 5, 4, True, True, True, (1, 2, 3, 1, 5), 0),
    "the first began before": (1, 9, 3, 4, True, True, True, (4, 5), 2),
    "no state although it began before": (1, 9, 3, 4, True, False, True, (4, 5), 7),
    "one endless document": (2, 7, 3, 3, False, True, False, None, 0),
    "shorter than the taps": (2, 2, 4, 4, True, True, True, (2,), 1),
    "one token": (3, 1, 1, 2, False, True, True, (1,), 0),
    "no tokens": (2, 0, 3, 4, True, True, True, None, 0),
    "no channels": (2, 3, 0, 4, True, True, True, (2, 1), 0),
}


def check_against_reference(backend, dtype, tolerance, case):
    rows, tokens, channels, width, bias, state, silu, lengths, began = case
    positions = None
    if lengths is not None:
        positions = documents(*lengths, began=began).expand(rows, -1)
    inputs = problem(rows, tokens, channels, width, dtype, bias, state)
    options = {"positions_BL": positions, "silu": silu}
    expected = outputs_and_gradients(convolve, inputs, backend="reference", **options)
    actual = outputs_and_gradients(convolve, inputs, backend=backend, **options)
    assert_equal(actual, expected, tolerance)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("nan_filled_memory")
def test_fast_paths_equal_the_reference(name, backend):
    if (name, backend) == ("two pieces on a CPU", "triton") and DEVICE == "cpu":
        pytest.skip("too wide for the interpreter")
    check_against_reference(backend, torch.float32, 1e-5, CASES[name])
    if name == "several documents":
        check_against_reference(backend, torch.bfloat16, 1e-2, CASES[name])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1000, 1536])
def test_triton_equals_the_reference_at_sizes_of_models(dtype, channels):
    case = (2, 2051, channels, 4, True, True, True, (700, 1, 350, 1000), 9)
    check_against_reference("triton", dtype, 1e-5 if dtype == torch.float32 else 1e-2, case)


def test_each_document_is_convolved_as_if_it_stood_alone():
    lengths = (1, 6, 2, 3, 9)
    x, weight, bias, _ = problem(1, sum(lengths), 6, 4)
    for backend in ("reference", "torch"):
        y, _ = causal_conv1d(
            x, weight, bias, positions_BL=documents(*lengths)[None], backend=backend
        )
        alone = [
            F.conv1d(F.pad(part.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=6)
            for part in x.split(lengths, 1)
        ]
        assert rms_ratio(y, F.silu(torch.cat(alone, 2)).transpose(1, 2)) <= 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_not_even_nan_passes_from_one_document_to_another(backend):
    x, weight, bias, state = problem(1, 8, 3, 4)
    positions = documents(3, 5)[None]
    clean = outputs_and_gradients(convolve, (x, weight, bias, state), positions_BL=positions)
    with torch.no_grad():
        x[:, :3], state[:] = torch.nan, torch.nan
    y, final, dx, _, _, dstate = outputs_and_gradients(
        convolve, (x, weight, bias, state), positions_BL=positions, backend=backend
    )
    assert rms_ratio(y[:, 3:], clean[0][:, 3:]) <= 1e-6
    assert torch.equal(final, clean[1])
    assert rms_ratio(dx[:, 3:], clean[2][:, 3:]) <= 1e-6
    assert torch.equal(dstate, torch.zeros_like(dstate))  # the row begins with a document


@pytest.mark.parametrize("lengths", [(6, 1, 2, 5), (1,) * 14], ids=["segments", "decoding"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_segments_joined_by_the_states_equal_the_whole(backend, lengths):
    x, weight, bias, state = problem(2, 14, 4, 4)
    positions = documents(5, 1, 8, began=3).expand(2, -1)

    def in_segments(x, weight, bias, state, positions_BL):
        outputs = []
        for part, places in zip(x.split(lengths, 1), positions_BL.split(lengths, 1), strict=True):
            y, state = convolve(part, weight, bias, state, positions_BL=places, backend=backend)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    inputs = (x, weight, bias, state)
    whole = outputs_and_gradients(convolve, inputs, positions_BL=positions, backend=backend)
    for have, want in zip(
        outputs_and_gradients(in_segments, inputs, positions_BL=positions), whole, strict=True
    ):
        assert rms_ratio(have, want) <= 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_of_a_wider_projection_is_taken_without_a_copy(backend):
    x, weight, bias, _ = problem(2, 6, 8, 4)
    expected = causal_conv1d(x[..., 4:].contiguous(), weight[4:], bias[4:], backend="reference")
    actual = causal_conv1d(x[..., 4:], weight[4:], bias[4:], backend=backend)
    for have, want in zip(actual, expected, strict=True):
        assert rms_ratio(have, want) <= 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_the_slopes_of_the_outputs(backend):
    inputs = problem(2, 6, 2, 3, torch.float64)
    positions = documents(2, 4, began=1).expand(2, -1)

    def function(x, weight, bias, state):
        return convolve(x, weight, bias, state, positions_BL=positions, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_runs_give_the_same_bits(backend):
    inputs = problem(2, 5, 3, 4)
    first, second = (outputs_and_gradients(convolve, inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_is_the_same_in_any_layout(backend, silu):
    inputs = problem(2, 6, 3, 4)
    positions = documents(1, 2, 3).expand(2, -1)
    outputs = convolve(*inputs, positions_BL=positions, silu=silu, backend=backend)
    dense = [torch.randn_like(y) for y in outputs]
    expected = torch.autograd.grad(outputs, inputs, dense, retain_graph=True)
    turned = [dy.mT.contiguous().mT for dy in dense]
    found = torch.autograd.grad(outputs, inputs, turned)
    assert all(
        torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_leaves_the_gradient_it_is_given_as_it_was(backend):
    x, *parameters = problem(1, 5, 3, 4)
    positions = documents(2, 3)[None]
    y, _ = convolve(x, *parameters, positions_BL=positions, silu=False, backend=backend)
    dy = torch.ones_like(y)
    torch.autograd.grad(y, x, dy)
    assert torch.equal(dy, torch.ones_like(y))


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_gradient_alone_is_what_it_is_among_all(backend, wanted):
    inputs = problem(1, 5, 3, 4)
    expected = outputs_and_gradients(convolve, inputs, backend=backend)[2 + wanted]
    alone = [t if i == wanted else t.detach() for i, t in enumerate(inputs)]
    assert torch.equal(outputs_and_gradients(convolve, alone, backend=backend)[2], expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_registered_op_keeps_the_rules_of_torch_library(backend):
    x, weight, bias, state = problem(1, 5, 3, 4)
    positions = documents(2, 3)[None]
    op = torch.ops.earlyfuse.causal_conv1d
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(op, (x, weight, None, None, None, False, backend), test_utils=checks)
    if backend == "torch":  # tracing runs the op many times: too long in the interpreter
        checks.append("test_aot_dispatch_dynamic")
    everything = (x, weight, bias, positions, state, True, backend)
    torch.library.opcheck(op, everything, test_utils=checks)


def test_counted_flops_are_those_of_the_taps():
    x, weight, bias, state = problem(2, 6, 3, 4)
    with FlopCounterMode(display=False) as counter:
        y, _ = convolve(x, weight, bias, state, backend="torch")
    one_pass = 2 * 2 * 6 * 3 * 4
    assert counter.get_total_flops() == one_pass
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), [x, weight])
    assert counter.get_total_flops() == 3 * one_pass  # dx, dweight, and SiLU's input once more
