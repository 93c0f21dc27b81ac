"""Rows 1 to 3 of ``gpu.py``: a MoMa layer, the grouped products under it, and moving its rows.

T tokens, D width, F inner width, E experts, K tokens an expert takes, R = E·K routed rows.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from unittest import mock

import torch
import torch.nn.functional as F

from earlyfuse.kernels.grouped_gemm import grouped_linear, grouped_swiglu, op
from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k
from gpu_timing import Goal, Run, Work

GROUPS = 8


def without_tma(run: Run) -> Sequence[torch.Tensor]:
    """Results of ``run`` where the grouped kernels read every tile through pointers."""
    from earlyfuse.kernels.grouped_gemm import triton_impl  # needs Triton

    with mock.patch.object(triton_impl, "has_tma", lambda tensor: False):
        return run()


def pointers(run: Run, kind: str) -> dict[str, Run]:
    """The rival of ``run`` that does not use TMA, where the device has it."""
    if kind != "cuda" or torch.cuda.get_device_capability() < (9, 0):
        return {}
    return {"pointers": partial(without_tma, run)}


def torch_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """torch's, which leaves ties open."""
    return scores.topk(k, dim=1).indices


def put_back(
    y_RD: torch.Tensor, row_R: torch.Tensor, weight_R: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Weighted rows added up by torch, in fp32."""
    out_TD = torch.zeros(tokens, y_RD.shape[1], device=y_RD.device)
    return out_TD.index_add(0, row_R, y_RD.float() * weight_R[:, None]).to(y_RD.dtype)


# ---------------------------------------------------------------- row 1


class Experts:
    """MoMa's experts on random tokens: half text, half image, capacity factor 1."""

    def __init__(self, tokens: int, dim: int, hidden: int, experts: int, kind: str) -> None:
        torch.manual_seed(0)

        def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, device=kind) * scale).bfloat16().requires_grad_()

        self.x = leaf(tokens, dim)
        self.dy = leaf(tokens, dim).detach()
        self.router = leaf(experts, dim, scale=dim**-0.5)
        self.w1, self.w3 = (leaf(experts, hidden, dim, scale=dim**-0.5) for _ in range(2))
        self.w2 = leaf(experts, dim, hidden, scale=hidden**-0.5)
        self.tokens, self.k = tokens, tokens // experts
        self.offset = torch.arange(experts + 1, device=kind) * self.k
        image_T = torch.arange(tokens, device=kind) % 2 == 1
        text_expert_E1 = torch.arange(experts, device=kind)[:, None] < experts // 2
        self.foreign_ET = image_T[None, :] == text_expert_E1

    def route(self, top_k: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and weight of each expert's rows (E, K)."""
        logits_ET = F.linear(self.router.float(), self.x.float())
        scores_ET = logits_ET.detach().masked_fill(self.foreign_ET, -torch.inf)
        row_EK = top_k(scores_ET, self.k)
        return row_EK, logits_ET.gather(1, row_EK).sigmoid()

    def _through(self, y: torch.Tensor) -> list[torch.Tensor]:
        leaves = [self.x, self.router, self.w1, self.w3, self.w2]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def ours(self, backend: str = "auto") -> list[torch.Tensor]:
        """Routing, experts and dispatch, and all gradients."""
        row_EK, weight_EK = self.route(partial(select_top_k, backend=backend))
        weights = (self.w1, self.w3, self.w2)
        routes = (row_EK.flatten(), self.offset, weight_EK.flatten())
        return self._through(grouped_swiglu(self.x, *weights, *routes, backend=backend))

    def grouped_mm(self) -> list[torch.Tensor]:
        """The same with ``F.grouped_mm``, routed, gathered and put back by torch."""
        row_EK, weight_EK = self.route(torch_top_k)
        row_R, stop_E = row_EK.flatten(), self.offset[1:].int()
        x_RD = self.x.index_select(0, row_R)
        gate_RF = F.grouped_mm(x_RD, self.w1.transpose(1, 2), offs=stop_E)
        up_RF = F.grouped_mm(x_RD, self.w3.transpose(1, 2), offs=stop_E)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, self.w2.transpose(1, 2), offs=stop_E)
        return self._through(put_back(y_RD, row_R, weight_EK.flatten(), self.tokens))

    def batched(self) -> list[torch.Tensor]:
        """The same with one batched product: all experts take equally many tokens."""
        row_EK, weight_EK = self.route(torch_top_k)
        row_R = row_EK.flatten()
        x_EKD = self.x.index_select(0, row_R).unflatten(0, row_EK.shape)
        h_EKF = F.silu(x_EKD @ self.w1.transpose(1, 2)) * (x_EKD @ self.w3.transpose(1, 2))
        y_RD = (h_EKF @ self.w2.transpose(1, 2)).flatten(0, 1)
        return self._through(put_back(y_RD, row_R, weight_EK.flatten(), self.tokens))

    def loop(self) -> list[torch.Tensor]:
        """One expert after another."""
        row_EK, weight_EK = self.route(torch_top_k)
        y_TD = torch.zeros(self.x.shape, device=self.x.device)
        for expert, (row_K, weight_K) in enumerate(zip(row_EK, weight_EK, strict=True)):
            x_KD = self.x.index_select(0, row_K)
            gate_KF = F.linear(x_KD, self.w1[expert])
            y_KD = F.linear(F.silu(gate_KF) * F.linear(x_KD, self.w3[expert]), self.w2[expert])
            y_TD = y_TD.index_add(0, row_K, y_KD.float() * weight_K[:, None])
        return self._through(y_TD.to(self.x.dtype))

    def dense(self) -> list[torch.Tensor]:
        """One expert of the same FLOPs for all tokens, with its gradients alone."""
        w1, w3, w2 = (w[0].detach().requires_grad_() for w in (self.w1, self.w3, self.w2))
        y = F.linear(F.silu(F.linear(self.x, w1)) * F.linear(self.x, w3), w2)
        return [y.detach(), *torch.autograd.grad(y, [self.x, w1, w3, w2], self.dy)]


