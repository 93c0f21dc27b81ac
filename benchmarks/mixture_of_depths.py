"""Depth-routed blocks beside the plain block: how much of the FLOPs saved is time saved (row 8).

    python benchmarks/mixture_of_depths.py [ROUNDS [WARMUPS]]

Forward and backward of ``MixtureOfDepths`` over dense, MoMa (4t4i) and Mixture-of-Mamba blocks:
router, selection, gather, the block on fewer rows, scatter. The realised share is

    (1 - depth-routed time / plain time) / (1 - depth-routed FLOPs / plain FLOPs)

with the FLOPs of ``models/flops.py``: attention counts the full square of a row's kept tokens, and
the router is a cost. Plain and depth-routed blocks have the same documents in their rows.

Two rivals compute the same function as ours, which is verified, gradients included. "masked" runs
the block on all tokens, hides the others from attention and discards their outputs. "p-MoD's code"
gathers with boolean masks, splits by row, pads, and scatters back, as its public code does (arXiv
2412.04449). "routing alone" is all that a depth-routed block does besides the block.

T tokens, D width, B rows, S positions.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from earlyfuse.configs import decoders, mamba_decoders
from earlyfuse.configs.depth import depth_routed
from earlyfuse.models.batch import PADDING, MixedBatch
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.depth.capacity import Capacities, every_nth, in_layers, shifted_cosine
from earlyfuse.models.depth.mixture_of_depths import MixtureOfDepths
from earlyfuse.models.depth.selection import Selection
from earlyfuse.models.init_weights import init_weights
from earlyfuse.models.masks import attention_mask
from earlyfuse.models.routes import by_modality
from earlyfuse.models.vocabulary import Modality
from harness import (
    Report,
    Rival,
    Timing,
    at_least,
    at_most,
    compare,
    compare_models,
    differentiated,
    speed,
)

PLAIN, MASKED, PUBLIC = "plain block", "masked", "p-MoD's code"
CAPACITIES = (0.5, 0.25, 0.125)
GOAL = 0.95
SEGMENT = 64  # tokens of text, then as many of an image
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Setting:
    """A block, its rows, and what competes: "all" tokens, or "image" tokens with text forced."""

    block: Literal["dense", "MoMa 4t4i", "Mixture-of-Mamba"]
    dim: int
    rows: int
    seq_len: int
    documents: int
    group: Literal["routing_group", "row", "document"] = "row"
    competing: Literal["all", "image"] = "all"

    def config(self) -> Block.Config:
        """The block as models have it."""
        if self.block == "Mixture-of-Mamba":
            size = mamba_decoders.MambaShape(dim=self.dim, layers=1, vocab_size=8)
            return mamba_decoders.mixture_of_mamba(size).layers[0]
        shape = decoders.Shape(self.dim, 1, self.dim // 64, 4 * self.dim, 8, norm_order="pre")
        if self.block == "dense":
            return decoders.dense(shape).layers[0]
        experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
        shares = {Modality.TEXT: 0.5, Modality.IMAGE: 0.5}
        return decoders.moma(shape, experts, shares, routing_rows=self.rows).layers[0]

    def selection(self, capacity: float) -> Selection:
        """The rule at a capacity."""
        images = self.competing == "image"
        return Selection(
            capacity=capacity,
            competing=(1,) if images else (),
            competing_share=0.5 if images else 1.0,
            group=self.group,
            routing_rows=self.rows if self.group == "routing_group" else 1,
        )

    def batch(self) -> MixedBatch:
        """Documents of equal length in each row; segments of text and image alternate."""
        place_BS = torch.arange(self.seq_len).expand(self.rows, -1)
        document_BS = (place_BS * self.documents // self.seq_len + 1).int()
        modality_BS = (place_BS // SEGMENT % 2).to(torch.uint8)
        return MixedBatch.of(torch.zeros_like(place_BS), modality_BS, document_BS)

    def flops(self, selection: Selection | None = None) -> float:
        """Training FLOPs of the batch."""
        tokens, seq_len, router = self.rows * self.seq_len, self.seq_len, 0.0
        if selection is not None:
            router = 6.0 * tokens * self.dim
            seq_len = round(selection.kept_share * seq_len)
            tokens = self.rows * seq_len
        config = self.config()
        each = [sum(config.flops(seq_len, group)) for group in (0, 1)]
        return router + tokens * sum(each) / 2


SETTINGS = (
    Setting("dense", 512, rows=2, seq_len=1024, documents=4),
    Setting("MoMa 4t4i", 512, rows=4, seq_len=1024, documents=4),
    Setting("dense", 512, rows=2, seq_len=1024, documents=4, group="document", competing="image"),
    Setting("dense", 512, rows=1, seq_len=2048, documents=1),
    Setting("MoMa 4t4i", 512, rows=4, seq_len=1024, documents=4, group="routing_group"),
    Setting("Mixture-of-Mamba", 256, rows=2, seq_len=1024, documents=4),
    Setting("dense", 1024, rows=2, seq_len=1024, documents=4),
    Setting("MoMa 4t4i", 1024, rows=2, seq_len=1024, documents=4),
    Setting("MoMa 4t4i", 1024, rows=4, seq_len=1024, documents=4),
)
WITH_RIVALS = (SETTINGS[0], SETTINGS[2])
RIVALS_AT = 0.25


class Problem:
    """Input, gradient and context; one block, plain and under a router for each capacity."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        generator = torch.Generator().manual_seed(0)
        shape = (setting.rows * setting.seq_len, setting.dim)
        self.x_TD = torch.randn(shape, generator=generator).requires_grad_()
        self.dy_TD = torch.randn(shape, generator=generator)
        config = setting.config()
        head_dim = config.attention.head_dim if config.attention is not None else 0
        self.context = ForwardContext.build(
            setting.batch(), modalities=(0, 1), head_dim=head_dim, rope_theta=1e4
        )
        self.block = config.build()
        init_weights(self.block, std=0.02, branches=2, seed=0)

    def routed(self, capacity: float) -> Block:
        """The block behind a router; all capacities have the same."""
        depth = MixtureOfDepths.Config(selection=self.setting.selection(capacity))
        layer = replace(self.setting.config(), depth=depth).build()
        for name, module in self.block.named_children():
            layer.add_module(name, module)
        weight = layer.depth.router.projection.weight
        nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(1))
        return layer

    def rival(
        self,
        name: str,
        layer: Callable[[torch.Tensor], torch.Tensor],
        module: nn.Module,
        same_as: str | None = None,
    ) -> Rival:
        """Output, gradients of ``x`` and of each parameter of ``module``."""
        leaves = [self.x_TD, *module.parameters()]
        return Rival(name, lambda: differentiated(layer(self.x_TD), leaves, self.dy_TD), same_as)

    def rivals(self) -> list[Rival]:
        """The plain block first."""
        found = [self.rival(PLAIN, lambda x_TD: self.block(x_TD, self.context), self.block)]
        for capacity in CAPACITIES:
            layer = self.routed(capacity)
            ours = partial(self._ours, layer)
            found.append(self.rival(name_of(capacity), ours, layer))
            if self.setting in WITH_RIVALS and capacity == RIVALS_AT:
                for name, theirs in ((MASKED, self._masked), (PUBLIC, self._public)):
                    name = f"{name}, {name_of(capacity)}"
                    found.append(self.rival(name, partial(theirs, layer), layer, name_of(capacity)))
        return found

    def _ours(self, layer: Block, x_TD: torch.Tensor) -> torch.Tensor:
        return layer(x_TD, self.context)

    def _masked(self, layer: Block, x_TD: torch.Tensor) -> torch.Tensor:
        """All tokens pass; those that are not kept are hidden, and their outputs discarded."""
        weight_T, kept_T = self._choose(layer, x_TD)
        kept_BS = kept_T.view(self.setting.rows, -1)
        document_BS = self.context.document_BS.masked_fill(~kept_BS, PADDING)
        context = replace(self.context, mask=attention_mask(document_BS), document_BS=document_BS)
        y_TD = x_TD + weight_T[:, None] * (self.block(x_TD, context) - x_TD)
        return torch.where(kept_T[:, None], y_TD, x_TD)

    def _public(self, layer: Block, x_TD: torch.Tensor) -> torch.Tensor:
        """Gather by boolean masks, split by row, pad; scatter back by the same masks."""
        context, sequence = self.context, self.context.document_BS.shape
        weight_T, kept_T = self._choose(layer, x_TD)
        kept_BS = kept_T.view(sequence)
        lengths = kept_BS.sum(1).tolist()

        def padded(t_BS: torch.Tensor) -> torch.Tensor:
            return pad_sequence(t_BS[kept_BS].split(lengths), batch_first=True)

        document_BS = padded(context.document_BS)
        group_T = padded(context.group_T.view(sequence)).flatten()
        inner = replace(
            context,
            seq_len=document_BS.shape[1],
            group_T=group_T,
            by_group=by_modality(group_T, 2),
            cos_BS1H=padded(context.cos_BS1H),
            sin_BS1H=padded(context.sin_BS1H),
            mask=attention_mask(document_BS),
            document_BS=document_BS,
        )
        h_BSD, weight_BS1 = padded(x_TD.unflatten(0, sequence)), padded(weight_T.view(sequence))
        y_BSD = self.block(h_BSD.flatten(0, 1), inner).view_as(h_BSD)
        y_BSD = h_BSD + weight_BS1[..., None] * (y_BSD - h_BSD)
        out_BSD = x_TD.unflatten(0, sequence).clone()
        out_BSD[kept_BS] = torch.cat([y[:n] for y, n in zip(y_BSD, lengths, strict=True)])
        return out_BSD.flatten(0, 1)

    def _choose(self, layer: Block, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight of each token, and which are kept, by a top-k for each group."""
        assert layer.depth is not None, "made by routed"
        selection, setting = layer.depth.config.selection, self.setting
        logits_T = layer.depth.router(x_TD, self.context).logits_T
        weight_T, score_T = logits_T.sigmoid(), logits_T.detach()
        image_T = self.context.group_T == 1
        kept_T = ~image_T if selection.competing else torch.zeros_like(image_T)
        forced_T = kept_T.clone()
        row_T = torch.arange(len(x_TD)) // setting.seq_len
        document_T = self.context.document_BS.flatten() if selection.group == "document" else row_T
        group_T = row_T * setting.seq_len + document_T
        for group in group_T.unique():
            competing = ((group_T == group) & ~forced_T).nonzero().flatten()
            top = score_T[competing].topk(int(selection.capacity * len(competing))).indices
            kept_T[competing[top]] = True
        return weight_T.masked_fill(forced_T, 1.0), kept_T


def name_of(capacity: float) -> str:
    """Name of our rival at a capacity."""
    return f"depth-routed, c {capacity}"


def judge(report: Report, setting: Setting, timings: list[Timing]) -> None:
    """The realised share of each capacity, and ours beside the rivals."""
    times = {timing.name: timing for timing in timings}
    what = f"{setting.block} {setting.rows} x {setting.seq_len} x {setting.dim}"
    if setting.group != "row":
        what += f", {setting.competing} by {setting.group.replace('_', ' ')}"
    for capacity in CAPACITIES:
        ideal = setting.flops(setting.selection(capacity)) / setting.flops()
        found = times[name_of(capacity)].cpu_ratio
        share = None if found is None else (1 - found) / (1 - ideal)
        shown = (
            "" if found is None else f" [time {found:.3f}, FLOPs {ideal:.3f} of the plain block]"
        )
        report.judge(at_least(f"{what}, c {capacity}: realised share", share, GOAL) + shown)
    for name, timing in times.items():
        if name.startswith((MASKED, PUBLIC)):
            ratio = speed(timing, times[name_of(RIVALS_AT)])
            report.judge(at_most(f"{what}: ours / {name}", ratio, 1.0))


# ---------------------------------------------------------------- whole models


@dataclass(frozen=True)
class ModelSetting:
    """Sizes of whole models; a batch is ``rows`` x ``seq_len`` tokens."""

    layers: int = 8
    dim: int = 384
    hidden_dim: int = 1536
    vocab_size: int = 2048
    rows: int = 2
    seq_len: int = 1024
    documents: int = 4
    capacity: float = 0.25


def every_other(config: Decoder.Config, capacity: float) -> Decoder.Config:
    """MoD in every other layer, from the first on."""
    depth = MixtureOfDepths.Config(selection=Selection(capacity=capacity))
    return depth_routed(config, every_nth(len(config.layers), capacity), depth)


def models(report: Report, setting: ModelSetting, rounds: int) -> str:
    """Markdown: steps of whole models beside their FLOPs."""
    shape = decoders.Shape(
        setting.dim,
        setting.layers,
        setting.dim // 64,
        setting.hidden_dim,
        setting.vocab_size,
        norm_order="pre",
    )
    experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
    shares = {Modality.TEXT: 0.5, Modality.IMAGE: 0.5}

    def moma() -> Decoder.Config:
        return decoders.moma(shape, experts, shares)

    configs = {
        "dense": decoders.dense(shape),
        "dense, MoD every other layer": every_other(decoders.dense(shape), setting.capacity),
        "MoMa 4t4i": moma(),
        "MoMa 4t4i, MoD every other layer": every_other(moma(), setting.capacity),
    }
    found: dict[str, nn.Module] = {}
    for name, config in configs.items():
        model = Decoder(config)
        model.init_states()
        found[name] = model
    tokens = setting.rows * setting.seq_len
    shown = {"dtype": "fp32", "rounds": rounds} | vars(setting)
    table, timings = compare_models(
        report, shown, tokens, found, partial(training, setting=setting), rounds=rounds
    )
    head = 6.0 * tokens * setting.dim * setting.vocab_size
    lines = [
        table,
        "| model | FLOPs of the one without MoD | time of it |",
        "|---|---:|---:|",
    ]
    for plain in ("dense", "MoMa 4t4i"):
        name = f"{plain}, MoD every other layer"
        block = Setting(plain, setting.dim, setting.rows, setting.seq_len, setting.documents)
        whole = head + setting.layers * block.flops()
        routed = head + setting.layers / 2 * (
            block.flops() + block.flops(block.selection(setting.capacity))
        )
        ratio = speed(timings[plain], timings[name])
        lines.append(f"| {name} | {routed / whole:.3f} | {shown_ratio(ratio)} |")
    return "\n".join([*lines, ""])


def shown_ratio(ratio: float | None) -> str:
    """Three decimals."""
    return "too noisy" if ratio is None else f"{ratio:.3f}"


def training(model: nn.Module, setting: ModelSetting) -> Callable[[], list[torch.Tensor]]:
    """One batch, forward and backward."""
    block = Setting("dense", setting.dim, setting.rows, setting.seq_len, setting.documents)
    batch = block.batch()
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(setting.vocab_size, batch.tokens_BS.shape, generator=generator)
    batch = replace(batch, tokens_BS=tokens_BS)
    labels_T = tokens_BS.roll(-1, 1).flatten()

    def run() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch).flatten(0, 1), labels_T).backward()
        return []

    return run


# ---------------------------------------------------------------- decode caches


LAYERS, TEXT, IMAGE, FRAMES = 32, 64, 576, 4
# capacities of the layers, and the rule; the prompt is text, then media
SYSTEMS: dict[str, tuple[Capacities, dict[str, Any]]] = {
    "dense": ((None,) * LAYERS, {}),
    "MoD, every other layer keeps 0.125": (every_nth(LAYERS, 0.125), {}),
    "MoMa's MoD, every other layer keeps 0.25": (every_nth(LAYERS, 0.25), {}),
    "p-MoD, shifted cosine over media": (
        shifted_cosine(LAYERS),
        {"competing": (1,), "group": "document"},
    ),
    "gamma-MoD, 28 of 32 layers skip half of the media": (
        in_layers(LAYERS, 1 - 0.5 * IMAGE / (TEXT + IMAGE), range(3, LAYERS - 1)),
        {"forced": (0,)},
    ),
    "VideoLLM-MoD, every other layer keeps 0.2 of a frame": (
        every_nth(LAYERS, 0.2),
        {"competing": (1,), "group": "span"},
    ),
}


@torch.no_grad()
def cache_bytes(system: str) -> int:
    """Bytes of the decode cache after a prompt of text and media, at width 64."""
    capacities, rule = SYSTEMS[system]
    config = decoders.dense(decoders.Shape(64, LAYERS, 1, 64, 8))
    if rule:
        rule = {"competing_share": IMAGE / (TEXT + IMAGE)} | rule
    depth = MixtureOfDepths.Config(selection=Selection(capacity=1.0, **rule))
    model = Decoder(depth_routed(config, capacities, depth))
    model.init_states()
    place_BS = torch.arange(TEXT + IMAGE)[None]
    media_BS = place_BS >= TEXT
    batch = MixedBatch.of(torch.zeros_like(place_BS), media_BS.to(torch.uint8))
    span_BS = (place_BS - TEXT) * FRAMES // IMAGE + 1
    batch = replace(batch, span_BS=span_BS.masked_fill(~media_BS, 0).int())
    cache = DecodeCache(1, TEXT + IMAGE)
    cache.start_step(torch.tensor([TEXT + IMAGE]), TEXT + IMAGE)
    model(batch, ForwardSettings(budgets="exact"), cache=cache)
    return cache.nbytes


def caches() -> str:
    """Markdown: bytes of the decode cache of each system."""
    found = {system: cache_bytes(system) for system in SYSTEMS}
    lines = [
        f"Decode cache after a prompt of {TEXT} text and {IMAGE} media tokens ({FRAMES} frames), "
        f"{LAYERS} layers, fp32, one key and value head of width 64: bytes allocated.",
        "",
        "| system | bytes | of dense |",
        "|---|---:|---:|",
        *(
            f"| {name} | {count:,} | {count / found['dense']:.3f} |"
            for name, count in found.items()
        ),
    ]
    return "\n".join([*lines, ""])


def main(rounds: int = 15, warmups: int = 3) -> None:
    """Runs all settings and writes ``results/mixture_of_depths.{jsonl,md}``."""
    report = Report("mixture_of_depths", "Depth-routed blocks, forward and backward (row 8)")
    for setting in SETTINGS:
        timings = compare(
            Problem(setting).rivals(),
            rounds=rounds,
            warmups=warmups,
            tolerance=TOLERANCE,
            keep_freed=True,
        )
        gflop = setting.flops() / 1e9
        shown = {"dtype": "fp32", "GFLOP": gflop, "rounds": rounds}
        report.add(vars(setting) | shown, timings)
        judge(report, setting, timings)
    pages = [models(report, ModelSetting(), rounds), caches()]
    print("\n".join(pages))
    report.write("\n".join(pages))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
