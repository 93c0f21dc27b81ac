"""Named sums: what objectives return, by data source and by modality.

Sums, not means: ranks and micro-batches hold different numbers of text and image tokens, so the
caller adds them up and divides by global counts, and a batch without images is no special case.
Most sums are over labels, by modality of the label; an objective that scores something else names
its counts.

N data sources, M registered modalities (``len(Modality)``, read at each call), T = B·S, K = N·M.
"""

from typing import NamedTuple

import torch

from earlyfuse.models.batch import IGNORE_LABEL, MixedBatch
from earlyfuse.models.vocabulary import Modality

LABELS = "labels"  # the name of their count


class Losses(NamedTuple):
    """The result of an objective for one batch.

    ``totals``  name of a count → () with gradient, to be divided by the global count; what is
                minimised is the sum of these
    ``sums``    name of a metric → (N, M) without gradient. Every objective has "loss", in nats
    """

    totals: dict[str, torch.Tensor]
    sums: dict[str, torch.Tensor]

    @property
    def total(self) -> torch.Tensor:
        """The total over labels."""
        return self.totals[LABELS]

    def mean(self, counts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss to minimise; ``counts``: of each name, global, (N, M) or ()."""
        parts = [total / counts[name].sum().clamp_min(1) for name, total in self.totals.items()]
        return torch.stack(parts).sum() if parts[1:] else parts[0]


def buckets(source_BS: torch.Tensor, modality_BS: torch.Tensor) -> torch.Tensor:
    """(T,) int64: source · M + modality, the flat index of an (N, M) table."""
    return (source_BS.long() * len(Modality) + modality_BS).flatten()


def label_buckets(batch: MixedBatch) -> torch.Tensor:
    """``buckets`` of the labels."""
    return buckets(batch.source_BS, batch.label_modality_BS)


def label_counts(batch: MixedBatch, sources: int) -> torch.Tensor:
    """(N, M) int64: labels that are not ignored."""
    counted_T = (batch.labels_BS != IGNORE_LABEL).flatten()
    return table(counted_T.long(), counted_T, label_buckets(batch), sources)


def table(
    value_T: torch.Tensor, counted_T: torch.Tensor, bucket_T: torch.Tensor, sources: int
) -> torch.Tensor:
    """(N, M): ``value_T`` summed by bucket, over positions where ``counted_T`` (bool)."""
    # others go to a bucket behind: on a GPU the host would wait for bincount
    size = sources * len(Modality)
    bucket_T = torch.where(counted_T, bucket_T, size)
    sums_K = torch.zeros(size + 1, dtype=value_T.dtype, device=bucket_T.device)
    return sums_K.index_add_(0, bucket_T, value_T)[:-1].view(sources, -1)
