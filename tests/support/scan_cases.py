"""Made-up arguments of the selective scan for its tests, and its results."""

import torch
from kernel_checks import outputs_and_gradients

from earlyfuse.kernels.selective_scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "skip", "z", "bias", "group", "reset", "state")
OPTIONS = ("skip", "z", "bias", "group", "reset", "state")


def scan_inputs(
    batch, length, channels, states, without=(), groups=2, dtype=torch.float32, device="cpu"
):
    """Arguments of ``selective_scan`` in order; decays between about 0.1 and 1."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(*shape, dtype=dtype):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    rates = torch.rand(channels, states, generator=generator, dtype=torch.float64)
    found = {
        "u": leaf(batch, length, channels),
        "delta": leaf(batch, length, channels),
        "A": (-2 * rates).to(device, wide).requires_grad_(),
        "B": leaf(batch, length, states),
        "C": leaf(batch, length, states),
        "skip": leaf(channels, dtype=wide),
        "z": leaf(batch, length, channels),
        "bias": leaf(1 if "group" in without else groups, channels, dtype=wide),
        "group": torch.randint(0, groups, (batch, length), generator=generator).to(device),
        "reset": (torch.rand(batch, length, generator=generator) < 0.15).to(device),
        "state": leaf(batch, channels, states, dtype=wide),
    }
    return [None if name in without else found[name] for name in NAMES]


def converted(inputs, dtype=torch.float32):
    """The same numbers in another type, as new leaves."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype).requires_grad_()
        for t in inputs
    ]


def results(inputs, backend):
    """Outputs, then the gradient of every floating-point argument, in order."""
    return outputs_and_gradients(selective_scan, inputs, backend=backend)
