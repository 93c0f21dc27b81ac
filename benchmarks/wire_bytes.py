"""Bytes of one training step on the wire, beside the closed form (row 15).

    python benchmarks/wire_bytes.py [LAYOUT ...]

Every layout runs in a network of its own, where nothing else passes the loopback interface (in the
host's, where that is not allowed: then the least of the repeats counts). Its counters before and
after a step give the bytes that all ranks received; what
``parallel/estimates/communication.py`` predicts for gloo is set beside them, and what the same
step takes where reduce_scatter is one. Calls are counted by
``parallel/estimates/collective_counter.py`` in another step.

Steps are those of the trainer: batches, counts, loss, backward, clipping, AdamW. Nothing is logged,
saved or validated.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.config import ParallelismConfig
from torchtitan.distributed.activation_checkpoint import FullAC

from earlyfuse.configs import decoders, embedded
from earlyfuse.data.shards.writer import ShardRecord, shard_name, write_manifest, write_shard
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.parallel.estimates.collective_counter import CollectiveCounter
from earlyfuse.parallel.estimates.communication import step_traffic, total
from earlyfuse.parallel.trainer import Trainer
from harness import RESULTS, environment

REPEATS = 7
ROWS, SEQ_LEN = 2, 256
INTERFACES = Path("/proc/self/net/dev")  # of the process's own network
# large enough that headers of packets and the few scalars of a step are lost in it
SHAPE = decoders.Shape(dim=256, layers=4, heads=4, hidden_dim=512, vocab_size=4096)
NEVER = 1_000_000


def moma() -> Decoder.Config:
    """Two text and two image experts."""
    return decoders.moma(SHAPE, {Modality.TEXT: 2, Modality.IMAGE: 2}, embedded.SHARES)


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    ranks: int
    model: Callable[[], Decoder.Config] = moma
    parallelism: dict[str, Any] = field(default_factory=dict)
    param: str = "float32"
    full_recomputation: bool = False
    microbatches: int = 1


LAYOUTS = {
    "FSDP 2, dense": Setting(2, lambda: decoders.dense(SHAPE)),
    "FSDP 2, moe_8x": Setting(2, lambda: decoders.moe(SHAPE, experts=4)),
    "FSDP 2, MoMa": Setting(2),
    "FSDP 2, MoMa, bf16 parameters": Setting(2, param="bfloat16"),
    "FSDP 2, MoMa, kept gathered": Setting(2, parallelism={"fsdp_reshard_after_forward": "never"}),
    "FSDP 2, MoMa, 2 micro-batches": Setting(2, microbatches=2),
    "TP 2, MoMa": Setting(2, parallelism={"tensor_parallel_degree": 2}),
    "EP 2, MoMa": Setting(2, parallelism={"expert_parallel_degree": 2}),
    "EP 2, MoMa, full recomputation": Setting(
        2, parallelism={"expert_parallel_degree": 2}, full_recomputation=True
    ),
    "FSDP 4, MoMa": Setting(4),
    "HSDP 2x2, MoMa": Setting(
        4, parallelism={"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
    ),
    "FSDP 2 x TP 2, MoMa": Setting(4, parallelism={"tensor_parallel_degree": 2}),
    "FSDP 4 x EP 2, MoMa": Setting(4, parallelism={"expert_parallel_degree": 2}),
}


# ---------------------------------------------------------------- one rank


def run_config(setting: Setting, folder: Path) -> Trainer.Config:
    """The embedded run's config with the setting's model and layout, on ``folder``'s data."""
    config = deepcopy(embedded.dense())
    assert config.model_spec is not None
    config.model_spec = replace(config.model_spec, model=setting.model())
    config.dump_folder = str(folder / "run")
    config.data = replace(config.data, folder=str(folder), embedded=False, shares={"noise": 1.0})
    config.dataloader.media_share = None
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **setting.parallelism)
    config.activation_checkpoint = FullAC.Config() if setting.full_recomputation else None
    data_ranks = setting.ranks // config.parallelism.tensor_parallel_degree
    config.training = replace(
        config.training,
        local_batch_size=ROWS,
        global_batch_size=ROWS * data_ranks * setting.microbatches,
        seq_len=SEQ_LEN,
        steps=NEVER,
        mixed_precision_param=setting.param,
    )
    config.checkpoint.enable = config.validator.enable = False
    config.metrics = replace(config.metrics, log_freq=NEVER, enable_tensorboard=False)
    return config


