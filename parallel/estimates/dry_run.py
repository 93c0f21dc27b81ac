"""Describes what a run would take, without devices or ranks: ``train.py CONFIG --dry-run``.

Nothing is built, joined or written. Sizes and traffic are closed forms (``models/flops.py``,
``communication.py``); memory is partly an estimate (``memory.py``).
"""

from collections.abc import Iterator
from dataclasses import replace

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.data.tokenizers import VOCABULARY_FILE
from earlyfuse.models.flops import training_flops
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.estimates.communication import step_traffic, total
from earlyfuse.parallel.estimates.memory import rank_memory
from earlyfuse.parallel.estimates.step import Step
from earlyfuse.parallel.reporting.opening import (
    count,
    model,
    quantity,
    source_line,
    source_plan,
)
from earlyfuse.parallel.strategies.pipeline import stage_blocks
from earlyfuse.parallel.trainer import Trainer, check
from earlyfuse.parallel.training.data_config import DataSet, data_folder, fitted


def describe(name: str, config: Trainer.Config, ranks: int) -> str:
    """A page about ``config`` on ``ranks`` ranks; ``ValueError`` if it cannot run there."""
    check(fitted(config), ranks)
    data = _data_set(config)
    if data is not None:
        config = data.resolve(config, ranks)
    step = Step.of(config, ranks)
    lines = [f"{name} on {count(ranks, 'rank')}. Nothing is built, joined or written.", ""]
    for title, section in (
        ("model", model(step.model, step.training.seq_len)),
        ("step", _step(config, step)),
        ("memory", _memory(step)),
        ("traffic", _traffic(step)),
        ("data", _data(config, step, data)),
    ):
        for line in section:
            lines.append(f"{title:<9}{line}")
            title = ""
        lines.append("")
    return "\n".join(lines).rstrip()


def _data_set(config: Trainer.Config) -> DataSet | None:
    """The data of the run, refused as at its start; None if there are none yet."""
    folder = data_folder(config.data)
    if folder is None:
        return None
    prepared = (folder / "tokenizers" / VOCABULARY_FILE).exists()
    if not prepared and not (config.data.folder and config.data.embedded):
        return None  # without making the embedded corpus
    return DataSet(replace(config.data, folder=str(folder)))


def _step(config: Trainer.Config, step: Step) -> Iterator[str]:
    training, tokens = step.training, step.rows * step.training.seq_len
    flops_by_modality = training_flops(step.model, training.seq_len)
    shares = _shares(config, len(step.model.modalities))
    flops = sum(s * f for s, f in zip(shares, flops_by_modality, strict=True))
    yield (
        f"{tokens:,} tokens: {training.local_batch_size} rows x {training.seq_len} x "
        f"{count(step.data_ranks, 'data rank')} x "
        f"{count(step.microbatches, 'micro-batch', 'es')}"
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
        f"a micro-batch passes in {count(parts, 'part')} of "
        f"{count(step.local_batch.rows, 'row')} through "
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


def _data(config: Trainer.Config, step: Step, data: DataSet | None) -> Iterator[str]:
    folder = data_folder(config.data)
    if folder is None:
        yield "none yet: prepare some (docs/data.md) and pass the folder with --data.folder"
        yield from _needs(config)
        return
    if data is None:
        if config.data.embedded:
            yield f"{folder} does not have the embedded corpus yet: it is made at the first start"
        else:
            names = ", ".join(config.data.shares) or "any source"
            yield f"{folder} does not have {names} yet: prepare them first"
        return
    sources = tuple(TokenSource(folder) for folder in config.dataloader.sources)
    loader = config.dataloader
    shares = tuple(loader.sources.values())
    mixture = Mixture(sources, shares, loader.media_share, loader.clean_copies)
    tokens, lanes = step.training.steps * step.rows * step.training.seq_len, step.rows
    yield f"from {folder}: {data.taken}"
    yield f"the run takes {quantity(tokens)} tokens in {count(lanes, 'lane')}:"
    for use in source_plan(mixture, tokens):
        yield source_line(use)
        if use.documents < lanes:
            yield (
                f"  too few: {lanes - use.documents} lanes would start with a document of another "
                "lane; lower training.global_batch_size or add documents"
            )


def _needs(config: Trainer.Config) -> Iterator[str]:
    """The needs of the config for data; all else it takes from them."""
    model, quota = config.model_spec.model, config.dataloader.media_share
    labels = ", ".join(Modality(modality).label for modality in model.modalities)
    yield f"ids and modalities are those of the data; {model.vocab_size:,} and {labels} here"
    yield f"an image or utterance must fit a row: {config.training.seq_len - 2:,} codes at most"
    if model.vectors is not None:
        media = ", ".join(Modality(modality).label for modality in model.vectors.modalities)
        yield f"{media} must be vectors (--image-tokenizer pixels, vae or a folder of diffusers)"
    if quota is not None:
        yield (
            f"media must be able to make up {quota:.0%} of the tokens (dataloader.media_share): "
            "one source with more of them, one with less"
        )


def _shares(config: Trainer.Config, modalities: int) -> list[float]:
    """Share of each modality among the tokens: the loader's quota, else equal shares."""
    others = modalities - 1
    media = config.dataloader.media_share
    if media is None or not others:
        return [1 / modalities] * modalities
    return [1 - media, *[media / others] * others]


def _bytes(size: float) -> str:
    return f"{quantity(size)}B"
