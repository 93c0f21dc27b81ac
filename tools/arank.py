"""Measures ranks of attention maps per layer, to choose the layers that become depth-routed.

``python -m earlyfuse.tools.arank FOLDER --out DIR [--layers N | --threshold RANK]``; FOLDER is a
run, a checkpoint or a model of any format. gamma-MoD's ARank: docs/mixture_of_depths.md.

P samples, L layers.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlyfuse.data.console import printable
from earlyfuse.tools.command import (
    Parser,
    add_code_option,
    add_weights_option,
    check_device,
    import_code,
    run_command,
)

if TYPE_CHECKING:  # --help does not pay for torch
    import numpy as np

    from earlyfuse.data.shards.source import TokenSource
    from earlyfuse.models.batch import MixedBatch
    from earlyfuse.models.decoder import Decoder
    from earlyfuse.models.depth.capacity import Capacities
    from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel
    from earlyfuse.tools.documents import ModelFolder

RESULTS, PICTURE = "arank.json", "arank.png"
SEQ_LEN = 1024  # of a model whose run is not known
DTYPES = ("float32", "bfloat16", "float16")
MOST = 1 << 16  # of any number: more is a slip


@dataclass(frozen=True)
class Ranks:
    """``rank_LP``: means over heads, NaN in layers without attention; ``tokens_P``: of a sample."""

    rank_LP: "np.ndarray"
    tokens_P: "np.ndarray"

    @property
    def relative_LP(self) -> "np.ndarray":
        """Rank / (tokens - 1), the largest rank that a map without its diagonal has."""
        return self.rank_LP / (self.tokens_P - 1)

    @property
    def layers(self) -> list[dict[str, Any] | None]:
        """Measurements of each layer; None for one without attention."""
        root = math.sqrt(len(self.tokens_P))
        return [
            None
            if math.isnan(rank_P[0])
            else {
                "rank": float(rank_P.mean()),
                "sd": float(rank_P.std(ddof=1)),
                "se": float(rank_P.std(ddof=1)) / root,
                "relative": float(relative_P.mean()),
                "relative_sd": float(relative_P.std(ddof=1)),
                "by_sample": rank_P.tolist(),
            }
            for rank_P, relative_P in zip(self.rank_LP, self.relative_LP, strict=True)
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 with what to change on stderr."""
    return run_command(
        "arank",
        lambda: _arank(_parser().parse_args(arguments)),
        interrupted="stopped; nothing was written",
    )


def _arank(options: argparse.Namespace) -> None:
    """Measures, prints the table and the choice of layers, and writes both files."""
    _check(options)
    import torch

    from earlyfuse.data.atomic import atomic_write_json
    from earlyfuse.models.depth.attention_rank import check_comparable
    from earlyfuse.parallel.checkpoint.open_checkpoint import as_module, open_model
    from earlyfuse.parallel.reporting.plots import plot_ranks
    from earlyfuse.tools.documents import ModelFolder

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    import_code(options.code)
    opened = open_model(options.folder, options.weights)
    check_comparable(opened.config)
    about = ModelFolder.read(options.folder)
    sources = _sources(options, about, opened)
    model = as_module(opened, device=device, dtype=getattr(torch, options.dtype))
    _check_layers(model, options)
    options.seq_len = options.seq_len or about.seq_len or SEQ_LEN
    ranks = _measure(model, _batches(model, sources, options), device, options)
    capacities = _capacities(ranks, options)
    routed = [layer for layer, kept in enumerate(capacities or ()) if kept is not None]
    print(_table(ranks, routed))
    if capacities is not None:
        none = "" if routed else ": no rank is as low as --threshold"
        print(f"\nrouted layers: {routed}{none}\ncapacities: {capacities}")
    options.out.mkdir(parents=True, exist_ok=True)
    panels = {"rank of attention maps": ranks.rank_LP, "rank / full rank": ranks.relative_LP}
    title = f"{len(ranks.tokens_P)} samples; bars: standard deviation"
    plot_ranks(panels, routed, title, options.out / PICTURE)
    settings = {
        "model": printable(str(opened.folder)),
        "weights": opened.weights,
        "rule": model.default_settings.rule,
        "sources": {source.name: source.identity for source in sources},
        **{name: getattr(options, name) for name in _RECORDED},
    }
    found = {
        "settings": settings,
        "tokens": ranks.tokens_P.tolist(),
        "layers": ranks.layers,
        "routed": routed,
        "capacities": capacities,
    }
    atomic_write_json(options.out / RESULTS, found)
    print(f"\n{printable(str(options.out / RESULTS))}\n{printable(str(options.out / PICTURE))}")


