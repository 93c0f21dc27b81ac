"""The output projection and its cross-entropy, without the logits of all tokens in memory.

T tokens, V vocabulary (or this rank's part of it), D model, M modalities.

================  =====================  ===========================================================
argument          shape, dtype           meaning
================  =====================  ===========================================================
``x_TD``          (T, D) float           final hidden states
``w_VD``          (V, D), as x           the head's weight, or this rank's rows of it
``labels_T``      (T,) int64             ids in the whole vocabulary; -100 counts nothing
``modality_T``    (T,) uint8, int32 or   which sum a token's loss belongs to, 0 … M-1; anything
                  int64                  where the label is -100
================  =====================  ===========================================================

Logits are made a chunk of tokens at a time and turned at once into losses and gradients, in the
same memory (Liger Kernel, arXiv 2410.10989, 3.2; the z-loss is that of PaLM, arXiv 2204.02311, 5).
For that, the gradient of each logit must be known in the forward pass but for one factor: the ratio
of z-loss to likelihood, ``z_weight``, is fixed beforehand, and the sum of both is the one output
with a gradient. Its backward multiplies what the forward pass has made; dividing by global counts
stays with the caller. Sums per modality are for reading.

All backends give the same bits on every run. Backends: ``triton``, ``torch``, ``reference``.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.checks import FLOATS, check_ids, readable
from earlyfuse.kernels.linear_cross_entropy import op, reference
from earlyfuse.kernels.linear_cross_entropy.chunked import IGNORED, check_labels

__all__ = ["LossSums", "VocabularyShard", "linear_cross_entropy"]


class LossSums(NamedTuple):
    """Sums over tokens that count.

    ``total``   () fp32, with gradient: Σ nll + z_weight · Σ log² Z
    ``nll_M``   (M,) fp32, without: negative log likelihood by modality, nats
    ``z_M``     (M,) fp32, without: log² Z by modality
    """

    total: torch.Tensor
    nll_M: torch.Tensor
    z_M: torch.Tensor


class VocabularyShard(NamedTuple):
    """This rank has rows ``first`` … ``first + len(w) - 1`` of the weight; the other ranks of
    ``group`` have the rest of ``vocabulary`` rows, about equally many, for the same tokens."""

    first: int
    vocabulary: int
    group: dist.ProcessGroup


def linear_cross_entropy(
    x_TD: torch.Tensor,
    w_VD: torch.Tensor,
    labels_T: torch.Tensor,
    modality_T: torch.Tensor,
    *,
    modalities: int,
    z_weight: float = 0.0,
    shard: VocabularyShard | None = None,
    backend: str = "auto",
) -> LossSums:
    """Loss sums of logits x wᵀ; gradients reach ``x`` and ``w`` through ``total``.

    With ``shard``, sums are those of the whole vocabulary, the same on all ranks; the gradient of
    ``w`` is that of its rows, and the gradient of ``x`` *this rank's part*: the caller adds the
    parts up, as it does for every layer whose weight is cut by columns. Raises ``ValueError`` on
    wrong shapes, dtypes, devices or labels, and on an unavailable backend.
    """
    _check(x_TD, w_VD, labels_T, shard)
    if modality_T.shape != labels_T.shape or modality_T.device != labels_T.device:
        raise ValueError(
            f"modality_T ({tuple(modality_T.shape)} on {modality_T.device}) must have one entry "
            f"per label ({tuple(labels_T.shape)} on {labels_T.device})"
        )
    if modality_T.is_floating_point() or modality_T.is_complex() or modalities < 1:
        raise ValueError(
            f"modality_T ({modality_T.dtype}) must be integers below modalities ({modalities}), "
            "which must be positive"
        )
    if not z_weight >= 0:  # NaN is neither
        raise ValueError(f"z_weight ({z_weight}) must not be negative; 0 turns the z-loss off")
    if readable(labels_T):
        check_ids("modality_T", modality_T[labels_T != IGNORED], modalities, "the modalities")
    chosen = _resolve(x_TD, shard, backend)
    if chosen == "reference":
        check_labels(labels_T, w_VD.shape[0])
        nll_T, log_z_T = reference.token_losses(x_TD, w_VD, labels_T)
        total = reference.total(nll_T, log_z_T, z_weight)
    else:
        need = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x_TD, w_VD)]
        if shard is None:
            cut = (0, w_VD.shape[0], "", 1)
        else:
            cut = (shard.first, shard.vocabulary, shard.group.group_name, shard.group.size())
        total, nll_T, log_z_T, _, _ = op.linear_cross_entropy(
            x_TD, w_VD, labels_T, float(z_weight), need, *cut, chosen
        )
    ids_M1 = torch.arange(modalities, device=labels_T.device)[:, None]
    member_MT = modality_T == ids_M1  # what does not count has losses of 0
    nll_M, z_M = (
        torch.where(member_MT, values_T.detach(), 0.0).sum(1)
        for values_T in (nll_T, log_z_T.detach().square())
    )
    return LossSums(total, nll_M, z_M)


def _resolve(x_TD: torch.Tensor, shard: VocabularyShard | None, backend: str) -> str:
    chosen = resolve("linear_cross_entropy", backend, ("triton", "torch", "reference"), x_TD)
    if chosen == "reference" and shard is not None:
        raise ValueError(
            "backend ('reference') needs the whole vocabulary, but shard is given; choose torch"
        )
    return chosen


def _check(
    x_TD: torch.Tensor, w_VD: torch.Tensor, labels_T: torch.Tensor, shard: VocabularyShard | None
) -> None:
    if x_TD.ndim != 2 or x_TD.dtype not in FLOATS:
        raise ValueError(
            f"x_TD ({tuple(x_TD.shape)}, {x_TD.dtype}) must be a floating-point matrix (tokens, "
            "width); flatten batch and sequence first"
        )
    if w_VD.ndim != 2 or w_VD.shape[1] != x_TD.shape[1] or w_VD.shape[0] == 0:
        raise ValueError(
            f"w_VD {tuple(w_VD.shape)} must be a matrix (vocabulary, {x_TD.shape[1]}), the width "
            "of x_TD, with at least one row, as nn.Linear stores it"
        )
    if w_VD.dtype != x_TD.dtype or w_VD.device != x_TD.device:
        raise ValueError(
            f"w_VD ({w_VD.dtype} on {w_VD.device}) must have the dtype and device of x_TD "
            f"({x_TD.dtype} on {x_TD.device}); cast one of them"
        )
    if tuple(labels_T.shape) != (x_TD.shape[0],) or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels_T ({tuple(labels_T.shape)}, {labels_T.dtype}) must be int64, one per row of "
            f"x_TD ({x_TD.shape[0]},); -100 counts nothing"
        )
    if labels_T.device != x_TD.device:
        raise ValueError(
            f"labels_T ({labels_T.device}) must be on the device of x_TD ({x_TD.device}); move it"
        )
    if shard is not None and not 0 <= shard.first <= shard.vocabulary - w_VD.shape[0]:
        raise ValueError(
            f"shard.first ({shard.first}) must lie in [0, {shard.vocabulary - w_VD.shape[0]}]: the "
            f"{w_VD.shape[0]} rows of w_VD are a part of shard.vocabulary ({shard.vocabulary})"
        )
