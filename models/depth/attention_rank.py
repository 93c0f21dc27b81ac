"""ARank: the numerical rank of attention maps, which finds layers that can be depth-routed.

gamma-MoD (arXiv 2410.13859) converts the layers of the lowest rank: their attention mixes tokens
in few ways, so that most tokens can skip them. The rank is that of the map after softmax, without
its diagonal, in fp32, with torch's default tolerance: size · eps · largest singular value.
Every branch with the method ``queries_and_keys`` of ``Attention`` takes part.

P samples, L layers, N heads, K key heads, S tokens of a sample, H width of a head.
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from earlyfuse.models.batch import PADDING, MixedBatch
from earlyfuse.models.blocks.attention import attention_map
from earlyfuse.models.context import ForwardContext
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.masks import visible


class Sample(NamedTuple):
    """Positions ``start`` … ``stop`` - 1 of a row of a batch, all of one document."""

    row: int
    start: int
    stop: int


def samples_in(batch: MixedBatch, *, shortest: int, longest: int) -> list[Sample]:
    """The first ``longest`` tokens of each document of at least ``shortest``."""
    samples = []
    for row, document_S in enumerate(batch.document_BS):
        numbers, counts = document_S.unique_consecutive(return_counts=True)
        start = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number != PADDING and count >= shortest:
                samples.append(Sample(row, start, start + min(count, longest)))
            start += count
    return samples


def check_comparable(config: Decoder.Config) -> None:
    """``ValueError`` if a layer of the model is depth-routed."""
    for index, layer in enumerate(config.layers):
        if getattr(layer, "depth", None) is not None:
            raise ValueError(
                f"layers[{index}] is depth-routed: its attention sees the kept tokens alone, so "
                "its rank cannot be compared with that of other layers; measure the model before "
                "depth routing"
            )


def attentions(model: Decoder) -> dict[int, list[Any]]:
    """Layer → the branches that have attention maps; only layers that have some."""
    found = {
        int(name): [branch for branch in layer.modules() if hasattr(branch, "queries_and_keys")]
        for name, layer in model.layers.items()
    }
    return {layer: branches for layer, branches in found.items() if branches}


@torch.no_grad()
def attention_ranks(model: Decoder, batch: MixedBatch, samples: list[Sample]) -> torch.Tensor:
    """(L, P) float64: the mean over heads of the ranks of each layer's maps of each sample.

    A sample's map has the weights among its own tokens, as if it were alone. NaN: a layer without
    attention. Holds the map of one head at a time. ``ValueError`` if a map has no numbers.
    """
    ranks: dict[int, list[torch.Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for layer, branches in attentions(model).items():
            record = partial(_record, ranks[layer], layer, samples)
            for branch in branches:
                hooks.enter_context(branch.register_forward_pre_hook(record))
        model(batch, loss=lambda hidden_TD, weight_VD, **_: None)  # the head computes no logits
    rank_LP = torch.full((len(model.layers), len(samples)), torch.nan, dtype=torch.float64)
    for layer, found in ranks.items():
        rank_LP[layer] = torch.cat(found, 1).mean(1)
    return rank_LP


def _record(
    found: list[torch.Tensor], layer: int, samples: list[Sample], branch: Any, inputs: Any
) -> None:
    """Adds the ranks (P, N) of an attention's maps to ``found``; runs before its forward."""
    x_TD, context = inputs
    q_BSNH, k_BSKH = branch.queries_and_keys(x_TD, context)
    if not (q_BSNH.isfinite().all() and k_BSKH.isfinite().all()):
        raise ValueError(
            f"layers[{layer}] has queries or keys that are no numbers: some weights are NaN, "
            "infinite or damaged; take another checkpoint"
        )
    rows = [_head_ranks(q_BSNH, k_BSKH, context, sample) for sample in samples]
    found.append(torch.tensor(rows, dtype=torch.float64))


def _head_ranks(
    q_BSNH: torch.Tensor, k_BSKH: torch.Tensor, context: ForwardContext, sample: Sample
) -> list[int]:
    row, start, stop = sample
    q_SNH, k_SKH = q_BSNH[row, start:stop], k_BSKH[row, start:stop]
    k_SNH = k_SKH.repeat_interleave(q_SNH.shape[1] // k_SKH.shape[1], 1)
    place_S = torch.arange(len(q_SNH), device=q_SNH.device)
    numbers = [place_S, context.document_BS[row, start:stop]]
    if context.attention_span_BS is not None:
        numbers.append(context.attention_span_BS[row, start:stop])
    seen_SS = visible(*(pair for number_S in numbers for pair in (number_S[:, None], number_S)))
    heads = zip(q_SNH.unbind(1), k_SNH.unbind(1), strict=True)
    off_diagonal_SS = place_S[:, None] != place_S
    maps = (attention_map(q_SH, k_SH, seen_SS).float() * off_diagonal_SS for q_SH, k_SH in heads)
    return [int(torch.linalg.matrix_rank(map_SS)) for map_SS in maps]
