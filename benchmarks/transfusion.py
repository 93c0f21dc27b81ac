"""Training steps of Transfusion: ours beside lucidrains' transfusion-pytorch (row 14).

    pip install --no-deps --target wheels $(python benchmarks/transfusion.py --packages)
    PYTHONPATH=wheels python benchmarks/transfusion.py

A run is one step: noise, forward, backward, AdamW (torch's, fused). Both train on the same
documents, captions each followed by an image of 16 vectors: one document a row, or a document for
each pair, which ours packs into rows and theirs pads to the longest. Speed counts the tokens of
captions and the vectors; the sentinels that each model adds are its own affair. The losses are next
token and rectified flow, with linear adapters, as many heads, words and normalised queries.

Theirs normalises each branch by the time of every token (AdaLN), which has twice the parameters of
a block's attention and feed-forward. Ours is timed with a feed-forward as large as theirs ("equal
branches"), and with one so wide that whole blocks have as many parameters ("equal blocks"). Theirs
has its fastest settings: no gates of values, no consistency or reconstruction loss, no conditions
dropped, and the fastest of its ways to gather vectors. Skip connections between its layers cannot
be turned off in 0.20.0 (an assertion fails).

Ours is also timed beside itself: with other adapters and masks, and as Chameleon, whose images are
16 tokens.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from earlyfuse.configs import decoders
from earlyfuse.configs.transfusion import with_vectors
from earlyfuse.models.batch import IGNORE_LABEL, PADDING, MixedBatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.objectives.transfusion import TransfusionObjective
from earlyfuse.models.vocabulary import Modality
from harness import Report, Rival, Timing, at_least, compare, speed

VOCABULARY, WIDTH, BLOCK, HEAD = 2048, 48, 16, 48
BOS, EOS, PAD, BEGIN, END, VECTOR, FIRST_WORD = range(7)
THEIR_SENTINELS = 134  # theirs adds them to the words of a text
SHORTEST, LONGEST = 4, 24  # captions
CHECKED_STEPS = 4
GOAL = 1.5
EQUAL_BLOCKS, EQUAL_BRANCHES = "ours, equal blocks", "ours, equal branches"
THEIRS = "transfusion-pytorch"
TRANSFUSION = "Transfusion, dense, linear adapters"
FLOW = Diffusion.Config(schedule="flow", predicts="v")
# of the extra "bench": the rival and what it imports beside torch, einops, scipy and sympy
PACKAGES = (
    "transfusion-pytorch",
    "axial-positional-embedding",
    "beartype",
    "einops",
    "einx",
    "ema-pytorch",
    "frozendict",
    "jaxtyping",
    "loguru",
    "rotary-embedding-torch",
    "torch-einops-utils",
    "torchdiffeq",
    "wadler-lindig",
)

Pair = tuple[torch.Tensor, torch.Tensor]  # a caption (n,) and its image (BLOCK, WIDTH)
Rows = list[list[list[Pair]]]  # rows of documents of pairs
Step = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Setting:
    """Sizes. ``document``: "row", all pairs of a row, or "pair"."""

    dim: int
    layers: int
    rows: int
    seq_len: int
    document: str
    rounds: int

    def shape(self, hidden_dim: int) -> decoders.Shape:
        """The same for our configs."""
        heads = self.dim // HEAD
        return decoders.Shape(self.dim, self.layers, heads, hidden_dim, VOCABULARY)

    @property
    def hidden_dim(self) -> int:
        """Inner width of a gated feed-forward with 8 D² parameters."""
        return self.dim * 8 // 3


SMALL = Setting(192, 4, rows=4, seq_len=256, document="row", rounds=15)
SETTINGS = (
    SMALL,
    replace(SMALL, document="pair"),
    Setting(384, 6, rows=1, seq_len=1024, document="row", rounds=5),
)


# ---------------------------------------------------------------- data


def rows_of(setting: Setting) -> Rows:
    """Rows as full of pairs as they get."""
    generator = torch.Generator().manual_seed(0)
    rows: Rows = []
    for _ in range(setting.rows):
        pairs, left = [], setting.seq_len - 2
        framing = BLOCK + 2 + 2 * (setting.document == "pair")
        while left >= SHORTEST + framing:
            longest = min(LONGEST, left - framing)
            length = int(torch.randint(SHORTEST, longest + 1, (1,), generator=generator))
            caption = torch.randint(
                FIRST_WORD, VOCABULARY - THEIR_SENTINELS, (length,), generator=generator
            )
            pairs.append((caption, torch.randn(BLOCK, WIDTH, generator=generator)))
            left -= length + framing
        rows.append([pairs] if setting.document == "row" else [[pair] for pair in pairs])
    return rows


def packed(setting: Setting, rows: Rows, discrete: bool = False) -> MixedBatch:
    """Our batch; ``discrete``: images are tokens, drawn here, and have labels."""
    shape, generator = (setting.rows, setting.seq_len), torch.Generator().manual_seed(1)
    tokens_BS, labels_BS = torch.full(shape, PAD), torch.full(shape, IGNORE_LABEL)
    document_BS = torch.full(shape, PADDING, dtype=torch.int32)
    modality_BS, label_modality_BS = torch.zeros(2, *shape, dtype=torch.uint8)
    vectors_BSP = torch.zeros(*shape, WIDTH)
    for row, documents in enumerate(rows):
        start = 0
        for number, pairs in enumerate(documents, 1):
            ids, images = [torch.tensor([BOS])], []
            for caption, image in pairs:
                place = start + sum(map(len, ids)) + len(caption) + 1
                images.append((slice(place, place + BLOCK), image))
                image_ids = torch.full((BLOCK,), VECTOR)
                if discrete:
                    image_ids = torch.randint(FIRST_WORD, VOCABULARY, (BLOCK,), generator=generator)
                ids += [caption, torch.tensor([BEGIN]), image_ids, torch.tensor([END])]
            document = torch.cat([*ids, torch.tensor([EOS])])
            stop = start + len(document)
            tokens_BS[row, start:stop] = document
            labels_BS[row, start : stop - 1] = document[1:]
            document_BS[row, start:stop] = number
            for part, image in images:
                modality_BS[row, part] = Modality.IMAGE
                vectors_BSP[row, part] = image
            label_modality_BS[row, start : stop - 1] = modality_BS[row, start + 1 : stop]
            start = stop
    if discrete:
        vectors: dict[str, Any] = {}
    else:
        has_vector_BS = modality_BS == Modality.IMAGE
        forced_BS = has_vector_BS | (label_modality_BS == Modality.IMAGE)
        labels_BS = labels_BS.masked_fill(forced_BS, IGNORE_LABEL)
        label_modality_BS = label_modality_BS * ~forced_BS
        vectors = {"vectors_BSP": vectors_BSP, "has_vector_BS": has_vector_BS}
    return MixedBatch.of(
        tokens_BS,
        modality_BS,
        document_BS,
        labels_BS=labels_BS,
        label_modality_BS=label_modality_BS,
        **vectors,
    )


def real_tokens(rows: Rows) -> int:
    """Tokens of captions, and vectors."""
    return sum(
        len(caption) + BLOCK for documents in rows for pairs in documents for caption, _ in pairs
    )


# ---------------------------------------------------------------- models


def ours(
    setting: Setting, rows: Rows, hidden_dim: int, *, noised_once: bool = False, **adapters: Any
) -> tuple[Decoder, Step]:
    """Our dense Transfusion, pre-norm; ``noised_once``: every step has the first one's noise."""
    shape = replace(setting.shape(hidden_dim), norm_order="pre")
    model = Decoder(with_vectors(decoders.dense(shape), WIDTH, FLOW, **adapters))
    objective = TransfusionObjective.Config(drop_condition=0.0).build().for_model(model.config)
    return model, our_step(model, objective, packed(setting, rows), noised_once)


