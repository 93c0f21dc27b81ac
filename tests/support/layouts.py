"""Runs the same tiny training on different layouts: started by ``test_ranks.py``.

    ranks.py RANKS layouts OUT DATA CASE …

Each case ends in OUT/<case>.pt, written by rank 0: logged losses and norms of all steps, and, in
full, the gradients and the parameters after the last one.
"""

import gc
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_runs import DEPTHS, MAMBAS, MODELS, SHAPE, THRESHOLDS, VECTORS, tiny_config
from torch.distributed._functional_collectives import AsyncCollectiveTensor as Collected
from torch.distributed.tensor import DTensor
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from toy import VOCABULARY

from earlyfuse.configs import decoders, stages
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.experts import Experts
from earlyfuse.models.blocks.vector_layers import Last, LastConv
from earlyfuse.models.init_weights import constant, normal
from earlyfuse.parallel.compat import can_pipeline
from earlyfuse.parallel.evaluation.eval_tasks import Task
from earlyfuse.parallel.strategies.expert import _AllToAll
from earlyfuse.parallel.trainer import Trainer

ROWS, STEPS = 8, 2
# "deep": six blocks, for pipelines of several stages a rank. Dense, because the first tokens of all
# documents tie exactly in routers, and over so many layers rounding comes to decide between them
BY_NAME = MODELS | MAMBAS | DEPTHS | {"deep": lambda: decoders.dense(replace(SHAPE, layers=6))}
# starts from the run of moe_1t1i in DATA's neighbour "seed"
BY_NAME["upcycled"] = MODELS["moma_causal"]
BY_NAME["moma_threshold"] = THRESHOLDS["moma_threshold"]
BY_NAME |= VECTORS  # on DATA's neighbour "vectors"
DEGREES = {
    "hsdp": {"data_parallel_replicate": 2},
    "tp": {"tensor_parallel": 2},
    "ep": {"expert_parallel": 2},
    "cp": {"context_parallel": 2},
    "cp4": {"context_parallel": 4},
    "pp": {"pipeline_parallel": 2},
    "pp4": {"pipeline_parallel": 4},
}
RECOMPUTE = {"full": FullAC.Config(), "selective": SelectiveAC.Config()}
SCHEDULES = {"gpipe": "GPipe", "interleaved": "Interleaved1F1B"}


@dataclass(frozen=True, order=True)
class Case:
    """A model and its layout, as words: "moma-ep-apart-accumulated-full".

    After the model: degrees of parallelism (FSDP takes the remaining ranks), "apart" (the first
    half of the rows is all image, the second all text), "accumulated" (two micro-batches), "full"
    or "selective" (activation checkpointing), "gathered" (no resharding after forward), "stage2"
    (only causal routers are trained), a pipeline schedule.
    """

    name: str

    @property
    def model(self) -> str:
        return self.name.partition("-")[0]

    @property
    def words(self) -> set[str]:
        return set(self.name.split("-")[1:])

    @property
    def one_rank(self) -> str:
        """The case on one rank that computes the same."""
        return "-".join([self.model, *(w for w in ("apart", "stage2") if w in self.words)])

    @property
    def runs(self) -> bool:
        return can_pipeline() or not self.words & {"pp", "pp4"}

    def config(self, out: Path, data: Path, ranks: int) -> Trainer.Config:
        if self.model in VECTORS:
            data = data.with_name("vectors")
        config = tiny_config(out, data, BY_NAME[self.model](), steps=STEPS)
        parallelism, seed = config.parallelism, str(data.with_name("seed"))
        config.checkpoint.enable = config.metrics.enable_tensorboard = False
        config.validator.batch_rows = config.training.global_batch_size = ROWS
        if self.model == "upcycled":
            config.start.model = seed
        if "stage2" in self.words:
            stage2 = stages.causal_routers_only(config, seed, lr=1e-2)
            config.train_only, config.optimizer = stage2.train_only, stage2.optimizer
        if "gathered" in self.words:
            parallelism.fsdp_reshard_after_forward = "never"
        parallelism.pipeline_parallel_microbatch_size = 2
        data_ranks = ranks * (2 if "accumulated" in self.words else 1)
        for word in self.words:
            for name, degree in DEGREES.get(word, {}).items():
                setattr(parallelism, f"{name}_degree", degree)
                if name in ("tensor_parallel", "context_parallel", "pipeline_parallel"):
                    data_ranks //= degree
            config.activation_checkpoint = RECOMPUTE.get(word, config.activation_checkpoint)
            schedule = parallelism.pipeline_parallel_schedule
            parallelism.pipeline_parallel_schedule = SCHEDULES.get(word, schedule)
        config.training.local_batch_size = ROWS // data_ranks
        return config


