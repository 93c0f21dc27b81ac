"""Training steps of our trainer beside torchtitan's llama3 in torchtitan's trainer (row 11).

    python benchmarks/end_to_end.py

A run is one whole optimizer step: batch, forward, loss, backward, clipping, AdamW, schedule. All
trainers get the same batches from memory (reading is row 10), one document a row, so that attention
is plain causal everywhere. Nothing is logged, saved or validated while timed.

torchtitan's trainer runs on a CPU by ``parallel/compat.py`` and by its config alone: SDPA for
FlexAttention, whole logits, fp32, no recomputation of activations. It is shown as it comes, which
wraps every block in FSDP2 even on one rank, and without that wrapping.

"equal" is our decoder composed as llama3 is (pre-norm, no qk-norm, no z-loss): as many parameters
and FLOPs, the same optimizer. "Chameleon" has qk-norm, Swin-order norm and z-loss. MoMa has its
FLOPs, and eight feed-forwards to update instead of one.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchtitan.trainer as titan
from torch import nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, model_registry
from torchtitan.models.llama3.parallelize import parallelize_llama

from earlyfuse.configs import decoders, embedded
from earlyfuse.data.shards.manifest import write_manifest
from earlyfuse.data.shards.writer import ShardRecord, shard_name, write_shard
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.parallel import compat
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.data_config import NoTokenizer
from harness import Report, Rival, Timing, at_least, compare

ROWS, SEQ_LEN, SEGMENT = 4, 512, 64
BATCHES = 64
NEVER = 1_000_000

TITAN, TITAN_PLAIN = "torchtitan llama3, as it comes", "torchtitan llama3, without FSDP2"
EQUAL, CHAMELEON, MOMA = "ours, equal to llama3", "ours, Chameleon", "ours, MoMa 4t4i"

Batch = tuple[dict[str, Any], torch.Tensor]


# ---------------------------------------------------------------- data


def vocabulary_of(size: int) -> Vocabulary:
    """Vocabulary of text pieces in the lower half and image codes in the upper."""
    image = MediaCodes(Modality.IMAGE, start=size // 2, count=size // 2, begin=3, end=4)
    return Vocabulary(size, bos=0, eos=1, pad=2, media=(image,))


def rows_of_tokens(rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """(rows, SEQ_LEN + 1) ids: text and image segments in turn, each a noisy arithmetic chain.

    The next id is one of four that follow from the current one, so there is something to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    half = vocab_size // 2
    token_B = torch.randint(half, (rows,), generator=generator)
    columns = []
    for position in range(SEQ_LEN + 1):
        image = position // SEGMENT % 2
        columns.append(token_B + image * half)
        token_B = (5 * token_B + torch.randint(1, 5, (rows,), generator=generator)) % half
    return torch.stack(columns, 1)


def batches(vocabulary: Vocabulary) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels), both (ROWS, SEQ_LEN); the last pair is held out."""
    rows = rows_of_tokens(ROWS * (BATCHES + 1), vocabulary.size, seed=0)
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(ROWS)]


def prepared_folder(folder: Path, vocabulary: Vocabulary) -> None:
    """Writes a data set for our trainer to open; its batches come from memory."""
    source = folder / "train" / "chains"
    source.mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "vocabulary.json").write_text(json.dumps(vocabulary.to_dict()))
    record = ShardRecord(f"{shard_name(0)}.tar", "", "benchmark", 0, "")
    document = np.arange(2 * SEQ_LEN, dtype=np.uint16) % (vocabulary.size // 2)
    write_shard(source, record, [(document, [len(document), 0])], vocabulary)
    write_manifest(source, vocabulary, {"text": "benchmark"}, [record])


# ---------------------------------------------------------------- trainers


class TitanTrainer(titan.Trainer):
    """torchtitan's, in the process group that our trainer has made."""

    def init_distributed(self) -> ParallelDims:
        """One rank, as in our trainer."""
        return ParallelDims.from_config(self.config.parallelism, 1)


