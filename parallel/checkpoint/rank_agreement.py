"""Steps of a save that all ranks take together; each learns the outcome on every rank."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from earlyfuse.parallel.training.skip_step import not_finite


def run_together(
    action: Callable[[], Any], group: dist.ProcessGroup | None
) -> tuple[list[Any], dict[int, OSError]]:
    """Runs ``action`` on all ranks; returns its values by rank, and the ranks' disk errors.

    Any other error of one rank is raised on all of them: it would recur at every save.
    """
    outcome: Any
    try:
        outcome = action()
    except CheckpointException as error:  # DCP has gathered the errors of all ranks already
        outcome = error.failures.get(dist.get_rank(group), (None, None))[0]
    except Exception as error:
        outcome = error
    if isinstance(outcome, BaseException) and not isinstance(outcome, OSError):
        outcome = RuntimeError(f"{type(outcome).__name__}: {outcome}")
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    for rank, result in enumerate(outcomes):
        if isinstance(result, RuntimeError):
            raise RuntimeError(f"checkpoint: rank {rank}: {result}") from result
    return outcomes, {r: v for r, v in enumerate(outcomes) if isinstance(v, OSError)}


def check_finite(
    states: dict[str, Any], step: int, good: object, group: dist.ProcessGroup | None
) -> None:
    """``RuntimeError`` on all ranks if any has a value that is not finite: the loss does not show
    it in a parameter that no token of the step used. ``good``: the last good checkpoint.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, not_finite(states), group=group)
    ranks = [rank for rank, names in enumerate(found) if names]
    if not ranks:
        return
    names = list(dict.fromkeys(name for names in found for name in names))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    raise RuntimeError(
        f"{', '.join(names[:4])}{more} on ranks {ranks} are not finite at step {step}, which is "
        f"not saved: the run cannot recover; resume from the last good checkpoint, {good}"
    )
