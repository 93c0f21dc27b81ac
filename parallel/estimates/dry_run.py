"""Describes what a run would take, without devices or ranks: ``train.py CONFIG --dry-run``.

Nothing is built, joined or written. Sizes and traffic are closed forms (``models/flops.py``,
``communication.py``); memory is partly an estimate (``memory.py``).
"""

from collections.abc import Iterator
from dataclasses import replace

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture, positions_of
from earlyfuse.data.tokenizers import VOCABULARY_FILE
from earlyfuse.models.flops import count_parameters, training_flops
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.estimates.communication import step_traffic, total
from earlyfuse.parallel.estimates.memory import rank_memory
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.parallel.strategies.pipeline import stage_blocks
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.data_config import DataSet, data_folder


def describe(name: str, config: Trainer.Config, ranks: int) -> str:
    """A page about ``config`` on ``ranks`` ranks; ``ValueError`` if it cannot run there."""
    step = Step.of(config, ranks)
    lines = [f"{name} on {_count(ranks, 'rank')}. Nothing is built, joined or written.", ""]
    for title, section in (
        ("model", _model(step)),
        ("step", _step(config, step)),
        ("memory", _memory(step)),
        ("traffic", _traffic(step)),
        ("data", _data(config, step)),
    ):
        for line in section:
            lines.append(f"{title:<9}{line}")
            title = ""
        lines.append("")
    return "\n".join(lines).rstrip()


def _model(step: Step) -> Iterator[str]:
    model, parameters = step.model, count_parameters(step.model)
    yield f"{quantity(parameters.total)} parameters"
    flops = training_flops(model, step.training.seq_len)
    for group, modality in enumerate(model.modalities):
        yield (
            f"{Modality(modality).label} tokens use {quantity(parameters.active[group])} of them: "
            f"{quantity(flops[group])}FLOP per token, forward and backward"
        )


def _step(config: Trainer.Config, step: Step) -> Iterator[str]:
    training, tokens = step.training, step.rows * step.training.seq_len
    flops_by_modality = training_flops(step.model, training.seq_len)
    shares = _shares(config, len(step.model.modalities))
    flops = sum(s * f for s, f in zip(shares, flops_by_modality, strict=True))
    yield (
        f"{tokens:,} tokens: {training.local_batch_size} rows x {training.seq_len} x "
        f"{_count(step.data_ranks, 'data rank')} x "
        f"{_count(step.microbatches, 'micro-batch', 'es')}"
    )
    yield from _pipeline(step)
    each = tokens * flops / step.dims.world_size
    yield f"{quantity(tokens * flops)}FLOP, {quantity(each)}FLOP per rank"
    yield (
        f"{training.steps:,} steps: {quantity(training.steps * tokens)} tokens, "
        f"{quantity(training.steps * tokens * flops)}FLOP"
    )


def _pipeline(step: Step) -> Iterator[str]:
    ranks, parts = step.dims.pp, step.parts
    if ranks == 1:
        return
    stages = stage_blocks(step.parallelism, len(step.model.layers))
    # bubble: arXiv 2104.04473, 2.2
    idle = (ranks - 1) / (ranks - 1 + parts * len(stages) // ranks)
    yield (
        f"a micro-batch passes in {_count(parts, 'part')} of "
        f"{_count(step.local_batch.rows, 'row')} through "
        f"{' + '.join(str(len(blocks)) for blocks in stages)} blocks on {ranks} ranks "
        f"({step.parallelism.pipeline_parallel_schedule}): idle at least {idle:.0%} of the time"
    )


def _memory(step: Step) -> Iterator[str]:
    recompute, memory = step.recompute, rank_memory(step)
    yield f"{_bytes(memory.total)} {_which_rank(step)}, of which"
    policy = type(recompute).__qualname__.partition(".")[0]
    checkpointing = "no checkpointing" if recompute is None else policy
    for what, size in (
        ("parameters", memory.parameters),
        *([("their averages", memory.averages)] if memory.averages else []),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("gathered by FSDP, about", memory.gathered),
        (f"activations ({checkpointing}), about", memory.activations),
        ("gradients of the head and a chunk of logits, about", memory.head),
    ):
        yield f"{_bytes(size):>11}  {what}"


def _traffic(step: Step) -> Iterator[str]:
    traffic = step_traffic(step)
    if not traffic:
        yield "none: one rank"
        return
    yield f"{_bytes(total(traffic))} received in a step {_which_rank(step)}, of which"
    for one in traffic:
        yield (
            f"{_bytes(one.received):>11}  {one.purpose}: {one.calls} {one.kind} over "
            f"{one.ranks} {one.axis} ranks"
        )


def _which_rank(step: Step) -> str:
    return "per rank" if step.dims.pp == 1 else "on the fullest rank of the pipeline"


def _data(config: Trainer.Config, step: Step) -> Iterator[str]:
    folder = data_folder(config.data)
    if folder is None:
        yield "none yet: prepare some (docs/data.md) and pass the folder with --data.folder"
        return
    if not (folder / "tokenizers" / VOCABULARY_FILE).exists():
        if not config.data.folder:
            yield f"{folder} does not have the embedded corpus yet: it is made at the first start"
            return
        if not config.data.embedded:
            names = ", ".join(config.data.shares) or "any source"
            yield f"{folder} does not have {names} yet: prepare them first"
            return
    # refuses what the start would refuse, without making the embedded corpus
    data = DataSet(replace(config.data, folder=str(folder)))
    found = data.resolve(config, step.dims.world_size)
    sources = tuple(TokenSource(folder / "train" / name) for name in data.shares)
    loader = found.dataloader
    shares = tuple(data.shares.values())
    mixture = Mixture(sources, shares, loader.media_share, loader.clean_copies)
    lanes = step.rows
    tokens = step.training.steps * lanes * step.training.seq_len
    yield f"the run takes {quantity(tokens)} tokens in {_count(lanes, 'lane')} of {folder}:"
    for source, share in zip(sources, mixture.effective_shares(), strict=True):
        size = sum(positions_of(source, mixture.clean_copies).values())
        yield (
            f"{source.name}: {len(source):,} documents, {quantity(size)} tokens; {share:.0%} of "
            f"the run, {tokens * share / size:.3g} epochs"
        )
        if len(source) < lanes:
            yield (
                f"  too few: {lanes - len(source)} lanes would start with a document of another "
                "lane; lower training.global_batch_size or add documents"
            )


def _shares(config: Trainer.Config, modalities: int) -> list[float]:
    """Share of each modality among the tokens: the loader's quota, else equal shares."""
    others = modalities - 1
    media = config.dataloader.media_share
    if media is None or not others:
        return [1 / modalities] * modalities
    return [1 - media, *[media / others] * others]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def quantity(value: float) -> str:
    """Four digits and an SI prefix: 1234567 → "1.235 M"."""
    power = 0
    while abs(value) >= 999.95 and power < 7:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}"


def _bytes(size: float) -> str:
    return f"{quantity(size)}B"
