"""Named sums: what objectives return, by data source and by modality of the label.

Sums, not means: ranks and micro-batches hold different numbers of text and image tokens, so the
caller adds them up and divides by global counts, and a batch without images is no special case.

N data sources, M modality ids, T = B·S.
"""

from typing import NamedTuple

import torch

from earlyfuse.models.batch import IGNORE_LABEL, MixedBatch
from earlyfuse.models.vocabulary import Modality

MODALITIES = len(Modality)


class Losses(NamedTuple):
    """The result of an objective for one batch.

    ``total``  () with gradient; divided by the number of labels, it is what to minimise
    ``sums``   name → (N, M) without gradient, for reading; a name is that of a metric. Every
               objective has "loss", in nats
    """

    total: torch.Tensor
    sums: dict[str, torch.Tensor]


def label_buckets(batch: MixedBatch) -> torch.Tensor:
    """(T,) int64: source · M + modality of each label, the flat index of an (N, M) table."""
    return (batch.source_BS.long() * MODALITIES + batch.label_modality_BS).flatten()


def label_counts(batch: MixedBatch, sources: int) -> torch.Tensor:
    """(N, M) int64: labels that count."""
    counted_T = (batch.labels_BS != IGNORE_LABEL).flatten()
    # no bincount of the counted ones alone: on a GPU the host would wait for their number
    bucket_T = torch.where(counted_T, label_buckets(batch), sources * MODALITIES)
    counts_K = torch.zeros(sources * MODALITIES + 1, dtype=torch.int64, device=bucket_T.device)
    return counts_K.index_add_(0, bucket_T, torch.ones_like(bucket_T))[:-1].view(sources, -1)
