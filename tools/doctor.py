"""Checks whether runs can start here, and predicts what a config needs of a cluster.

``python -m earlyfuse.tools.doctor``: versions, device, run folder, and ranks that meet;
``… check CONFIG --FIELD VALUE``: also data, disk and memory for that run. A line per check, with
the remedy of what failed; status 1 if something did. Under ``tools.launch`` the job's ranks meet.
``… traffic CONFIG --gpus 8 64 1024``: bytes per step, and how long a step would take by a simple
model. ``… presets``: parameters, FLOPs and tokens of the configs that train on data of one's own,
as in docs/presets.md.
"""

import argparse
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlyfuse.data.console import printable
from earlyfuse.tools.command import Parser, run_command

if TYPE_CHECKING:  # --help does not pay for torch
    from torchtitan.distributed import ParallelDims

    from earlyfuse.parallel.estimates.communication import Traffic
    from earlyfuse.parallel.trainer import Trainer

RECOMPUTATION = ("none", "selective", "full")
MOST_EPOCHS = 4.0  # up to which repeated data train like new data: arXiv 2305.16264, figure 1
GIGA, TERA = 1e9, 1e12
TIMES = ("compute, ms", "FSDP traffic, ms", "other traffic, ms", "step, ms")
AFTER_PURPOSES = ("all", *TIMES, "efficiency")

ASSUMPTIONS = """A model, not a measurement. It assumes
- {mfu:.0%} of {flops:g} TFLOP/s while computing; FLOPs by models/flops.py, no recomputation;
- {gpus_per_node} GPUs a node; {nvlink:g} GB/s per GPU inside, {network:g} GB/s to others, attained;
  tensor, sequence or expert parallel ranks next to each other, then shards, then replicas;
- collectives that go between nodes once and spread inside: the slower of the two parts counts;
- {overlap:.0%} of what FSDP sends hides behind compute, as far as there is compute; what tensor,
  sequence and expert parallelism send hides behind nothing;
- no latency, stragglers, optimizer or data: expect less than this above 256 GPUs."""


@dataclass(frozen=True)
class Cluster:
    """Bytes/s per GPU, FLOP/s that a GPU attains, and the share of FSDP's traffic that can hide."""

    gpus_per_node: int
    nvlink: float
    network: float
    flops: float
    overlap: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of computing, of FSDP's traffic, of other traffic, and of the whole step."""

    compute: float
    fsdp: float
    other: float
    step: float


def step_time(
    sent: "Sequence[Traffic]", dims: "ParallelDims", flops: float, cluster: Cluster
) -> StepTime:
    """Time of a step that sends ``sent`` and computes ``flops`` on each GPU."""
    seconds: dict[bool, float] = defaultdict(float)
    for one in sent:
        seconds[one.axis in ("tp", "cp", "ep")] += _seconds(one, dims, cluster)
    compute, fsdp, other = flops / cluster.flops, seconds[False], seconds[True]
    hidden = min(cluster.overlap * fsdp, compute)
    return StepTime(compute, fsdp, other, compute + fsdp - hidden + other)


def _seconds(one: "Traffic", dims: "ParallelDims", cluster: Cluster) -> float:
    """The slower of what moves inside nodes and what moves between them."""
    from earlyfuse.parallel.estimates.communication import received

    copy = dims.dp_shard * dims.cp * dims.tp
    apart = {"cp": dims.tp, "fsdp": dims.tp, "efsdp": dims.ep, "dp_replicate": copy}
    in_node = min(max(cluster.gpus_per_node // apart.get(one.axis, 1), 1), one.ranks)
    if one.kind == "all_to_all":  # each pair of ranks by itself
        between = one.size * (1 - in_node / one.ranks)
    else:  # the GPUs of a node share the work of fetching for all of them
        between = received(one.kind, one.ranks / in_node, one.size / in_node)
    inside = one.received if in_node > 1 else 0.0
    return max(inside / cluster.nvlink, between / cluster.network)


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 if a check failed, 2 with one line on what to change
    when it could not run.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0][0] == "-" and given[0] not in ("-h", "--help")):
        given.insert(0, "check")

    def command() -> int:
        parser = _parser()
        known, fields = parser.parse_known_args(given)
        options = vars(known)
        logging.getLogger().setLevel(logging.ERROR)  # torchtitan warns of its own defaults
        chosen = options.pop("command")
        if chosen is check:
            return check(fields=fields, **options)
        if fields:
            parser.error(f"unrecognized arguments: {' '.join(fields)}")
        print(chosen(**options))
        return 0

    return run_command("doctor", command, interrupted="stopped")


