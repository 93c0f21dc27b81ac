"""Expert choice: each expert takes its top k tokens of a routing group (arXiv 2407.21770, 2.2).

A routing group is a fixed number of rows of the global batch, so the function computed does not
depend on ranks, micro-batches or accumulation, and routing needs no communication. Selection sees a
whole group at once, hence also later tokens: not causal.

T tokens, N routing groups of L = T/N tokens, E experts, k tokens an expert takes in a group,
R = E·N·k rows.
"""

import torch

from earlyfuse.kernels.permute import select_top_k
from earlyfuse.models.routes import Routes


def expert_choice(
    logits_TE: torch.Tensor,
    eligible_T: torch.Tensor | None,
    routing_groups: int,
    *,
    budget: int | None,
    capacity_factor: float,
) -> Routes:
    """Routes of the tokens that the experts choose; weights are sigmoid scores (MoMa eq. 1).

    ``logits_TE``   (T, E) fp32 raw router outputs; selection and ties (lower index first) use these
    ``eligible_T``  (T,) bool, tokens that may be chosen; None means all
    ``budget``      k for the static rule: always k rows per expert and group; those that no
                    eligible token fills have weight 0. None for the paper's exact rule,
                    k = round(capacity_factor · eligible tokens of the group / E), which needs the
                    counts on the host.
    """
    if budget is not None:
        return _static(logits_TE, eligible_T, routing_groups, budget)
    return _exact(logits_TE, eligible_T, routing_groups, capacity_factor)


def static_budget(share: float, capacity_factor: float, group_tokens: int, experts: int) -> int:
    """k = round(capacity_factor · share · tokens of a routing group / experts).

    Raises ``ValueError`` when that is 0 or more than a group holds.
    """
    budget = round(capacity_factor * share * group_tokens / experts)
    if not 0 < budget <= group_tokens:
        raise ValueError(
            f"each of {experts} experts would take {budget} of the {group_tokens} tokens of a "
            "routing group "
            f"(share {share}, capacity_factor {capacity_factor}); it must be between 1 and "
            f"{group_tokens}: "
            "raise share, routing_rows or seq_len, or use fewer experts"
        )
    return budget


def _static(
    logits_TE: torch.Tensor, eligible_T: torch.Tensor | None, routing_groups: int, budget: int
) -> Routes:
    scores_ENL = _scores_by_expert(logits_TE, eligible_T, routing_groups)
    experts, _, length = scores_ENL.shape
    chosen_ENk = select_top_k(scores_ENL.flatten(0, 1), budget).view(
        experts, routing_groups, budget
    )
    start_N1 = torch.arange(routing_groups, device=logits_TE.device).unsqueeze(1) * length
    row_R = (chosen_ENk + start_N1).flatten()
    offset_G1 = torch.arange(experts + 1, device=logits_TE.device) * (routing_groups * budget)
    expert_R = torch.arange(experts, device=logits_TE.device).repeat_interleave(
        routing_groups * budget
    )
    weight_R = logits_TE[row_R, expert_R].sigmoid()
    if eligible_T is not None:
        weight_R = weight_R * eligible_T[row_R]
    return Routes(row_R, offset_G1, weight_R)


def _exact(
    logits_TE: torch.Tensor,
    eligible_T: torch.Tensor | None,
    routing_groups: int,
    capacity_factor: float,
) -> Routes:
    scores_ENL = _scores_by_expert(logits_TE, eligible_T, routing_groups)
    experts, _, length = scores_ENL.shape
    count_N = (scores_ENL[0] > -torch.inf).sum(1)
    # half to even, like Python's round in static_budget, so that both rules agree on equal counts
    budget_N = (count_N * capacity_factor / experts).round().long().clamp(max=count_N)
    order_ENL = select_top_k(scores_ENL.flatten(0, 1), length).view_as(scores_ENL)
    order_ENL = order_ENL + torch.arange(routing_groups, device=order_ENL.device)[:, None] * length
    taken_NL = torch.arange(length, device=order_ENL.device) < budget_N[:, None]
    row_R = order_ENL[taken_NL.expand_as(order_ENL)]
    per_expert = int(budget_N.sum())
    offset_G1 = torch.arange(experts + 1, device=row_R.device) * per_expert
    expert_R = torch.arange(experts, device=row_R.device).repeat_interleave(per_expert)
    return Routes(row_R, offset_G1, logits_TE[row_R, expert_R].sigmoid())


def _scores_by_expert(
    logits_TE: torch.Tensor, eligible_T: torch.Tensor | None, routing_groups: int
) -> torch.Tensor:
    """(T, E) → (E, N, L) without gradient; ineligible tokens score -inf."""
    scores_TE = logits_TE.detach()
    if eligible_T is not None:
        scores_TE = scores_TE.masked_fill(~eligible_T.unsqueeze(1), -torch.inf)
    return scores_TE.t().reshape(logits_TE.shape[1], routing_groups, -1)
