"""Norms and rotary positions: hand-written gradients equal those of the definition."""

import pytest
import torch
from batches import context_of

from earlyfuse.models.blocks.attention import rotate
from earlyfuse.models.blocks.linear import NORM_EPS, RMSNorm

B, S, N, H, D = 2, 7, 3, 8, 12
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 50, 51, 3, 3, 900]])
MODALITY = torch.arange(B * S).view(B, S).remainder(3).clamp(max=1).to(torch.uint8)
CONTEXT = context_of(MODALITY, POSITIONS, (0, 1), H, 100.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_rotation_is_that_of_complex_numbers_and_so_is_its_gradient():
    """Dimensions i and i + H/2 as one complex number, times e^(i · position · theta^(-2i/H))."""
    x, dy = normal(B, S, N, H), normal(B, S, N, H, seed=1).detach()
    angle = POSITIONS.double()[..., None, None] * 100.0 ** (-torch.arange(0, H, 2).double() / H)
    left, right = x.double().chunk(2, dim=-1)
    turned = torch.complex(left, right) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    found = rotate(x, CONTEXT)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    (dx,) = torch.autograd.grad(found, x, dy)
    (expected_dx,) = torch.autograd.grad(expected, x, dy.double())
    torch.testing.assert_close(dx, expected_dx, rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_rms_norm_and_its_gradients_are_those_of_the_definition(groups):
    norm = RMSNorm(D, groups)
    norm.weight.data = normal(*norm.weight.shape, seed=2).detach()
    x, dy = normal(B * S, D), normal(B * S, D, seed=1).detach()
    with torch.no_grad():
        x[0] = 0.0  # the norm of a zero row has no gradient of its own
    weight = norm.weight[CONTEXT.group_T] if groups > 1 else norm.weight
    expected = x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight
    found = norm(x, CONTEXT)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, norm.weight], dy),
        torch.autograd.grad(expected, [x, norm.weight], dy),
        rtol=1e-5,
        atol=1e-4,  # of the zero row, whose gradient is 1/sqrt(eps) times larger
    )