def check(
    config: str, fields: Sequence[str], ranks: int, folder: str, most_epochs: float, timeout: float
) -> int:
    """Prints a line per check; 1 if one failed, under a launcher on all ranks."""
    from earlyfuse.configs.command_line import override
    from earlyfuse.configs.registry import load_config
    from earlyfuse.tools import environment, handshake

    launched = "RANK" in os.environ
    if fields and not config:
        raise ValueError(f"{fields[0]} is a field of a config; name it: doctor check CONFIG …")
    run = override(load_config(config), list(fields)) if config else None
    found = [*environment.check_versions(), *environment.check_device()]
    ranks = int(os.environ.get("WORLD_SIZE", ranks))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # a host has one disk, and one copy of the data
        found += environment.check_folder(Path(run.dump_folder if run else folder), run)
        if run:
            found += environment.check_data(run, ranks, most_epochs)
            found += environment.check_memory(run, ranks)
    found = handshake.meet(found, timeout) if launched else found + handshake.meet_here(timeout)
    failed = sum(bool(one.remedy) for one in found)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(printable(str(one)) for one in found))
        print(f"{failed} of {len(found)} checks failed" if failed else "all checks passed")
    return int(failed > 0)


def traffic(config: str, gpus: list[int], **options: Any) -> str:
    """A Markdown table: bytes by purpose and the time of a step for each number of GPUs."""
    cluster = Cluster(
        gpus_per_node=options["gpus_per_node"],
        nvlink=options["nvlink"] * GIGA,
        network=options["network"] * GIGA,
        flops=options["flops"] * options["mfu"] * TERA,
        overlap=options["overlap"],
    )
    run = _run(config, options)
    rows = [_row(run, ranks, cluster) for ranks in gpus]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.sort(key=lambda name: name in AFTER_PURPOSES)  # a layout of few ranks may lack some
    tokens = run.training.local_batch_size * run.training.seq_len
    lines = [f"{config}, {tokens:,} tokens per micro-batch and data rank; GB received per step", ""]
    lines += ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    lines += ["| " + " | ".join(row.get(name, "0") for name in names) + " |" for row in rows]
    return "\n".join([*lines, "", ASSUMPTIONS.format(**options)])