def write_data(folder: Path) -> None:
    """Random tokens, text and image codes half and half."""
    half = SHAPE.vocab_size // 2
    image = MediaCodes(Modality.IMAGE, start=half, count=half, begin=3, end=4)
    vocabulary = Vocabulary(SHAPE.vocab_size, bos=0, eos=1, pad=2, media=(image,))
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "vocabulary.json").write_text(json.dumps(vocabulary.to_dict()))
    random = np.random.default_rng(0)
    documents = []
    for _ in range(64):
        text, codes = random.integers(5, half, 62), random.integers(half, 2 * half, 64)
        document = np.concatenate([[0], text[:60], [3], codes, [4, 1]])
        documents.append((document, [64, 64]))
    for split in ("train", "validation"):
        source = folder / split / "noise"
        source.mkdir(parents=True)
        record = ShardRecord(f"{shard_name(0)}.tar", "", "benchmark", 0, "")
        write_shard(source, record, documents, vocabulary)
        write_manifest(source, vocabulary, {"text": "benchmark"}, [record])


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Bytes on the wire of each repeat, counted calls, and predictions, over all ranks."""
    torch.set_num_threads(1)
    config = run_config(setting, folder)
    trainer = Trainer(config)
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.step = 2  # the first one is logged
    trainer.train_step(batches)
    with CollectiveCounter() as counter:
        trainer.train_step(batches)
    wire = []
    for _ in range(REPEATS):
        dist.barrier()
        before = loopback_bytes()
        trainer.train_step(batches)
        dist.barrier()
        wire.append(loopback_bytes() - before)
    assert config.model_spec is not None
    sent = step_traffic(
        config.model_spec.model,
        trainer.parallel_dims,
        config.training,
        config.parallelism,
        config.activation_checkpoint,
    )
    calls: Counter[str] = Counter()
    for one in sent:
        calls[one.kind] += one.calls
    ranks = setting.ranks
    return {
        "wire": wire,
        "predicted": total(sent, on_gloo=True) * ranks,
        "nccl": total(sent) * ranks,
        "predicted_calls": dict(calls),
        "counted_calls": dict(Counter(seen.kind for seen in counter.seen if seen.ranks > 1)),
        "by_purpose": {f"{one.purpose}, {one.axis}": one.received_on_gloo * ranks for one in sent},
    }


def loopback_bytes() -> int:
    """Bytes that the loopback interface has received."""
    lines = (line.split() for line in INTERFACES.read_text().splitlines())
    return next(int(received) for name, received, *_ in lines if name == "lo:")


def work(name: str, folder: Path) -> None:
    """What each rank does; rank 0 writes ``folder``/measured.json."""
    measured = measure(LAYOUTS[name], folder)
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    dist.barrier()
    os._exit(0)  # nothing of the trainer is worth an orderly end


# ---------------------------------------------------------------- all layouts


def own_network() -> list[str]:
    """What to put before a command so that it has a loopback interface to itself, or nothing."""
    prefix = [
        "unshare",
        "--net",
        "--map-root-user",
        "sh",
        "-c",
        'ip link set lo up && exec "$@"',
        "sh",
    ]
    if not shutil.which("unshare") or not shutil.which("ip"):
        return []
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


def run_layout(name: str, prefix: list[str]) -> dict[str, Any]:
    """Start the ranks of one layout and return what they measured."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        launcher += [f"--nproc-per-node={LAYOUTS[name].ranks}"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            [*prefix, *launcher, __file__, "--rank", name, place],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        if not (folder / "measured.json").exists():
            logs = "\n".join(p.read_text() for p in folder.glob("run/logs/*.log"))
            raise RuntimeError(f"{name} did not finish:\n{done.stdout}{done.stderr}{logs}")
        measured: dict[str, Any] = json.loads((folder / "measured.json").read_text())
        return measured


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line per layout."""
    lines = [
        "| layout | predicted, MB | measured, MB | measured / predicted | with NCCL's rings, MB "
        "| calls: all_gather, reduce_scatter, all_reduce, all_to_all |",
        "|---|---:|---:|---:|---:|---|",
    ]
    kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    for name, row in rows.items():
        least = min(row["wire"])
        calls = ", ".join(
            f"{row['predicted_calls'].get(kind, 0)}" + ("" if extra == 0 else f" + {extra}")
            for kind in kinds
            for extra in [row["counted_calls"].get(kind, 0) - row["predicted_calls"].get(kind, 0)]
        )
        lines.append(
            f"| {name} | {row['predicted'] / 1e6:.2f} | {least / 1e6:.2f} "
            f"| {least / row['predicted']:.4f} | {row['nccl'] / 1e6:.2f} | {calls} |"
        )
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    """Measure the layouts and write ``results/wire_bytes.{md,jsonl}``."""
    prefix = own_network()
    surroundings = environment() | {"network": "its own" if prefix else "shared with the host"}
    rows = {}
    for name in names or LAYOUTS:
        rows[name] = run_layout(name, prefix)
        print(table({name: rows[name]}).splitlines()[-1], flush=True)
    ratios = [min(row["wire"]) / row["predicted"] for row in rows.values()]
    verdict = "met" if all(abs(ratio - 1) <= 0.02 for ratio in ratios) else "missed"
    header = ", ".join(f"{key}: {value}" for key, value in surroundings.items())
    page = (
        f"# Bytes on the wire in a training step (row 15)\n\n{header}\n\n"
        f"All ranks together, least of {REPEATS} steps; dim {SHAPE.dim}, {SHAPE.layers} layers, "
        f"{ROWS} x {SEQ_LEN} tokens per rank and micro-batch. "
        "gloo's reduce_scatter costs an all_reduce; the prediction counts it so, the next column "
        'does not. After "+": collectives of a few numbers (counts, loss sums, gradient norm), '
        f"the same for every layout. Routing sends nothing.\n\n{table(rows)}\n"
        f"Goal, measured within 2 % of predicted: {verdict} "
        f"({min(ratios):.4f} to {max(ratios):.4f}).\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "wire_bytes.md").write_text(page)
    lines = [
        json.dumps({"layout": name, **row, "environment": surroundings})
        for name, row in rows.items()
    ]
    (RESULTS / "wire_bytes.jsonl").write_text("\n".join(lines) + "\n")
    print(f"\nGoal, measured within 2 % of predicted: {verdict}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
