"""A run whose objective adds a sum of its own; started by ``test_named_sums.py``.

ranks.py RANKS sum_ranks FOLDER DATA
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_runs import tiny_config

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.objectives.sums import Losses, label_buckets
from earlyfuse.models.vocabulary import Modality


class WithAccuracy(ChameleonObjective):
    """Also counts how often the most likely token is right."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChameleonObjective.Config):
        pass

    sum_names = (*ChameleonObjective.sum_names, "top1")

    def loss_of(self, batch: MixedBatch, sources: int = 1) -> Callable[..., Losses]:
        loss_of = super().loss_of(batch, sources)

        def loss(x_TD: torch.Tensor, w_VD: torch.Tensor, **shard: Any) -> Losses:
            losses = loss_of(x_TD, w_VD, **shard)
            right_T = (F.linear(x_TD, w_VD).argmax(1) == batch.labels_BS.flatten()).float()
            right_K = torch.zeros(sources * len(Modality))
            right_K = right_K.index_add(0, label_buckets(batch), right_T)
            return losses._replace(sums=losses.sums | {"top1": right_K.view(sources, -1)})

        return loss


def main(folder: str, data: str) -> None:
    torch.set_num_threads(1)
    config = tiny_config(Path(folder), Path(data), steps=2)
    config.loss = WithAccuracy.Config()
    config.checkpoint.enable = config.sampler.enable = False
    trainer = config.build()
    trainer.train()
    trainer.close()
    if dist.is_initialized():
        dist.destroy_process_group()
