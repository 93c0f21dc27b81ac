"""Chameleon's attention: grouped-query, qk-norm before RoPE, causal within each document, or
bidirectional inside spans of vectors (``models/masks.py``).

Shared, or with projections and norms untied by modality (Mixture-of-Transformers): the attention
product itself always runs over the whole mixed sequence.

B rows, S positions, L positions that they may see, T = B·S tokens, D width, N heads, K key/value
heads, H head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from earlyfuse.models.blocks.branch import (
    ALL_USES,
    Branch,
    Collective,
    Flops,
    Matrix,
    Microbatch,
    Regrouping,
    Use,
    products,
    sums_of_split_region,
)
from earlyfuse.models.blocks.cache import KVCache
from earlyfuse.models.blocks.linear import HeadNorm, Linear
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.init_weights import Draw, normal
from earlyfuse.models.masks import Mask, MergedMasks, QueryBlocks


class Attention(Branch):
    """Multi-head attention with qk-norm and rotary positions (arXiv 2405.09818, section 2.3)."""

    tensor_split: ClassVar = {
        **dict.fromkeys(("wq.weight", "wk.weight", "wv.weight"), -2),
        **{f"{norm}.{leaf}": -2 for norm in ("q_norm", "k_norm") for leaf in ("weight", "bias")},
        "wo.weight": -1,
    }

    @dataclass(kw_only=True, slots=True)
    class Config(Branch.Config):
        inherited_fields: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "qk_norm")
        supports: ClassVar[tuple[Use, ...]] = ALL_USES

        dim: int
        heads: int
        kv_heads: int
        head_dim: int
        qk_norm: bool = True
        groups: int = 1

        def __post_init__(self) -> None:
            if self.kv_heads < 1 or self.heads % self.kv_heads:
                raise ValueError(
                    f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}); "
                    "change one of them"
                )
            if self.head_dim % 2:
                raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary positions")

        def regrouped(self, to: Regrouping) -> Self:
            return replace(self, groups=to.sets(self.groups))

        def _widths(self, tensor_ranks: int = 1) -> tuple[int, int]:
            """Width of all query heads, and of all key heads, on one of the ranks."""
            width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
            return width // tensor_ranks, kv_width // tensor_ranks

        def matrices(self) -> list[Matrix]:
            """wq, wk, wv, wo."""
            width, kv_width = self._widths()
            q, k = (Matrix(self.dim, outputs, self.groups, True) for outputs in (width, kv_width))
            return [q, k, k, Matrix(width, self.dim, self.groups)]

        def vectors(self) -> list[tuple[int, int]]:
            """Weights and biases of the two norms."""
            return [(2 * sum(self._widths()), self.groups)] if self.qk_norm else []

        def flops(self, seq_len: int, group: int) -> Flops:
            """Projections, and scores and sums over the whole row."""
            attended = products(2 * seq_len * self._widths()[0])
            return Branch.Config.flops(self, seq_len, group) + attended

        def saved(self, batch: Microbatch) -> int:
            """Input; q and k before and after their norm, and rotated; v; the output, twice;
            rotated k and v of the other ranks' positions.
            """
            width, kv_width = self._widths(batch.tensor_ranks)
            normed = 2 if self.qk_norm else 0  # before and after; rotated are counted always
            others = 2 * (batch.context_ranks - 1) * kv_width
            return (1 + normed) * (width + kv_width) + kv_width + 2 * width + others

        def saved_by_selective(self, batch: Microbatch) -> int:
            projections = Branch.Config.saved_by_selective(self, batch)
            return self._widths(batch.tensor_ranks)[0] + projections

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            """The sums of a split region; keys and values of the whole row."""
            yield sums_of_split_region(batch, self.dim)
            row = batch.context_ranks * batch.tokens * 2 * self._widths()[1] * batch.itemsize
            yield Collective("keys and values", "all_gather", "cp", row, forward=1)
            yield Collective("keys and values", "reduce_scatter", "cp", row, backward=1)

        def even_sizes(self, axis: Literal["tensor", "expert"]) -> dict[str, int]:
            return {"heads": self.heads, "kv_heads": self.kv_heads} if axis == "tensor" else {}

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wq, self.wk, self.wv, self.wo = map(Linear, config.matrices())
        if config.qk_norm:
            for name, heads in (("q_norm", config.heads), ("k_norm", config.kv_heads)):
                self.add_module(name, HeadNorm(heads, config.head_dim, config.groups))

    def draws(self) -> dict[str, Draw]:
        """``wo`` writes into the residual."""
        matrices = dict.fromkeys(("wq.weight", "wk.weight", "wv.weight"), normal())
        return matrices | {"wo.weight": normal(residual=True)}

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D)."""
        q_BSNH, k_BSKH, v_BSKH = self._projected(x_TD, context)
        if context.cache is None:
            k_BLKH, v_BLKH = context.sequence_shard.keys_and_values(k_BSKH, v_BSKH)
        else:
            k_BLKH, v_BLKH = context.cache.state(self, KVCache).extend(k_BSKH, v_BSKH)
        out_BSNH = attend(q_BSNH, k_BLKH, v_BLKH, context.mask)
        return self.wo(out_BSNH.flatten(0, 1).flatten(1), context)

    def queries_and_keys(
        self, x_TD: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, N, H) and (B, S, K, H) as they are multiplied, for analysis."""
        q_BSNH, k_BSKH, _ = self._projected(x_TD, context)
        return q_BSNH, k_BSKH

    def _projected(
        self, x_TD: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, normalised and rotated, and values."""
        head_dim = self.config.head_dim
        q_TNH = self.wq(x_TD, context).unflatten(-1, (-1, head_dim))
        k_TKH = self.wk(x_TD, context).unflatten(-1, (-1, head_dim))
        v_TKH = self.wv(x_TD, context).unflatten(-1, (-1, head_dim))
        if self.config.qk_norm:
            q_TNH, k_TKH = self.q_norm(q_TNH, context), self.k_norm(k_TKH, context)
        q_BSNH, k_BSKH, v_BSKH = (
            t.unflatten(0, (context.rows, context.seq_len)) for t in (q_TNH, k_TKH, v_TKH)
        )
        return rotate(q_BSNH, context), rotate(k_BSKH, context), v_BSKH