def moma_layer(kind: str, tokens: int, dim: int, hidden: int, experts: int) -> Iterator[Work]:
    """Row 1: forward and backward of a layer."""
    layer = Experts(tokens, dim, hidden, experts, kind)
    same: dict[str, Run] = {
        "F.grouped_mm": layer.grouped_mm,
        "bmm": layer.batched,
        "loop": layer.loop,
        **pointers(layer.ours, kind),
    }
    yield Work(
        "1 MoMa layer", f"T {tokens} d {dim} f {hidden} 4t4i", layer.ours,
        partial(layer.ours, "reference"), 3e-2, {"dense": layer.dense, **same}, tuple(same),
        flops=18 * tokens * dim * hidden, bytes_moved=6 * 3 * experts * dim * hidden,
        goals=(Goal("ours / dense", 1.05), Goal("ours / F.grouped_mm", 0.90)),
    )  # fmt: skip


# ---------------------------------------------------------------- row 2


class Products:
    """One product over groups of given sizes, every token once, sorted by group or not."""

    def __init__(
        self, sizes: Sequence[int], in_order: bool, dim: int, hidden: int, kind: str
    ) -> None:
        torch.manual_seed(0)
        tokens, self.in_order = sum(sizes), in_order
        self.ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        offset = torch.tensor(self.ends, device=kind)
        order = torch.arange(tokens) if in_order else torch.randperm(tokens)
        self.row, self.stop = order.to(kind), offset[1:].int()
        self.x, self.dy, self.w = (
            torch.randn(*shape, device=kind).bfloat16()
            for shape in ((tokens, dim), (tokens, hidden), (len(sizes), hidden, dim))
        )
        self.routes = (self.row, offset, None)
        self.backend = "triton" if kind == "cuda" else "torch"

    def ours(self, part: str) -> list[torch.Tensor]:
        """The operator behind ``grouped_linear`` and its gradients one at a time."""
        if part == "forward":
            return [op.grouped_linear(self.x, self.w, *self.routes, True, self.backend)]
        need = [part == "dX", part == "dW", False, False, False]
        tensors = (self.dy, self.x, self.w)
        found = op.grouped_linear_backward(*tensors, *self.routes, True, need, self.backend)
        return [found[need.index(True)]]

    def definition(self, part: str) -> list[torch.Tensor]:
        """The same in fp32 by autograd."""
        x, w = (t.detach().requires_grad_() for t in (self.x, self.w))
        y = grouped_linear(x, w, *self.routes, backend="reference")
        if part == "forward":
            return [y.detach()]
        return list(torch.autograd.grad(y, x if part == "dX" else w, self.dy))

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.in_order else tensor.index_select(0, self.row)

    def _put_back(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.in_order:
            return [tensor]
        return [torch.empty_like(tensor).index_copy_(0, self.row, tensor)]

    def grouped_mm(self, part: str) -> list[torch.Tensor]:
        """One ``F.grouped_mm``; rows gathered before and put back after it unless in order."""
        if part == "dW":
            dy, x = self._gathered(self.dy), self._gathered(self.x)
            return [F.grouped_mm(dy.t(), x, offs=self.stop)]
        forward = part == "forward"
        a, b = (self.x, self.w.transpose(1, 2)) if forward else (self.dy, self.w)
        return self._put_back(F.grouped_mm(self._gathered(a), b, offs=self.stop))

    def loop(self, part: str) -> list[torch.Tensor]:
        """Group by group, the groups' sizes known to the host."""
        groups = [slice(*ends) for ends in pairwise(self.ends)]
        if part == "dW":
            dy, x = self._gathered(self.dy), self._gathered(self.x)
            return [torch.stack([dy[group].t() @ x[group] for group in groups])]
        forward = part == "forward"
        a = self._gathered(self.x if forward else self.dy)
        pairs = zip(groups, self.w, strict=True)
        parts = [F.linear(a[group], w) if forward else a[group] @ w for group, w in pairs]
        return self._put_back(torch.cat(parts))

    def dense(self, part: str) -> list[torch.Tensor]:
        """One weight for all tokens: the same FLOPs."""
        if part == "dW":
            return [self.dy.t() @ self.x]
        return [F.linear(self.x, self.w[0]) if part == "forward" else self.dy @ self.w[0]]


def group_sizes(name: str, tokens: int) -> list[int]:
    """Tokens of each group."""
    shares = {
        "equal": [1.0] * GROUPS,
        "zipf": [1 / (group + 1) for group in range(GROUPS)],
        "one empty": [0.0, *[1.0] * (GROUPS - 1)],
        "one tiny": [3 * (GROUPS - 1) / (tokens - 3), *[1.0] * (GROUPS - 1)],
    }[name]
    sizes = [round(share / sum(shares) * tokens) for share in shares]
    return [*sizes[:-1], tokens - sum(sizes[:-1])]


def grouped_products(
    kind: str, tokens: int, dim: int, hidden: int, name: str, in_order: bool
) -> Iterator[Work]:
    """Row 2: forward, dX and dW of one product over groups."""
    products = Products(group_sizes(name, tokens), in_order, dim, hidden, kind)
    for part in ("forward", "dX", "dW"):
        run = partial(products.ours, part)
        same: dict[str, Run] = {
            "F.grouped_mm": partial(products.grouped_mm, part),
            "loop": partial(products.loop, part),
            # both operands of dW are gathered: there is no other path
            **(pointers(run, kind) if part != "dW" else {}),
        }
        rivals: dict[str, Run] = {"dense": partial(products.dense, part), **same}
        goals = [Goal("ours / dense", 1 / 0.9), Goal("ours / F.grouped_mm", 1.0)]
        if part == "forward":
            goals.append(Goal("TFLOP/s", 700, at_most=False))
        if part == "dW":
            rivals["own forward"] = partial(products.ours, "forward")
            goals.append(Goal("ours / own forward", 1.05))
        order = "sorted" if in_order else "rows moved"
        yield Work(
            "2 grouped GEMM", f"{part}, {name}, {order}, T {tokens} d {dim} f {hidden}", run,
            partial(products.definition, part), 2e-2, rivals, tuple(same),
            flops=2 * tokens * dim * hidden,
            bytes_moved=2 * (tokens * (dim + hidden) + GROUPS * dim * hidden),
            goals=goals,
        )  # fmt: skip


# ---------------------------------------------------------------- row 3


def top_k(kind: str, tokens: int, experts: int) -> Iterator[Work]:
    """Row 3: the best tokens of each expert."""
    torch.manual_seed(0)
    scores, k = torch.randn(experts, tokens, device=kind), tokens // experts
    yield Work(
        "3 top-k", f"T {tokens} E {experts}", lambda: [select_top_k(scores, k)],
        lambda: [select_top_k(scores, k, backend="reference")], 0.0,
        {"torch.topk": lambda: [torch_top_k(scores, k)]},
        bytes_moved=4 * experts * tokens,
        goals=(Goal("ms", 0.040),) if experts == 8 else (),
    )  # fmt: skip


def moving(kind: str, tokens: int, dim: int) -> Iterator[Work]:
    """Row 3: gather and weighted scatter of as many rows as there are tokens."""
    torch.manual_seed(0)
    x = torch.randn(tokens, dim, device=kind).bfloat16()
    row = torch_top_k(torch.randn(GROUPS, tokens, device=kind), tokens // GROUPS).flatten()
    weight = torch.rand(len(row), device=kind)
    at, moved = f"T {tokens} d {dim}", 2 * 2 * len(row) * dim
    goals = (Goal("% of floor", 85, at_most=False),)
    yield Work(
        "3 gather", at, lambda: [gather_rows(x, row)],
        lambda: [gather_rows(x, row, backend="reference")], 0.0,
        {"index_select": lambda: [x.index_select(0, row)]}, ("index_select",),
        bytes_moved=moved, goals=goals,
    )  # fmt: skip
    yield Work(
        "3 weighted scatter", at, lambda: [scatter_add_rows(x, row, tokens, weight)],
        lambda: [scatter_add_rows(x, row, tokens, weight, backend="reference")], 2e-2,
        {"index_add": lambda: [put_back(x, row, weight, tokens)]}, ("index_add",),
        bytes_moved=moved, goals=goals,
    )  # fmt: skip
