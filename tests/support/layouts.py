"""The same tiny run on different layouts: started by ``test_ranks.py``.

    ranks.py RANKS layouts OUT DATA CASE …

Each case ends in OUT/<case>.pt, written by rank 0: logged losses and norms of all steps, and, in
full, the gradients and the parameters after the last one.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_runs import MAMBAS, MODELS, SHAPE, tiny_config
from torch.distributed._functional_collectives import AsyncCollectiveTensor as Collected
from torch.distributed.tensor import DTensor
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from toy import VOCABULARY

from earlyfuse.configs import decoders, stages
from earlyfuse.models.blocks.experts import Experts
from earlyfuse.parallel.compat import can_pipeline
from earlyfuse.parallel.evaluation.eval_tasks import Task
from earlyfuse.parallel.strategies.expert import _AllToAll
from earlyfuse.parallel.trainer import Trainer

ROWS, STEPS = 8, 2
# "deep": six blocks, for pipelines of several stages a rank. Dense, because the first tokens of all
# documents tie exactly in routers, and over so many layers rounding comes to decide between them
BY_NAME = MODELS | MAMBAS | {"deep": lambda: decoders.dense(replace(SHAPE, layers=6))}
# begun with the run of moe_1t1i in DATA's neighbour "seed"
BY_NAME["upcycled"] = MODELS["moma_causal"]
BY_MODALITY = [name for name in MODELS if name not in ("dense", "moe_8x")]
RECOMPUTE = {"none": lambda: None, "full": FullAC.Config, "selective": SelectiveAC.Config}


@dataclass(frozen=True)
class Case:
    """``degrees``: fields of the parallelism config, without "_degree". ``micro_batches``: of each
    rank and step. ``apart``: the first half of the rows is all image, the second all text.
    ``stage2``: the causal routers alone learn.
    """

    model: str
    degrees: dict[str, int] = field(default_factory=dict)
    micro_batches: int = 1
    recompute: str = "none"
    apart: bool = False
    stage2: bool = False
    reshard: str = "default"
    schedule: str = "1F1B"

    @property
    def runs(self) -> bool:
        return "pipeline_parallel" not in self.degrees or can_pipeline()

    def config(self, out: Path, data: Path, ranks: int) -> Trainer.Config:
        config = tiny_config(out, data, BY_NAME[self.model](), steps=STEPS)
        config.checkpoint.enable = False
        if self.model == "upcycled":
            config.start.run = str(data.with_name("seed"))
        if self.stage2:
            stage2 = stages.causal_routers_only(config, str(data.with_name("seed")), lr=1e-2)
            config.train_only, config.optimizer = stage2.train_only, stage2.optimizer
        config.metrics.enable_tensorboard = False
        config.validator.batch_rows = ROWS
        config.activation_checkpoint = RECOMPUTE[self.recompute]()
        for name, degree in self.degrees.items():
            setattr(config.parallelism, f"{name}_degree", degree)
        config.parallelism.fsdp_reshard_after_forward = self.reshard
        config.parallelism.pipeline_parallel_schedule = self.schedule
        config.parallelism.pipeline_parallel_microbatch_size = 2
        data_ranks = ranks // self.degrees.get("tensor_parallel", 1)
        data_ranks //= self.degrees.get("pipeline_parallel", 1)
        data_ranks //= self.degrees.get("context_parallel", 1)
        config.training.global_batch_size = ROWS
        config.training.local_batch_size = ROWS // data_ranks // self.micro_batches
        return config


FSDP: dict[str, int] = {}
HSDP = {"data_parallel_replicate": 2}
TP, EP, PP = {"tensor_parallel": 2}, {"expert_parallel": 2}, {"pipeline_parallel": 2}
CP = {"context_parallel": 2}

# what a case must equal is its model on one rank: the first four, and "apart"
CASES: dict[int, dict[str, Case]] = {
    1: {model: Case(model) for model in (BY_NAME if can_pipeline() else MODELS | MAMBAS)}
    | {f"{model}-apart": Case(model, apart=True) for model in (*BY_MODALITY, "mixture_of_mamba")}
    | {"upcycled": Case("upcycled"), "upcycled-stage2": Case("upcycled", stage2=True)},
    # of the others, "apart" is the harder case, and "accumulated" or "full" of tensor parallelism
    2: {f"{model}-fsdp": Case(model, FSDP) for model in MODELS | MAMBAS if model not in BY_MODALITY}
    | {
        f"{model}-tp": Case(model, TP)
        for model in MODELS
        if model not in ("moma", "mot", "token_choice")
    }
    | {
        f"{model}-ep": Case(model, EP)
        for model in ("moe_8x", "moma", "moma_causal", "shared", "token_choice")
    }
    | {
        "upcycled-ep": Case("upcycled", EP),
        "upcycled-tp": Case("upcycled", TP),
        "upcycled-fsdp-accumulated-full": Case("upcycled", micro_batches=2, recompute="full"),
        "upcycled-fsdp-stage2": Case("upcycled", stage2=True),
        "upcycled-ep-stage2-full": Case("upcycled", EP, stage2=True, recompute="full"),
        "moma_causal-ep-apart": Case("moma_causal", EP, apart=True),
    }
    | {f"{model}-fsdp-apart": Case(model, FSDP, apart=True) for model in BY_MODALITY}
    | {
        "moma-ep-apart": Case("moma", EP, apart=True),
        "moma-fsdp-accumulated": Case("moma", FSDP, micro_batches=2),
        "moma-ep-accumulated-full": Case("moma", EP, micro_batches=2, recompute="full"),
        "moma-tp-accumulated": Case("moma", TP, micro_batches=4),
        "moma-fsdp-selective": Case("moma", FSDP, recompute="selective"),
        "token_choice-ep-apart": Case("token_choice", EP, apart=True),
        "token_choice-fsdp-accumulated": Case("token_choice", FSDP, micro_batches=2),
        "token_choice-ep-accumulated-full": Case(
            "token_choice", EP, micro_batches=2, recompute="full"
        ),
        "token_choice-ep-selective": Case("token_choice", EP, recompute="selective"),
        "token_choice-tp-accumulated": Case("token_choice", TP, micro_batches=2),
        "mot-tp-full": Case("mot", TP, recompute="full"),
        "dense-fsdp-kept": Case("dense", FSDP, reshard="never"),
    }
    | {f"{model}-cp": Case(model, CP) for model in ("dense", "token_choice", "hybrid")}
    | {
        "mixture_of_mamba-cp-accumulated-full": Case(
            "mixture_of_mamba", CP, micro_batches=2, recompute="full"
        ),
        "hybrid-cp-selective": Case("hybrid", CP, recompute="selective"),
    }
    | {f"{model}-pp": Case(model, PP) for model in MODELS}
    | {
        "moma-pp-accumulated-full": Case("moma", PP, micro_batches=2, recompute="full"),
        "moma-pp-selective": Case("moma", PP, recompute="selective"),
        "moma-pp-apart": Case("moma", PP, apart=True),
        "moma-pp-gpipe": Case("moma", PP, schedule="GPipe"),
        "deep-pp-interleaved": Case("deep", PP, schedule="Interleaved1F1B"),
    },
    # more ranks than a pool has experts
    4: {f"{model}-fsdp": Case(model, FSDP) for model in ("moma", "moma_causal", "token_choice")}
    | {"moma-hsdp": Case("moma", HSDP)}
    | {
        f"{model}-fsdp-ep": Case(model, EP)
        for model in ("moe_8x", "moma", "upcycled", "token_choice")
    }
    | {
        "mot-fsdp-tp": Case("mot", TP),
        "moma-hsdp-ep-full": Case("moma", HSDP | EP, recompute="full"),
        "moma-fsdp-ep-apart": Case("moma", EP, apart=True),
        "moma-fsdp-tp-accumulated": Case("moma", TP, micro_batches=2),
    }
    | {
        "hybrid-cp4-full": Case("hybrid", {"context_parallel": 4}, recompute="full"),
        # each rank has half of a row of one modality
        "mixture_of_mamba-fsdp-cp-apart": Case("mixture_of_mamba", CP, apart=True),
        "hybrid-hsdp-cp-accumulated": Case("hybrid", HSDP | CP, micro_batches=2),
        "token_choice-fsdp-cp": Case("token_choice", CP),
        "mot-cp4": Case("mot", {"context_parallel": 4}),
    }
    | {f"{model}-pp-fsdp": Case(model, PP) for model in ("mot", "moma")}
    | {
        "moma-pp-hsdp": Case("moma", PP | HSDP),
        "moma-pp-tp": Case("moma", PP | TP),
        "moma-pp-ep": Case("moma", PP | EP),
        "moma-pp-ep-full": Case("moma", PP | EP, recompute="full"),
        "token_choice-pp-ep": Case("token_choice", PP | EP),
        "token_choice-hsdp-ep": Case("token_choice", HSDP | EP),
        "deep-pp4": Case("deep", {"pipeline_parallel": 4}),
        "deep-pp-fsdp-interleaved": Case("deep", PP, schedule="Interleaved1F1B"),
    },
}


# which of nine words follows an image, two of which begin alike
TASK = Task(
    "toy",
    prompts=[[0, 3, *(32 + (i + j) % 16 for j in range(4)), 4] for i in range(12)],
    candidates=[*((5 + i,) for i in range(7)), (12, 13), (12, 14)],
    answers=[i % 9 for i in range(12)],
    vocabulary=VOCABULARY,
)


class Keeping(Trainer):
    """Keeps gradients and parameters of the last step, whole."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Trainer.Config):
        super().__init__(config)
        self.validator.tasks = [TASK]
        self.validator.should_validate = lambda step: False  # but at the end, as always

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        super().train_step(data_iterator)
        named = [(_plain(n), p) for part in self.model_parts for n, p in part.named_parameters()]
        biases = [(_plain(n), b) for part in self.model_parts for n, b in part.named_buffers()]
        biases = [(name, bias) for name, bias in biases if name.endswith("bias_E")]
        kept = {
            "gradients": {name: whole(p.grad) for name, p in named if p.grad is not None},
            "parameters": {name: whole(p) for name, p in named + biases},
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
        lanes = self.dataloader._lanes
        row = 0
        for inputs, labels_BS in super().batch_generator(data):
            batch = inputs["batch"]
            for tokens_S, label_S, modality_S, label_modality_S in zip(
                batch.tokens_BS,
                batch.labels_BS,
                batch.modality_BS,
                batch.label_modality_BS,
                strict=True,
            ):
                text = lanes[row % len(lanes)] >= ROWS // 2
                tokens_S.copy_(tokens_S % 27 + 5 if text else tokens_S % 16 + 32)
                counted = label_S >= 0
                label_S[counted] = label_S[counted] % 27 + 5 if text else label_S[counted] % 16 + 32
                modality_S.fill_(0 if text else 1)
                label_modality_S.copy_(counted * modality_S)
                row += 1
            yield inputs, labels_BS


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run(case: Case, name: str, out: Path, data: Path, ranks: int) -> None:
    """Train, and write ``out/<name>.pt`` from rank 0."""
    folder = out / name
    trainer = (Apart if case.apart else Keeping)(case.config(folder, data, ranks))
    trainer.train()
    if case.degrees == EP and case.recompute == "none":
        trainer.kept["events"] = order_of_events(trainer)
    trainer.close()
    if dist.get_rank() == 0:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        torch.save(trainer.kept | {"metrics": lines}, out / f"{name}.pt")


def order_of_events(trainer: Trainer) -> list[str]:
    """What one forward and backward of the routed layers do, in order: send, wait, compute."""
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
    ranks = int(os.environ["WORLD_SIZE"])
    for name in names or [name for name, case in CASES[ranks].items() if case.runs]:
        run(CASES[ranks][name], name, Path(out), Path(data), ranks)
        if dist.get_rank() == 0:
            print(f"case {name} done", flush=True)
    dist.destroy_process_group()
