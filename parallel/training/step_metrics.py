"""Metrics of logged steps: losses by modality and source, tokens and FLOPs, statistics of routers.

N data sources, M modality ids.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn
from torchtitan.distributed import ParallelDims

from earlyfuse.data.json_files import load_json
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import training_flops
from earlyfuse.models.routing.router_stats import Statistics
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.training.rank_sums import all_stages, is_first_along, sum_over_ranks


def losses(
    sums: dict[str, torch.Tensor],
    counts: dict[str, torch.Tensor],
    sources: Sequence[str],
    prefix: str = "",
) -> dict[str, float]:
    """Each sum by its count: over everything, by modality and by source; without empty ones.

    ``sums``, ``counts``: name of a sum → (N, M) over all ranks, on the host. Returns "loss",
    "loss/text", "loss_by_source/pairs" …, each with ``prefix``.
    """
    found: dict[str, float] = {}
    for name, sums_NM in sums.items():
        count_M, count_N = counts[name].sum(0).tolist(), counts[name].sum(1).tolist()
        sums_M, sums_N = sums_NM.double().sum(0).tolist(), sums_NM.double().sum(1).tolist()
        name = prefix + name
        found[name] = sum(sums_M) / max(sum(count_M), 1)
        found |= {f"{name}/{m.label}": sums_M[m] / count_M[m] for m in Modality if count_M[m]}
        found |= {
            f"{name}_by_source/{source}": sums_N[n] / count_N[n]
            for n, source in enumerate(sources)
            if count_N[n]
        }
    return found


class LossMean:
    """Sums and counts of the objective over the steps taken since the last logged line.

    The logged losses are their quotients: means over all labels of these steps, as the loss of one
    step is the mean over its labels. Kept on the device, without host synchronisation, and in
    checkpoints, so that a resumed run logs what the unbroken one does.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def add(
        self,
        sums: Mapping[str, torch.Tensor],
        counts: Mapping[str, torch.Tensor],
        taken: torch.Tensor,
    ) -> None:
        """Add a step, over all ranks, if it was ``taken``, a bool tensor ()."""
        for name, sums_NM in sums.items():
            kept_NM = torch.where(taken, sums_NM.double(), 0.0)
            self.sums[name] = self.sums.get(name, 0) + kept_NM
        for name, count_NM in counts.items():
            self.counts[name] = self.counts.get(name, 0) + torch.where(taken, count_NM, 0)

    def pop(
        self, sums: Mapping[str, torch.Tensor], counts: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Sums and counts on the host, and begin anew; of the last step, ``sums`` and ``counts``,
        if no step was taken.
        """
        found = {name: count.cpu() for name, count in self.counts.items()}
        if any(count.any() for count in found.values()):
            totals = {name: total.cpu() for name, total in self.sums.items()}
        else:
            totals = {name: total.cpu() for name, total in sums.items()}
            found = dict(counts)
        self.sums, self.counts = {}, {}
        return totals, found

    def state_dict(self) -> str:
        """JSON, which keeps floats exactly."""
        parts = {"sums": self.sums, "counts": self.counts}
        return json.dumps({k: {n: t.tolist() for n, t in v.items()} for k, v in parts.items()})

    def load_state_dict(
        self, state: str, shape: tuple[int, int], device: torch.device | str
    ) -> None:
        """Inverse of ``state_dict``; ``shape`` is (N, M), and a state of another begins anew."""
        where, remedy = "train_state.loss_mean of the checkpoint", "load another checkpoint"
        saved, found = load_json(state, where, remedy), []
        for part, dtype in (("sums", torch.float64), ("counts", torch.int64)):
            try:
                found.append(
                    {
                        str(name): torch.tensor(values, dtype=dtype, device=device)
                        for name, values in saved[part].items()
                    }
                )
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{where} must have tables of numbers as {part} ({error}); {remedy}"
                ) from error
        if all(t.shape == shape for part in found for t in part.values()):
            self.sums, self.counts = found


def data_read(
    loader: LaneLoader, counts_lanes: bool, device: torch.device | str
) -> dict[str, float]:
    """Tokens and epochs read of each source; collective. ``counts_lanes``: False on ranks that read
    the lanes of another rank.
    """
    lanes_K = loader.lanes.sum(0).to(device) * counts_lanes
    progress = loader.progress(sum_over_ranks({"lanes": lanes_K})["lanes"].cpu())
    return {
        f"{name}_by_source/{source}": value
        for name, values in (("tokens", "source_tokens"), ("epochs", "epoch"))
        for source, value in progress[values].items()
    }


def work_done(model: Decoder.Config, seq_len: int, tokens_M: torch.Tensor) -> dict[str, float]:
    """Tokens and FLOPs of the run per modality; ``tokens_M`` int64 (M,), on the host."""
    flops = training_flops(model, seq_len)
    done: dict[str, float] = {}
    for group, modality in enumerate(model.modalities):
        tokens, label = int(tokens_M[modality]), Modality(modality).label
        done |= {f"tokens/{label}": tokens, f"flops/{label}": tokens * flops[group]}
    return done


class ModelStatistics:
    """All ``Statistics`` of a model, including those on other pipeline stages."""

    def __init__(
        self, parts: Sequence[nn.Module], model: Decoder.Config, parallel_dims: ParallelDims
    ):
        here = {
            metric_name(name, module, model.modalities): module
            for part in parts
            for name, module in part.named_modules()
            if isinstance(module, Statistics)
        }
        self.found: dict[str, Statistics] = all_stages(here, parallel_dims)
        # the ranks of a tensor-parallel group compute the same sums: one of them counts
        self.counts = is_first_along(parallel_dims, "tp")

    def pop(self, kind: str = "") -> dict[str, float]:
        """Metrics over all ranks since the last call, of one kind or all; resets their counts."""
        chosen = {name: s for name, s in self.found.items() if kind in ("", s.kind)}
        buffers = {
            f"{name} {leaf}": buffer
            for name, statistics in chosen.items()
            for leaf, buffer in statistics.named_buffers()
        }
        totals = sum_over_ranks({name: b * self.counts for name, b in buffers.items()})
        for name, buffer in buffers.items():
            buffer.copy_(totals[name])
        return {
            f"{name}/{key}" if key else name: value
            for name, statistics in chosen.items()
            for key, value in statistics.pop().items()
        }

    def discard(self) -> None:
        """Reset all counts."""
        for statistics in self.found.values():
            statistics._init_self_buffers()

    def __contains__(self, kind: str) -> bool:
        return any(statistics.kind == kind for statistics in self.found.values())


def metric_name(path: str, statistics: Statistics, modalities: Sequence[int]) -> str:
    """layers.3.feed_forward.pools.1.router.stats → ``router/layer3.pool1``, and the modality if
    the statistics are of one.
    """
    parts = path.split(".")
    places = [
        f"{name.removesuffix('s')}{number}"
        for name, number in pairwise(parts)
        if number.isdigit() and name != "stats"
    ]
    if statistics.group is not None:
        places.append(Modality(modalities[statistics.group]).label)
    return "/".join(filter(None, [statistics.kind, ".".join(places)]))
