"""Gather and scatter by torch's own ops, and a top-k on keys that cannot tie.

T tokens, R routed rows, G groups, D model.
"""

import numpy as np
import torch


def gather_rows(x_TD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
    """x[row] → (R, D)."""
    return x_TD.index_select(0, row_R)


def scatter_add_rows(
    y_RD: torch.Tensor, row_R: torch.Tensor, tokens: int, weight_R: torch.Tensor | None
) -> torch.Tensor:
    """out[row] += weight · y over all rows → (tokens, D)."""
    types = {y_RD.dtype, torch.float32 if weight_R is None else weight_R.dtype}
    if y_RD.device.type == "cpu" and types == {torch.float32}:
        return _sum_by_token(y_RD, row_R, tokens, weight_R)
    out_TD = sums(y_RD, tokens, y_RD.shape[1], False, y_RD.shape[0])
    add_rows(out_TD, row_R, y_RD if weight_R is None else y_RD * weight_R[:, None])
    return out_TD.to(y_RD.dtype)


def _sum_by_token(
    y_RD: torch.Tensor, row_R: torch.Tensor, tokens: int, weight_R: torch.Tensor | None
) -> torch.Tensor:
    """``scatter_add_rows`` that writes each result once: rows sorted by token are bags to sum.

    Moves half the bytes of adding rows to zeros, and makes no weighted copy of ``y``.
    """
    row = row_R.numpy()
    count = np.bincount(row, minlength=tokens)
    if len(count) > tokens:
        raise ValueError(f"row_R (up to {row.max()}) must lie below the tokens ({tokens})")
    # numpy sorts 16-bit numbers by radix, wider ones by comparison: five times slower
    order_R = np.argsort(row.astype(np.uint16) if tokens <= 1 << 16 else row, kind="stable")
    begin = np.zeros(tokens + 1, np.int64)
    np.cumsum(count, out=begin[1:])
    order, offsets = torch.from_numpy(order_R), torch.from_numpy(begin)
    weights = None if weight_R is None else weight_R[order]
    return torch.embedding_bag(
        y_RD, order, offsets, per_sample_weights=weights, include_last_offset=True
    )[0]


def scatter_add_rows_backward(
    dout_TD: torch.Tensor,
    y_RD: torch.Tensor | None,
    row_R: torch.Tensor,
    weight_R: torch.Tensor | None,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and of the weights; empty where not needed."""
    dy_RD = dout_TD.index_select(0, row_R)
    dweight_R = dout_TD.new_empty(0)
    if y_RD is not None and weight_R is not None and need[1]:
        dweight_R = (dy_RD * y_RD).sum(1, dtype=weight_R.dtype)
    if weight_R is not None:
        dy_RD.mul_(weight_R[:, None])
    return dy_RD if need[0] else dout_TD.new_empty(0), dweight_R


def select_top_k(scores_GT: torch.Tensor, k: int) -> torch.Tensor:
    """The k best tokens of each group, best first.

    ``topk`` leaves ties open, so it is given keys without ties: the score's bits, mapped to an
    integer of the same order, above the token's distance from the end. On a CPU numpy partitions
    and sorts with vector instructions, which ``topk`` does not.
    """
    if scores_GT.device.type == "cpu" and 0 < k < scores_GT.shape[1]:
        return _select_on_cpu(scores_GT.contiguous(), k)
    tokens = scores_GT.shape[1]
    key_GT = _keys(scores_GT, torch.arange(tokens - 1, -1, -1, device=scores_GT.device))
    return key_GT.topk(k, dim=1).indices


def _select_on_cpu(scores_GT: torch.Tensor, k: int) -> torch.Tensor:
    groups, tokens = scores_GT.shape
    score = scores_GT.numpy()
    least_G1 = np.partition(score, tokens - k, axis=1)[:, tokens - k, None]
    best_GT = score >= least_G1
    if (np.count_nonzero(best_GT, axis=1) == k).all():
        chosen_Gk = torch.from_numpy(np.flatnonzero(best_GT)).view(groups, k)
        last_G1 = torch.arange(tokens - 1, scores_GT.numel(), tokens)[:, None]
        key_Gk = _keys(scores_GT.view(-1)[chosen_Gk], last_G1 - chosen_Gk).numpy()
    else:  # more than k are as good as the least of the best, as where k exceeds the eligible
        key_GT = _keys(scores_GT, torch.arange(tokens - 1, -1, -1)).numpy()
        key_Gk = np.partition(key_GT, tokens - k, axis=1)[:, tokens - k :]
    best_last_Gk = torch.from_numpy(np.sort(key_Gk, axis=1))
    return tokens - 1 - (best_last_Gk.flip(1) & 0xFFFFFFFF)


def _keys(scores: torch.Tensor, last_first: torch.Tensor) -> torch.Tensor:
    """int64 in the order of the scores, equal ones in that of ``last_first``."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, its equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | last_first


def add_rows(out_TD: torch.Tensor, rows_N: torch.Tensor, y_ND: torch.Tensor) -> None:
    """out[rows] += y in place, the same result every time; rows may repeat."""
    y_ND = y_ND.to(out_TD.dtype)
    if out_TD.device.type == "cpu":
        out_TD.index_add_(0, rows_N, y_ND)
    else:  # index_add_ adds atomically on CUDA, in no fixed order; index_put_ sorts first
        out_TD.index_put_((rows_N.long(),), y_ND, accumulate=True)


def put_rows(out_TD: torch.Tensor, rows_N: torch.Tensor, y_ND: torch.Tensor, unique: bool) -> None:
    """``add_rows`` to zeros; ``unique``: no row repeats, not even between calls."""
    if unique:
        out_TD.index_copy_(0, rows_N.long(), y_ND.to(out_TD.dtype))
    else:
        add_rows(out_TD, rows_N, y_ND)


def sums(like: torch.Tensor, tokens: int, width: int, unique: bool, rows: int) -> torch.Tensor:
    """Target of ``put_rows`` for all ``rows``: (tokens, width) in at least fp32, so that sums are
    rounded once. Zeros, unless every token is certain to be written.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if unique and rows == tokens:
        return like.new_empty(tokens, width, dtype=dtype)
    return like.new_zeros(tokens, width, dtype=dtype)