def chameleon(setting: Setting, rows: Rows) -> tuple[Decoder, Step]:
    """Our dense Chameleon of the same shape, on as many tokens."""
    model = Decoder(decoders.dense(replace(setting.shape(setting.hidden_dim), norm_order="pre")))
    objective = ChameleonObjective.Config(z_loss=0.0).build().for_model(model.config)
    return model, our_step(model, objective, packed(setting, rows, discrete=True))


def our_step(
    model: Decoder, objective: ChameleonObjective, batch: MixedBatch, noised_once: bool = False
) -> Step:
    """A run of ours."""
    model.init_states()
    counts, number = objective.counts(batch), 0
    if noised_once:
        batch = objective.prepare(batch, ForwardSettings(step=1))

    def loss() -> torch.Tensor:
        nonlocal number
        number += 1
        settings = ForwardSettings(step=number)
        prepared = batch if noised_once else objective.prepare(batch, settings)
        return model(prepared, settings, loss=objective.loss_of(prepared)).mean(counts)

    return stepping(model, loss)


def theirs(setting: Setting, rows: Rows, way: str) -> tuple[nn.Module, Step]:
    """transfusion-pytorch's with its fastest settings; ``way``: how it gathers vectors."""
    from transfusion_pytorch import Transfusion

    model = Transfusion(
        num_text_tokens=VOCABULARY - THEIR_SENTINELS,
        dim_latent=WIDTH,
        modality_num_dim=1,
        transformer={
            "dim": setting.dim,
            "depth": setting.layers,
            "dim_head": HEAD,
            "heads": setting.dim // HEAD,
            "ff_expansion_factor": 1.5 * setting.hidden_dim / setting.dim,
            "attn_kwargs": {"gate_values": False},
        },
        velocity_consistency_loss_weight=0.0,
        prob_uncond=0.0,
        modality_processing=way,
    )
    samples = [
        [item for caption, image in pairs for item in (caption, (0, image))]
        for documents in rows
        for pairs in documents
    ]
    return model, stepping(model, lambda: model(samples))