def presets() -> str:
    """A Markdown table of the configs that bring no data."""
    from earlyfuse.configs.registry import catalogue
    from earlyfuse.models.flops import count_parameters, training_flops
    from earlyfuse.parallel.reporting.opening import quantity

    names = ("config", "parameters", "of a token", "FLOPs of a token", "tokens of a step", "steps")
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for name, function in catalogue().items():
        run = function()
        if run.data.embedded or run.start.upcycle:  # sizes are those of a user's data or model
            continue
        assert run.model_spec is not None, "configs always set model_spec"
        model, training = run.model_spec.model, run.training
        parameters, flops = count_parameters(model), training_flops(model, training.seq_len)
        row = (
            name,
            quantity(parameters.total),
            _by_modality(parameters.active),
            _by_modality(flops),
            f"{training.global_batch_size * training.seq_len:,}",
            f"{training.steps:,}",
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _by_modality(values: Sequence[float]) -> str:
    from earlyfuse.parallel.reporting.opening import quantity

    return " / ".join(dict.fromkeys(quantity(value) for value in values))


def _run(name: str, options: dict[str, Any]) -> "Trainer.Config":
    """The config with the command line's layout and one micro-batch a step."""
    from earlyfuse.configs.base import RECOMPUTE
    from earlyfuse.configs.registry import load_config

    run = deepcopy(load_config(name))
    run.training.global_batch_size = -1  # one micro-batch
    for field in ("local_batch_size", "seq_len", "mixed_precision_param"):
        if options[field] is not None:
            setattr(run.training, field, options[field])
    run.parallelism.tensor_parallel_degree = options["tensor"]
    run.parallelism.context_parallel_degree = options["context"]
    run.parallelism.expert_parallel_degree = options["expert"]
    run.parallelism.data_parallel_shard_degree = options["shard"]
    policy = RECOMPUTE[options["recompute"]]
    run.activation_checkpoint = policy and policy()
    return run


def _row(run: "Trainer.Config", ranks: int, cluster: Cluster) -> dict[str, str]:
    from earlyfuse.models.flops import mean_training_flops
    from earlyfuse.parallel.estimates.communication import step_traffic, total
    from earlyfuse.parallel.estimates.step import Step

    run = deepcopy(run)
    parallelism = run.parallelism
    shard = parallelism.data_parallel_shard_degree
    if shard > 0:  # as many replicas as there is room for
        copy = shard * parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
        parallelism.data_parallel_replicate_degree = max(ranks // copy, 1)
    step = Step.of(run, ranks)
    dims, sent = step.dims, step_traffic(step)
    tokens = run.training.local_batch_size * run.training.seq_len
    flops = tokens * mean_training_flops(step.model, run.training.seq_len) / (dims.tp * dims.cp)
    time = step_time(sent, dims, flops, cluster)
    sizes: dict[str, float] = defaultdict(float)
    for one in sent:
        sizes[one.purpose] += one.received
    sizes["all"] = total(sent)
    seconds = (time.compute, time.fsdp, time.other, time.step)
    return {
        "GPUs": f"{ranks}",
        **{purpose: f"{size / GIGA:.1f}" for purpose, size in sizes.items()},
        **{name: f"{1e3 * second:.0f}" for name, second in zip(TIMES, seconds, strict=True)},
        "efficiency": f"{time.compute / time.step:.2f}",
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="doctor", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    here = commands.add_parser(
        "check",
        help="whether runs can start here, with the remedy of what is wrong (the default command)",
        description="Checks versions, device, run folder and ranks; with a CONFIG also its data, "
        "disk and memory. Status 0: all passed, 1: a check failed, 2: wrong command line. Under "
        "launch (… -m earlyfuse.tools.doctor check CONFIG) the job's ranks meet, else ranks that "
        "are started here.",
        allow_abbrev=False,
        epilog="--FIELD VALUE: fields of the config, as for train.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here.set_defaults(command=check)
    here.add_argument("config", nargs="?", default="", help="a config of train.py, or FILE.py:NAME")
    here.add_argument("--ranks", type=int, default=1, help="ranks of the run; a launcher's decide")
    here.add_argument("--folder", default="runs", help="run folder; a config's own decides")
    here.add_argument("--most-epochs", type=float, default=MOST_EPOCHS, help="of a source in a run")
    here.add_argument("--timeout", type=float, default=60.0, help="seconds for ranks to meet")
    table = commands.add_parser("presets", help="the papers' configs as a table")
    table.set_defaults(command=presets)
    one = commands.add_parser(
        "traffic",
        help="bytes and time of a step on any number of GPUs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    one.set_defaults(command=traffic)
    one.add_argument("config", help="a config of train.py, or FILE.py:NAME")
    one.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024], help="rows of the table")
    for name, default, meaning in (
        ("shard", -1, "ranks that share one copy of the parameters; -1: all, else replicas"),
        ("tensor", 1, "tensor parallel ranks"),
        ("context", 1, "ranks that share the positions of a row"),
        ("expert", 1, "expert parallel ranks"),
        ("gpus-per-node", 8, "GPUs behind one NVLink"),
    ):
        one.add_argument(f"--{name}", type=int, default=default, help=meaning)
    for name, value, meaning in (
        ("nvlink", 370.0, "GB/s per GPU inside a node, attained"),
        ("network", 42.0, "GB/s per GPU between nodes, attained"),
        ("flops", 989.0, "peak TFLOP/s of a GPU"),
        ("mfu", 0.5, "share of it that is attained while computing"),
        ("overlap", 0.85, "share of FSDP's traffic that can hide behind compute"),
    ):
        one.add_argument(f"--{name}", type=float, default=value, help=meaning)
    one.add_argument("--local-batch-size", type=int, help="rows per rank; default: the config's")
    one.add_argument("--seq-len", type=int, help="positions in a row; default: the config's")
    one.add_argument("--mixed-precision-param", choices=["bfloat16", "float32"], help="likewise")
    one.add_argument("--recompute", choices=RECOMPUTATION, default="none", help="activations")
    return parser


if __name__ == "__main__":
    sys.exit(main())
