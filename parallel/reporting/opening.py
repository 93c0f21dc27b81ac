"""Describes a run in the lines that it opens with: model, batch, layout, device, data, log."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchtitan.distributed import ParallelDims

from earlyfuse.data.stream.mixture import Mixture, positions_of
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.flops import count_parameters, training_flops
from earlyfuse.models.vocabulary import Modality

# mesh axis → degree in ParallelDims
AXES = {
    "replicas": "dp_replicate",
    "shards (FSDP)": "dp_shard",
    "context": "cp",
    "tensor": "tp",
    "pipeline": "pp",
    "expert": "ep",
}
CONVENTION = "a multiply-add is 2 FLOP, attention counts its full square, recomputation nothing"


@dataclass(frozen=True)
class Place:
    """The place of a run: its layout over ranks, their hosts, and the name of rank 0's device."""

    dims: ParallelDims
    hosts: Sequence[str]
    device: str


def lines(
    config: Any, place: Place, mixture: Mixture, taken: str, step: int, read: Mapping[str, float]
) -> Iterator[str]:
    """Lines about a run of the ``Trainer.Config`` ``config`` that continues after ``step``.

    ``taken``: what the model has from the data (``DataSet.taken``).
    ``read``: ``epochs_by_source/NAME`` so far.
    """
    for title, section in (
        ("model", model(config.model_spec.model, config.training.seq_len)),
        ("batch", _batch(config, mixture, step)),
        ("layout", _layout(config, place)),
        ("data", _data(config, mixture, taken, step, read)),
        ("log", _log(config)),
    ):
        for line in section:
            yield f"{title:<9}{line}"
            title = ""


def model(config: Decoder.Config, seq_len: int) -> Iterator[str]:
    """Parameters of a model, and what tokens of each modality use."""
    parameters, flops = count_parameters(config), training_flops(config, seq_len)
    yield f"{quantity(parameters.total)} parameters"
    for group, modality in enumerate(config.modalities):
        yield (
            f"{Modality(modality).label} tokens use {quantity(parameters.active[group])} of them: "
            f"{quantity(flops[group])}FLOP per token, forward and backward"
        )


def _batch(config: Any, mixture: Mixture, step: int) -> Iterator[str]:
    training, decoder = config.training, config.model_spec.model
    tokens = training.global_batch_size * training.seq_len
    shares = mixture.modality_shares()
    pairs = zip(decoder.modalities, training_flops(decoder, training.seq_len), strict=True)
    flops = tokens * sum(shares.get(Modality(modality).label, 0) * cost for modality, cost in pairs)
    rows = count(training.global_batch_size, "row")
    yield f"{tokens:,} tokens of a step: {rows} x {training.seq_len} positions"
    yield f"{quantity(flops)}FLOP of a step on these data ({CONVENTION})"
    left = training.steps - step
    yield (
        f"{count(left, 'step')}{' left' * bool(step)}: {left * tokens:,} tokens, "
        f"{quantity(left * flops)}FLOP"
    )


def _layout(config: Any, place: Place) -> Iterator[str]:
    ranks, hosts = len(place.hosts), len(set(place.hosts))
    degrees = {name: getattr(place.dims, axis) for name, axis in AXES.items()}
    parts = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    of = f": {' x '.join(parts)}" if parts else ""
    yield f"{count(ranks, 'rank')} on {count(hosts, 'host')}{of}; {place.device}"
    training = config.training
    yield f"computes in {training.mixed_precision_param}, keeps weights in {training.dtype}"


def _data(
    config: Any, mixture: Mixture, taken: str, step: int, read: Mapping[str, float]
) -> Iterator[str]:
    training = config.training
    tokens = (training.steps - step) * training.global_batch_size * training.seq_len
    yield f"{config.data.folder}: {taken}; of which this run reads"
    for use in source_plan(mixture, tokens):
        yield source_line(use, read[f"epochs_by_source/{use.name}"])


class SourceUse(NamedTuple):
    """A source of a run: its ``documents`` and ``tokens``, its ``share`` of the run, ``epochs``."""

    name: str
    documents: int
    tokens: int
    share: float
    epochs: float


def source_plan(mixture: Mixture, tokens: int) -> list[SourceUse]:
    """The use of each source of ``mixture`` in a run of ``tokens``."""
    plan = []
    for source, share in zip(mixture.sources, mixture.effective_shares(), strict=True):
        size = sum(positions_of(source, mixture.clean_copies).values())
        plan.append(SourceUse(source.name, len(source), size, share, tokens * share / size))
    return plan


def source_line(use: SourceUse, begun: float = 0.0) -> str:
    """Documents, tokens and share of a source, and the epochs that a run reads."""
    epochs = begun + use.epochs
    span = f"from epoch {begun:.3g} to {epochs:.3g}" if begun else f"{epochs:.3g} epochs"
    return (
        f"{use.name}: {use.documents:,} documents, {quantity(use.tokens)} tokens; "
        f"{use.share:.0%} of the run, {span}"
    )


def _log(config: Any) -> Iterator[str]:
    every = config.metrics.log_freq
    note = "" if every == 1 else "; losses are means over the steps since the last line"
    yield f"every {count(every, 'step') if every > 1 else 'step'} in {config.dump_folder}{note}"


def count(number: int, noun: str, plural: str = "s") -> str:
    """ "1 rank", "2 ranks"."""
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def quantity(value: float) -> str:
    """Four digits and an SI prefix: 1234567 → "1.235 M"."""
    power = 0
    while abs(value) >= 999.95 and power < 7:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}"
