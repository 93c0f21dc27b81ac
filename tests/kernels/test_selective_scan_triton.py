"""The selective scan's Triton kernels equal its definition, on a GPU or in Triton's interpreter."""

from functools import partialmethod

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, rms_ratio
from scan_cases import OPTIONS, converted, results, scan_inputs

from earlyfuse.kernels import selective_scan as package

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_impl = pytest.importorskip("earlyfuse.kernels.selective_scan.triton_impl")
_over_channels = pytest.importorskip(
    "earlyfuse.kernels.selective_scan.triton_kernels"
)._over_channels

TRITON_CASES = {
    "all options, cut into segments": ((1, 27, 3, 4), ()),
    "no option": ((1, 9, 2, 4), OPTIONS),
    "one bias, no skip, two sequences": ((2, 5, 2, 4), ("group", "skip", "reset", "state")),
}


@pytest.fixture(autouse=True)
def small_cuts(monkeypatch):
    """Four states allowed, and segments of one chunk: the interpreter takes 1 ms per element."""
    if DEVICE == "cpu":
        monkeypatch.setattr(package, "TRITON_STATES", (4, 16))
    monkeypatch.setattr(triton_impl, "SHORTEST", 1)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_equals_the_definition_in_outputs_and_every_gradient(case):
    (batch, length, channels, states), without = TRITON_CASES[case]
    states = states if DEVICE == "cpu" else 16
    inputs = scan_inputs(batch, length, channels, states, without, device=DEVICE)
    for have, want in zip(results(inputs, "triton"), results(inputs, "reference"), strict=True):
        assert have.dtype == want.dtype and have.shape == want.shape
        assert rms_ratio(have, want) < 1e-5


def test_triton_in_bf16_stays_within_its_rounding():
    states = 4 if DEVICE == "cpu" else 16
    inputs = scan_inputs(1, 9, 2, states, dtype=torch.bfloat16, device=DEVICE)
    exact = converted(inputs)
    for have, want in zip(results(inputs, "triton"), results(exact, "reference"), strict=True):
        assert rms_ratio(have, want) < 1e-2


def test_triton_finds_the_initial_states_gradient_alone():
    inputs = scan_inputs(1, 27, 2, 4 if DEVICE == "cpu" else 16, device=DEVICE)
    alone = [t if t is None else t.detach() for t in inputs]
    alone[10].requires_grad_()
    expected = results(inputs, "reference")[-1]
    assert rms_ratio(results(alone, "triton")[-1], expected) < 1e-5


@pytest.mark.parametrize("resets", [[], [3, 20]], ids=["no resets", "one in each segment"])
def test_triton_carries_states_over_segments_but_not_over_resets(resets):
    """Decays so slow that what crosses two segments shows."""
    inputs = scan_inputs(1, 27, 1, 4 if DEVICE == "cpu" else 16, device=DEVICE)
    inputs[2] = torch.full_like(inputs[2], -1e-3).requires_grad_()
    inputs[9] = torch.zeros_like(inputs[9])
    inputs[9][0, resets] = True
    for have, want in zip(results(inputs, "triton"), results(inputs, "reference"), strict=True):
        assert rms_ratio(have, want) < 1e-5


@pytest.mark.parametrize("offset", [-14.0, 25.0])
def test_triton_keeps_the_precision_of_tiny_and_large_steps(offset):
    inputs = scan_inputs(1, 9, 2, 4 if DEVICE == "cpu" else 16, ("group", "bias"), device=DEVICE)
    inputs[1] = (inputs[1].detach() + offset).requires_grad_()
    exact = converted(inputs, torch.float64)
    for have, want in zip(results(inputs, "triton"), results(exact, "reference"), strict=True):
        assert rms_ratio(have, want) < 2e-6


def test_a_step_that_is_not_a_number_shows_in_the_output(monkeypatch):
    if DEVICE == "cpu":  # as on a GPU, where the minimum of NaN and a number is the number
        builder = triton.runtime.interpreter.InterpreterBuilder
        minimum = partialmethod(builder.binary_op, op=np.fmin)
        monkeypatch.setattr(builder, "create_minnumf", minimum)
    inputs = scan_inputs(1, 9, 2, 4 if DEVICE == "cpu" else 16, ("reset",), device=DEVICE)
    with torch.no_grad():
        inputs[1][0, 5, 1] = torch.nan
    y, _ = package.selective_scan(*inputs, backend="triton")
    assert y[0, 5:, 1].isnan().all() and y[..., 0].isfinite().all() and y[:, :5].isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("states", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1024, 96), (3, 517, 100), (2, 2048, 16)])
def test_triton_equals_the_definition_at_larger_sizes(sizes, dtype, states):
    inputs = scan_inputs(*sizes, states, groups=3, dtype=dtype, device=DEVICE)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    actual = results(inputs, "triton")
    for have, want in zip(actual, results(inputs, "reference"), strict=True):
        assert rms_ratio(have, want) < bound
    for once, again in zip(actual, results(inputs, "triton"), strict=True):
        assert torch.equal(once, again)


@triton.jit
def sum_over_channels(x, y, T: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOT: tl.constexpr):
    t, n, w = tl.arange(0, T), tl.arange(0, N), tl.arange(0, W)
    at = t[:, None] * N + n[None, :]
    tile = tl.load(x + at[:, :, None] * W + w[None, None, :])
    tl.store(y + at, _over_channels(tile, DOT))


@pytest.mark.parametrize("by_tensor_cores", [True, False])
def test_sums_over_channels_are_the_same_by_either_way(by_tensor_cores):
    x = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y = torch.empty(4, 4, device=DEVICE)
    sum_over_channels[(1,)](x, y, 4, 4, 16, by_tensor_cores)
    bound = 2e-3 if by_tensor_cores and DEVICE == "cuda" else 1e-6  # tf32 there
    assert rms_ratio(y, x.sum(2)) < bound
