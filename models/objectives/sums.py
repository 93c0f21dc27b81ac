"""Named sums: what objectives return, by data source and by modality of the label.

Sums, not means: ranks and micro-batches hold different numbers of text and image tokens, so the
caller adds them up and divides by global counts, and a batch without images is no special case.

N data sources, M registered modalities (``len(Modality)``, read at each call), T = B·S, K = N·M.
"""

from typing import NamedTuple

import torch

from earlyfuse.models.batch import IGNORE_LABEL, MixedBatch
from earlyfuse.models.vocabulary import Modality


class Losses(NamedTuple):
    """The result of an objective for one batch.

    ``total``  () with gradient, to be divided by the number of labels and minimised
    ``sums``   name of a metric → (N, M) without gradient. Every objective has "loss", in nats
    """

    total: torch.Tensor
    sums: dict[str, torch.Tensor]


def label_buckets(batch: MixedBatch) -> torch.Tensor:
    """(T,) int64: source · M + modality of each label, the flat index of an (N, M) table."""
    return (batch.source_BS.long() * len(Modality) + batch.label_modality_BS).flatten()


def label_counts(batch: MixedBatch, sources: int) -> torch.Tensor:
    """(N, M) int64: labels that are not ignored."""
    counted_T = (batch.labels_BS != IGNORE_LABEL).flatten()
    # ignored labels go to a bucket behind: on a GPU the host would wait for bincount
    buckets = sources * len(Modality)
    bucket_T = torch.where(counted_T, label_buckets(batch), buckets)
    counts_K = torch.zeros(buckets + 1, dtype=torch.int64, device=bucket_T.device)
    return counts_K.index_add_(0, bucket_T, torch.ones_like(bucket_T))[:-1].view(sources, -1)
