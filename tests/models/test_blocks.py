"""Norms and rotary positions: hand-written gradients = those of the definition."""

import pytest
import torch
import torch.nn.functional as F
from batches import context_of

from earlyfuse.models.blocks.attention import rotate
from earlyfuse.models.blocks.linear import NORM_EPS, RMSNorm
from earlyfuse.models.context import ForwardContext

B, S, N, H, D = 2, 7, 3, 8, 12


def layout_of(positions: torch.Tensor) -> ForwardContext:
    generator = torch.Generator().manual_seed(3)
    modality = torch.randint(0, 2, positions.shape, generator=generator).to(torch.uint8)
    return context_of(modality, positions, (0, 1), H, 100.0)


def positions_of(start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + S).expand(B, S)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def rotated_by_definition(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Dimensions i and i + H/2 as one complex number, times e^(i · position · theta^(-2i/H))."""
    angle = positions.double()[..., None, None] * 100.0 ** (-torch.arange(0, H, 2).double() / H)
    left, right = x.double().chunk(2, dim=-1)
    turned = torch.complex(left, right) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_rotation_is_that_of_complex_numbers_and_so_is_its_gradient():
    x, dy = normal(B, S, N, H), normal(B, S, N, H, seed=1).detach()
    actual = rotate(x, layout_of(positions_of()))
    expected = rotated_by_definition(x, positions_of())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)
    (dx,) = torch.autograd.grad(actual, x, dy)
    (expected_dx,) = torch.autograd.grad(expected, x, dy.double())
    torch.testing.assert_close(dx, expected_dx, rtol=0, atol=1e-6)


def test_rotated_scores_depend_on_the_distance_alone():
    q, k = normal(B, S, N, H), normal(B, S, N, H, seed=1)
    near, far = (layout_of(positions_of(start)) for start in (0, 50))
    scores = [
        torch.einsum("bsnh,btnh->bnst", rotate(q, layout), rotate(k, layout))
        for layout in (near, far)
    ]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


def test_rotation_keeps_the_dtype():
    x = normal(B, S, N, H).detach().bfloat16()
    assert rotate(x, layout_of(positions_of())).dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 2])
def test_rms_norm_and_its_gradients_are_those_of_the_definition(groups):
    norm = RMSNorm.Config(dim=D, groups=groups).build()
    norm.weight.data = normal(*norm.weight.shape, seed=2).detach()
    layout = layout_of(positions_of())
    x, dy = normal(B * S, D), normal(B * S, D, seed=1).detach()
    with torch.no_grad():
        x[0] = 0.0  # the norm of a zero row has no gradient of its own
    weight = norm.weight[layout.group_T] if groups > 1 else norm.weight
    expected = x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight
    actual = norm(x, layout)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, [x, norm.weight], dy),
        torch.autograd.grad(expected, [x, norm.weight], dy),
        rtol=1e-5,
        atol=1e-4,  # of the zero row, whose gradient is 1/sqrt(eps) times larger
    )


def test_rms_norm_in_bf16_is_that_in_fp32_rounded():
    norm = RMSNorm.Config(dim=D).build()
    norm.weight.data.fill_(1.0)
    layout, x = layout_of(positions_of()), normal(B * S, D).detach().bfloat16()
    actual = norm.bfloat16()(x, layout)
    expected = F.rms_norm(x.float(), (D,), eps=NORM_EPS)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)
