"""Running thresholds: each expert's moving average of the score that its last chosen token has.

Expert threshold routing (arXiv 2603.11535): a token goes to an expert if its score exceeds the
expert's threshold. No token looks at another, so the rule is causal and needs no second router.
The threshold follows the k-th highest score of each routing group, k the budget of top-k routing,
and is an average over the tokens seen so far, later ones weighing more:

    b = 2^(-tokens of a step / half_life)        weight ← b · weight + (1 - b)
    threshold ← threshold + (1 - b) / weight · (mean k-th score of the step - threshold)

A step's mean is over all ranks and micro-batches (``parallel/training/thresholds.py``), so that
thresholds are equal on any layout. A skipped step, validation and inference move none.

E experts, N routing groups, k slots of an expert in a group, T tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torchtitan.protocols.module import Module

from earlyfuse.models.field_checks import check_positive
from earlyfuse.models.routing.router_stats import ThresholdStats


@torch.library.custom_op("earlyfuse::count_above", mutates_args=())
def count_above(score_ENk: torch.Tensor, threshold_E: torch.Tensor) -> torch.Tensor:
    """Number of slots above the threshold, (E, N) int64: an operator, as recomputed blocks keep its
    result.
    """
    return (score_ENk > threshold_E[:, None, None]).sum(-1)


@count_above.register_fake
def _(score_ENk: torch.Tensor, threshold_E: torch.Tensor) -> torch.Tensor:
    return score_ENk.new_empty(score_ENk.shape[:2], dtype=torch.int64)


class RunningThreshold(Module):
    """One threshold per expert.

    ``threshold_E``, ``weight_E`` fp32: saved in checkpoints; weight 0: no score was seen yet.
    ``sums_2E`` fp64: of the k-th scores of a step's training forwards, and their number. Recomputed
    blocks count both twice, which leaves the mean.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``half_life``: tokens after which a score counts half. In steps of more tokens, a
        threshold is about the mean of the last step. ``chooses``: training chooses by thresholds
        too, instead of the top k. Each expert then takes at most ``slack`` · k tokens of a group,
        those of the lowest scores are dropped; and at least its ``floor`` · k best ones, one or
        more, so that none starves."""

        half_life: float = 16_384
        chooses: bool = False
        slack: float = 1.5
        floor: float = 0.25

        def __post_init__(self) -> None:
            check_positive(self, "half_life")
            if not 1 <= self.slack < math.inf:
                raise ValueError(
                    f"slack ({self.slack}) must be at least 1 and finite: slots of an expert over "
                    "its budget of top-k routing"
                )
            if not 0 <= self.floor <= 1:
                raise ValueError(
                    f"floor ({self.floor}) must be in [0, 1]: the part of the budget of top-k "
                    "routing that an expert takes whatever the scores"
                )

        def slots(self, budget: int, tokens: int) -> int:
            """Rows of an expert in a training routing group of ``tokens``."""
            return min(math.ceil(self.slack * budget), tokens) if self.chooses else budget

    def __init__(self, config: Config, *, experts: int):
        super().__init__()
        self.config = config
        zeros_E = torch.zeros(experts, dtype=torch.float32)
        self.register_buffer("threshold_E", zeros_E)
        self.register_buffer("weight_E", zeros_E.clone())
        sums_2E = torch.zeros(2, experts, dtype=torch.float64)
        self.register_buffer("sums_2E", sums_2E, persistent=False)
        self.stats = ThresholdStats()

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(self) -> torch.Tensor:
        """Thresholds (E,); where no score was seen infinite, so that the expert takes no token."""
        return self.threshold_E.masked_fill(self.weight_E == 0, torch.inf)

    def above(self, scores_TE: torch.Tensor, eligible_T: torch.Tensor | None) -> torch.Tensor:
        """(T, E) bool: the tokens that each expert takes by the rule of inference."""
        above_TE = scores_TE > self()
        return above_TE if eligible_T is None else above_TE & eligible_T[:, None]

    @torch.no_grad()
    def compare(
        self, scores_TE: torch.Tensor, member_TE: torch.Tensor, eligible_T: torch.Tensor | None
    ) -> None:
        """Records how the thresholds agree with the batch's choice ``member_TE``."""
        above_TE = self.above(scores_TE, eligible_T)
        self.stats.record(above_TE, member_TE, eligible_T, self.weight_E > 0)

    @torch.no_grad()
    def follow(
        self, score_ENk: torch.Tensor, budget: int, recording: bool = False
    ) -> torch.Tensor | None:
        """Adds the last score of each ``budget`` to the sums of the step. Where thresholds choose,
        returns the slots that they take, (R,) bool.

        ``score_ENk``: of a training forward, in descending order, -inf in slots without a token.
        Before the first threshold the top ``budget`` are taken. No host synchronisation.
        """
        there_ENk = score_ENk > -torch.inf
        last_EN = score_ENk.masked_fill(~there_ENk, torch.inf)[..., :budget].amin(-1)
        self.record(last_EN, there_ENk[..., 0])
        if not self.config.chooses:
            return None
        above_EN = count_above(score_ENk, self())
        above_EN = torch.where(self.weight_E[:, None] > 0, above_EN, budget)
        floor = max(1, round(self.config.floor * budget))
        slot_k = torch.arange(score_ENk.shape[-1], device=score_ENk.device)
        taken_ENk = (slot_k < above_EN.clamp_min(floor)[..., None]) & there_ENk
        if recording:
            self.stats.record_slots(
                taken_ENk, slot_k < above_EN[..., None], budget, self.weight_E > 0
            )
        return taken_ENk.flatten()

    @torch.no_grad()
    def record(self, kth_EN: torch.Tensor, there_EN: torch.Tensor) -> None:
        """Adds k-th scores to the sums of the step; ``there_EN`` bool: groups that have one."""
        kth_EN = kth_EN.masked_fill(~there_EN, 0).double()
        self.sums_2E += torch.stack([kth_EN.sum(1), there_EN.sum(1).double()])

    @torch.no_grad()
    def update(self, sums_2E: torch.Tensor, step_tokens: float, taken: torch.Tensor) -> None:
        """Moves the thresholds after a step. ``sums_2E``: of all ranks; ``taken`` bool: False if
        the step was skipped. No host synchronisation.
        """
        kept = 0.5 ** (step_tokens / self.config.half_life)
        total_E, count_E = sums_2E
        moved_E = taken & (count_E > 0)
        mean_E = (total_E / count_E.clamp_min(1)).float()
        weight_E = kept * self.weight_E + (1 - kept)
        step_E = (1 - kept) / weight_E * (mean_E - self.threshold_E)
        self.threshold_E += torch.where(moved_E, step_E, 0.0)
        self.weight_E.copy_(torch.where(moved_E, weight_E, self.weight_E))
        self.sums_2E.zero_()


def running_thresholds(model: nn.Module) -> Iterator[tuple[str, RunningThreshold]]:
    """All running thresholds of a model by name, in order."""
    for name, module in model.named_modules():
        if isinstance(module, RunningThreshold):
            yield name, module


def measured(model: nn.Module) -> bool:
    """True unless the model has running thresholds and no step has moved one yet."""
    thresholds = [threshold for _, threshold in running_thresholds(model)]
    return not thresholds or any(bool(threshold.weight_E.any()) for threshold in thresholds)
