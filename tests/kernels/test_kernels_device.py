"""Triton kernels are launched on the device of their tensors, whichever is the current one."""

from contextlib import contextmanager

import pytest
import torch
from kernel_checks import DEVICE

from earlyfuse.kernels.causal_conv1d import causal_conv1d
from earlyfuse.kernels.grouped_gemm import grouped_swiglu
from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from earlyfuse.kernels.permute import select_top_k
from earlyfuse.kernels.selective_scan import selective_scan

triton_support = pytest.importorskip("earlyfuse.kernels.triton_support")


def convolution(x):
    return causal_conv1d(x[None], x[:2].T.contiguous(), backend="triton")[0]


def scan(x):
    A = -torch.ones(16, 16, device=x.device)
    inputs = (x[None, :, :16], x[None, :, :16], A, x[None, :, :16], x[None, :, :16])
    return selective_scan(*inputs, backend="triton")[0]


def loss(x):
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return linear_cross_entropy(x, x[:3], labels, labels, modalities=1, backend="triton").total


def experts(x):
    row, offset = (torch.tensor(values, device=x.device) for values in ([0, 2], [0, 2]))
    w = x[None, :3]
    return grouped_swiglu(x, w, w, w.mT, row, offset, backend="triton")


def top_k(x):
    return select_top_k(x, 2, backend="triton") * x.sum()


OPS = pytest.mark.parametrize(
    ("op", "passes"), [(convolution, 2), (scan, 2), (loss, 1), (experts, 2), (top_k, 1)]
)


@OPS
def test_the_device_of_the_tensors_is_current_where_kernels_are_launched(op, passes, monkeypatch):
    """Triton asks for the current device, which in a process with several need not be theirs."""
    entered = []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor.device)
        yield
        entered.append(None)

    monkeypatch.setattr(triton_support.torch.cuda, "device_of", device_of)
    x = torch.rand(4, 16, device=DEVICE).requires_grad_()
    op(x).sum().backward()
    assert {device.type for device in entered[::2]} == {DEVICE}
    assert entered[1::2] == [None] * passes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@OPS
def test_results_on_the_second_device_are_those_of_the_first(op, passes):
    x = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    first, second = (op(x.to(device).requires_grad_()) for device in ("cuda:0", "cuda:1"))
    assert torch.equal(first.cpu(), second.cpu())