def our_trainer(folder: Path, model: Decoder.Config, z_loss: float) -> Trainer:
    """Our trainer as configs build it, with this benchmark's sizes."""
    config = embedded.dense()
    assert config.model_spec is not None
    config.model_spec = replace(config.model_spec, model=model)
    config.dump_folder = tempfile.mkdtemp(dir=folder)
    config.data = replace(config.data, folder=str(folder), embedded=False, shares={"chains": 1.0})
    config.dataloader.media_share = None
    config.loss = ChameleonObjective.Config(z_loss=z_loss)
    config.training = replace(config.training, local_batch_size=ROWS, seq_len=SEQ_LEN, steps=NEVER)
    config.lr_scheduler.warmup_steps = 5
    config.checkpoint.enable = False
    config.validator.enable = False
    config.metrics = replace(config.metrics, log_freq=NEVER, enable_tensorboard=False)
    return Trainer(config)


def llama_config() -> Llama3Model.Config:
    """torchtitan's debug model, with SDPA in place of FlexAttention."""
    model = model_registry("debugmodel").model
    assert isinstance(model, Llama3Model.Config)
    for _, _, parent, field in list(model.traverse(FlexAttention.Config)):
        assert isinstance(field, str)
        setattr(parent, field, ScaledDotProductAttention.Config())
    return model


def titan_trainer(folder: Path, like: Trainer, fsdp: bool) -> TitanTrainer:
    """torchtitan's trainer and model with the optimizer, schedule and sizes of ``like``."""

    def parallelize(model: nn.Module, **options: Any) -> nn.Module:
        if fsdp:
            model = parallelize_llama(model, **options)
            compat.reduce_with_plain_sums(model)
        return model

    ours = like.config
    spec = replace(
        model_registry("debugmodel"),
        model=llama_config(),
        parallelize_fn=parallelize,
        state_dict_adapter=None,
    )
    loader: Any = SimpleNamespace(build=lambda **_: None)  # batches come from memory
    config = titan.Trainer.Config(
        model_spec=spec,
        dump_folder=str(folder / "titan"),
        tokenizer=NoTokenizer.Config(),
        dataloader=loader,
        loss=CrossEntropyLoss.Config(),
        optimizer=deepcopy(ours.optimizer),
        lr_scheduler=deepcopy(ours.lr_scheduler),
        training=deepcopy(ours.training),
        parallelism=deepcopy(ours.parallelism),
        compile=deepcopy(ours.compile),
        activation_checkpoint=None,
        checkpoint=CheckpointManager.Config(enable=False),
        metrics=MetricsProcessor.Config(log_freq=NEVER),
    )
    return TitanTrainer(config)


# ---------------------------------------------------------------- steps


def fed(trainer: titan.Trainer, vocabulary: Vocabulary) -> Iterator[Batch]:
    """The batches again and again, with the fields that the trainer's model takes."""
    positions_BS = torch.arange(SEQ_LEN).expand(ROWS, -1)
    prepared: list[Batch] = []
    for tokens_BS, labels_BS in batches(vocabulary)[:-1]:
        if isinstance(trainer, Trainer):
            batch = MixedBatch.of(
                tokens_BS,
                vocabulary.modality_of(tokens_BS),
                labels_BS=labels_BS,
                label_modality_BS=vocabulary.modality_of(labels_BS),
            )
            prepared.append(({"batch": batch, "first_row": 0}, labels_BS))
        else:
            prepared.append(({"input": tokens_BS, "positions": positions_BS}, labels_BS))
    return trainer.batch_generator(cycle(prepared))


def stepping(trainer: titan.Trainer, vocabulary: Vocabulary) -> Callable[[], list[torch.Tensor]]:
    """A run: the body of ``train`` in a step without a log line."""
    feed = fed(trainer, vocabulary)
    trainer.step = 1  # the first step is logged

    def run() -> list[torch.Tensor]:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(feed)
        return []

    return run


@torch.no_grad()
def held_out_loss(trainer: titan.Trainer, vocabulary: Vocabulary) -> float:
    """Mean cross entropy of the held-out batch, in nats."""
    tokens_BS, labels_BS = batches(vocabulary)[-1]
    model = trainer.model_parts[0]
    if isinstance(trainer, Trainer):
        logits_BSV = model(MixedBatch.of(tokens_BS, vocabulary.modality_of(tokens_BS)))
    else:
        logits_BSV = model(tokens_BS, torch.arange(SEQ_LEN).expand(ROWS, -1))
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()).item()