def rotate(x_BSNH: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """Rotary embedding on the two halves of each head (the pairing of Hugging Face checkpoints)."""
    return _Rotate.apply(x_BSNH, context.cos_BS1H, context.sin_BS1H)


class _Rotate(torch.autograd.Function):
    """(left, right) → (left · cos - right · sin, right · cos + left · sin), in fp32.

    The gradient of a rotation is the rotation back. ``sin`` comes with the signs of both halves.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BSNH: torch.Tensor, cos_BS1H: torch.Tensor, sin_BS1H: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_BS1H, sin_BS1H)
        return _turn(x_BSNH, cos_BS1H, sin_BS1H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSNH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_BS1H, sin_BS1H = ctx.saved_tensors
        return _turn(dy_BSNH, cos_BS1H, -sin_BS1H), None, None  # cos, sin


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    swapped = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(swapped, sin).to(x.dtype)


def attend(
    q_BSNH: torch.Tensor, k_BLKH: torch.Tensor, v_BLKH: torch.Tensor, mask: Mask
) -> torch.Tensor:
    """Softmax attention under ``mask`` (see ``models/masks.py``) → (B, S, N, H)."""
    if isinstance(mask, MergedMasks):
        return _attend_by_parts(q_BSNH, k_BLKH, v_BLKH, mask)
    if isinstance(mask, QueryBlocks):
        pieces = q_BSNH.split([own.shape[2] for _, own in mask.parts], 1)
        blocks = [
            attend(piece, k_BLKH[:, keys], v_BLKH[:, keys], own)
            for piece, (keys, own) in zip(pieces, mask.parts, strict=True)
        ]
        return torch.cat(blocks, 1)
    q, k, v = (t.transpose(1, 2) for t in (q_BSNH, k_BLKH, v_BLKH))
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        out = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=gqa)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
        )
    return out.transpose(1, 2)


def _attend_by_parts(
    q_BSNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, mask: MergedMasks
) -> torch.Tensor:
    """Attention over each part of each row; 0 for the padding behind them."""
    rows = []
    for *row, parts in zip(q_BSNH, k_BSKH, v_BSKH, mask.parts, strict=True):
        lengths = [length for length, _ in parts]
        lengths.append(len(row[0]) - sum(lengths))
        *pieces, (padding, _, _) = zip(*(x_SNH.split(lengths) for x_SNH in row), strict=True)
        attended = [
            attend(q_LNH[None], k_LNH[None], v_LNH[None], own)[0]
            for (q_LNH, k_LNH, v_LNH), (_, own) in zip(pieces, parts, strict=True)
        ]
        rows.append(torch.cat([*attended, torch.zeros_like(padding)]))
    return torch.stack(rows)


def attention_map(q_SH: torch.Tensor, k_SH: torch.Tensor, visible_SS: torch.Tensor) -> torch.Tensor:
    """The attention weights (S, S) of one head, which ``attend`` never materialises.

    Softmax is computed in fp32 and rounded to the dtype of ``q_SH``, as eager attention does.
    """
    scores_SS = (q_SH @ k_SH.T).float() * q_SH.shape[-1] ** -0.5
    return scores_SS.masked_fill(~visible_SS, -torch.inf).softmax(-1).to(q_SH.dtype)


@cache
def _compiled_flex_attention() -> Any:
    # eager FlexAttention materialises all scores; compiled once and shared by all layers
    return torch.compile(flex_attention)