# two ranks: each model, and each layout that treats it in a way of its own
TWO = """
    dense-gathered moe_8x-ep
    moma-apart-accumulated-selective moma-ep moma-ep-apart-accumulated-full
    moma_threshold-tp-full moma_threshold-pp
    shared-tp-full
    token_choice-cp-apart token_choice-ep-apart-accumulated-full
    mot-tp-apart
    upcycled-ep-apart upcycled-ep-stage2-full
    mixture_of_mamba-apart-accumulated hybrid-cp-selective
    mod-tp-accumulated-selective moma_mod-ep-apart-accumulated-full p_mod-apart-accumulated
    gamma_mod-apart-full videollm_mod-apart-selective static-ep-apart
    depth_threshold-ep-accumulated-full
    tf_dense-apart-accumulated-full tf_unet-tp-full tf_moma-ep-apart-accumulated-full
    tf_hybrid-accumulated-full tf_dense-pp tf_clean-pp-accumulated-full
    mot-pp-apart mod-pp-apart token_choice-pp shared-pp-apart moma_causal-pp-selective
    moma-pp-accumulated-full moma-pp-gpipe deep-pp-interleaved
"""
# slow: each layout with each other word
TWO_MORE = """
    moma-tp-accumulated moma_threshold-ep-apart-accumulated shared-ep-apart-selective
    token_choice-apart-accumulated token_choice-tp-selective
    upcycled-accumulated-full upcycled-tp mixture_of_mamba-cp-accumulated-full p_mod-ep gamma_mod-tp
    tf_clean-tp-accumulated
"""
# slow: more ranks than a pool has experts, and two kinds of parallelism together
FOUR = """
    moe_8x-ep upcycled-ep-apart moma-hsdp-ep-full moma-tp-accumulated
    moma_threshold-hsdp-ep-selective
    tf_moma-hsdp-ep tf_unet-hsdp-apart tf_paper-tp tf_mot-apart-selective tf_mod-hsdp-apart
    tf_p_mod-ep
    hybrid-cp4-full hybrid-hsdp-cp-accumulated moma_mod-hsdp-ep gamma_mod-hsdp-accumulated
    moma-pp-hsdp moma-pp-tp moma-pp-ep-full deep-pp4 deep-pp-interleaved
"""


def compared(cases: Iterable[Case]) -> list[Case]:
    """The cases of one rank that compute the same as ``cases``."""
    return sorted({Case(case.one_rank) for case in cases if case.runs})


_TWO, _MORE, _FOUR = ([Case(name) for name in text.split()] for text in (TWO, TWO_MORE, FOUR))
CASES = {1: compared(_TWO + _MORE + _FOUR), 2: _TWO + _MORE, 4: _FOUR}
FAST: dict[int, list[Case]] = {1: compared(_TWO), 2: _TWO, 4: []}


# which of nine words follows an image, two of which begin alike
TASK = Task(
    "toy",
    prompts=[[0, 3, *(32 + (i + j) % 16 for j in range(4)), 4] for i in range(12)],
    candidates=[*((5 + i,) for i in range(7)), (12, 13), (12, 14)],
    answers=[i % 9 for i in range(12)],
    vocabulary=VOCABULARY,
)


