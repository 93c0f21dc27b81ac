"""Skips non-finite steps and, on request, spikes of the loss or gradient norm.

A skipped step leaves parameters and optimizer state unchanged; data and learning-rate schedule
advance, as both follow the step number. The decision is made on the device and read there by the
optimizer, without host synchronisation. The host reads it at the end of the next step, or earlier
if the step is logged, validated or saved, and then counts and reports it. The rule sees only sums
over all ranks, so all ranks decide alike. Its state is in every checkpoint: a resumed run skips the
same steps as the unbroken one.

The spike guard follows OLMo-core's ``SkipStepOptimizer``: it skips a step whose loss or gradient
norm is more than ``deviations`` standard deviations above the mean of the last ``window`` steps.
Spikes enter the window too, so that a lasting change of level is accepted.

W steps of the window.
"""

import json
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Configurable

from earlyfuse.data.json_files import JsonObject, load_json
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.training.host_copy import HostCopy

QUANTITIES = ("loss", "gradient norm")


class SkipRule(Configurable):
    """Decides on the device whether a step is taken; counts and reports on the host."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        max_skipped: int = 10
        """Consecutive skipped steps that stop the job."""

        spike_guard: bool = False
        """Also skip steps whose loss or gradient norm is far above that of recent steps."""

        window: int = 128
        """Recent steps that the guard compares with; it starts once half of them are known."""

        deviations: float = 6.0
        """Standard deviations above the mean at which the guard skips."""

    def __init__(self, config: Config):
        self.config = config
        self.total = 0
        self.in_a_row = 0
        self.origin = ""  # of the present run of skipped steps: step, reason and ranks
        self.past: deque[tuple[float, float]] = deque(maxlen=config.window)
        self._window: Window | None = None  # the same on the device, of the latest step
        self._pending: deque[tuple[int, HostCopy]] = deque()

    def decide(
        self,
        step: int,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        own_sums: Iterable[torch.Tensor],
    ) -> torch.Tensor:
        """True if the optimizer may take ``step``: bool tensor () on the device of ``loss``.

        ``loss`` (nats per label) and ``grad_norm`` are over all ranks, ``own_sums`` are this rank's
        sums of losses. No host synchronisation.
        """
        self._device = loss.device
        values_2 = torch.stack([loss.double(), grad_norm.to(loss.device).double()])
        finite = values_2.isfinite().all()
        taken, statistics_4 = finite, torch.zeros(4, dtype=torch.float64, device=loss.device)
        if self.config.spike_guard:
            if self._window is None:
                self._window = Window(self.past, self.config.window, loss.device)
            spike, statistics_4 = self._window.judge(values_2, self.config.deviations)
            taken = finite & ~spike
            self._window.push(values_2, finite)
        own_finite = torch.stack([sums.isfinite().all() for sums in own_sums]).all()
        flags_2 = torch.stack([taken, own_finite]).double()
        self._pending.append((step, HostCopy(torch.cat([flags_2, values_2, statistics_4]))))
        return taken

    def settle(
        self, parameters: Iterable[torch.Tensor], last_checkpoint: str, but_last: int = 0
    ) -> None:
        """Count and report decided steps, except the latest ``but_last``.

        ``RuntimeError`` on all ranks if parameters are not finite or ``max_skipped`` steps in a row
        were skipped.
        """
        while len(self._pending) > but_last:
            step, record = self._pending.popleft()
            taken, own_finite, loss, grad_norm, *statistics = record.tensor().tolist()
            if self.config.spike_guard and is_finite(loss, grad_norm):
                self.past.append((loss, grad_norm))
            if taken:
                self.in_a_row, self.origin = 0, ""
                continue
            what = f"step {step} skipped: {self.reason(loss, grad_norm, statistics)}"
            if not is_finite(loss, grad_norm):
                losses, poisoned = ranks_not_finite(bool(own_finite), parameters, self._device)
                if poisoned:
                    raise RuntimeError(
                        f"non-finite parameters on ranks {poisoned} at step {step}: resume from "
                        f"the last good checkpoint, {last_checkpoint}"
                    )
                what += f" (first on ranks {losses})" if losses else " (only in the gradients)"
            self._count(what, last_checkpoint)

    def _count(self, what: str, last_checkpoint: str) -> None:
        self.total += 1
        self.in_a_row += 1
        self.origin = self.origin or what
        if dist.get_rank() == 0:
            rank_log.tell(what)
        if self.in_a_row >= self.config.max_skipped:
            raise RuntimeError(
                f"{self.in_a_row} steps in a row were skipped, the first of them: {self.origin}; "
                f"the last good checkpoint is {last_checkpoint}. Lower the learning rate, check "
                "data and hosts, or raise skip.max_skipped"
            )

    def reason(self, loss: float, grad_norm: float, statistics: list[float]) -> str:
        """Cause of a skipped step; ``statistics``: mean and deviation of loss and norm."""
        if not is_finite(loss, grad_norm):
            return f"loss {loss:.4g} and gradient norm {grad_norm:.4g} must be finite"
        name, value, mean, deviation = max(
            zip(QUANTITIES, (loss, grad_norm), statistics[::2], statistics[1::2], strict=True),
            key=lambda found: (found[1] - found[2]) / max(found[3], 1e-300),
        )
        return (
            f"{name} {value:.4g} is more than {self.config.deviations:g} standard deviations "
            f"({deviation:.2g}) above the mean ({mean:.4g}) of recent steps"
        )

    def state_dict(self) -> dict[str, Any]:
        """``total`` skipped steps, and the rest as JSON, which keeps floats exactly."""
        assert not self._pending, "call settle before saving"
        memory = {"in_a_row": self.in_a_row, "origin": self.origin, "past": list(self.past)}
        return {"total": self.total, "memory": json.dumps(memory)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; a shorter window keeps the latest steps."""
        where, remedy = "train_state.skip.memory of the checkpoint", "load another checkpoint"
        memory = JsonObject.of(load_json(state_dict["memory"], where, remedy), where, remedy)
        past = memory.items("past", list)
        if not all(len(pair) == 2 and {*map(type, pair)} <= {int, float} for pair in past):
            raise memory.wrong("past", "must be pairs of loss and gradient norm")
        self.total = state_dict["total"]
        self.in_a_row = memory.field("in_a_row", int, least=0)
        self.origin = memory.field("origin", str)
        self.past.clear()
        self.past.extend((loss, grad_norm) for loss, grad_norm in past)
        self._window = None


