"""Capacity over depth: which layers are routed, and the fraction of tokens that each keeps.

A schedule is a tuple with one entry per layer: the fraction of the competing tokens that the layer
keeps, or None for a layer that is not routed.
"""

import math
from collections.abc import Iterable, Sequence

Capacities = tuple[float | None, ...]


def every_nth(layers: int, capacity: float, *, every: int = 2, start: int = 0) -> Capacities:
    """``capacity`` in each ``every``-th layer from ``start`` on (MoD, arXiv 2404.02258; MoMa)."""
    if every < 1 or not 0 <= start < layers:
        raise ValueError(
            f"every ({every}) must be at least 1 and start ({start}) one of the {layers} layers"
        )
    routed = range(start, layers, every)
    return tuple(capacity if layer in routed else None for layer in range(layers))


def in_layers(layers: int, capacity: float, routed: Iterable[int]) -> Capacities:
    """``capacity`` in the ``routed`` layers; negative numbers count from the last."""
    chosen = set()
    for layer in routed:
        if not -layers <= layer < layers:
            raise ValueError(f"layer {layer} is not one of the {layers} layers")
        chosen.add(layer % layers)
    return tuple(capacity if layer in chosen else None for layer in range(layers))


def shifted_cosine(
    layers: int,
    *,
    mean: float = 0.5,
    dense_above: float = 0.85,
    floor: float = 0.15,
    last: int | None = None,
) -> Capacities:
    """p-MoD's progressive ratio decay: f(l) = cos(pi l / last) / 2 + mean (arXiv 2412.04449).

    A layer with f(l) > ``dense_above`` is not routed; the others keep max(f(l), ``floor``).
    ``last`` None: layers - 1; the public code has 31 for any number of layers.
    """
    last = layers - 1 if last is None else last
    if last < 1:
        raise ValueError(f"layers ({layers}) must be at least 2 for a schedule over depth")
    ratios = [math.cos(math.pi * layer / last) / 2 + mean for layer in range(layers)]
    return tuple(None if ratio > dense_above else max(ratio, floor) for ratio in ratios)


def lowest_rank(ranks: Sequence[float], capacity: float, routed: int) -> Capacities:
    """``capacity`` in the ``routed`` layers of the lowest attention rank (gamma-MoD's ARank)."""
    if not 0 <= routed <= len(ranks):
        raise ValueError(f"routed ({routed}) must be between 0 and the {len(ranks)} layers")
    order = sorted(range(len(ranks)), key=lambda layer: (ranks[layer], layer))
    return in_layers(len(ranks), capacity, order[:routed])


def mean_capacity(capacities: Capacities) -> float:
    """Mean fraction kept, over all layers."""
    return sum(1.0 if kept is None else kept for kept in capacities) / len(capacities)
