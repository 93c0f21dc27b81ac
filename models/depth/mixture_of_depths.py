"""Mixture-of-Depths: a block that only some of the tokens pass.

A router scores the tokens, a ``Selection`` keeps some, the block runs on these alone, gathered in
order with their documents, positions, modalities and spans; the others go on as they are. MoD
(arXiv 2404.02258), MoMa's MoD (2407.21770, 2.3), p-MoD (2412.04449), gamma-MoD (2410.13859) and
VideoLLM-MoD (2408.16730) are values of ``MixtureOfDepths.Config``: see ``configs/depth.py``.

T tokens, D width, R kept rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torchtitan.config import Configurable
from torchtitan.protocols.module import Module

from earlyfuse.kernels.permute import gather_rows
from earlyfuse.models.batch import PADDING
from earlyfuse.models.blocks.branch import FP32, Flops, Microbatch
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.depth.depth_router import DepthRouter, Scores
from earlyfuse.models.depth.kept_cache import KeptCache
from earlyfuse.models.depth.put_rows import put_rows
from earlyfuse.models.depth.selection import (
    Decision,
    Kept,
    Rounding,
    Selection,
    compact,
    keep,
    slots,
)
from earlyfuse.models.field_checks import check_choices
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.router import LACKING
from earlyfuse.models.routing.running_threshold import RunningThreshold

Scales = Literal["block", "feed_forward"]


class RoutedBlock(Protocol):
    """A block that can be depth-routed: ``Block``, or any object with these two methods."""

    def run(
        self,
        x_TD: torch.Tensor,
        context: ForwardContext,
        weight_T: torch.Tensor | None,
        scales: Scales,
    ) -> torch.Tensor:
        """(T, D) → (T, D); ``weight_T`` scales what the block adds, or its last branch adds."""

    def first_norm(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Input of the first branch, for routers that read it."""


@dataclass(kw_only=True, slots=True)
class Weighting(Configurable.Config):
    """How a router's score z scales what the block adds.

    ``map``      "one": 1, the router then learns from its auxiliary losses alone; "identity": z;
                 "sigmoid", of two outputs the softmax; "tanh": 1 + ``alpha`` · tanh(z)
    ``scales``   "block": all that the block adds to the residual; "feed_forward": its last branch
    ``forced``   forced tokens are scaled too
    ``skipped``  competing tokens that are not kept: "unchanged", or "scaled" by their weight
    """

    map: Literal["one", "identity", "sigmoid", "tanh"] = "sigmoid"
    alpha: float = 0.2
    scales: Scales = "block"
    forced: bool = False
    skipped: Literal["unchanged", "scaled"] = "unchanged"

    def __post_init__(self) -> None:
        check_choices(
            self,
            map=("one", "identity", "sigmoid", "tanh"),
            scales=("block", "feed_forward"),
            skipped=("unchanged", "scaled"),
        )

    def __call__(self, logits_T: torch.Tensor) -> torch.Tensor:
        """Weights (T,) fp32."""
        if self.map == "identity":
            return logits_T
        if self.map == "sigmoid":
            return logits_T.sigmoid()
        if self.map == "tanh":
            return 1 + self.alpha * logits_T.tanh()
        return torch.ones_like(logits_T)