class Keeping(Trainer):
    """Keeps the full gradients and parameters of the last step."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Trainer.Config):
        super().__init__(config)
        self.validator.tasks = [TASK] if config.model_spec.model.vectors is None else []
        self.validator.should_validate = lambda step: False  # but at the end, as always

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        super().train_step(data_iterator)
        named = [(_plain(n), p) for part in self.model_parts for n, p in part.named_parameters()]
        buffers = [(_plain(n), b) for part in self.model_parts for n, b in part.named_buffers()]
        kinds = ("bias_E", "threshold_E", "weight_E")
        moved = [(name, buffer) for name, buffer in buffers if name.endswith(kinds)]
        kept = {
            "gradients": {name: whole(p.grad) for name, p in named if p.grad is not None},
            "parameters": {name: whole(p) for name, p in named + moved},
        }
        ranks = [kept] * dist.get_world_size()
        if self.parallel_dims.pp_enabled:
            dist.all_gather_object(ranks, kept)
        self.kept = {kind: {n: t for k in ranks for n, t in k[kind].items()} for kind in kept}

    def _finish(self, saved: bool) -> None:
        """No picture."""
        self.metrics_processor.close()


class Apart(Keeping):
    """Every row of one modality: text, in the second half of the global batch; else image."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def batch_generator(self, data: Any) -> Iterator[Any]:
        lanes = cycle(self.dataloader._lanes)
        for inputs, labels_BS in super().batch_generator(data):
            batch = inputs["batch"]
            if batch.has_vector_BS is not None:
                without_vectors(batch, [next(lanes) >= ROWS // 2 for _ in batch.tokens_BS])
                yield inputs, labels_BS
                continue
            image_B1 = torch.tensor([[next(lanes) < ROWS // 2] for _ in batch.tokens_BS])
            for ids_BS in (batch.tokens_BS, batch.labels_BS):
                moved_BS = torch.where(image_B1, ids_BS % 16 + 32, ids_BS % 27 + 5)
                ids_BS.copy_(torch.where(ids_BS >= 0, moved_BS, ids_BS))
            batch.modality_BS.copy_(image_B1.expand_as(batch.modality_BS))
            batch.label_modality_BS.copy_(image_B1 & (batch.labels_BS >= 0))
            yield inputs, labels_BS


def without_vectors(batch: MixedBatch, rows: list[bool]) -> None:
    """Makes text of these rows of ``batch``, in place."""
    text_B1 = torch.tensor(rows)[:, None]
    was_text_BS = ~batch.has_vector_BS
    batch.has_vector_BS &= ~text_B1
    batch.vectors_BSP *= batch.has_vector_BS[..., None]
    batch.tokens_BS.copy_(torch.where(text_B1, batch.tokens_BS % 27 + 5, batch.tokens_BS))
    for name in ("modality_BS", "span_BS"):
        getattr(batch, name).mul_(~text_B1 | was_text_BS)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run(case: Case, out: Path, data: Path) -> None:
    """Train, and write ``out/<name>.pt`` from rank 0."""
    folder = out / case.name
    kind = Apart if "apart" in case.words else Keeping
    trainer = kind(case.config(folder, data, int(os.environ["WORLD_SIZE"])))
    trainer.train()
    if case.words == {"ep"}:
        trainer.kept["events"] = order_of_events(trainer)
    trainer.close()
    if dist.get_rank() == 0:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        torch.save(trainer.kept | {"metrics": lines}, out / f"{case.name}.pt")


def order_of_events(trainer: Trainer) -> list[str]:
    """Events of one forward and backward of the routed layers, in order: send, wait, compute."""
    events: list[str] = []

    def noted(event: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return function(*args, **kwargs)

        return wrapper

    with (
        mock.patch.object(_AllToAll, "apply", noted("send", _AllToAll.apply)),
        mock.patch.object(Collected, "trigger_wait", noted("wait", Collected.trigger_wait)),
        mock.patch.object(Experts, "forward", noted("compute", Experts.forward)),
    ):
        inputs, _ = next(iter(trainer.dataloader))
        logits = trainer.model(inputs["batch"])
    logits.sum().backward()
    return events


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def main(out: str, data: str, *names: str) -> None:
    torch.set_num_threads(1)
    for last in (Last, LastConv):  # zeros would leave the decoder without gradients of vectors
        last.draws = lambda _: {"weight": normal(), "bias": constant(0.1)}
    for name in names:
        run(Case(name), Path(out), Path(data))
        gc.collect()  # a trainer is in reference cycles: nothing of it is left beside the next
        if dist.get_rank() == 0:
            print(f"case {name} done", flush=True)
    dist.destroy_process_group()
