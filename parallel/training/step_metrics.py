"""Sums of one step over all ranks, read by the host in one go, and the metrics that follow."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from earlyfuse.models.blocks.branch import Branch
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import training_flops
from earlyfuse.models.routing.router_stats import CausalStats, RouterStats
from earlyfuse.models.vocabulary import Modality

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


def work_done(model: Decoder.Config, seq_len: int, tokens_M: torch.Tensor) -> dict[str, float]:
    """Tokens and FLOPs per modality of the run so far; ``tokens_M`` int64 (M,) on the host."""
    flops = training_flops(model, seq_len)
    done: dict[str, float] = {}
    for group, modality in enumerate(model.modalities):
        tokens, label = int(tokens_M[modality]), Modality(modality).label
        done |= {f"tokens/{label}": tokens, f"flops/{label}": tokens * flops[group]}
    return done


def router_statistics(
    parts: Iterable[nn.Module], model: Decoder.Config, device: torch.device
) -> dict[str, RouterStats]:
    """``layer3.pool1`` … → statistics of every router of ``model``, in order; of token choice,
    ``layer3.pool0.text`` where its experts serve single modalities.

    Those of the ``parts`` that are here, else new ones that count nothing: so all ranks of a
    pipeline have the same sums to add up.
    """
    here = routers_by_place(parts)
    statistics: dict[str, RouterStats] = {}
    for place, pool in pools_by_place(model):
        router = here.get(place)
        for index, (group, new) in enumerate(pool.router.new_statistics(pool.experts).items()):
            name = "" if group is None else f".{Modality(model.modalities[group]).label}"
            found = None if router is None else router.statistics()[index]
            statistics[place + name] = found or new.to(device)
    return statistics


def causal_statistics(
    parts: Iterable[nn.Module], model: Decoder.Config, device: torch.device
) -> dict[str, CausalStats]:
    """The same of all causal routers."""
    here = routers_by_place(parts)
    statistics: dict[str, CausalStats] = {}
    for place, pool in pools_by_place(model):
        if pool.router.causal is not None:
            router = here.get(place)
            statistics[place] = CausalStats().to(device) if router is None else router.causal.stats
    return statistics


def pools_by_place(model: Decoder.Config) -> Iterator[tuple[str, ExpertPool.Config]]:
    """``layer3.pool1`` … and the pool there, of all pools of ``model`` in order."""
    for number, block in enumerate(model.layers):
        for index, (_, pool, _, _) in enumerate(block.traverse(ExpertPool.Config)):
            yield f"layer{number}.pool{index}", pool


def routers_by_place(parts: Iterable[nn.Module]) -> dict[str, Any]:
    """``layer3.pool1`` … → router of the pool there, of the pools in ``parts``."""
    here: dict[str, Any] = {}
    for name, module in (named for part in parts for named in part.named_modules()):
        if isinstance(module, ExpertPool):
            path = name.split(".")
            layer, pool = (path[path.index(of) + 1] for of in ("layers", "pools"))
            here[f"layer{layer}.pool{pool}"] = module.router
    return here


def branch_statistics(parts: Iterable[nn.Module]) -> dict[str, Any]:
    """``layer3.attention`` … → what the branch there counts, of those that do, in order."""
    found: dict[str, Any] = {}
    for name, module in (named for part in parts for named in part.named_modules()):
        if isinstance(module, Branch) and (counted := module.statistics()) is not None:
            path = [one for one in name.split(".") if not one.startswith("_")]
            found[f"layer{path[1]}.{'.'.join(path[2:])}"] = counted
    return found


def router_load(name: str, statistics: Mapping[str, Any]) -> dict[str, float]:
    """What routers or branches recorded since the last call: ``name/layer3.pool1/…``."""
    return {
        f"{name}/{place}/{key}": value
        for place, recorded in statistics.items()
        for key, value in recorded.take().items()
    }
