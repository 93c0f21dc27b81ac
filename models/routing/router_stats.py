"""Router statistics: summed on the device, read when a step is logged.

T tokens, E experts, R routed rows, K sums.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torchtitan.protocols.module import Module

from earlyfuse.models.routes import Routes


class Statistics(Module, ABC):
    """Sums over recorded forwards, in buffers, and the metrics that follow from them.

    The trainer finds all of a model's by this class, sums their buffers over ranks and calls
    ``pop``. ``kind`` is the first part of a metric's name; ``group``: the modality group of the
    tokens counted, None for all. With the layer they make the name ``kind``/layer3.pool1.text.
    """

    kind: str
    group: int | None = None

    def __init__(self, sums: int):
        super().__init__()
        self.register_buffer("sums_K", torch.zeros(sums), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def add(self, *values: torch.Tensor) -> None:
        """Add one tensor to each of ``sums_K``, summed. No host synchronisation."""
        self.sums_K += torch.stack([value.sum().float() for value in values])

    def pop(self) -> dict[str, float]:
        """Metrics since the last call; resets the sums. Waits for the device."""
        summary = self.summary()
        self._init_self_buffers()
        return summary

    @abstractmethod
    def summary(self) -> dict[str, float]:
        """Name → value, from the present sums."""


class RouterStats(Statistics):
    """Load, reach, weights and logits of a router.

    ``load_E``: real tokens of each expert. ``sums_K``: eligible tokens, those that some expert
    took, rows, rows of real tokens, their weights, squared logits. ``per_token``: experts that a
    token takes.
    """

    kind = "router"

    def __init__(self, experts: int, per_token: int = 1, group: int | None = None):
        super().__init__(sums=6)
        self.per_token, self.group = per_token, group
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)

    @torch.no_grad()
    def record(
        self,
        logits_TE: torch.Tensor,
        eligible_T: torch.Tensor | None,
        routes: Routes,
        own_E: torch.Tensor | None = None,
        taken_R: torch.Tensor | None = None,
    ) -> None:
        """Add one forward's routing; with ``own_E``, of these experts alone, whose tokens are the
        eligible ones; with ``taken_R`` bool, of these rows alone, the others being padding. No host
        synchronisation.
        """
        row_R, offset_G1, weight_R = routes
        assert weight_R is not None, "routers always weigh their rows"
        eligible = logits_TE.new_ones(len(logits_TE)) if eligible_T is None else eligible_T.float()
        real_R = eligible[row_R]
        if taken_R is not None:
            real_R = real_R * taken_R
        reached_T = torch.zeros_like(eligible).scatter_reduce_(0, row_R, real_R, "amax")
        # experts may have different numbers of rows
        upto_R1 = F.pad(real_R.cumsum(0, dtype=torch.float64), (1, 0))
        load_E, rows_E = upto_R1[offset_G1].diff(), offset_G1.diff()
        if own_E is not None:
            logits_TE, load_E, rows_E = logits_TE[:, own_E], load_E[own_E], rows_E[own_E]
        squares_T = logits_TE.square().mean(1) * eligible
        self.load_E += load_E
        self.add(eligible, reached_T, rows_E, real_R, weight_R * real_R, squares_T)

    def summary(self) -> dict[str, float]:
        """``load_min``, ``load_max``: least and most loaded expert relative to an even share;
        ``reached``: share of eligible tokens with an expert; ``filled``: share of the slots used;
        ``weight``: mean weight of a chosen token; ``logit_rms``.
        """
        eligible, reached, rows, real, weight, squares = self.sums_K.tolist()
        even = max(eligible, 1) * self.per_token / len(self.load_E)
        load = (self.load_E / even).tolist()
        return {
            "load_min": min(load),
            "load_max": max(load),
            "reached": reached / max(eligible, 1),
            "filled": real / max(rows, 1),
            "weight": weight / max(real, 1),
            "logit_rms": (squares / max(eligible, 1)) ** 0.5,
        }


class CausalStats(Statistics):
    """Precision and recall of a causal router against the batch's choice.

    ``sums_K``: decisions (eligible tokens times experts), their cross-entropy in nats, rows of the
    batch's choice, rows that the router takes, rows of both.
    """

    kind = "causal"

    def __init__(self) -> None:
        super().__init__(sums=5)

    @torch.no_grad()
    def record(
        self,
        bce_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        member_TE: torch.Tensor,
        eligible_T: torch.Tensor | None,
    ) -> None:
        """Add one forward. No host synchronisation."""
        taken_TE = logits_TE > 0
        decided_TE = torch.ones_like(taken_TE)
        if eligible_T is not None:
            decided_TE = decided_TE & eligible_T[:, None]
        self.add(decided_TE, bce_TE, member_TE, taken_TE & decided_TE, taken_TE & member_TE)

    def summary(self) -> dict[str, float]:
        """``bce``: nats per decision; ``precision``: share of the router's rows that the batch
        chose; ``recall``: share of the batch's rows that the router takes; ``taken``: share of all
        decisions that take a token (of the batch: capacity_factor / E).
        """
        decisions, bce, member, taken, both = self.sums_K.tolist()
        return {"bce": bce / max(decisions, 1)} | _agreement(decisions, member, taken, both)


def _agreement(decisions: float, member: float, taken: float, both: float) -> dict[str, float]:
    return {
        "precision": both / max(taken, 1),
        "recall": both / max(member, 1),
        "taken": taken / max(decisions, 1),
    }


class ThresholdStats(Statistics):
    """Precision and recall of running thresholds against the batch's choice, and how training by
    them fills budgets.

    ``sums_K``: decisions (eligible tokens times experts), rows of the batch's choice, rows above
    the thresholds, rows of both. ``slots_K``, in training by thresholds: budgets of top-k routing,
    rows taken, those of them above the thresholds. Experts without a threshold, before
    the first step, are not counted.
    """

    kind = "threshold"

    def __init__(self) -> None:
        super().__init__(sums=4)
        self.register_buffer("slots_K", torch.zeros(3), persistent=False)

    @torch.no_grad()
    def record(
        self,
        above_TE: torch.Tensor,
        member_TE: torch.Tensor,
        eligible_T: torch.Tensor | None,
        seen_E: torch.Tensor,
    ) -> None:
        """Add one forward. ``seen_E`` bool: experts that have a threshold. No host
        synchronisation.
        """
        decided_TE = seen_E.expand_as(above_TE)
        if eligible_T is not None:
            decided_TE = decided_TE & eligible_T[:, None]
        self.add(decided_TE, member_TE & seen_E, above_TE, above_TE & member_TE)

    @torch.no_grad()
    def record_slots(
        self, taken_ENk: torch.Tensor, above_ENk: torch.Tensor, budget: int, seen_E: torch.Tensor
    ) -> None:
        """Add the slots of one training forward, those ``above`` the thresholds in front. No host
        synchronisation.
        """
        budgets_EN = torch.full_like(taken_ENk[..., 0], budget, dtype=torch.float32)
        rows = [budgets_EN, taken_ENk.sum(-1), (taken_ENk & above_ENk).sum(-1)]
        self.slots_K += torch.stack([(rows_EN.float().sum(1) * seen_E).sum() for rows_EN in rows])

    def summary(self) -> dict[str, float]:
        """``precision``: share of the rows above the thresholds that the batch chose; ``recall``:
        share of the batch's rows above them; ``taken``: share of all decisions above them.

        In training by thresholds also ``used``: rows taken over the budget of top-k routing;
        ``overflow``: share of the rows above the thresholds that did not fit; ``floor``: share of
        the rows taken that are below.
        """
        decisions, member, above, both = self.sums_K.tolist()
        budget, rows, within = self.slots_K.tolist()
        found = _agreement(decisions, member, above, both) if decisions else {}
        if budget:
            found |= {
                "used": rows / budget,
                "overflow": (above - within) / max(above, 1),
                "floor": (rows - within) / max(rows, 1),
            }
        return found


class OutputNorm(Statistics):
    """Mean norm of the last block's outputs: it grows before Chameleon diverges (arXiv 2405.09818,
    2.3). ``sums_K``: norms, tokens.
    """

    kind = "output_norm"

    def __init__(self) -> None:
        super().__init__(sums=2)

    @torch.no_grad()
    def record(self, x_TD: torch.Tensor) -> None:
        """Add one forward. No host synchronisation."""
        norms_T = torch.linalg.vector_norm(x_TD.float(), dim=-1)
        self.add(norms_T, torch.ones_like(norms_T))

    def summary(self) -> dict[str, float]:
        """The mean, without a name of its own."""
        total, tokens = self.sums_K.tolist()
        return {"": total / max(tokens, 1)}
