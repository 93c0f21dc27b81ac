"""Mixture-of-Depths: each function returns a copy of a model whose blocks only some tokens pass.

==================  ============  ==============  ==============  ================================
                    tokens that   compared in a   kept            weight z of the router
                    compete
==================  ============  ==============  ==============  ================================
``mod``             all           row             0.125           z · block
``moma_mod``        all           routing group   0.25            sigmoid(z) · block
``p_mod``           media         document        falls by depth  (1 + 0.2 tanh z) · feed-forward,
                                                                  and of skipped media the residual
``gamma_mod``       all, text     row             a part of       softmax(z) · feed-forward
                    first                         media skipped
``videollm_mod``    media         frame           0.2             z · block
==================  ============  ==============  ==============  ================================

Any other combination is a ``MixtureOfDepths.Config`` of your own, set by ``depth_routed``.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.depth.capacity import Capacities, every_nth, in_layers, shifted_cosine
from earlyfuse.models.depth.depth_router import DepthRouter
from earlyfuse.models.depth.mixture_of_depths import MixtureOfDepths, Weighting
from earlyfuse.models.depth.selection import Selection
from earlyfuse.models.routing.causal_router import CausalRouter
from earlyfuse.models.routing.running_threshold import RunningThreshold
from earlyfuse.models.vocabulary import Modality

Budget = Literal["static", "exact"]


def depth_routed(
    model: Decoder.Config, capacities: Capacities, depth: MixtureOfDepths.Config
) -> Decoder.Config:
    """``model`` with ``depth`` in each layer that has a capacity, which replaces that of ``depth``.

    Shares of expert pools become those among the kept tokens, from which static budgets follow.
    """
    if len(capacities) != len(model.layers):
        raise ValueError(
            f"capacities ({len(capacities)}) must be as many as the {len(model.layers)} layers; "
            "None leaves a layer as it is"
        )
    model = deepcopy(model)
    for index, (layer, capacity) in enumerate(zip(model.layers, capacities, strict=True)):
        if layer.depth is not None:
            raise ValueError(f"layers[{index}] is depth-routed already; give the model before that")
        if capacity is None:
            continue
        layer.depth = replace(depth, selection=replace(depth.selection, capacity=capacity))
        for pool_name, pool, _, _ in layer.traverse(ExpertPool.Config):
            layer.rescale(pool, pool_name)
        layer.__post_init__()  # checks the block with its pools
    return model


def mod(
    model: Decoder.Config,
    capacity: float = 0.125,
    *,
    every: int = 2,
    start: int = 1,
    causal: Literal["logit", "predictor", "threshold"] | None = "logit",
    threshold: RunningThreshold.Config | None = None,
) -> Decoder.Config:
    """Mixture-of-Depths (arXiv 2404.02258): the best tokens of a row pass every other block.

    ``causal``: how to decide without later tokens: the router's own score, trained by binary
    cross-entropy; a predictor; a running threshold; None: batch routing alone. Which of the two
    alternating blocks is routed is not in the paper; here the second.
    """
    return depth_routed(
        model,
        every_nth(len(model.layers), capacity, every=every, start=start),
        MixtureOfDepths.Config(
            selection=Selection(capacity=capacity),
            weighting=Weighting(map="identity"),
            router=_router(causal, threshold, bce=0.01),
        ),
    )


def moma_mod(
    model: Decoder.Config,
    capacity: float = 0.25,
    *,
    every: int = 2,
    start: int = 0,
    routing_rows: int = 1,
    causal: Literal["logit", "predictor", "threshold"] | None = "predictor",
    threshold: RunningThreshold.Config | None = None,
) -> Decoder.Config:
    """MoMa's Mixture-of-Depths (arXiv 2407.21770, 2.3), before the split by modality.

    ``routing_rows``: rows whose tokens compete; routing groups of experts must be multiples. The
    paper trains its predictors in a second stage (``stages.causal_routers_only``; ``causal`` None);
    by default they are trained along, behind a stop-gradient.
    """
    return depth_routed(
        model,
        every_nth(len(model.layers), capacity, every=every, start=start),
        MixtureOfDepths.Config(
            selection=Selection(
                capacity=capacity, group="routing_group", routing_rows=routing_rows
            ),
            weighting=Weighting(map="sigmoid"),
            router=_router(causal, threshold, bce=0.01),
        ),
    )


def p_mod(
    model: Decoder.Config,
    capacities: Capacities | None = None,
    *,
    media_share: float,
    init: Literal["normal", "zero"] = "zero",
    budget: Budget = "exact",
    slack: float = 1.25,
    threshold: RunningThreshold.Config | None = None,
) -> Decoder.Config:
    """p-MoD (arXiv 2412.04449): media tokens of a document compete, fewer pass the deeper blocks.

    ``capacities``: of each layer; None: the paper's shifted cosine. ``init`` "zero": every weight
    is 1 and ties go to earlier tokens, as where a trained model is adapted; "normal" for training
    from scratch. ``media_share``: fraction of all tokens that are media. Text is never routed,
    hence exact budgets; static ones have ``slack``. ``threshold``: a running one, to write images
    too, which the selection, of whole images, cannot route.
    """
    return depth_routed(
        model,
        shifted_cosine(len(model.layers)) if capacities is None else capacities,
        MixtureOfDepths.Config(
            selection=Selection(
                capacity=1.0,
                competing=_media(model),
                group="document",
                budget=budget,
                competing_share=media_share,
                slack=slack if budget == "static" else 1.0,
            ),
            weighting=Weighting(map="tanh", alpha=0.2, scales="feed_forward", skipped="scaled"),
            router=DepthRouter.Config(
                bias=True, init=init, inference="selection", decoding="all", threshold=threshold
            ),
        ),
    )


def gamma_mod(
    model: Decoder.Config,
    layers: Sequence[int] | None = None,
    *,
    media_share: float,
    skipped: float = 0.5,
) -> Decoder.Config:
    """gamma-MoD (arXiv 2410.13859): one router for all layers, which learns what it kept.

    ``layers``: the routed ones, of lowest attention rank (``tools.arank``); None: all but 0, 1, 2
    and the last, as in the paper. ``skipped``: part of the media that a row has no room for; text
    goes first. Inference keeps what has a probability above 0.005, after the prompt above 0.5.
    """
    count = len(model.layers)
    capacity = 1 - skipped * media_share
    return depth_routed(
        model,
        in_layers(count, capacity, range(3, count - 1) if layers is None else layers),
        MixtureOfDepths.Config(
            selection=Selection(
                capacity=capacity,
                forced=_text(model),
                rounding="ceil",
                competing_share=media_share,
            ),
            weighting=Weighting(map="sigmoid", scales="feed_forward", forced=True),
            router=DepthRouter.Config(
                outputs=2,
                reads="normed",
                shared=True,
                bce=0.01,
                inference="logit",
                at=math.log(0.005 / 0.995),
                at_decoding=0.0,
            ),
            positions="compacted",
        ),
    )


def videollm_mod(
    model: Decoder.Config,
    capacity: float = 0.2,
    *,
    every: int = 2,
    start: int = 1,
    media_share: float,
    budget: Budget = "exact",
    slack: float = 1.25,
    threshold: RunningThreshold.Config | None = None,
) -> Decoder.Config:
    """VideoLLM-MoD (arXiv 2408.16730): tokens of a frame compete with each other alone.

    Its code is not public; the weight, and which of alternating blocks is routed, are assumptions.
    ``threshold``: as of ``p_mod``.
    """
    return depth_routed(
        model,
        every_nth(len(model.layers), capacity, every=every, start=start),
        MixtureOfDepths.Config(
            selection=Selection(
                capacity=capacity,
                competing=_media(model),
                group="span",
                budget=budget,
                competing_share=media_share,
                slack=slack if budget == "static" else 1.0,
            ),
            weighting=Weighting(map="identity"),
            router=DepthRouter.Config(inference="selection", decoding="all", threshold=threshold),
        ),
    )


def near_parent(model: Decoder.Config) -> Decoder.Config:
    """A copy of ``model`` whose routers begin with weights near 1, to be started from a model
    without depth routing: a kept token then passes a block nearly as in the parent.

    Identity: a bias of 1; sigmoid of one output: 4, a weight of 0.98; 1 + α·tanh: as it is. The
    softmax of gamma-MoD has no bias and begins near 0.5, as in the paper.
    """
    biases = {"identity": 1.0, "sigmoid": 4.0}
    model = deepcopy(model)
    for layer in model.layers:
        if layer.depth is None:
            continue
        bias, router = biases.get(layer.depth.weighting.map), layer.depth.router
        if bias is not None and router.outputs == 1:
            router = replace(router, bias=True, bias_init=bias)
            layer.depth = replace(layer.depth, router=router)
    return model


def with_depth_routers(model: Decoder.Config, **fields: Any) -> Decoder.Config:
    """A copy of ``model`` with these ``fields`` of ``DepthRouter.Config`` in all depth routers."""
    model = deepcopy(model)
    for layer in model.layers:
        if layer.depth is not None:
            layer.depth = replace(layer.depth, router=replace(layer.depth.router, **fields))
    return model


def _router(
    causal: Literal["logit", "predictor", "threshold"] | None,
    threshold: RunningThreshold.Config | None,
    bce: float,
) -> DepthRouter.Config:
    if causal == "logit":
        return DepthRouter.Config(inference="logit", bce=bce, threshold=threshold)
    if causal == "predictor":
        predictor = CausalRouter.Config()
        return DepthRouter.Config(inference="predictor", predictor=predictor, threshold=threshold)
    if causal == "threshold":
        return DepthRouter.Config(threshold=threshold or RunningThreshold.Config())
    return DepthRouter.Config(threshold=threshold)


def _media(model: Decoder.Config) -> tuple[int, ...]:
    """Modality groups other than text."""
    return tuple(group for group, m in enumerate(model.modalities) if m != Modality.TEXT)


def _text(model: Decoder.Config) -> tuple[int, ...]:
    return tuple(group for group, m in enumerate(model.modalities) if m == Modality.TEXT)
