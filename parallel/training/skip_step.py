"""Steps that are not taken: non-finite ones, and, if asked for, spikes of loss or gradient norm.

A skipped step leaves parameters and optimizer untouched. Data and learning-rate schedule go on, as
both follow the step number. The rule sees sums over all ranks only, hence every rank comes to the
same answer, and its memory is in every checkpoint: a resumed run skips what the unbroken one does.

The guard against spikes follows OLMo-core's ``SkipStepOptimizer``: a step is skipped when its loss
or gradient norm lies more than ``deviations`` standard deviations above the mean of the last
``window`` steps. Spikes themselves enter the window, so that a level that stays is accepted.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.config import Configurable

from earlyfuse.data.json_files import JsonObject, load_json
from earlyfuse.parallel.reporting import rank_log
from earlyfuse.parallel.training.step_metrics import StepTotals


class SkipRule(Configurable):
    """Judges each step before the optimizer takes it, and counts."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        max_skipped: int = 10
        """Consecutive skipped steps that stop the job."""

        spike_guard: bool = False
        """Also skip steps whose loss or gradient norm is far above that of the steps before."""

        window: int = 128
        """Steps that the guard compares with; it begins to judge when half of them are there."""

        deviations: float = 6.0
        """Standard deviations above the mean at which the guard skips."""

        def __post_init__(self) -> None:
            if self.max_skipped < 1:
                raise ValueError(
                    f"skip.max_skipped ({self.max_skipped}) must be at least 1: the number of "
                    "consecutive skipped steps that stops the job"
                )
            if self.window < 4:
                raise ValueError(
                    f"skip.window ({self.window}) must be at least 4 steps; 128 is usual"
                )
            if not 0 < self.deviations < math.inf:
                raise ValueError(
                    f"skip.deviations ({self.deviations}) must be positive; 6 is usual, and "
                    "--skip.no-spike-guard turns the guard off"
                )

    def __init__(self, config: Config):
        self.config = config
        self.total = 0
        self.in_a_row = 0
        self.origin = ""  # of the present run of skipped steps: step, reason and ranks
        self.past: deque[tuple[float, float]] = deque(maxlen=config.window)

    def check(
        self,
        step: int,
        totals: StepTotals,
        own_sums: torch.Tensor,
        parameters: Iterable[torch.Tensor],
        last_checkpoint: str,
    ) -> bool:
        """Whether the optimizer may take ``step``; counts and says it when it may not.

        ``own_sums`` are this rank's loss sums. Raises ``RuntimeError``, on all ranks, when no later
        step could be taken either, or too many in a row were not.
        """
        reason = self.reason(totals.loss, totals.grad_norm)
        if not reason:
            self.in_a_row, self.origin = 0, ""
            return True
        what = f"step {step} skipped: {reason}"
        if not is_finite(totals.loss, totals.grad_norm):
            losses, poisoned = ranks_not_finite(own_sums, parameters)
            if poisoned:
                raise RuntimeError(
                    f"parameters on ranks {poisoned} are not finite at step {step}: no later step "
                    f"can be either; resume from the last good checkpoint, {last_checkpoint}"
                )
            what += f" (first on ranks {losses})" if losses else " (only in the gradients)"
        self.total += 1
        self.in_a_row += 1
        self.origin = self.origin or what
        if dist.get_rank() == 0:
            rank_log.tell(what)
        if self.in_a_row >= self.config.max_skipped:
            raise RuntimeError(
                f"{self.in_a_row} steps in a row were skipped, the first of them: {self.origin}; "
                f"the last good checkpoint is {last_checkpoint}. Lower the learning rate, look at "
                "data and hosts, or raise skip.max_skipped"
            )
        return False

    def reason(self, loss: float, grad_norm: float) -> str:
        """Why the step of this loss (nats) and gradient norm must be skipped; "" if it must not."""
        if not is_finite(loss, grad_norm):
            return f"loss {loss:.4g} and gradient norm {grad_norm:.4g} must be finite"
        if not self.config.spike_guard:
            return ""
        past = list(self.past)
        self.past.append((loss, grad_norm))
        if len(past) < self.config.window // 2:
            return ""
        for name, value, values in zip(
            ("loss", "gradient norm"), (loss, grad_norm), zip(*past, strict=True), strict=True
        ):
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            if value - mean > self.config.deviations * deviation:
                return (
                    f"{name} {value:.4g} is more than {self.config.deviations:g} standard "
                    f"deviations ({deviation:.2g}) above the mean ({mean:.4g}) of {len(past)} steps"
                )
        return ""

    def state_dict(self) -> dict[str, Any]:
        """``total`` skipped steps of the run, and the rest as JSON, which keeps floats exactly."""
        memory = {"in_a_row": self.in_a_row, "origin": self.origin, "past": list(self.past)}
        return {"total": self.total, "memory": json.dumps(memory)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; a window of another length keeps the latest steps."""
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


def is_finite(loss: float, grad_norm: float) -> bool:
    """Whether a step could be taken at all."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


@torch.no_grad()
def ranks_not_finite(
    sums: torch.Tensor, parameters: Iterable[torch.Tensor]
) -> tuple[list[int], list[int]]:
    """Ranks whose own loss ``sums``, and ranks whose part of the ``parameters``, are not finite.

    All ranks call it, and all get the same lists.
    """
    held = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    sound = torch.stack([h.isfinite().all() for h in held]).all()
    bad_2R = torch.zeros(2, dist.get_world_size(), device=sums.device)
    bad_2R[0, dist.get_rank()] = ~sums.isfinite().all()
    bad_2R[1, dist.get_rank()] = ~sound
    if dist.get_world_size() > 1:
        dist.all_reduce(bad_2R)
    losses_R, parameters_R = bad_2R.tolist()
    return [r for r, bad in enumerate(losses_R) if bad], [
        r for r, bad in enumerate(parameters_R) if bad
    ]


def not_finite(states: dict[str, Any]) -> list[str]:
    """Names of the tensors whose part on this rank has a value that is not finite."""
    held = {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in states.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not held:
        return []
    device = next(iter(held.values())).device
    finite = torch.stack([value.isfinite().all().to(device) for value in held.values()])
    return [name for name, good in zip(held, finite.tolist(), strict=True) if not good]
