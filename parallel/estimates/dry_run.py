"""What a run would take, before a device or a process group is: ``train.py CONFIG --dry-run``.

Nothing is built, joined or written. Sizes and traffic are closed forms (``models/flops.py``,
``communication.py``); memory is partly an estimate (``memory.py``).
"""

from collections.abc import Iterator
from dataclasses import replace

from torchtitan.distributed import ParallelDims

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import count_parameters, training_flops
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.estimates.communication import step_traffic, total
from earlyfuse.parallel.estimates.fsdp_units import accumulation
from earlyfuse.parallel.estimates.memory import rank_memory
from earlyfuse.parallel.plan import check_parallelism
from earlyfuse.parallel.strategies.pipeline import stage_blocks
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.config_checks import check_config
from earlyfuse.parallel.training.data_config import DataSet, data_folder


def describe(name: str, config: Trainer.Config, ranks: int) -> str:
    """A page about ``config`` on ``ranks`` ranks; ``ValueError`` if it cannot run on them."""
    model, dims = check(config, ranks)
    lines = [f"{name} on {_count(ranks, 'rank')}. Nothing is built, joined or written.", ""]
    for title, section in (
        ("model", _model(model, config)),
        ("step", _step(model, config, dims)),
        ("memory", _memory(model, config, dims)),
        ("traffic", _traffic(model, config, dims)),
        ("data", _data(config, dims)),
    ):
        lines += [f"{title if first else '':<9}{line}" for first, line in _marked(section)] + [""]
    return "\n".join(lines).rstrip()


def check(config: Trainer.Config, ranks: int) -> tuple[Decoder.Config, ParallelDims]:
    """Model and degrees of ``config`` on ``ranks`` ranks; ``ValueError`` if it cannot run there."""
    assert config.model_spec is not None, "configs always set model_spec"
    model = config.model_spec.model
    assert isinstance(model, Decoder.Config)
    check_config(config)
    check_parallelism(config.parallelism, config.training, model, ranks)
    return model, ParallelDims.from_config(config.parallelism, ranks)


def _marked(lines: Iterator[str]) -> Iterator[tuple[bool, str]]:
    for number, line in enumerate(lines):
        yield number == 0, line


def _model(model: Decoder.Config, config: Trainer.Config) -> Iterator[str]:
    parameters = count_parameters(model)
    yield f"{quantity(parameters.total)} parameters"
    flops = training_flops(model, config.training.seq_len)
    for group, modality in enumerate(model.modalities):
        yield (
            f"a token of {Modality(modality).label} meets {quantity(parameters.active[group])} of "
            f"them: {quantity(flops[group])}FLOP, forward and backward"
        )


def _step(model: Decoder.Config, config: Trainer.Config, dims: ParallelDims) -> Iterator[str]:
    training = config.training
    tokens = _step_tokens(config, dims)
    flops = sum(
        share * flops
        for share, flops in zip(
            _shares(model, config), training_flops(model, training.seq_len), strict=True
        )
    )
    microbatches = accumulation(training, dims)
    yield (
        f"{tokens:,} tokens: {training.local_batch_size} rows x {training.seq_len} x "
        f"{_count(dims.dp_replicate * dims.dp_shard, 'data rank')} x "
        f"{_count(microbatches, 'micro-batch', 'es')}"
    )
    yield from _pipeline(model, config, dims)
    each = tokens * flops / dims.world_size
    yield f"{quantity(tokens * flops)}FLOP, {quantity(each)}FLOP per rank"
    yield (
        f"{training.steps:,} steps: {quantity(training.steps * tokens)} tokens, "
        f"{quantity(training.steps * tokens * flops)}FLOP"
    )


