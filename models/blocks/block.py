"""The residual block: an ordered list of branches, each with a norm.

Models differ only in the branches of their blocks: ``Attention`` or ``Mamba``, ``FeedForward`` or
``MixtureOfExperts``, shared or untied by modality, or any other ``Branch``.

T tokens, D width.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torchtitan.protocols.module import Module

from earlyfuse.models.blocks.attention import Attention
from earlyfuse.models.blocks.branch import Branch, Flops
from earlyfuse.models.blocks.experts import MixtureOfExperts
from earlyfuse.models.blocks.feed_forward import FeedForward
from earlyfuse.models.blocks.linear import RMSNorm
from earlyfuse.models.blocks.mamba import Mamba
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.field_checks import check_choices

EXTRA = "extra_branches"
BRANCHES = ("attention", "mamba", EXTRA, "feed_forward")  # in the order in which they run


class Block(Module):
    """A residual block: runs the configured branches in order, each with its own norm.

    ``norm_order`` "pre": x + f(norm(x)); "swin": x + norm(f(x)), as in Chameleon-34B and MoMa.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``extra_branches``: name → any other branch; its parameters have that name."""

        attention: Attention.Config | None = None
        mamba: Mamba.Config | None = None
        extra_branches: dict[str, Branch.Config] = field(default_factory=dict)
        feed_forward: FeedForward.Config | MixtureOfExperts.Config | None = None
        norm_order: Literal["pre", "swin"] = "pre"
        norm_groups: int = 1
        dropout: float = 0.0

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

        def parameters(self, group: int | None = None) -> int:
            """Number of parameters, norms included; see ``Branch.Config.parameters``."""
            norms = len(self.branches) * self.dim * (self.norm_groups if group is None else 1)
            return norms + sum(branch.parameters(group) for branch in self.branches.values())

        def flops(self, seq_len: int, group: int) -> Flops:
            """FLOPs of a token of a modality group in rows of ``seq_len``."""
            return sum(
                (branch.flops(seq_len, group) for branch in self.branches.values()), Flops(0, 0)
            )

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

    def forward(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(T, D) → (T, D)."""
        for name in self.branches:
            norm, branch = getattr(self, f"{name}_norm"), getattr(self, name)
            if self.norm_order == "pre":
                out_TD = branch(norm(x_TD, context), context)
            else:
                out_TD = norm(branch(x_TD, context), context)
            x_TD = x_TD + F.dropout(out_TD, self.dropout, self.training and self.dropout > 0)
        return x_TD
