"""Inputs of an expert layer (4 text and 4 image experts), and usual ways to write the layer.

Used by ``moma_layer.py`` and by row 1 of ``gpu.py``; needs neither torchtitan nor a GPU.

T tokens, D width, F inner width, E experts, K tokens an expert takes, R = Σ K rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

POOL = 4  # experts of a modality
EXPERTS = 2 * POOL

TopK = Callable[[torch.Tensor, int], torch.Tensor]


def torch_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the highest scores; torch leaves the order of ties open."""
    return scores.topk(k, dim=1).indices


class ExpertProblem:
    """Tokens in random order, the output's gradient, router and expert weights."""

    def __init__(
        self,
        tokens: int,
        dim: int,
        hidden: int,
        text_share: float = 0.5,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=device) * std
            return values.to(dtype).requires_grad_()

        self.x_TD, self.dy_TD = normal(tokens, dim), normal(tokens, dim).detach()
        order_T = torch.randperm(tokens, generator=generator, device=device)
        self.image_T = order_T >= text_share * tokens
        self.budgets = [round(s * tokens / POOL) for s in (text_share, 1 - text_share)]
        """Tokens of each text expert and of each image expert."""
        self.router_ED = normal(EXPERTS, dim, std=dim**-0.5)
        self.w1_EFD, self.w3_EFD = (normal(EXPERTS, hidden, dim, std=dim**-0.5) for _ in range(2))
        self.w2_EDF = normal(EXPERTS, dim, hidden, std=hidden**-0.5)
        self.parameters = [self.router_ED, self.w1_EFD, self.w3_EFD, self.w2_EDF]

    def chosen(
        self, x_TD: torch.Tensor, top_k: TopK = torch_top_k
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids (4, K) and weights (4, K) of each modality's experts; scores in fp32."""
        logits_ET = F.linear(self.router_ED.float(), x_TD.float())
        parts = []
        foreign = (self.image_T, ~self.image_T)
        for logits_GT, foreign_T, k in zip(
            logits_ET.split(POOL), foreign, self.budgets, strict=True
        ):
            ids_GK = top_k(logits_GT.detach().masked_fill(foreign_T, -torch.inf), k)
            parts.append((ids_GK, logits_GT.gather(1, ids_GK).sigmoid()))
        return parts

    def routes(
        self, x_TD: torch.Tensor, top_k: TopK = torch_top_k
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of all experts (R,), where each expert's begin (E + 1,), and their weights (R,)."""
        parts = self.chosen(x_TD, top_k)
        row_R, weight_R = (torch.cat([p[i].flatten() for p in parts]) for i in range(2))
        sizes = torch.tensor(
            [0, *(k for k in self.budgets for _ in range(POOL))], device=x_TD.device
        )
        return row_R, sizes.cumsum(0), weight_R

    def loop(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One expert after another."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        expert = 0
        for ids_GK, weights_GK in self.chosen(x_TD):
            for ids_K, weights_K in zip(ids_GK, weights_GK, strict=True):
                x_KD = x_TD.index_select(0, ids_K)
                w1, w3, w2 = self.w1_EFD[expert], self.w3_EFD[expert], self.w2_EDF[expert]
                y_KD = F.linear(F.silu(F.linear(x_KD, w1)) * F.linear(x_KD, w3), w2)
                y_TD.index_add_(0, ids_K, y_KD * weights_K[:, None])
                expert += 1
        return y_TD.to(x_TD.dtype)

    def batched(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One batched product for the experts of a modality, whose budgets are equal."""
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        stacks = (w.split(POOL) for w in (self.w1_EFD, self.w3_EFD, self.w2_EDF))
        for (ids_GK, weights_GK), w1, w3, w2 in zip(self.chosen(x_TD), *stacks, strict=True):
            x_GKD = x_TD.index_select(0, ids_GK.flatten()).unflatten(0, ids_GK.shape)
            h_GKF = F.silu(x_GKD @ w1.transpose(1, 2)) * (x_GKD @ w3.transpose(1, 2))
            y_GKD = (h_GKF @ w2.transpose(1, 2)) * weights_GK[..., None]
            y_TD.index_add_(0, ids_GK.flatten(), y_GKD.flatten(0, 1))
        return y_TD.to(x_TD.dtype)

    def grouped(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One ``F.grouped_mm`` per weight for all experts."""
        row_R, offset_E1, weight_R = self.routes(x_TD)
        stop_E = offset_E1[1:].int()
        x_RD = x_TD.index_select(0, row_R)
        gate_RF = F.grouped_mm(x_RD, self.w1_EFD.transpose(1, 2), offs=stop_E)
        up_RF = F.grouped_mm(x_RD, self.w3_EFD.transpose(1, 2), offs=stop_E)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, self.w2_EDF.transpose(1, 2), offs=stop_E)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        return y_TD.index_add_(0, row_R, y_RD * weight_R[:, None]).to(x_TD.dtype)