def _pipeline(model: Decoder.Config, config: Trainer.Config, dims: ParallelDims) -> Iterator[str]:
    if dims.pp == 1:
        return
    parallelism = config.parallelism
    stages = stage_blocks(parallelism, len(model.layers))
    rows = parallelism.pipeline_parallel_microbatch_size
    parts = config.training.local_batch_size // rows
    # filling and draining: arXiv 2104.04473, 2.2
    idle = (dims.pp - 1) / (dims.pp - 1 + parts * len(stages) // dims.pp)
    yield (
        f"a micro-batch goes in {_count(parts, 'part')} of {_count(rows, 'row')} through "
        f"{' + '.join(str(len(blocks)) for blocks in stages)} blocks on {dims.pp} ranks "
        f"({parallelism.pipeline_parallel_schedule}): idle {idle:.0%} of the time, or more"
    )


def _memory(model: Decoder.Config, config: Trainer.Config, dims: ParallelDims) -> Iterator[str]:
    arguments = (config.training, config.parallelism, config.activation_checkpoint)
    memory = rank_memory(model, dims, *arguments)
    yield f"{_bytes(memory.total)} {_which_rank(dims)}, of which"
    policy = type(config.activation_checkpoint).__qualname__.partition(".")[0]
    checkpointing = "no checkpointing" if config.activation_checkpoint is None else policy
    for what, size in (
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("gathered by FSDP, about", memory.gathered),
        (f"activations ({checkpointing}), about", memory.activations),
        ("gradients of the head and a chunk of logits, about", memory.head),
    ):
        yield f"{_bytes(size):>11}  {what}"


def _traffic(model: Decoder.Config, config: Trainer.Config, dims: ParallelDims) -> Iterator[str]:
    arguments = (config.training, config.parallelism, config.activation_checkpoint)
    traffic = step_traffic(model, dims, *arguments)
    if not traffic:
        yield "none: one rank"
        return
    yield f"{_bytes(total(traffic))} received in a step {_which_rank(dims)}, of which"
    for one in traffic:
        yield (
            f"{_bytes(one.received):>11}  {one.purpose}: {one.calls} {one.kind} over "
            f"{one.ranks} {one.axis} ranks"
        )


def _which_rank(dims: ParallelDims) -> str:
    return "per rank" if dims.pp == 1 else "on the fullest rank of the pipeline"


def _data(config: Trainer.Config, dims: ParallelDims) -> Iterator[str]:
    folder = data_folder(config.data)
    if folder is None:
        yield "none yet: prepare some (docs/data.md), and give their folder with --data.folder"
        return
    if not (folder / "tokenizers" / "vocabulary.json").exists():
        if not config.data.folder:
            yield f"{folder} does not have the embedded corpus yet: it is made at the first start"
            return
        if not config.data.embedded:
            names = ", ".join(config.data.shares) or "any source"
            yield f"{folder} does not have {names} yet: prepare them first"
            return
    # what the start would refuse is refused here; only making the embedded corpus is left out
    data = DataSet(replace(config.data, folder=str(folder)))
    data.resolve(config, dims.world_size)
    sources = tuple(TokenSource(folder / "train" / name) for name in data.shares)
    mixture = Mixture(sources, tuple(data.shares.values()), config.dataloader.media_share)
    tokens = config.training.steps * _step_tokens(config, dims)
    lanes = accumulation(config.training, dims) * config.training.local_batch_size
    lanes *= dims.dp_replicate * dims.dp_shard
    yield f"the run takes {quantity(tokens)} tokens in {_count(lanes, 'lane')} of {folder}:"
    for source, share in zip(sources, mixture.effective_shares(), strict=True):
        there = sum(source.tokens.values())
        yield (
            f"{source.name}: {len(source):,} documents, {quantity(there)} tokens; takes "
            f"{share:.0%} of the run, {tokens * share / there:.3g} epochs"
        )
        if len(source) < lanes:
            yield (
                f"  too few: {lanes - len(source)} lanes would start with a document that another "
                "has; lower training.global_batch_size or add documents"
            )


def _step_tokens(config: Trainer.Config, dims: ParallelDims) -> int:
    training = config.training
    rows = accumulation(training, dims) * training.local_batch_size
    return rows * dims.dp_replicate * dims.dp_shard * training.seq_len


def _shares(model: Decoder.Config, config: Trainer.Config) -> list[float]:
    """Share of each modality among the tokens: the loader's quota, else all alike."""
    others = len(model.modalities) - 1
    media = config.dataloader.media_share
    if media is None or not others:
        return [1 / len(model.modalities)] * len(model.modalities)
    return [1 - media, *[media / others] * others]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def quantity(value: float) -> str:
    """Four digits and the prefix of a unit: 1234567 → "1.235 M"."""
    power = 0
    while abs(value) >= 999.95 and power < 7:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}"


def _bytes(size: float) -> str:
    return f"{quantity(size)}B"
