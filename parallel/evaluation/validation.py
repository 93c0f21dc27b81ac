"""Validation: loss per modality on a fixed list of rows, and checks of what the model has learned.

Expert-choice routers see a whole routing group, later tokens included; ``loss`` uses that batch
routing, with budgets from the actual counts (the paper's exact rule), as do the training losses
with static budgets. Where there are causal routers, ``causal_loss`` is what inference has: nothing
looks ahead. The task checks never put the answer into the input; ``causal_task`` are the same under
the causal rule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils
from torchtitan.distributed import ParallelDims

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import validation_batches
from earlyfuse.data.stream.lanes import Blend
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective, label_members
from earlyfuse.models.routing.causal import routing
from earlyfuse.models.routing.router import Router
from earlyfuse.models.routing.router_stats import CausalStats
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.evaluation.eval_tasks import Ranks, Task, load_tasks
from earlyfuse.parallel.strategies.context import positions_here
from earlyfuse.parallel.strategies.pipeline import Pipeline
from earlyfuse.parallel.torchtitan_run import Validator
from earlyfuse.parallel.training.step_metrics import router_load

MODALITIES = len(Modality)


class Validation(Validator):
    """Evaluates every ``freq`` steps and at the end."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        enable: bool = True
        """Evaluate on the validation split."""

        freq: int = 100
        """Steps between two validations."""

        batch_rows: int = 8
        """Rows of a validation batch over all ranks; -1: local_batch_size on each. More, in fewer
        batches, where ranks could not share them by whole routing groups."""

        max_batches: int = 8
        """Validation batches; fewer if the split is smaller."""

        tasks: bool = True
        """Run the task checks that the data folder brings (validation/tasks.json)."""

        sources: list[str] = field(default_factory=list)
        """Prepared folders; filled in from data.folder."""

        data_folder: str = ""
        """Filled in from data.folder."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        parallel_dims: ParallelDims,
        **_: Any,
    ):
        self.config: Validation.Config = config
        self.seq_len, self.parallel_dims = seq_len, parallel_dims
        sources = tuple(TokenSource(folder) for folder in config.sources)
        if not sources:
            raise ValueError(
                f"validator.enable is set, but {config.data_folder} has no validation split; "
                "prepare one with --validation, or turn it off with --validator.no-enable"
            )
        tokens = [sum(source.tokens.values()) for source in sources]
        blend = Blend(sources, tuple(count / sum(tokens) for count in tokens))
        self.batches = validation_batches(
            blend, seq_len, config.batch_rows, config.max_batches, dp_rank, dp_world_size
        )
        positions = positions_here(parallel_dims, seq_len)
        self.parts = [batch.part(positions) for batch in self.batches]  # what this rank has of them
        self.unigram = self._unigram_entropy(blend.vocabulary)
        self.ranks = Ranks(dp_rank, dp_world_size, self._sum_answers, positions)
        self.causal_statistics: dict[str, CausalStats] = {}  # of the model; set by the trainer
        self.tasks: list[Task] = load_tasks(Path(config.data_folder)) if config.tasks else []
        for task in self.tasks:
            if task.longest > seq_len:
                raise ValueError(
                    f"training.seq_len ({seq_len}) must hold a prompt of the task {task.name!r} "
                    f"({task.longest} tokens); raise it, or turn the tasks off with "
                    "--validator.no-tasks"
                )

    @torch.no_grad()
    def measure(
        self, model: Decoder | Pipeline, objective: ChameleonObjective, vocabulary: Vocabulary
    ) -> dict[str, float]:
        """Loss, loss per modality, the unigram entropies to compare with, and task accuracies.

        With causal routers, losses and tasks under the causal rule too, and on these data the
        routers' cross-entropy, precision and recall.
        """
        with evaluating(model):
            self._record_causal(True)
            metrics = self._losses("loss", model, objective, vocabulary)
            self._record_causal(False)
            metrics |= {
                f"unigram_entropy/{m.label}": self.unigram[m]
                for m in vocabulary.modalities
                if f"loss/{m.label}" in metrics
            }
            metrics |= self._task_checks("task", model)
            if self.causal_statistics:
                metrics |= self._causal_quality()
                with routing(model, "causal"):
                    metrics |= self._losses("causal_loss", model, objective, vocabulary)
                    metrics |= self._task_checks("causal_task", model)
        return metrics

    def _losses(
        self,
        name: str,
        model: Decoder | Pipeline,
        objective: ChameleonObjective,
        vocabulary: Vocabulary,
    ) -> dict[str, float]:
        """``name``, and ``name``/modality for those that have labels: nats per label."""
        device = next(model.parameters()).device
        sums_2M = torch.zeros(2, MODALITIES, dtype=torch.float64, device=device)
        for batch in self.parts:
            batch = batch.to(device)
            label_modality_BS = vocabulary.modality_of(batch.labels_BS)
            sums = model(
                batch.tokens_BS,
                batch.modality_BS,
                batch.positions_BS,
                batch.span_BS,
                objective.loss_of(batch.labels_BS, label_modality_BS),
            )
            if sums is not None:
                count_M = label_members(batch.labels_BS.flatten(), label_modality_BS.flatten())
                sums_2M += torch.stack([sums.nll_M, count_M.sum(1)])
        nll_M, count_M = self._sum_over_stages(self._sum_over_rows(sums_2M)).tolist()
        losses = {name: sum(nll_M) / max(sum(count_M), 1)}
        present = [m for m in vocabulary.modalities if count_M[m]]
        return losses | {f"{name}/{m.label}": nll_M[m] / count_M[m] for m in present}

    def _task_checks(self, name: str, model: Decoder | Pipeline) -> dict[str, float]:
        accuracies = {}
        for task in self.tasks:
            accuracies[f"{name}/{task.name}"] = task.accuracy(model, self.batches, self.ranks)
            accuracies[f"chance/{task.name}"] = task.chance
        return accuracies

    def _record_causal(self, recording: bool) -> None:
        for statistics in self.causal_statistics.values():
            statistics.recording = recording

    def _causal_quality(self) -> dict[str, float]:
        """What the causal routers recorded, over all ranks."""
        counted = [statistics.sums_5 for statistics in self.causal_statistics.values()]
        total = self._sum_over_stages(self._sum_over_rows(torch.cat(counted)))
        for sums_5, part in zip(counted, total.split(5), strict=True):
            sums_5.copy_(part)
        return router_load("causal", self.causal_statistics)

    def _sum_over_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """And over the parts of rows: torchtitan's "loss" mesh has both."""
        if self.parallel_dims.dp_cp_enabled:
            dist.all_reduce(tensor, group=self.parallel_dims.get_mesh("loss").get_group())
        return tensor

    def _sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.parallel_dims.pp_enabled:
            dist.all_reduce(tensor, group=self.parallel_dims.get_mesh("pp").get_group())
        return tensor

    def _sum_answers(self, tensor: torch.Tensor) -> torch.Tensor:
        on_device = tensor.to(titan_utils.device_type)
        return self._sum_over_stages(self._sum_over_rows(on_device)).cpu()

    def _unigram_entropy(self, vocabulary: Vocabulary) -> list[float]:
        """Entropy of the labels of each modality, nats: what no model of single tokens can beat."""
        counts_V = torch.zeros(vocabulary.size, dtype=torch.float64)
        for batch in self.parts:
            labels_T = batch.labels_BS.reshape(-1)
            counted_T = label_members(labels_T, vocabulary.modality_of(labels_T)).any(0)
            counts_V += torch.bincount(labels_T[counted_T], minlength=vocabulary.size)
        counts_V = self._sum_over_rows(counts_V.to(titan_utils.device_type)).cpu()
        modality_V = vocabulary.modality_of(torch.arange(vocabulary.size))
        entropies = []
        for modality in range(MODALITIES):
            counts = counts_V[(modality_V == modality) & (counts_V > 0)]
            share = counts / counts.sum()
            entropies.append(float(-(share * share.log()).sum()))
        return entropies


@contextmanager
def evaluating(model: Decoder | Pipeline) -> Iterator[None]:
    """Evaluation mode with budgets from actual counts; puts everything back."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    budgets = [router.budget for router in routers]
    was_training = model.training
    model.eval()
    for router in routers:
        router.budget = "exact"
    try:
        yield
    finally:
        model.train(was_training)
        for router, budget in zip(routers, budgets, strict=True):
            router.budget = budget
