"""Helpers of the kernel tests: errors as ratios of RMS, outputs and all gradients of an op."""

from collections.abc import Callable, Sequence

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected; NaN where either has one."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-12)).item()


def outputs_and_gradients(
    op: Callable, inputs: Sequence[torch.Tensor | None], *rest: object, **options: object
) -> list[torch.Tensor]:
    """Outputs of ``op(*inputs, *rest)``, then the gradient of a fixed random projection of all of
    them for each tensor given that requires one, in order."""
    outputs = op(*inputs, *rest, **options)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(2)
    projections = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
        for y in outputs
    ]
    wanted = [t for t in (*inputs, *rest) if isinstance(t, torch.Tensor) and t.requires_grad]
    found = [(y, dy) for y, dy in zip(outputs, projections, strict=True) if y.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in found], wanted, [dy for _, dy in found])
    return [*(y.detach() for y in outputs), *gradients]


def assert_equal(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], bound: float
) -> None:
    """The same shapes and dtypes, and values within ``bound`` (``rms_ratio``)."""
    for have, want in zip(actual, expected, strict=True):
        assert have.dtype == want.dtype and have.shape == want.shape
        assert rms_ratio(have, want) <= bound


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every other element of a row of memory that begins at an odd place."""
    apart = torch.full((*tensor.shape, 2), -7, dtype=tensor.dtype, device=tensor.device)
    apart[..., 1] = tensor.detach()
    return apart[..., 1].requires_grad_(tensor.requires_grad)