_NUMBERS = ("samples", "length", "shortest", "batch_size", "seq_len", "layers")
_RECORDED = ("split", "seed", "dtype", "seq_len", "length", "shortest", "batch_size")


def _check(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for what is wrong before anything is loaded."""
    for name in _NUMBERS:
        value, least = getattr(options, name), 1 if name in ("batch_size", "layers") else 2
        if value is not None and not least <= value <= MOST:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} ({value}) must lie in [{least}, {MOST}]; give another")
    if options.shortest > options.length:
        raise ValueError(
            f"--shortest ({options.shortest}) must be at most --length ({options.length}), the "
            "tokens of a document that are measured; change one of them"
        )
    if options.threshold is not None and not 0 <= options.threshold < math.inf:
        raise ValueError(f"--threshold ({options.threshold}) must be a rank, 0 or more")
    if not 0 < options.capacity <= 1:
        raise ValueError(f"--capacity ({options.capacity}) must be in (0, 1]")
    if not options.folder.is_dir():
        raise ValueError(f"{options.folder} is no folder; give a run, a checkpoint or an export")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out ({options.out}) must be a folder; it is a file")
    for name in (RESULTS, PICTURE):
        if (options.out / name).exists():
            raise ValueError(f"--out ({options.out}) has {name} already; give another folder")


def _check_layers(model: "Decoder", options: argparse.Namespace) -> None:
    """Raises ``ValueError`` unless so many layers have attention."""
    from earlyfuse.models.depth.attention_rank import attentions

    there = len(attentions(model))
    if not there:
        raise ValueError(f"{options.folder} has no attention, hence no maps; give another model")
    if options.layers is not None and options.layers > there:
        raise ValueError(
            f"--layers ({options.layers}) must be at most {there}, the layers with attention"
        )


# ---------------------------------------------------------------- data


def _sources(
    options: argparse.Namespace, about: "ModelFolder", opened: "OpenModel"
) -> "list[TokenSource]":
    """The sources to measure on; ``ValueError`` if there are none, or not of the model's tokens."""
    from earlyfuse.data.shards.source import TokenSource
    from earlyfuse.parallel.training.model_fit import fit_vectors

    folder = options.data or about.data
    if folder is None:
        raise ValueError(
            f"--data is required: {options.folder} is of no run that names its data; give a "
            "folder written by `python -m earlyfuse.tools.prepare`"
        )
    places = (path for path in (folder / options.split).glob("*/") if path.name[0] != ".")
    found = {path.name: path for path in sorted(places)}
    wanted = options.sources or list(found)
    if not found or (unknown := sorted(set(wanted) - set(found))):
        raise ValueError(
            f"{folder} has no {options.split}/{unknown[0] if found else ''}; its sources there are "
            f"{sorted(found)}: give --data, a folder of `python -m earlyfuse.tools.prepare`, and "
            "--sources of it"
        )
    sources = [TokenSource(found[name]) for name in dict.fromkeys(wanted)]
    for source in sources:
        trained = about.hashes or source.tokenizers
        # a model's vocabulary may be padded
        same = replace(source.vocabulary, size=opened.vocabulary.size) == opened.vocabulary
        if not same or trained != source.tokenizers:
            raise ValueError(
                f"source {source.folder} was made by other tokenizers than the model's; give "
                "--data that was prepared with the model's"
            )
        if fit_vectors(opened.config, source) != opened.config:
            raise ValueError(
                f"source {source.folder} must have vectors of the shape of the model's; give "
                "--data that was prepared with its image tokenizer"
            )
    return sources


def _batches(
    model: "Decoder", sources: "list[TokenSource]", options: argparse.Namespace
) -> "Iterator[MixedBatch]":
    """Batches of packed rows, as in training; each document once, in an order by the seed."""
    from earlyfuse.data.stream.batches import assemble
    from earlyfuse.data.stream.lanes import Lane
    from earlyfuse.data.stream.mixture import Mixture, Order, Shuffle, check_seq_len
    from earlyfuse.models.routing.expert_choice import ExpertChoice

    tokens = [sum(source.tokens.values()) for source in sources]
    mixture = Mixture(tuple(sources), tuple(count / sum(tokens) for count in tokens))
    check_seq_len(options.seq_len, mixture)

    def once(source: "TokenSource") -> Order:
        shuffle = Shuffle(len(source), options.seed, source.name)
        return lambda taken_Q: shuffle(taken_Q[taken_Q < len(source)])

    routers = model.config.traverse(ExpertChoice.Config)
    group = math.lcm(*(router.routing_rows for _, router, _, _ in routers))
    rows = group * math.ceil(options.batch_size / group)
    lane = Lane(mixture, [once(source) for source in sources], options.seq_len)
    while (packed := [lane.row() for _ in range(rows)])[0]:
        yield assemble(packed, options.seq_len, mixture)


# ---------------------------------------------------------------- ranks


def _measure(
    model: "Decoder", batches: "Iterator[MixedBatch]", device: str, options: argparse.Namespace
) -> Ranks:
    import torch

    from earlyfuse.models.depth.attention_rank import attention_ranks, samples_in

    found: list[torch.Tensor] = []
    lengths: list[int] = []
    for batch in batches:
        samples = samples_in(batch, shortest=options.shortest, longest=options.length)
        if samples := samples[: options.samples - len(lengths)]:
            found.append(attention_ranks(model, batch.to(device), samples))
            lengths += [sample.stop - sample.start for sample in samples]
            print(f"{len(lengths)} of {options.samples} samples", file=sys.stderr, flush=True)
        if len(lengths) == options.samples:
            break
    else:
        raise ValueError(
            f"--samples ({options.samples}) exceeds the {len(lengths)} documents of at least "
            f"--shortest ({options.shortest}) tokens in rows of {options.seq_len}; lower one of "
            "them, or give more data"
        )
    return Ranks(torch.cat(found, 1).numpy(), torch.tensor(lengths).numpy())


def _capacities(ranks: Ranks, options: argparse.Namespace) -> "Capacities | None":
    """The schedule that the options ask for; None if they ask for none."""
    from earlyfuse.models.depth.capacity import lowest_rank

    mean_L = [math.inf if layer is None else layer["rank"] for layer in ranks.layers]
    number = options.layers
    if options.threshold is not None:
        number = sum(mean <= options.threshold for mean in mean_L)
    return None if number is None else lowest_rank(mean_L, options.capacity, number)


def _table(ranks: Ranks, routed: Sequence[int]) -> str:
    names = ("layer", "rank", "standard deviation", "standard error", "of full rank", "routed")
    rows = [names, ("---:",) * len(names)]
    for index, layer in enumerate(ranks.layers):
        if layer is None:
            rows.append((f"{index}", "no attention", "", "", "", ""))
            continue
        numbers = (f"{layer[name]:.2f}" for name in ("rank", "sd", "se"))
        share = f"{layer['relative']:.1%} ± {layer['relative_sd']:.1%}"
        rows.append((f"{index}", *numbers, share, "yes" if index in routed else ""))
    tokens_P = ranks.tokens_P
    about = (
        f"{len(tokens_P)} samples of {tokens_P.min()} to {tokens_P.max()} tokens (mean "
        f"{tokens_P.mean():.0f}); means over heads and samples, spread over samples"
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", about])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="arank",
        description="Measures ranks of attention maps per layer (gamma-MoD's ARank) and lists the "
        "layers of the lowest ranks, which become depth-routed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a run, a checkpoint or a model of any format")
    add("--out", type=Path, required=True, help=f"folder for {RESULTS} and {PICTURE}")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--layers", type=int, metavar="N", help="choose the N lowest ranks")
    choice.add_argument("--threshold", type=float, metavar="RANK", help="choose ranks up to this")
    add("--capacity", type=float, default=0.5, help="tokens that chosen layers keep, 0 to 1 (0.5)")
    add("--data", type=Path, metavar="DIR", help="prepared data (that of the run)")
    add("--split", choices=("validation", "train"), default="validation", help="(validation)")
    add("--sources", nargs="+", metavar="NAME", help="sources of the split (all, by their tokens)")
    add("--samples", type=int, default=64, metavar="N", help="documents to measure (64)")
    add("--length", type=int, default=512, metavar="N", help="tokens of each, the first (512)")
    add("--shortest", type=int, default=32, metavar="N", help="leave shorter documents out (32)")
    add("--seq-len", type=int, metavar="N", help=f"of packed rows (the run's, else {SEQ_LEN})")
    add("--batch-size", type=int, default=4, metavar="N", help="rows at once (4)")
    add("--seed", type=int, default=0, help="of the order of documents (0)")
    add("--dtype", choices=DTYPES, default="float32", help="of the model and its maps (float32)")
    add_weights_option(parser)
    add("--device", help="cpu, cuda … (a GPU if there is one)")
    add_code_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