class MixtureOfDepths(Module):
    """Routes tokens through a block or past it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``positions``: rotary positions of kept tokens, "original", with gaps, or "compacted":
        their place among the kept tokens of their document."""

        selection: Selection
        weighting: Weighting = field(default_factory=Weighting)
        router: DepthRouter.Config = field(default_factory=DepthRouter.Config)
        positions: Literal["original", "compacted"] = "original"

        def __post_init__(self) -> None:
            check_choices(self, positions=("original", "compacted"))
            chosen = self.selection
            if self.router.inference == "selection" and (
                not chosen.competing or chosen.group not in ("document", "span")
            ):
                raise ValueError(
                    f'inference ("selection") needs competing ({chosen.competing}) modality groups '
                    f'that are media, and group ({chosen.group!r}) "document" or "span": other '
                    "selections depend on tokens that are not written yet; use a predictor, logit "
                    "or threshold"
                )

        @property
        def slot_share(self) -> int:
            """See ``Selection.slot_share``; a threshold that chooses has slack of its own."""
            threshold = self.router.threshold
            if threshold is None or not threshold.chooses:
                return self.selection.slot_share()
            return self.selection.slot_share(threshold.slack)

        def inner(self, batch: Microbatch) -> Microbatch:
            """The micro-batch that the block computes: as many rows, of kept tokens."""
            return batch._replace(seq_len=slots(self.slot_share, batch.seq_len, rows=1))

        def flops(
            self, dim: int, inside: Callable[[int], Flops], seq_len: int, group: int
        ) -> Flops:
            """FLOPs of a token; ``inside(S)``: of one in the block, in rows of S kept tokens."""
            kept_len = max(1, round(self.selection.kept_share * seq_len))
            one, share = inside(kept_len), self.selection.kept_share_of(group)
            within = Flops(one.forward * share, one.backward * share)
            return within + self.router.flops(dim)

        def saved(self, dim: int, batch: Microbatch) -> int:
            """Elements per token that autograd keeps: gathered rows, what the block returned, and
            the router's fp32 copy of its input.
            """
            copies = FP32 // batch.itemsize if batch.itemsize < FP32 else 0
            return round((2 * self.inner(batch).tokens / batch.tokens + copies) * dim)

    def __init__(self, config: Config, *, dim: int):
        super().__init__()
        self.config, self.slot_share = config, config.slot_share
        chosen = config.selection
        # what the router decides about: forced tokens inside the capacity too
        share = chosen.competing_share if chosen.competing else 1.0
        self.router = config.router.build(dim=dim, share=share)

    def forward(
        self, x_TD: torch.Tensor, context: ForwardContext, block: RoutedBlock
    ) -> torch.Tensor:
        """(T, D) → (T, D)."""
        return self.run(x_TD, context, block)[0]

    def run(
        self, x_TD: torch.Tensor, context: ForwardContext, block: RoutedBlock
    ) -> tuple[torch.Tensor, Decision]:
        """The output (T, D), and what the router decided."""
        weighting = self.config.weighting
        read_TD = x_TD
        if self.config.router.reads == "normed":
            read_TD = block.first_norm(x_TD, context)
        scores = self.router(read_TD, context)
        decision = self.decide(scores, context)
        row_R, real_R = decision.kept
        weight_T = decision.weight_T
        if not weighting.forced:
            weight_T = weight_T.masked_fill(decision.forced_T, 1.0)
        weight_R = weight_T[row_R] * real_R
        if context.settings.rule == "batch":
            weight_R = self.router.learn(scores, decision, weight_R, context.settings)
        if self._keeps_all(context):
            return block.run(x_TD, context, weight_R, weighting.scales), decision
        inner = self._inner(decision.kept, context)
        y_RD = block.run(gather_rows(x_TD, row_R), inner, weight_R, weighting.scales)
        base_TD = x_TD
        if weighting.skipped == "scaled":
            scale_T = torch.where(decision.forced_T, 1.0, decision.weight_T)
            scale_T = torch.where(decision.decided_T, scale_T, 1.0)
            base_TD = (x_TD * scale_T[:, None]).to(x_TD.dtype)
        return put_rows(base_TD, y_RD, row_R, real_R), decision

    def decide(self, scores: Scores, context: ForwardContext) -> Decision:
        """Decides which tokens the block computes, by the rule of ``context.settings``."""
        selection, rule = self.config.selection, context.settings.rule
        if rule != "batch" and rule not in self.config.router.causal_rules:
            raise ValueError(f"a depth router {LACKING[rule]}")
        selects = rule == "batch" or rule in self.config.router.selecting_rules
        real_T, in_prompt_T = _real(context), _in_prompt(context)
        decided_T = real_T
        if selection.competing:
            decided_T = real_T & _in_groups(context, selection.competing)
        if in_prompt_T is not None and self.config.router.decoding == "all" and rule != "threshold":
            decided_T = decided_T & in_prompt_T
        forced_T = real_T & ~decided_T
        if not selects:
            chosen_T = forced_T | (decided_T & self.router.decide(scores, rule, in_prompt_T))
        else:
            if selection.forced:
                forced_T = forced_T | (real_T & _in_groups(context, selection.forced))
            chosen_T = self._select(scores.logits_T, decided_T, forced_T, context)
        kept = self._fit(chosen_T, forced_T, scores.logits_T, context)
        weight_T = self.config.weighting(scores.logits_T)
        return Decision(scores.logits_T, weight_T, decided_T, forced_T, chosen_T, kept)

    def _select(
        self,
        logits_T: torch.Tensor,
        decided_T: torch.Tensor,
        forced_T: torch.Tensor,
        context: ForwardContext,
    ) -> torch.Tensor:
        """(T,) bool: the tokens that the batch's rule selects, and in training the sample of the
        running threshold.
        """
        selection, threshold = self.config.selection, self.router.threshold
        group_T = self._groups(context)

        def best(part: float = 1.0, rounding: Rounding = selection.rounding) -> torch.Tensor:
            return keep(
                logits_T,
                group_T,
                decided_T & ~forced_T,
                forced_T,
                capacity=min(1.0, part * selection.capacity),
                rounding=rounding,
                forced_in_budget=bool(selection.forced),
            )

        chosen_T = best()
        if threshold is None or not self.training or context.settings.rule != "batch":
            return chosen_T
        self._follow(threshold, logits_T, decided_T & ~forced_T, chosen_T, context)
        if not threshold.config.chooses:
            return chosen_T
        above_T = threshold.above(logits_T.detach()[:, None], None)[:, 0]
        floor_T = best(threshold.config.floor, "ceil")
        within_T = best(threshold.config.slack) & above_T & ~forced_T
        taken_T = floor_T | within_T | (chosen_T & forced_T)
        return torch.where(threshold.weight_E > 0, taken_T, chosen_T)

    def _follow(
        self,
        threshold: RunningThreshold,
        logits_T: torch.Tensor,
        competing_T: torch.Tensor,
        chosen_T: torch.Tensor,
        context: ForwardContext,
    ) -> None:
        """Adds to the threshold's sums, for each rectangle, the lowest score that keeps as many of
        its tokens as were chosen, in whatever groups.
        """
        rectangles = context.rows // self.config.selection.routing_rows
        score_T = logits_T.detach().masked_fill(~competing_T, -torch.inf)
        count_N = (competing_T & chosen_T).view(rectangles, -1).sum(1)
        descending_NL = score_T.view(rectangles, -1).sort(descending=True).values
        kth_N = descending_NL.gather(1, (count_N - 1).clamp_min(0)[:, None])[:, 0]
        threshold.record(kth_N[None], (count_N > 0)[None])

    def _fit(
        self,
        chosen_T: torch.Tensor,
        forced_T: torch.Tensor,
        logits_T: torch.Tensor,
        context: ForwardContext,
    ) -> Kept:
        """The chosen tokens in rectangles."""
        if self._keeps_all(context):
            every_T = torch.arange(len(chosen_T), device=chosen_T.device)
            return Kept(every_T, torch.ones_like(chosen_T))
        selection, settings = self.config.selection, context.settings
        rectangles = self._rectangles(context)
        exact = selection.budget == "exact" or settings.budgets == "exact"
        if exact or settings.rule != "batch":
            number = max(1, int(chosen_T.view(rectangles, -1).sum(1).max()))
        else:
            number = slots(self.slot_share, context.seq_len, selection.routing_rows)
        return compact(chosen_T, forced_T, logits_T, rectangles, number)

    def _rectangles(self, context: ForwardContext) -> int:
        """Rows of the block's input: tokens that decide by themselves stay in their row."""
        if context.cache is not None or context.settings.rule != "batch":
            return context.rows
        return context.rows // self.config.selection.routing_rows

    def _keeps_all(self, context: ForwardContext) -> bool:
        """True if the block computes all tokens as they are, padding too."""
        selection = self.config.selection
        return (
            selection.capacity == 1 and context.cache is None and context.settings.rule == "batch"
        )

    def _inner(self, kept: Kept, context: ForwardContext) -> ForwardContext:
        """The context of the kept tokens."""
        selection = self.config.selection
        offset_G1 = torch.arange(2, device=kept.row_R.device) * len(kept.row_R)
        routes = Routes(kept.row_R, offset_G1, kept.real_R.float())
        rows, state = self._rectangles(context), None
        if context.cache is not None:
            state = context.cache.state(self, KeptCache)
            state.start_step(kept.real_R.view(rows, -1))
        return context.select(
            routes,
            rows,
            None if state is None else state.cache,
            compacted=self.config.positions == "compacted",
            exact=selection.budget == "exact",
        )

    def _groups(self, context: ForwardContext) -> torch.Tensor:
        """(T,) int64: tokens with the same number compete with each other."""
        selection, cached = self.config.selection, context.cache is not None
        if not cached and context.rows % selection.routing_rows:
            raise ValueError(
                f"a batch of {context.rows} rows cannot be split into routing groups of "
                f"routing_rows ({selection.routing_rows}); make the local batch size a multiple "
                "of it"
            )
        token_T = torch.arange(context.rows * context.seq_len, device=context.group_T.device)
        row_T = token_T // context.seq_len
        if selection.group == "routing_group" and not cached:
            return row_T // selection.routing_rows
        if selection.group in ("row", "routing_group"):
            return row_T
        number_BS = context.document_BS if selection.group == "document" else context.span_BS
        return (row_T << 32) + number_BS.flatten()


def _real(context: ForwardContext) -> torch.Tensor:
    """(T,) bool: tokens of documents, no padding."""
    real_BS = context.document_BS != PADDING
    if context.cache is not None:
        assert context.cache.real_B is not None, "start_step comes before a forward"
        place_S = torch.arange(context.seq_len, device=real_BS.device)
        real_BS = real_BS & (place_S < context.cache.real_B[:, None])
    return real_BS.flatten()


def _in_prompt(context: ForwardContext) -> torch.Tensor | None:
    """(T,) bool: tokens that are read at the beginning of their document, not written; None
    without a cache: all.
    """
    if context.cache is None:
        return None
    assert context.cache.read_B is not None, "start_step comes before a forward"
    return (context.cache.read_B == 0).repeat_interleave(context.seq_len)


def _in_groups(context: ForwardContext, groups: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([context.group_T == group for group in groups]).any(0)
