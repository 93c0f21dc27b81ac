"""Validation: losses per modality on a fixed list of rows, and evaluation tasks.

Expert-choice routers see a whole routing group, later tokens included. ``loss`` uses this batch
routing, as training does, with budgets from actual counts (the paper's exact rule). With causal
routers, ``causal_loss`` and ``causal_task`` use their rule, which does not look ahead; with running
thresholds, ``threshold_loss`` and ``threshold_task`` use theirs, from the first step on. Task
prompts never contain the answer.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils
from torchtitan.distributed import ParallelDims

from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import validation_batches
from earlyfuse.data.stream.mixture import Mixture, positions_of
from earlyfuse.models.batch import IGNORE_LABEL
from earlyfuse.models.context import ForwardSettings, Rule
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.routing.router import CAUSAL_RULES, selecting_rules, usable_rules
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.evaluation.eval_tasks import Ranks, Task, load_tasks
from earlyfuse.parallel.strategies.context import positions_here, sequence_shard
from earlyfuse.parallel.strategies.pipeline import Pipeline
from earlyfuse.parallel.torchtitan_run import Validator
from earlyfuse.parallel.training.step_metrics import ModelStatistics, losses


class Validation(Validator):
    """Evaluates a model on fixed rows, every ``freq`` steps and at the end."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        enable: bool = True
        """Evaluate on the validation split."""

        freq: int = 100
        """Steps between validations."""

        batch_rows: int = 8
        """Rows of a validation batch over all ranks; -1: local_batch_size on each data rank.
        Rounded up to whole routing groups per rank, in fewer batches."""

        max_batches: int = 8
        """Number of validation batches; fewer if the split is smaller."""

        tasks: bool = True
        """Run the tasks of the data folder (validation/tasks.json)."""

        sources: list[str] = field(default_factory=list)
        """Prepared folders; filled in from data.folder."""

        clean_copies: bool = False
        """As dataloader.clean_copies; filled in from the model."""

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
                f"validator.enable (True) needs a validation split in {config.data_folder}; "
                "prepare one with --validation, or turn it off with --validator.no-enable"
            )
        copies = config.clean_copies
        tokens = [sum(positions_of(source, copies).values()) for source in sources]
        shares = tuple(count / sum(tokens) for count in tokens)
        mixture = Mixture(sources, shares, clean_copies=copies)
        self.sources = [source.name for source in sources]
        self.batches = validation_batches(
            mixture, seq_len, config.batch_rows, config.max_batches, dp_rank, dp_world_size
        )
        shard = sequence_shard(parallel_dims)
        positions = positions_here(shard, seq_len)
        self.settings = ForwardSettings(budgets="exact", sequence_shard=shard)
        self.parts = [batch.part(positions) for batch in self.batches]
        self.unigram = self._unigram_entropy(mixture.vocabulary)
        self.ranks = Ranks(dp_rank, dp_world_size, self._sum_answers, positions)
        self.statistics: ModelStatistics | None = None  # set by the trainer
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
        """Losses per modality and source, unigram entropies for comparison, task accuracies.

        Losses and tasks also under each causal rule that differs from the batch's, and how it
        agrees with the batch's choice on these rows: precision, recall …
        """
        was_training = model.training
        model.eval()
        rules = self._causal_rules(model)
        recording = replace(self.settings, recording=bool(rules))
        metrics = self._losses("", model, objective, recording)
        metrics |= {
            f"unigram_entropy/{m.label}": self.unigram[m]
            for m in vocabulary.modalities
            if f"loss/{m.label}" in metrics
        }
        metrics |= self._task_checks("task", model, self.settings)
        if self.statistics is not None and rules:
            for rule in rules:
                metrics |= self.statistics.pop(rule)
            self.statistics.discard()  # the other kinds are of training steps
        for rule in rules:
            settings = replace(self.settings, rule=rule)
            metrics |= self._losses(f"{rule}_", model, objective, settings)
            metrics |= self._task_checks(f"{rule}_task", model, settings)
        model.train(was_training)
        return metrics

    def _causal_rules(self, model: Decoder | Pipeline) -> list[Rule]:
        """Rules that all stages of ``model`` can use, of which some router has statistics, and
        under which none compares tokens with later ones.
        """
        if self.statistics is None:
            return []
        usable = [rule for rule in usable_rules(model) if rule not in selecting_rules(model)]
        lacking = torch.tensor([rule not in usable for rule in CAUSAL_RULES], dtype=torch.int64)
        lacking = self._sum_over_stages(lacking.to(titan_utils.device_type))
        return [
            rule
            for rule, lack in zip(CAUSAL_RULES, lacking.tolist(), strict=True)
            if not lack and rule in self.statistics
        ]

    def _losses(
        self,
        prefix: str,
        model: Decoder | Pipeline,
        objective: ChameleonObjective,
        settings: ForwardSettings,
    ) -> dict[str, float]:
        """The objective's sums by their counts; see ``step_metrics.losses``."""
        device = next(model.parameters()).device
        sources = len(self.sources)
        totals = {
            name: torch.zeros(sources, len(Modality), dtype=torch.float64, device=device)
            for name in (*objective.sum_names, *objective.count_names)
        }
        for number, batch in enumerate(self.parts):
            rows = len(batch.tokens_BS)
            first_row = (number * self.ranks.count + self.ranks.rank) * rows
            settings = replace(settings, first_row=first_row)
            batch = objective.prepare(batch.to(device), settings)
            found = model(batch, settings, loss=objective.loss_of(batch, sources))
            if found is not None:
                for name, sums_NM in (found.sums | objective.counts(batch, sources)).items():
                    totals[name] += sums_NM
        flat = self._sum_over_stages(self._sum_over_rows(torch.stack([*totals.values()])))
        summed = dict(zip(totals, flat.cpu(), strict=True))
        sums = {name: summed[name] for name in objective.sum_names}
        return losses(sums, objective.counts_of(summed), self.sources, prefix)

    def _task_checks(
        self, name: str, model: Decoder | Pipeline, settings: ForwardSettings
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for task in self.tasks:
            accuracy = task.accuracy(model, self.batches, self.ranks, settings)
            metrics |= {f"{name}/{task.name}": accuracy, f"chance/{task.name}": task.chance}
        return metrics

    def _sum_over_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over data and context-parallel ranks: torchtitan's "loss" mesh."""
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
        """Entropy of each modality's labels in nats: the loss of the best unigram model."""
        counts_V = torch.zeros(vocabulary.size, dtype=torch.float64)
        for batch in self.parts:
            labels_R = batch.labels_BS[batch.labels_BS != IGNORE_LABEL]
            counts_V += torch.bincount(labels_R, minlength=vocabulary.size)
        counts_V = self._sum_over_rows(counts_V.to(titan_utils.device_type)).cpu()
        modality_V = vocabulary.modality_of(torch.arange(vocabulary.size))
        entropies = []
        for modality in Modality:
            counts = counts_V[(modality_V == modality) & (counts_V > 0)]
            share = counts / counts.sum()
            entropies.append(float(-(share * share.log()).sum()))
        return entropies
