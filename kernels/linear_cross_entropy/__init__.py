"""The output projection and its cross-entropy, without the logits of all tokens in memory.

T tokens, V vocabulary (or this rank's part of it), D model, M modalities.

================  =====================  ===========================================================
argument          shape, dtype           meaning
================  =====================  ===========================================================
``x_TD``          (T, D) float           final hidden states
``w_VD``          (V, D), as x           the head's weight, or this rank's rows of it
``labels_T``      (T,) int64             ids in the whole vocabulary; -100: ignored
``modality_T``    (T,) uint8, int32 or   sum to which a token's loss belongs, 0 … M-1; ignored where
                  int64                  the label is -100
``weight_T``      (T,) fp32, or None     factor of a token's part of the total; none: 1
================  =====================  ===========================================================

Logits are computed a chunk of tokens at a time and turned at once into losses and gradients, in the
same memory (Liger Kernel, arXiv 2410.10989, 3.2; the z-loss is PaLM's, arXiv 2204.02311, 5). So the
forward pass must know the gradient of each logit up to one factor: the ratio of z-loss to
likelihood, ``z_weight``, is fixed, and the sum of both is the only output with a gradient. Backward
multiplies the gradients of the forward pass; the caller divides by global counts. Sums per modality
are for reporting.

All backends give the same bits on every run. Backends: ``triton``, ``torch``, ``reference``.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.checks import FLOATS, INTEGERS, SAME, check, check_ids, readable, rules
from earlyfuse.kernels.linear_cross_entropy import op, reference
from earlyfuse.kernels.linear_cross_entropy.chunked import IGNORED, check_labels

__all__ = ["LossSums", "VocabularyShard", "linear_cross_entropy"]

_RULES = rules(x_TD=FLOATS, w_VD=(SAME,), labels_T=(torch.int64,), modality_T=INTEGERS)
_WEIGHT_RULES = rules(x_TD=FLOATS, weight_T=(torch.float32,))


class LossSums(NamedTuple):
    """Sums over tokens that are not ignored.

    ``total``   () fp32, with gradient: Σ weight · (nll + z_weight · log² Z)
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
    weight_T: torch.Tensor | None = None,
    shard: VocabularyShard | None = None,
    backend: str = "auto",
) -> LossSums:
    """Loss sums of logits x wᵀ; gradients reach ``x`` and ``w`` through ``total``.

    ``weight_T`` has no gradient and does not change the sums by modality.
    With ``shard``, sums are those of the whole vocabulary, the same on all ranks; the gradient of
    ``w`` is that of its rows, and the gradient of ``x`` is *this rank's part*: the caller sums the
    parts, as for every column-sharded weight. Raises ``ValueError`` on wrong shapes, dtypes,
    devices or labels, and on an unavailable backend.
    """
    check(_RULES, (x_TD, w_VD, labels_T, modality_T))
    if weight_T is not None:
        check(_WEIGHT_RULES, (x_TD, weight_T))
    words = w_VD.shape[0]
    if words == 0:
        raise ValueError(f"w_VD {tuple(w_VD.shape)} must have rows; shard over fewer ranks")
    if shard is not None and not 0 <= shard.first <= shard.vocabulary - words:
        raise ValueError(
            f"shard.first ({shard.first}) must lie in [0, {shard.vocabulary - words}]: w_VD has "
            f"{words} of shard.vocabulary ({shard.vocabulary}) rows; pass this rank's first row"
        )
    if modalities < 1:
        raise ValueError(f"modalities ({modalities}) must be positive; pass the number of sums")
    if not z_weight >= 0:  # NaN is neither
        raise ValueError(f"z_weight ({z_weight}) must not be negative; 0 turns the z-loss off")
    if readable(labels_T):
        check_ids("modality_T", modality_T[labels_T != IGNORED], modalities, "the modalities")
    chosen = resolve("linear_cross_entropy", backend, ("triton", "torch", "reference"), x_TD)
    if chosen == "reference" and shard is not None:
        raise ValueError(
            "backend ('reference') needs the whole vocabulary, without shard; choose 'torch'"
        )
    if chosen == "reference":
        check_labels(labels_T, words)
        nll_T, log_z_T = reference.token_losses(x_TD, w_VD, labels_T)
        total = reference.total(nll_T, log_z_T, z_weight, weight_T)
    else:
        need = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x_TD, w_VD)]
        where: tuple[int, int, str, int] = (0, words, "", 1)
        if shard is not None:
            where = (shard.first, shard.vocabulary, shard.group.group_name, shard.group.size())
        total, nll_T, log_z_T, _, _ = op.linear_cross_entropy(
            x_TD, w_VD, labels_T, float(z_weight), need, *where, chosen, weight_T
        )
    ids_M1 = torch.arange(modalities, device=labels_T.device)[:, None]
    member_MT = modality_T == ids_M1  # ignored tokens have losses of 0
    nll_M, z_M = (
        torch.where(member_MT, values_T.detach(), 0.0).sum(1)
        for values_T in (nll_T, log_z_T.detach().square())
    )
    return LossSums(total, nll_M, z_M)