def build(folder: Path) -> tuple[dict[str, titan.Trainer], Vocabulary]:
    """All trainers, ours first, and the vocabulary of their tokens."""
    llama = llama_config()
    shape = decoders.Shape(
        dim=llama.dim,
        layers=len(llama.layers),
        heads=llama.layers[0].attention.n_heads,
        hidden_dim=llama.layers[0].feed_forward.w1.out_features,
        vocab_size=llama.vocab_size,
        norm_order="pre",
    )
    vocabulary = vocabulary_of(shape.vocab_size)
    prepared_folder(folder, vocabulary)
    equal = decoders.dense(shape)
    for layer in equal.layers:
        assert layer.attention is not None
        layer.attention.qk_norm = False
    swin = replace(shape, norm_order="swin")
    experts = {Modality.TEXT: 4, Modality.IMAGE: 4}
    moma = decoders.moma(swin, experts, embedded.SHARES, routing_rows=ROWS)
    ours = our_trainer(folder, equal, z_loss=0.0)
    trainers: dict[str, titan.Trainer] = {
        EQUAL: ours,
        TITAN: titan_trainer(folder, ours, fsdp=True),
        TITAN_PLAIN: titan_trainer(folder, ours, fsdp=False),
        CHAMELEON: our_trainer(folder, decoders.dense(swin), z_loss=1e-5),
        MOMA: our_trainer(folder, moma, z_loss=1e-5),
    }
    return trainers, vocabulary


# ---------------------------------------------------------------- the report


def parameters(trainer: titan.Trainer) -> int:
    """Number of the model's parameters."""
    return sum(parameter.numel() for parameter in trainer.model_parts[0].parameters())


def summary(
    trainers: dict[str, titan.Trainer],
    timings: list[Timing],
    before: dict[str, float],
    after: dict[str, float],
) -> str:
    """Markdown: size, speed and held-out loss of each, and the goal."""
    tokens = ROWS * SEQ_LEN
    lines = [
        "| trainer | parameters | MFLOP per token | tokens per CPU-s | relative to torchtitan "
        "| held-out loss before → after |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    ratios = {timing.name: timing.cpu_ratio for timing in timings}
    base = ratios[TITAN]
    for timing in timings:
        name, ratio = timing.name, timing.cpu_ratio
        speed = "too noisy" if base is None or ratio is None else f"{base / ratio:.2f}x"
        flops = trainers[name].metrics_processor.num_flops_per_token  # by the trainer's own formula
        lines.append(
            f"| {name} | {parameters(trainers[name]):,} | {flops / 1e6:.1f} "
            f"| {tokens / timing.cpu:,.0f} | {speed} | {before[name]:.2f} → {after[name]:.2f} |"
        )
    goals = [at_least(f"ours / {name}, tokens/s", ratios[name], 1) for name in (TITAN, TITAN_PLAIN)]
    return "\n".join([*lines, "", *goals, ""])


def main(rounds: int = 15, warmups: int = 3) -> None:
    """Times all trainers and writes ``results/end_to_end.{jsonl,md}``."""
    logging.getLogger().setLevel(logging.WARNING)
    report = Report("end_to_end", "Whole training steps (row 11)", ["torchtitan"])
    with tempfile.TemporaryDirectory() as place:
        trainers, vocabulary = build(Path(place))
        if parameters(trainers[EQUAL]) != parameters(trainers[TITAN]):
            raise ValueError(
                f"{EQUAL} has {parameters(trainers[EQUAL])} parameters and {TITAN} "
                f"{parameters(trainers[TITAN])}; make them equal"
            )
        before = {name: held_out_loss(t, vocabulary) for name, t in trainers.items()}
        rivals = [Rival(name, stepping(t, vocabulary)) for name, t in trainers.items()]
        timings = compare(rivals, rounds=rounds, warmups=warmups)
        after = {name: held_out_loss(t, vocabulary) for name, t in trainers.items()}
        llama = llama_config()
        setting = {
            "layers": len(llama.layers),
            "dim": llama.dim,
            "heads": llama.layers[0].attention.n_heads,
            "inner width": llama.layers[0].feed_forward.w1.out_features,
            "vocabulary": llama.vocab_size,
            "batch": f"{ROWS} x {SEQ_LEN}",
            "dtype": "fp32",
            "optimizer": f"AdamW, {trainers[EQUAL].config.optimizer.implementation}",
            "rounds": rounds,
        }
        report.add(setting, timings)
        text = summary(trainers, timings, before, after)
        print(text)
        for trainer in trainers.values():
            trainer.close()
    report.write(text)


if __name__ == "__main__":
    main()
