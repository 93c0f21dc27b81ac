"""Ops as torch operators: schemas, fakes, compile without a break, FLOPs by formula."""

import pytest
import torch
from kernel_checks import assert_equal, outputs_and_gradients
from scan_cases import scan_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from earlyfuse.kernels.causal_conv1d import causal_conv1d
from earlyfuse.kernels.grouped_gemm import grouped_linear, grouped_swiglu
from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k
from earlyfuse.kernels.selective_scan import selective_scan

T, D, F, G = 12, 6, 10, 3
ROW = torch.tensor([0, 4, 4, 11, 7, 1, 0])
OFFSET = torch.tensor([0, 3, 3, 7])


def tensors():
    torch.manual_seed(0)
    shapes = ((T, D), (G, F, D), (G, F, D), (G, D, F), (len(ROW),))
    return [torch.rand(shape).requires_grad_() for shape in shapes]


def test_operators_keep_what_they_declare():
    x, w1, w3, w2, weight = tensors()
    ops, check = torch.ops.earlyfuse, torch.library.opcheck
    for weights in (weight, None):
        check(ops.grouped_linear, (x, w1, ROW, OFFSET, weights, False, "torch"))
        check(ops.grouped_swiglu, (x, w1, w3, w2, ROW, OFFSET, weights, False, True, "torch"))
        check(ops.scatter_add_rows, (x[: len(ROW)], ROW, T, weights, "torch"))
    check(ops.gather_rows, (x, ROW, "torch"))
    check(ops.select_top_k, (torch.rand(G, T), 4, "torch"))
    inputs = scan_inputs(1, 19, 3, 4)
    check(ops.selective_scan, (*inputs, True, "torch"))
    detached = [t.detach() for t in inputs]
    kept = ops.selective_scan(*detached, True, "torch")
    arguments = (*kept, *detached, [*[True] * 8, False, False, True], "torch")
    checks = ("test_schema", "test_faketensor")
    check(ops.selective_scan_backward, arguments, test_utils=checks)


COMPILED = {
    "scan": (selective_scan, scan_inputs(1, 19, 3, 4)),
    "convolution": (causal_conv1d, [tensors()[0][None], torch.rand(D, 4).requires_grad_()]),
    "loss": (
        lambda x, w, backend: linear_cross_entropy(
            x, w, ROW, ROW % 2, modalities=2, z_weight=0.02, backend=backend
        ),
        [tensors()[0][: len(ROW)], torch.rand(T, D).requires_grad_()],
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_an_op_compiles_into_one_graph(name):
    op, inputs = COMPILED[name]
    inputs = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(op, inputs, backend="torch")
    assert_equal(outputs_and_gradients(compiled, inputs, backend="torch"), expected, 1e-6)


def test_a_gradient_that_nobody_needs_is_none():
    x, w1, w3, w2, weight = (t.detach() for t in tensors())
    w3.requires_grad_()
    grouped_swiglu(x, w1, w3, w2, ROW, OFFSET, weight).sum().backward()
    assert w3.grad is not None and w1.grad is None and x.grad is None and weight.grad is None


def test_routed_layers_compile_into_one_graph():
    x, w1, w3, w2, weight = tensors()

    def layer(x, weight):
        chosen = select_top_k(x.detach().t().contiguous(), 2).flatten()
        y = grouped_swiglu(x, w1, w3, w2, ROW, OFFSET, weight)
        y = y + grouped_linear(y, w1, ROW, OFFSET) @ w2[0].t()
        return y + scatter_add_rows(gather_rows(y, ROW), ROW, T, weight) + chosen.sum()

    expected = layer(x, weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual = compiled(x, weight)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected.sin().sum(), (x, w1, weight))
    for have, want in zip(
        torch.autograd.grad(actual.sin().sum(), (x, w1, weight)), wanted, strict=True
    ):
        torch.testing.assert_close(have, want)


def test_shapes_alone_are_enough_where_nothing_is_computed():
    """Ids have no values there to be checked."""
    with FakeTensorMode():
        x, w1, w3, w2, weight = (t.detach().requires_grad_() for t in tensors())
        row, offset = torch.zeros(len(ROW), dtype=torch.int64), torch.zeros(G + 1).long()
        y = grouped_swiglu(x, w1, w3, w2, row, offset, weight)
        y = y + scatter_add_rows(gather_rows(y, row), row, T, weight)
        z = grouped_linear(y, w1, row, offset)
        assert z.shape == (T, F)
        group = torch.zeros(1, T, dtype=torch.int64)
        u, B, rates = y[None], torch.zeros(1, T, 4), torch.zeros(D, 4)
        u, _ = selective_scan(u, u, rates, B, B, bias_GD=torch.zeros(2, D), group_BL=group)
        labels, modality = torch.zeros(T).long(), torch.zeros(T).long()
        total = linear_cross_entropy(u[0], w1[0], labels, modality, modalities=2).total
        (z.sum() + total).backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("needed", ["all", "x alone", "weights alone"])
def test_flops_are_those_of_the_matrix_products(needed):
    x, w1, w3, w2, weight = tensors()
    if needed == "x alone":
        w1, w3, w2, weight = (t.detach() for t in (w1, w3, w2, weight))
    if needed == "weights alone":
        x, w1, w3, w2 = (t.detach() for t in (x, w1, w3, w2))
    one = 2 * len(ROW) * D * F
    for op, weights, forward, backward in (
        (grouped_linear, (w1,), 1, {"all": 2, "x alone": 1, "weights alone": 1}),
        (grouped_swiglu, (w1, w3, w2), 3, {"all": 6, "x alone": 3, "weights alone": 1}),
    ):
        with FlopCounterMode(display=False) as counter:
            y = op(x, *weights, ROW, OFFSET, weight)
            assert counter.get_total_flops() == forward * one
            y.sum().backward()
        assert counter.get_total_flops() == (forward + backward[needed]) * one
