"""Matrix products of both fast paths, a chunk of tokens at a time.

A chunk's logits are one product, are turned in place into their gradient (by the backend), and are
multiplied twice more. The weight's gradient accumulates over chunks in at least fp32. All chunks
share one buffer of logits.

With a shard of the vocabulary the three statistics of each token (largest logit, sum of
exponentials relative to it, the label's logit) are gathered once per chunk and combined in the
order of ranks, so that every rank computes the same bits.

T tokens, V vocabulary, D model, C tokens of a chunk, R ranks.
"""

from collections.abc import Callable
from functools import partial

import torch

from earlyfuse.kernels.checks import readable
from earlyfuse.kernels.linear_cross_entropy.reference import total

IGNORED = -100
# in place of a label's row in w: the label is in another shard; the token is ignored
ELSEWHERE, UNCOUNTED = -1, -2

# Bytes of a chunk's logits. Large chunks add to the weight's gradient less often, small ones stay
# in cache. CPU: 256 tokens of 65,536 words, the fastest measured. GPU: adding V·D fp32 values takes
# as long as the product of about 700 tokens, so a chunk has thousands.
CPU_BYTES, GPU_BYTES = 1 << 26, 1 << 29

Combine = Callable[[torch.Tensor], torch.Tensor]
Turn = Callable[
    [torch.Tensor, torch.Tensor, float, Combine | None, bool], tuple[torch.Tensor, torch.Tensor]
]
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def forward(
    x_TD: torch.Tensor,
    w_VD: torch.Tensor,
    labels_T: torch.Tensor,
    z_weight: float,
    need: list[bool],
    first: int,
    vocabulary: int,
    group: str,
    group_size: int,
    weight_T: torch.Tensor | None,
    turn: Turn,
) -> Outputs:
    """Outputs of the op.

    A token's weight is a factor of its row of dx and, in the product that gives dw, of its row of
    x: no pass over logits.

    ``turn(logits_CV, rows_C, z_weight, combine, gradient)`` returns nll and log Z of a chunk and,
    if ``gradient``, leaves the gradient of the total in ``logits_CV``. ``rows_C`` are labels as
    rows of ``w``; ``combine`` joins the statistics (3, C) of all shards.
    """
    need_x, need_w = need
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    rows_T = _label_rows(labels_T, first, w_VD.shape[0], vocabulary)
    combine = partial(_combine, group=group, group_size=group_size) if group else None
    dx_TD = x_TD.new_empty(x_TD.shape if need_x else 0)
    dw_VD = w_VD.new_empty(w_VD.shape if need_w else 0, dtype=dtype)
    if x_TD.shape[0] == 0:  # no chunk will write it
        dw_VD.zero_()
    nll_T, log_z_T = (x_TD.new_empty(x_TD.shape[0], dtype=dtype) for _ in range(2))
    if x_TD.device.type == "cpu":  # bf16 products are slow there, and would round the logits
        x_TD, w_VD = x_TD.to(dtype), w_VD.to(dtype)
    words = -(-vocabulary // group_size)
    size = chunk_tokens(len(x_TD), words, x_TD.dtype, x_TD.device.type)
    buffer_CV = x_TD.new_empty(size, w_VD.shape[0])
    for start in range(0, x_TD.shape[0], size):
        chunk = slice(start, start + size)
        x_CD = x_TD[chunk]
        logits_CV = torch.mm(x_CD, w_VD.t(), out=buffer_CV[: x_CD.shape[0]])
        nll_T[chunk], log_z_T[chunk] = turn(
            logits_CV, rows_T[chunk], z_weight, combine, need_x or need_w
        )
        if need_x:
            _multiply(logits_CV, w_VD, dx_TD[chunk])
        if weight_T is not None:
            weight_C1 = weight_T[chunk, None]
            x_CD = (x_CD * weight_C1).to(x_CD.dtype)
            if need_x:
                dx_TD[chunk] *= weight_C1
        if need_w:
            _add_product(dw_VD, logits_CV.t(), x_CD, start == 0)
    return total(nll_T, log_z_T, z_weight, weight_T), nll_T, log_z_T, dx_TD, dw_VD


def _label_rows(labels_T: torch.Tensor, first: int, words: int, vocabulary: int) -> torch.Tensor:
    """Labels as rows of ``w``, or ``ELSEWHERE``, or ``UNCOUNTED``."""
    check_labels(labels_T, vocabulary)
    rows_T = labels_T - first
    rows_T = torch.where((rows_T >= 0) & (rows_T < words), rows_T, ELSEWHERE)
    return torch.where(labels_T != IGNORED, rows_T, UNCOUNTED)


def check_labels(labels_T: torch.Tensor, vocabulary: int) -> None:
    """Raises ``ValueError`` on a label outside the vocabulary where reading labels is free."""
    if not readable(labels_T):
        return
    wrong_T = (labels_T != IGNORED) & ((labels_T < 0) | (labels_T >= vocabulary))
    if bool(wrong_T.any()):
        raise ValueError(
            f"labels_T ({labels_T[wrong_T][0].item()}) must lie in [0, {vocabulary}), the "
            f"vocabulary, or be {IGNORED}; pass shard if w_VD is a part of the vocabulary"
        )


def chunk_tokens(tokens: int, words: int, dtype: torch.dtype, device_type: str) -> int:
    """Tokens of a chunk: as many as memory allows, all chunks about equal.

    ``words`` is equal on all ranks, so that their chunks are, even if the last rank has fewer.
    """
    allowed = CPU_BYTES if device_type == "cpu" else GPU_BYTES
    most = max(allowed // (words * dtype.itemsize), 1)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1)


def _combine(statistics_3C: torch.Tensor, group: str, group_size: int) -> torch.Tensor:
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(statistics_3C, group_size, group)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)
    largest_RC, sum_RC, label_RC = gathered.view(group_size, 3, -1).unbind(1)
    largest_C = largest_RC.amax(0)
    sum_C = (sum_RC * (largest_RC - largest_C).exp()).sum(0)
    return torch.stack([largest_C, sum_C, label_RC.sum(0)])  # a label is on one rank, 0 on others


def _multiply(dlogits_CV: torch.Tensor, w_VD: torch.Tensor, dx_CD: torch.Tensor) -> None:
    if dx_CD.dtype == w_VD.dtype:
        torch.mm(dlogits_CV, w_VD, out=dx_CD)
    else:
        dx_CD.copy_(torch.mm(dlogits_CV, w_VD))


def _add_product(
    dw_VD: torch.Tensor, dlogits_VC: torch.Tensor, x_CD: torch.Tensor, first: bool
) -> None:
    """dw += dlogits x, summed in the dtype of ``dw``."""
    if dw_VD.dtype == x_CD.dtype:
        torch.addmm(dw_VD, dlogits_VC, x_CD, beta=0 if first else 1, out=dw_VD)
    else:  # CUDA has products of bf16 that are not rounded to bf16
        torch.addmm(dw_VD, dlogits_VC, x_CD, dw_VD.dtype, beta=0 if first else 1, out=dw_VD)