def stepping(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    """A run: one step of ``loss``, which it returns."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def run() -> list[torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        return [value.detach()]

    return run


def checked(name: str, run: Step) -> str:
    """The loss before and after some steps. ``ValueError`` unless it falls."""
    losses = [run()[0].item() for _ in range(CHECKED_STEPS)]
    if not losses[-1] < losses[0]:
        raise ValueError(
            f"the loss of {name!r} ({losses[0]:.3f}) must fall in {CHECKED_STEPS} steps on one "
            f"batch, not end at {losses[-1]:.3f}; mend the model before timing it"
        )
    return f"{losses[0]:.2f} → {losses[-1]:.2f}"


def sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters of the blocks, and of the whole model."""
    blocks = model.get_submodule("layers" if isinstance(model, Decoder) else "transformer.layers")
    return sum(p.numel() for p in blocks.parameters()), sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- the report


def fastest(setting: Setting, rows: Rows) -> str:
    """The fastest of their ways to gather vectors, by its whole steps."""
    runs = [
        Rival(way, theirs(setting, rows, way)[1]) for way in ("grouped", "flat", "hybrid", "auto")
    ]
    return min(compare(runs, rounds=2, warmups=1), key=lambda timing: timing.cpu).name


def hidden_of_equal_blocks(setting: Setting, blocks: int) -> int:
    """Inner width of our feed-forward with which our blocks have so many parameters."""
    with torch.device("meta"):
        one, two = (sizes(Decoder(decoders.dense(setting.shape(width))))[0] for width in (8, 16))
    per_unit = (two - one) // 8
    return 8 * round(((blocks - one) / per_unit + 8) / 8)


def timed(
    report: Report,
    setting: Setting,
    rows: Rows,
    models: Mapping[str, tuple[nn.Module, Step]],
    **shown: Any,
) -> tuple[str, dict[str, Timing]]:
    """Checks and times ``models``; returns a Markdown table of sizes and speeds, and timings."""
    losses = {name: checked(name, run) for name, (_, run) in models.items()}
    rivals = [Rival(name, run) for name, (_, run) in models.items()]
    tokens = real_tokens(rows)
    timings = compare(rivals, rounds=setting.rounds, warmups=1)
    line = {"dtype": "fp32", "work": "step"} | vars(setting) | {"tokens": tokens} | shown
    report.add(line, timings)
    lines = [
        ", ".join(f"{key} {value}" for key, value in line.items()),
        "",
        "| model | parameters of blocks | of all | tokens per CPU-s | relative to the first "
        f"| loss in {CHECKED_STEPS} steps |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for timing in timings:
        blocks, total = sizes(models[timing.name][0])
        relative = speed(timing, timings[0])
        lines.append(
            f"| {timing.name} | {blocks:,} | {total:,} | {tokens / timing.cpu:,.0f} "
            f"| {'too noisy' if relative is None else f'{relative:.3f}'} | {losses[timing.name]} |"
        )
    return "\n".join(lines) + "\n", {timing.name: timing for timing in timings}


def beside_theirs(report: Report, setting: Setting) -> str:
    """Ours and theirs in one setting."""
    rows = rows_of(setting)
    way = fastest(setting, rows)
    rival = theirs(setting, rows, way)
    wide = hidden_of_equal_blocks(setting, sizes(rival[0])[0])
    models: dict[str, tuple[nn.Module, Step]] = {
        EQUAL_BLOCKS: ours(setting, rows, wide),
        EQUAL_BRANCHES: ours(setting, rows, setting.hidden_dim),
        THEIRS: rival,
    }
    page, timings = timed(report, setting, rows, models, gathering=way)
    where = f"dim {setting.dim}, rows of {setting.seq_len}, a document is a {setting.document}"
    for name in (EQUAL_BLOCKS, EQUAL_BRANCHES):
        ratio = speed(timings[name], timings[THEIRS])
        report.judge(at_least(f"{where}: {name} / {THEIRS}, tokens/s", ratio, GOAL))
    return page


def beside_ourselves(report: Report, setting: Setting) -> str:
    """Measures the cost of vectors, noise, masks and adapters."""
    rows = rows_of(setting)
    build = partial(ours, setting, rows, setting.hidden_dim)
    unet: dict[str, Any] = {"adapter": "unet", "block": BLOCK, "channels": 12}
    models = {
        TRANSFUSION: build(),
        "with place_embedding": build(place_embedding=True, block=BLOCK),
        "with U-Net adapters, 128 features": build(**unet),
        "causal inside images": build(bidirectional=False),
        "noise drawn once": build(noised_once=True),
        "Chameleon, images of tokens": chameleon(setting, rows),
    }
    return timed(report, setting, rows, models)[0]


def missing() -> list[str]:
    """Packages of ``PACKAGES`` that are not installed."""
    return [name for name in PACKAGES if not importlib.util.find_spec(name.replace("-", "_"))]


def pins() -> list[str]:
    """``PACKAGES`` with the versions of constraints.txt."""
    text = (Path(__file__).parent.parent / "constraints.txt").read_text()
    found = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    return [f"{name}=={found[name]}" for name in PACKAGES]


def main() -> None:
    """Times all settings and writes ``results/transfusion.{jsonl,md}``."""
    if "--packages" in sys.argv:
        print(*pins())
        return
    if absent := missing():
        raise SystemExit(
            f"{', '.join(absent)} must be installed for this benchmark: pip install --no-deps "
            "$(python benchmarks/transfusion.py --packages)"
        )
    report = Report("transfusion", "Training steps of Transfusion (row 14)", PACKAGES[:1])
    torch.manual_seed(0)
    pages = [beside_theirs(report, setting) for setting in SETTINGS]
    pages.append(beside_ourselves(report, SMALL))
    report.write("\n".join(pages))
    print("\n".join(pages))


if __name__ == "__main__":
    main()
