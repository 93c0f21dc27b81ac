"""The data of a run: a prepared folder (docs/data.md), its mix, and what must agree with the model.

Folder: ``train/<source>/``, ``validation/<source>/``, ``tokenizers/``.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan.config import Configurable

from earlyfuse.data.shards import TokenSource
from earlyfuse.data.tokenised import MANIFEST
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.modality import Modality, Vocabulary
from earlyfuse.models.routing.expert_choice import ExpertChoice, static_budget


class DataSet(Configurable):
    """Finds the sources of a prepared folder and fits a run's config to them."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        folder: str = ""
        """Folder written by the prepare tool."""

        shares: dict[str, float] = field(default_factory=dict)
        """Source → share of the training tokens, summing to 1. None given: every source of the
        folder, by the tokens that it has."""

        embedded: bool = False
        """Make the embedded corpus in this folder first, unless it is there."""

        speech: bool = False
        """The embedded corpus is the one with speech, which needs the program espeak-ng to be
        made. It goes into another folder than the one without."""

    def __init__(self, config: Config):
        self.folder = Path(config.folder)
        if config.speech and not config.embedded:
            raise ValueError(
                "data.speech (True) says which embedded corpus is made, and data.embedded is off; "
                "set that too, or leave speech out: prepared data have the speech they have"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"data.folder ({config.folder!r}) must be a folder; it is a file")
        if config.embedded:
            _prepare_once(self.folder, config.speech)
        path = self.folder / "tokenizers" / "vocabulary.json"
        if not config.folder:
            raise ValueError(
                "data.folder is not set, and this config brings no data: give a folder of prepared "
                "data with --data.folder FOLDER. `python -m earlyfuse.tools.prepare build --out "
                "FOLDER …` makes one of your shards (docs/data.md)"
            )
        if not path.exists():
            raise ValueError(
                f"data.folder ({config.folder!r}) must be a folder written by "
                "`python -m earlyfuse.tools.prepare`: it has no tokenizers/vocabulary.json"
            )
        self.vocabulary = Vocabulary.from_dict(json.loads(path.read_text()))

        self.shares = config.shares or self._shares_by_tokens()

    def _shares_by_tokens(self) -> dict[str, float]:
        tokens = {
            name: sum(TokenSource(folder).tokens.values())
            for name, folder in self.sources("train").items()
        }
        return {name: count / sum(tokens.values()) for name, count in tokens.items() if count}

    def sources(self, split: str) -> dict[str, Path]:
        """Name → folder of every source of ``split`` ("train" or "validation")."""
        return {
            path.parent.name: path.parent
            for path in sorted(self.folder.glob(f"{split}/*/{MANIFEST}"))
        }

    def connect(self, config: Any) -> None:
        """Fill loader and validator of a ``Trainer.Config`` and check it against data and model.

        Raises ``ValueError`` naming the field, before anything is built.
        """
        train = self.sources("train")
        unknown = sorted(set(self.shares) - set(train))
        if unknown or not self.shares:
            raise ValueError(
                f"data.shares names {unknown or 'no source'}; the sources of {self.folder} are "
                f"{sorted(train)}"
            )
        training = config.training
        # ranks of one tensor- or sequence-parallel group, and of one pipeline, share their rows
        ranks = int(os.environ.get("WORLD_SIZE", "1")) // config.parallelism.tensor_parallel_degree
        ranks //= config.parallelism.context_parallel_degree
        ranks //= config.parallelism.pipeline_parallel_degree
        rows = training.local_batch_size * ranks
        if training.global_batch_size < 0:
            training.global_batch_size = rows
        if config.validator.batch_rows < 0:
            config.validator.batch_rows = rows
        if training.global_batch_size % rows:
            raise ValueError(
                f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
                f"local_batch_size times the data ranks ({rows}); change one of them"
            )
        config.dataloader.sources = {str(train[name]): share for name, share in self.shares.items()}
        config.dataloader.global_batch_size = training.global_batch_size
        config.validator.sources = [str(folder) for folder in self.sources("validation").values()]
        config.validator.data_folder = config.sampler.data_folder = str(self.folder)
        model = config.model_spec.model
        self._check_model(model, training, config.validator.batch_rows)
        _share_validation(config.validator, model, ranks)

    def _check_model(self, model: Any, training: Any, validation_rows: int) -> None:
        if model.vocab_size != self.vocabulary.size:
            raise ValueError(
                f"model vocab_size ({model.vocab_size}) must equal the vocabulary of the data "
                f"({self.vocabulary.size} ids in {self.folder}); change the model's, or prepare "
                "with other sizes or with --tokenizers of the model that was converted"
            )
        missing = [m.label for m in self.vocabulary.modalities if m not in model.modalities]
        if missing:
            raise ValueError(
                f"model modalities {[Modality(m).label for m in model.modalities]} lack {missing}, "
                f"which the data in {self.folder} have; add them to the model's config"
            )
        whole_groups = {
            "training.local_batch_size": training.local_batch_size,
            "validator.batch_rows": validation_rows,
        }
        for name, pool, _, _ in model.traverse(ExpertPool.Config):
            for field_name, rows in whole_groups.items():
                if rows % pool.router.routing_rows:
                    raise ValueError(
                        f"{field_name} ({rows}) must be a multiple of routing_rows "
                        f"({pool.router.routing_rows}) of {name}; change one of them"
                    )
            if isinstance(pool.router, ExpertChoice.Config) and pool.router.budget == "static":
                static_budget(
                    pool.share,
                    pool.router.capacity_factor,
                    pool.router.routing_rows * training.seq_len,
                    pool.experts,
                )


def _share_validation(validator: Any, model: Any, ranks: int) -> None:
    """Make validation batches as wide as ``ranks`` need to have whole routing groups each, and
    their number as much smaller: the rows stay those of one rank, but for rounding up.
    """
    pools = (pool for _, pool, _, _ in model.traverse(ExpertPool.Config))
    each = math.lcm(ranks, *(ranks * pool.router.routing_rows for pool in pools))
    rows = validator.batch_rows * validator.max_batches
    validator.batch_rows = each * -(-validator.batch_rows // each)
    validator.max_batches = -(-rows // validator.batch_rows)


def _prepare_once(folder: Path, speech: bool) -> None:
    """Rank 0 of each host prepares; the others wait for it."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        from earlyfuse.data.prepare.embedded import prepare_corpus  # tokenizers, fonts: when needed

        prepare_corpus(folder, speech=speech)
        return
    while not (folder / "tokenizers" / "vocabulary.json").exists() or not list(
        folder.glob(f"validation/*/{MANIFEST}")
    ):
        time.sleep(1)


class NoTokenizer(Configurable):
    """torchtitan builds a tokenizer for every run; token streams need none."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        pass