class Window:
    """Loss and gradient norm of the last W steps on the device, (2, W), the latest on the right."""

    def __init__(self, past: Iterable[tuple[float, float]], size: int, device: torch.device):
        values = list(past)
        self.values_2W = torch.zeros(2, size, dtype=torch.float64, device=device)
        if values:
            self.values_2W[:, -len(values) :] = torch.tensor(values, dtype=torch.float64).t()
        self.used = torch.full((), len(values), device=device)

    def judge(self, values_2: torch.Tensor, deviations: float) -> tuple[torch.Tensor, torch.Tensor]:
        """True (bool tensor ()) if the values are a spike; mean and deviation of both (4,)."""
        size = self.values_2W.shape[1]
        there_W = torch.arange(size, device=values_2.device) >= size - self.used
        mean_2 = (self.values_2W * there_W).sum(1) / self.used.clamp_min(1)
        squares_2W = (self.values_2W - mean_2[:, None]).square() * there_W
        deviation_2 = (squares_2W.sum(1) / (self.used - 1).clamp_min(1)).sqrt()
        spike = (values_2 - mean_2 > deviations * deviation_2).any() & (self.used >= size // 2)
        return spike, torch.stack([mean_2, deviation_2], 1).flatten()

    def push(self, values_2: torch.Tensor, wanted: torch.Tensor) -> None:
        """Append a step if ``wanted``, a bool tensor ()."""
        pushed_2W = torch.cat([self.values_2W[:, 1:], values_2[:, None]], 1)
        self.values_2W = torch.where(wanted, pushed_2W, self.values_2W)
        self.used = (self.used + wanted).clamp_max(self.values_2W.shape[1])


def step_unless_skipped(optimizers: OptimizersContainer, taken: torch.Tensor) -> None:
    """One optimizer step if ``taken``; else parameters, moments and counts stay.

    Fused optimizers read a device flag made for gradient scalers; others synchronise the host.
    """
    for optimizer in optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            device = optimizer.param_groups[0]["params"][0].device
            optimizer.found_inf = (~taken).to(device, torch.float32)
            optimizer.step()
            del optimizer.found_inf
        elif taken:
            optimizer.step()


def is_finite(loss: float, grad_norm: float) -> bool:
    """True if a step with these values can be taken."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


@torch.no_grad()
def ranks_not_finite(
    own_finite: bool, parameters: Iterable[torch.Tensor], device: torch.device
) -> tuple[list[int], list[int]]:
    """Ranks with non-finite loss sums, and ranks with non-finite shards of ``parameters``.

    Collective; all ranks return the same lists.
    """
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    sound = torch.stack([shard.isfinite().all() for shard in shards]).all()
    bad_2R = torch.zeros(2, dist.get_world_size(), device=device)
    bad_2R[0, dist.get_rank()] = not own_finite
    bad_2R[1, dist.get_rank()] = ~sound
    if dist.get_world_size() > 1:
        dist.all_reduce(bad_2R)
    losses, parameters_ = ([r for r, bad in enumerate(bad_R) if bad] for bad_R in bad_2R.tolist())
    return losses, parameters_


def not_finite(states: dict[str, Any]) -> list[str]:
    """Names of the tensors whose shard on this rank is not finite."""
    shards = {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in states.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not shards:
        return []
    device = next(iter(shards.values())).device
    finite = torch.stack([value.isfinite().all().to(device) for value in shards.values()])
    return [name for name, good in zip(shards, finite.tolist(), strict=True) if not good]
