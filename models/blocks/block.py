"""The residual block: an ordered list of branches, each with a norm.

Models differ only in the branches of their blocks: ``Attention`` or ``Mamba``, ``FeedForward`` or
``MixtureOfExperts``, shared or untied by modality, or any other ``Branch``.

T tokens, D width.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torchtitan.protocols.module import Module

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.branch import (
    Branch,
    Collective,
    Flops,
    Microbatch,
    Regrouping,
    Use,
)
from earlyfuse.models.blocks.experts import ExpertPool, MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.linear import RMSNorm
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.depth.mixture_of_depths import MixtureOfDepths, Scales
from earlyfuse.models.field_checks import check_choices

EXTRA = "extra_branches"
BRANCHES = ("attention", "mamba", EXTRA, "feed_forward")  # in the order in which they run


class Block(Module):
    """A residual block: runs the configured branches in order, each with its own norm.

    ``norm_order`` "pre": x + f(norm(x)); "swin": x + norm(f(x)), as in Chameleon-34B and MoMa.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``extra_branches``: name → any other branch; its parameters have that name. ``depth``:
        which tokens pass the block; None: all."""

        attention: Attention.Config | None = None
        mamba: Mamba.Config | None = None
        extra_branches: dict[str, Branch.Config] = field(default_factory=dict)
        feed_forward: FeedForward.Config | MixtureOfExperts.Config | None = None
        norm_order: Literal["pre", "swin"] = "pre"
        norm_groups: int = 1
        dropout: float = 0.0
        depth: MixtureOfDepths.Config | None = None

        def __post_init__(self) -> None:
            check_choices(self, norm_order=("pre", "swin"))
            if not 0 <= self.dropout < 1:
                raise ValueError(f"dropout ({self.dropout}) must be in [0, 1)")
            if not self.branches:
                raise ValueError(f"a block must have at least one of {', '.join(BRANCHES)}")
            for name in self.extra_branches:
                if name in BRANCHES or not name.isidentifier() or name.endswith("_norm"):
                    raise ValueError(f"{EXTRA} must have names of their own, not {name!r}")
            widths = {name: branch.dim for name, branch in self.branches.items()}
            if len(set(widths.values())) > 1:
                raise ValueError(f"dim must be the same in all branches of a block, not {widths}")
            if self.depth is not None:
                if self.depth.router.reads == "normed" and self.norm_order != "pre":
                    raise ValueError(
                        f'norm_order ({self.norm_order!r}) must be "pre" for a depth router that '
                        'reads the "normed" input: other blocks have none; let it read the '
                        '"residual"'
                    )
                merged = self.depth.selection.routing_rows
                for name, pool, _, _ in self.traverse(ExpertPool.Config):
                    whole = pool.router.needs_whole_rows
                    if whole and pool.router.routing_rows % merged:
                        raise ValueError(
                            f"routing_rows ({pool.router.routing_rows}) of {name} must be a "
                            f"multiple of routing_rows ({merged}) of the block's depth, which "
                            "merges so many rows; change one of them"
                        )

        @property
        def branches(self) -> dict[str, Any]:
            """Configs of the branches by name, in order."""
            found: dict[str, Any] = {}
            for name in BRANCHES:
                found |= self.extra_branches if name == EXTRA else {name: getattr(self, name)}
            return {name: branch for name, branch in found.items() if branch is not None}

        @property
        def dim(self) -> int:
            """Width of the block's input and output."""
            return next(iter(self.branches.values())).dim

        def regrouped(self, to: Regrouping) -> Self:
            """The same block in a model of other modality groups; ``ValueError`` if a part of it
            cannot be.
            """
            other = {name: branch.regrouped(to) for name, branch in self.branches.items()}
            extra = {name: other.pop(name) for name in self.extra_branches}
            depth = self.depth and replace(self.depth, selection=self.depth.selection.regrouped(to))
            norms = to.sets(self.norm_groups)
            return replace(self, **other, extra_branches=extra, depth=depth, norm_groups=norms)

        def with_shares(self, shares: Sequence[float]) -> Self:
            """The same block for data with these ``shares`` of the tokens by modality group, from
            which static budgets follow; a share of 0 leaves those of its group alone.
            """
            layer = deepcopy(self)
            if layer.depth is not None:
                layer.depth.selection = layer.depth.selection.with_shares(shares)
            for _, pool, _, _ in layer.traverse(ExpertPool.Config):
                if share := sum(shares[group] for group in pool.groups):
                    pool.share = min(1.0, share)
                    layer.rescale(pool)
            return layer

        def rescale(self, pool: ExpertPool.Config, name: str = "") -> None:
            """Multiplies the share of ``pool`` by the part of its tokens that depth routing keeps,
            relative to all tokens.
            """
            if self.depth is None:
                return
            selection = self.depth.selection
            kept = {selection.kept_share_of(group) for group in pool.groups}
            if len(kept) > 1:
                raise ValueError(
                    f"{name or pool.name} serves modality groups {pool.groups}, of which different "
                    f"parts are kept ({sorted(kept)}); give each a pool of its own"
                )
            if kept:
                pool.share = min(1.0, pool.share * kept.pop() / selection.kept_share)

        def parameters(self, group: int | None = None) -> int:
            """Number of parameters, norms included; see ``Branch.Config.parameters``."""
            norms = len(self.branches) * self.dim * (self.norm_groups if group is None else 1)
            found = norms + sum(branch.parameters(group) for branch in self.branches.values())
            return found + (0 if self.depth is None else self.depth.router.parameters(self.dim))

        def flops(self, seq_len: int, group: int) -> Flops:
            """FLOPs of a token of a modality group in rows of ``seq_len``, on average."""

            def inside(seq_len: int) -> Flops:
                branches = self.branches.values()
                return sum((branch.flops(seq_len, group) for branch in branches), Flops(0, 0))

            if self.depth is None:
                return inside(seq_len)
            return self.depth.flops(self.dim, inside, seq_len, group)

        def inner(self, batch: Microbatch) -> Microbatch:
            """The micro-batch that the branches compute."""
            return batch if self.depth is None else self.depth.inner(batch)

        def saved(self, batch: Microbatch) -> int:
            """Elements per token of ``batch`` that autograd keeps: branches and norms."""
            inner, branches = self.inner(batch), self.branches.values()
            found = sum(branch.saved(inner) for branch in branches) + 2 * len(branches) * self.dim
            if self.depth is None:
                return found
            return found * inner.tokens // batch.tokens + self.depth.saved(self.dim, batch)

        def saved_by_selective(self, batch: Microbatch) -> int:
            """Elements per token of ``batch`` kept under selective activation checkpointing."""
            inner = self.inner(batch)
            found = sum(branch.saved_by_selective(inner) for branch in self.branches.values())
            return found * inner.tokens // batch.tokens

        def collectives(self, batch: Microbatch) -> Iterator[Collective]:
            """Collectives of tensor, expert and context parallelism."""
            for branch in self.branches.values():
                yield from branch.collectives(self.inner(batch))

        def refusal(self, use: Use) -> str | None:
            """Name of the part that refuses ``use``, and its reason; None if none does."""
            for name, branch in self.branches.items():
                if reason := branch.refusal(use):
                    return f"{name}: {reason}"
            if self.depth is not None and use == "context_parallel":
                return (
                    "depth: its router compares tokens of a whole row, of which a rank has a part; "
                    "use data_parallel_shard_degree and activation checkpointing"
                )
            return None

        @property
        def routing_rows(self) -> int:
            """Rows of the batch among which its routers choose, at least."""
            pools = (pool.router.routing_rows for _, pool, _, _ in self.traverse(ExpertPool.Config))
            return math.lcm(1 if self.depth is None else self.depth.selection.routing_rows, *pools)

        def traverse(self, config_cls: type, *, recurse: bool = False, _prefix: str = "") -> Any:
            """torchtitan's, extended to the dict of extra branches."""
            yield from Module.Config.traverse(self, config_cls, recurse=recurse, _prefix=_prefix)
            for name, branch in self.extra_branches.items():
                at = f"{_prefix}.{name}" if _prefix else name
                for found, config, parent, place in branch.traverse(
                    config_cls, recurse=recurse, _prefix=at
                ):
                    yield found, config, parent or self.extra_branches, place or name

    def __init__(self, config: Config):
        super().__init__()
        self.norm_order, self.dropout = config.norm_order, config.dropout
        self.branches = tuple(config.branches)
        for name, branch in config.branches.items():
            self.add_module(f"{name}_norm", RMSNorm(config.dim, config.norm_groups))
            self.add_module(name, branch.build())
        self.depth = None if config.depth is None else config.depth.build(dim=config.dim)

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D)."""
        if self.depth is not None:
            return self.depth(x_TD, context, self)
        return self.run(x_TD, context)

    def run(
        self,
        x_TD: torch.Tensor,
        context: ForwardContext,
        weight_T: torch.Tensor | None = None,
        scales: Scales = "block",
    ) -> torch.Tensor:
        """(T, D) → (T, D), all tokens through all branches.

        ``weight_T`` (T,) fp32 scales what each branch adds to the output, or the last branch alone;
        branches read the residual without weights.
        """
        y_TD = x_TD
        for name in self.branches:
            norm, branch = getattr(self, f"{name}_norm"), getattr(self, name)
            if self.norm_order == "pre":
                out_TD = branch(norm(x_TD, context), context)
            else:
                out_TD = norm(branch(x_TD, context), context)
            out_TD = F.dropout(out_TD, self.dropout, self.training and self.dropout > 0)
            x_TD = x_TD + out_TD
            if weight_T is not None:
                if scales == "block" or name == self.branches[-1]:
                    out_TD = (out_TD * weight_T[:, None]).to(out_TD.dtype)
                y_TD = y_TD + out_TD
        return x_TD if weight_T is None else y_TD

    def first_norm(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The input of the first branch under ``norm_order`` "pre"."""
        return getattr(self, f"{self.branches[0]}_norm")(x_TD, context)
