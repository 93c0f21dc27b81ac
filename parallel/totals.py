"""Sums of one step over all ranks, read by the host in one go, and the metrics that follow."""

from dataclasses import dataclass

import torch

from earlyfuse.models.blocks.experts import RouterStats
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import training_flops
from earlyfuse.models.modality import Modality

MODALITIES = len(Modality)


@dataclass(frozen=True)
class StepTotals:
    """One step over all ranks; lists are by modality id."""

    tokens_M: list[int]
    labels_M: list[int]
    asked_to_stop: int
    """Ranks that were asked to stop before this step."""
    nll_M: list[float]
    z_M: list[float]
    grad_norm: float

    @classmethod
    def read(
        cls, counts: torch.Tensor, sums_2M: torch.Tensor, grad_norm: torch.Tensor
    ) -> "StepTotals":
        """The one place in a step where the host waits for the device.

        ``counts`` int64 (2M + 1): tokens, labels, ranks asked to stop. ``sums_2M`` (2, M): nll and
        log² Z. ``grad_norm`` a scalar.
        """
        parts = (counts, sums_2M.flatten(), grad_norm.reshape(1).to(counts.device))
        values = torch.cat([part.double() for part in parts]).tolist()
        whole = [int(value) for value in values[: len(counts)]]
        return cls(
            whole[:MODALITIES],
            whole[MODALITIES:-1],
            whole[-1],
            values[len(counts) : -1 - MODALITIES],
            values[-1 - MODALITIES : -1],
            values[-1],
        )

    @property
    def loss(self) -> float:
        """Nats per label."""
        return sum(self.nll_M) / max(sum(self.labels_M), 1)

    def losses(self, z_loss: float) -> dict[str, float]:
        """Loss, loss per modality that has labels, and the z-loss of weight ``z_loss``."""
        losses = {"loss": self.loss}
        losses |= {
            f"loss/{m.label}": self.nll_M[m] / self.labels_M[m]
            for m in Modality
            if self.labels_M[m]
        }
        losses["z_loss"] = z_loss * sum(self.z_M) / max(sum(self.labels_M), 1)
        return losses


def work_done(model: Decoder, seq_len: int, tokens_M: torch.Tensor) -> dict[str, float]:
    """Tokens and FLOPs per modality of the run so far; ``tokens_M`` int64 (M,) on the host."""
    flops = training_flops(model.config, seq_len)
    done: dict[str, float] = {}
    for group, modality in enumerate(model.config.modalities):
        tokens, label = int(tokens_M[modality]), Modality(modality).label
        done |= {f"tokens/{label}": tokens, f"flops/{label}": tokens * flops[group]}
    return done


def router_load(model: Decoder) -> dict[str, float]:
    """What the routers recorded in this step: ``router/layer3.pool1/…``."""
    load: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, RouterStats):
            parts = name.split(".")
            place = f"layer{parts[parts.index('layers') + 1]}.pool{parts[-2]}"
            load |= {f"router/{place}/{key}": value for key, value in module.take().items()}
    return load
