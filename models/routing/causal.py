"""Causal routing of a whole model: what inference does, and what validation reports beside batch
routing. The router itself is in ``causal_router.py``.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.router import Router


@contextmanager
def routing(model: nn.Module, rule: Literal["batch", "causal"]) -> Iterator[None]:
    """Let all expert-choice routers of ``model`` decide by ``rule``; puts the former rules back.

    "batch": the top tokens of each routing group. "causal": by the causal routers; no output then
    depends on later tokens, nor on other rows. Models without expert choice are the same by both.
    Raises ``ValueError`` where a causal router is asked for and there is none.
    """
    if rule not in ("batch", "causal"):
        raise ValueError(f'rule ({rule!r}) must be "batch" or "causal"')
    routers = {n: m for n, m in model.named_modules() if isinstance(m, Router)}
    without = [name for name, router in routers.items() if not router.config.decides_causally]
    if rule == "causal" and without:
        raise ValueError(
            f"{without[0]} cannot route causally: it has no causal router. Train them on the "
            "finished model in a second stage (--train-only causal_routers, docs/moma.md), or "
            "along with it by a config whose routers have causal set"
        )
    former = [router.rule for router in routers.values()]
    for router in routers.values():
        router.rule = rule
    try:
        yield
    finally:
        for router, before in zip(routers.values(), former, strict=True):
            router.rule = before


def causal_routers(model: nn.Module) -> list[CausalRouter]:
    """All causal routers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, CausalRouter)]


def normalise_over(models: Iterable[nn.Module], step_tokens: float) -> None:
    """Divide the losses of all causal routers by ``step_tokens``: those of a step on all ranks."""
    for model in models:
        for router in causal_routers(model):
            router.step_tokens = step_tokens
