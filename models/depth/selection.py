"""Selection of the tokens that a depth-routed layer keeps.

``Selection`` is the rule as plain values; ``keep`` applies it to scores; ``compact`` arranges the
kept tokens in rectangles of a static size. None of them waits for the device.

T tokens, N rectangles of L = T/N tokens, K slots of a rectangle, R = N·K rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torchtitan.config import Configurable

from earlyfuse.kernels.permute import select_top_k
from earlyfuse.models.blocks.branch import Regrouping
from earlyfuse.models.field_checks import check_choices, check_positive

Group = Literal["routing_group", "row", "document", "span"]
Rounding = Literal["floor", "ceil", "nearest"]
MILLION = 1_000_000


@dataclass(kw_only=True, slots=True)
class Selection(Configurable.Config):
    """The rule of a selection: competing tokens, their groups, and how many of a group are kept.

    ``capacity``         fraction of a group that is kept
    ``competing``        modality groups whose tokens compete, () for all; the others are forced:
                         always kept, outside the capacity
    ``forced``           modality groups that are kept first, inside the capacity, which is then of
                         all tokens; dropped where they do not fit
    ``group``            what competes with each other: "routing_group", ``routing_rows`` rows of
                         the batch; "row"; "document"; "span", an image, frame or utterance
    ``rounding``         of capacity · tokens of a group
    ``budget``           "static": a fixed number of slots, from ``competing_share``; of tokens that
                         do not fit the lowest scores are dropped, and counted. "exact": as many
                         slots as are kept, a number that the host waits for
    ``competing_share``  fraction of all tokens that compete and are not forced
    ``slack``            slots of a static budget, as a multiple of those that it expects
    """

    capacity: float
    competing: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    group: Group = "row"
    routing_rows: int = 1
    rounding: Rounding = "floor"
    budget: Literal["static", "exact"] = "static"
    competing_share: float = 1.0
    slack: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity ({self.capacity}) must be in (0, 1]")
        if not 0 < self.competing_share <= 1:
            raise ValueError(
                f"competing_share ({self.competing_share}) must be in (0, 1]: the fraction of all "
                "tokens that compete"
            )
        if self.competing and self.forced:
            raise ValueError(
                f"forced ({self.forced}) must be () where competing ({self.competing}) names "
                "modality groups: the others are forced outside the capacity"
            )
        if not 1 <= self.slack < math.inf:
            raise ValueError(f"slack ({self.slack}) must be at least 1, and finite")
        check_positive(self, "routing_rows")
        check_choices(
            self,
            group=("routing_group", "row", "document", "span"),
            rounding=("floor", "ceil", "nearest"),
            budget=("static", "exact"),
        )

    def regrouped(self, to: Regrouping) -> Self:
        """The same rule for other modality groups; new ones are media."""
        competing = sorted((*to.places(self.competing), *to.new)) if self.competing else ()
        if self.competing and not competing:
            raise ValueError(
                "depth selects among the tokens of media, and the data have none; train a config "
                "without, or add a source with media"
            )
        return replace(self, competing=tuple(competing), forced=to.places(self.forced))

    def with_shares(self, shares: Sequence[float]) -> Self:
        """The same rule for data with these ``shares`` of the tokens by modality group."""
        competing = [group for group in range(len(shares)) if group not in self.forced]
        share = sum(shares[group] for group in self.competing or competing)
        return replace(self, competing_share=min(1.0, share)) if share else self

    @property
    def kept_share(self) -> float:
        """Fraction of all tokens that the layer keeps, in expectation."""
        if not self.competing:
            return self.capacity
        return 1 - self.competing_share * (1 - self.capacity)

    def kept_share_of(self, group: int) -> float:
        """Fraction of the tokens of a modality group that the layer keeps, in expectation."""
        if self.competing:
            return self.capacity if group in self.competing else 1.0
        if not self.forced:
            return self.capacity
        forced = 1 - self.competing_share
        if group in self.forced:
            return min(1.0, self.capacity / forced) if forced else 1.0
        return max(0.0, self.capacity - forced) / self.competing_share

    def slot_share(self, slack: float = 1.0) -> int:
        """Slots of a static budget in millionths of the tokens: compiled blocks take an int of a
        module for a constant, a float not.
        """
        return min(MILLION, math.ceil(round(self.kept_share * self.slack * slack * MILLION, 3)))


def slots(share: int, seq_len: int, rows: int) -> int:
    """Slots of a rectangle of ``rows`` rows, a multiple of these; ``share``: ``slot_share``."""
    return rows * max(1, -(-share * seq_len // MILLION))


class Kept(NamedTuple):
    """The kept tokens in rectangles.

    ``row_R``   (R,) int64: token of each slot, all different; in each rectangle ascending, those
                that only fill up last
    ``real_R``  (R,) bool: False for tokens that only fill up
    """

    row_R: torch.Tensor
    real_R: torch.Tensor


class Decision(NamedTuple):
    """A depth router's decision about all tokens.

    ``logits_T``, ``weight_T``  (T,) fp32 scores, and the weights that they map to
    ``decided_T``  (T,) bool: tokens that the router decides about: that compete, or are forced
                   inside the capacity
    ``forced_T``   (T,) bool: tokens that the batch's rule keeps in any case, or first
    ``chosen_T``   (T,) bool: selected tokens, before those that do not fit the budget are dropped
    ``kept``       the rows that the block computes
    """

    logits_T: torch.Tensor
    weight_T: torch.Tensor
    decided_T: torch.Tensor
    forced_T: torch.Tensor
    chosen_T: torch.Tensor
    kept: Kept


def keep(
    logits_T: torch.Tensor,
    group_T: torch.Tensor,
    competing_T: torch.Tensor,
    forced_T: torch.Tensor,
    *,
    capacity: float,
    rounding: Rounding = "floor",
    forced_in_budget: bool = False,
) -> torch.Tensor:
    """(T,) bool: forced tokens, and the competing ones of the highest scores in each group.

    ``logits_T``     (T,) fp32 raw scores: a squashed score would make ties where it saturates
    ``group_T``      (T,) int64, any numbers
    ``competing_T``, ``forced_T``  (T,) bool; tokens that are neither are never kept

    Ties go to the lower index. A group of n keeps ``capacity`` · n, rounded: n counts its competing
    tokens, or with ``forced_in_budget`` its forced ones too, which then go first and of which the
    lowest scores are dropped where they do not fit.
    """
    score_T = logits_T.detach().float()
    counted_T = competing_T
    if forced_in_budget:
        counted_T = competing_T | forced_T
    rank_T, size_T = _ranks(score_T, group_T, counted_T, forced_T)
    kept = (capacity * size_T.double()).round(decimals=6)  # 0.29 · 100 is not below 29
    kept_T = {"floor": kept.floor, "ceil": kept.ceil, "nearest": kept.round}[rounding]()
    chosen_T = counted_T & (rank_T < kept_T)
    return chosen_T if forced_in_budget else chosen_T | forced_T


def _ranks(
    score_T: torch.Tensor, group_T: torch.Tensor, counted_T: torch.Tensor, first_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank of each counted token in its group from 0, and the group's size: tokens of ``first_T``,
    then the highest scores.
    """
    # the others form a group of their own
    group_T = torch.where(counted_T, group_T, group_T.min() - 1)
    by_score_T = score_T.argsort(descending=True, stable=True)
    by_score_T = by_score_T[(~first_T)[by_score_T].argsort(stable=True)]
    order_T = by_score_T[group_T[by_score_T].argsort(stable=True)]
    sorted_T = group_T[order_T]
    begin_T = torch.searchsorted(sorted_T, sorted_T)
    size_T = torch.searchsorted(sorted_T, sorted_T, right=True) - begin_T
    place_T = torch.arange(len(order_T), device=order_T.device) - begin_T
    empty_T = torch.empty_like(order_T)
    return empty_T.scatter(0, order_T, place_T), empty_T.scatter(0, order_T, size_T)


def compact(
    kept_T: torch.Tensor,
    forced_T: torch.Tensor,
    logits_T: torch.Tensor,
    rectangles: int,
    slots: int,
) -> Kept:
    """The kept tokens in ``rectangles`` equal parts of the tokens, ``slots`` for each.

    Where more are kept than fit, those of the lowest scores are dropped, forced ones last.
    """
    key_T = logits_T.detach().float()
    key_T = key_T.masked_fill(forced_T, torch.inf).masked_fill(~kept_T, -torch.inf)
    tokens = len(kept_T) // rectangles
    place_NK = select_top_k(key_T.view(rectangles, tokens), slots)
    real_NK = kept_T.view(rectangles, tokens).gather(1, place_NK)
    place_NK, order_NK = torch.where(real_NK, place_NK, place_NK + tokens).sort(1)
    real_NK = real_NK.gather(1, order_NK)
    start_N1 = torch.arange(rectangles, device=key_T.device)[:, None] * tokens
    row_NK = torch.where(real_NK, place_NK, place_NK - tokens) + start_N1
    return Kept(row_NK.flatten(), real_NK.flatten())
