"""SwiGLU feed-forward: dense, or untied by modality (Mixture-of-Transformers; MoMa's 1t1i).

T tokens, D width, F inner width, G groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F

from earlyfuse.kernels.grouped_gemm import grouped_swiglu
from earlyfuse.models.blocks.branch import (
    ALL_USES,
    Branch,
    Collective,
    Matrix,
    Microbatch,
    Regrouping,
    Use,
    sums_of_split_region,
)
from earlyfuse.models.blocks.linear import parameter, to_local
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.init_weights import Draw, normal

# w2 writes into the residual
DRAWS: dict[str, Draw] = {"w1": normal(), "w3": normal(), "w2": normal(residual=True)}
TENSOR_SPLIT = {"w1": -2, "w3": -2, "w2": -1}


class FeedForward(Branch):
    """w2(silu(w1 x) · w3 x). Weights (F, D), (F, D), (D, F); with a leading G when untied."""

    tensor_split: ClassVar = TENSOR_SPLIT

    @dataclass(kw_only=True, slots=True)
    class Config(Branch.Config):
        supports: ClassVar[tuple[Use, ...]] = ALL_USES

        dim: int
        hidden_dim: int
        groups: int = 1

        def regrouped(self, to: Regrouping) -> Self:
            return replace(self, groups=to.sets(self.groups))

        def matrices(self) -> list[Matrix]:
            """w1, w3, w2."""
            up = Matrix(self.dim, self.hidden_dim, self.groups, split_outputs=True)
            return [up, up, Matrix(self.hidden_dim, self.dim, self.groups)]

        def saved(self, batch: Microbatch) -> int:
            """Gate, SiLU of it, up and their product; gate and up alone in the grouped product."""
            copies = 2 if self.groups > 1 else 4
            return copies * self.hidden_dim // batch.tensor_ranks

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            yield sums_of_split_region(batch, self.dim)

        def even_sizes(self, axis: Literal["tensor", "expert"]) -> dict[str, int]:
            return {"hidden_dim": self.hidden_dim} if axis == "tensor" else {}

    def __init__(self, config: Config):
        super().__init__()
        self.untied = config.groups > 1
        self.w1, self.w3, self.w2 = (
            parameter(matrix.groups, matrix.outputs, matrix.inputs) for matrix in config.matrices()
        )

    def draws(self) -> dict[str, Draw]:
        return DRAWS

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D)."""
        w1, w3, w2 = to_local(self.w1), to_local(self.w3), to_local(self.w2)
        if self.untied:
            return grouped_swiglu(x_TD, w1, w3, w2, *context.by_group, unique_tokens=True)
        return F.linear(F.silu(F.linear(x_TD, w1)) * F.linear(x_TD, w3), w2)
