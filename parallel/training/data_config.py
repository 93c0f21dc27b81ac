"""Finds the data of a run (docs/data.md), fills in what follows from them, and checks the model.

A data folder has ``train/<source>/``, ``validation/<source>/`` and ``tokenizers/``.
"""

import math
import os
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchtitan.config import Configurable

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.json_files import shown
from earlyfuse.data.media import MEDIA
from earlyfuse.data.shards.manifest import MANIFEST
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture, positions_of
from earlyfuse.data.tokenizers import TEXT_FILES, VOCABULARY_FILE
from earlyfuse.data.vocabulary import check_same, load_vocabulary
from earlyfuse.models.blocks.branch import Microbatch
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.parallel.training.config_checks import accumulation_steps, default_of
from earlyfuse.parallel.training.model_fit import (
    differences,
    fit_shares,
    fit_vectors,
    fit_vocabulary,
)

# folders of the embedded corpus, and shares of its sources unless given
CORPUS, SPEECH_CORPUS = Path("runs", "data"), Path("runs", "data_speech")
CLIPS_CORPUS, VECTORS_CORPUS = Path("runs", "data_clips"), Path("runs", "data_vectors")
_MIX = {"text": 0.2, "glyphs": 0.4, "digits": 0.2, "interleaved": 0.2}
_SPEECH_MIX = {"text": 0.15, "glyphs": 0.25, "digits": 0.15, "interleaved": 0.15, "speech": 0.3}
_CLIPS_MIX = {"text": 0.2, "glyphs": 0.2, "digits": 0.1, "interleaved": 0.1, "clips": 0.4}
# option of an embedded corpus → its folder and mix
_CORPORA: dict[str | None, tuple[Path, dict[str, float]]] = {
    None: (CORPUS, _MIX),
    "speech": (SPEECH_CORPUS, _SPEECH_MIX),
    "clips": (CLIPS_CORPUS, _CLIPS_MIX),
    "vectors": (VECTORS_CORPUS, _MIX),
}
_SPLITS = ("train", "validation")


class DataSet(Configurable):
    """Finds the sources of a prepared folder and fits a run's config to them."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        folder: str = ""
        """Folder written by the prepare tool; read only. Default: the embedded corpus, if the
        config has one."""

        shares: dict[str, float] = field(default_factory=dict)
        """Source → share of the training tokens, summing to 1. Default: every source of the
        folder by its tokens; the embedded corpus has shares of its own."""

        embedded: bool = False
        """Without a folder, train on the embedded corpus, which the first start makes in
        runs/data."""

        speech: bool = False
        """Use the embedded corpus with speech, made in runs/data_speech; making it needs the
        program espeak-ng."""

        clips: bool = False
        """Use the embedded corpus with clips of digits and glyphs in motion, made in
        runs/data_clips."""

        vectors: bool = False
        """Use the embedded corpus with images as vectors of raw pixels, most of them after their
        captions, made in runs/data_vectors. For models with vectors."""

    def __init__(self, config: Config):
        chosen = [name for name in _CORPORA if name and getattr(config, name)]
        for name in chosen:
            if not config.embedded:
                raise ValueError(
                    f"data.{name} (True) needs data.embedded: it selects an embedded corpus; set "
                    "both, or remove it"
                )
        if len(chosen) > 1:
            both = " and ".join(f"data.{name} (True)" for name in chosen)
            raise ValueError(f"{both} select different embedded corpora; set one")
        folder = data_folder(config)
        if folder is None:
            raise ValueError(
                "data.folder is required for this config: prepare one with `python -m "
                "earlyfuse.tools.prepare build --out FOLDER …`, and pass --data.folder FOLDER "
                "(docs/data.md)"
            )
        self.folder = folder
        self.taken = ""  # what ``resolve`` took from the data, in words
        self._opened: dict[Path, TokenSource] = {}
        if config.folder:
            self._check_given(config)
        else:
            _prepare_once(folder, _extra(config))
        self.vocabulary = load_vocabulary(folder / "tokenizers" / VOCABULARY_FILE)
        self.shares = config.shares or self._own_shares(config.embedded)

    def _check_given(self, config: Config) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"data.folder ({config.folder!r}) must be a folder; it is a file")
        if (self.folder / "tokenizers" / VOCABULARY_FILE).exists():
            return
        problem = "has no tokenizers/vocabulary.json" if self.folder.exists() else "does not exist"
        or_corpus = "; without --data.folder the run takes the embedded corpus"
        raise ValueError(
            f"data.folder ({config.folder!r}) must be a folder written by "
            f"`python -m earlyfuse.tools.prepare`: it {problem}"
            f"{or_corpus if config.embedded else ''}"
        )

    def _own_shares(self, embedded: bool, clean_copies: bool = False) -> dict[str, float]:
        sources = self.sources("train")
        for _, mix in _CORPORA.values():
            if embedded and sources.keys() == mix.keys():
                return dict(mix)
        sizes = {
            name: sum(positions_of(self._source(path), clean_copies).values())
            for name, path in sources.items()
        }
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}

    def sources(self, split: str) -> dict[str, Path]:
        """Name → folder of every source of ``split`` ("train" or "validation"), finished or not."""
        return {
            path.name: path
            for path in sorted((self.folder / split).glob("*/"))
            if not path.name.startswith(".")
        }

    def resolve(self, config: Any, ranks: int) -> Any:
        """A copy of a ``Trainer.Config`` for ``ranks`` ranks, filled in from the data.

        ``ValueError`` naming the field where config, data and model do not fit.
        """
        config = deepcopy(config)
        given = config.model_spec.model
        model = fit_vocabulary(given, self.vocabulary)
        clean_copies = model.vectors is not None and model.vectors.later_see == "clean"
        if clean_copies and not config.data.shares:
            self.shares = self._own_shares(config.data.embedded, clean_copies)
        train = self.sources("train")
        unknown = sorted(set(self.shares) - set(train))
        if unknown or not self.shares:
            raise ValueError(
                f"data.shares names {unknown or 'no source'}; the sources of {self.folder} are "
                f"{sorted(train)}"
            )
        held_out = self.sources("validation") if config.validator.enable else {}
        for folder in (*(train[name] for name in self.shares), *held_out.values()):
            source = self._source(folder)
            model = fit_vectors(model, source)
            self._check_tokenizers(source)
        training, validator = config.training, config.validator
        # the ranks of a tensor-, context- or pipeline-parallel group share their rows
        parallelism = config.parallelism
        ranks //= parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
        ranks //= parallelism.pipeline_parallel_degree
        rows = training.local_batch_size * ranks
        training.global_batch_size = rows * accumulation_steps(training, ranks)
        if validator.batch_rows < 0:
            validator.batch_rows = rows
        for field_name, value in {
            "dataloader.sources": {str(train[name]): share for name, share in self.shares.items()},
            "dataloader.order": sorted(self.shares, key=_place),
            "dataloader.global_batch_size": training.global_batch_size,
            "dataloader.clean_copies": clean_copies,
            "validator.clean_copies": clean_copies,
            "validator.sources": [str(folder) for folder in held_out.values()],
            "validator.data_folder": str(self.folder),
            "sampler.data_folder": str(self.folder),
        }.items():
            section, name = field_name.split(".")
            _fill_in(getattr(config, section), name, value, field_name)
        config.data.folder = str(self.folder)
        quota = config.dataloader.media_share
        if quota is None or model.modalities != given.modalities:
            read = tuple(self._source(train[name]) for name in self.shares)
            mixture = Mixture(read, tuple(self.shares.values()), quota, clean_copies)
            model = fit_shares(model, mixture)
        self.taken = "; ".join(differences(given, model))
        config.model_spec = replace(config.model_spec, model=model)
        self._check_model(model, training, validator.batch_rows)
        self._check_stream_loss(config.loss)
        _share_validation(validator, model, ranks)
        return config

    def _source(self, folder: Path) -> TokenSource:
        """The source in ``folder``; ``ValueError`` if it is not a finished one."""
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"source {folder} has no {MANIFEST}: prepare did not finish; run the same prepare "
                "command again, or remove the folder"
            )
        if folder not in self._opened:
            self._opened[folder] = TokenSource(folder)
        return self._opened[folder]

    def _check_tokenizers(self, source: TokenSource) -> None:
        """``ValueError`` unless the tokenizers beside the data are those of its tokens."""
        folder, manifest = self.folder / "tokenizers", source.folder / MANIFEST
        # a vocabulary may be padded to the model's size, which ``_check_model`` compares
        size = max(self.vocabulary.size, source.vocabulary.size)
        data = replace(source.vocabulary, size=size)
        check_same(folder / VOCABULARY_FILE, self.vocabulary, data, manifest)
        files = {"text": TEXT_FILES} | {label: (medium.file,) for label, medium in MEDIA.items()}
        for kind, names in files.items():
            for path in (folder / name for name in names):
                expected = source.tokenizers.get(kind)
                if path.exists() and (found := sha256_file(path)) != expected:
                    raise ValueError(
                        f"{path}: SHA-256 {found} must be that of the data ({expected} in "
                        f"{manifest}); copy the tokenizer again, or prepare in another folder"
                    )

    def _check_stream_loss(self, loss: Any) -> None:
        weight = getattr(loss, "stream_loss_weight", 1.0)
        # what follows a vector is no label
        if weight != 1 and all(m.separator is None or m.continuous for m in self.vocabulary.media):
            raise ValueError(
                f"loss.stream_loss_weight ({weight}) needs videos of codes, and the vocabulary of "
                f"{self.folder} has no frame separator between codes; prepare with --video-frames "
                "and a tokenizer of codes, or leave it out"
            )

    def _check_model(self, model: Any, training: Any, validation_rows: int) -> None:
        whole_groups = {
            "training.local_batch_size": training.local_batch_size,
            "validator.batch_rows": validation_rows,
        }
        for index, layer in enumerate(model.layers):
            for field_name, rows in whole_groups.items():
                if rows % layer.routing_rows:
                    raise ValueError(
                        f"{field_name} ({rows}) must be a multiple of routing_rows "
                        f"({layer.routing_rows}) of layers[{index}]; change one of them"
                    )
            for _, pool, _, _ in layer.traverse(ExpertPool.Config):
                if pool.router.static:  # raises if an expert would take no token
                    one_group = Microbatch(pool.router.routing_rows, training.seq_len)
                    pool.routed_rows(layer.inner(one_group))


def _fill_in(section: Any, name: str, value: Any, field_name: str) -> None:
    given = getattr(section, name)
    if given not in (default_of(section, name), value):
        raise ValueError(
            f"{field_name} ({shown(given)}) must be left out: data.folder, data.shares, "
            "training.global_batch_size and the model determine it"
        )
    setattr(section, name, value)


def _share_validation(validator: Any, model: Any, ranks: int) -> None:
    """Round validation batches up to whole routing groups on each of ``ranks`` data ranks, and
    make them fewer, so that about the same rows are read on any number of ranks.
    """
    each = ranks * math.lcm(*(layer.routing_rows for layer in model.layers))
    rows = validator.batch_rows * validator.max_batches
    validator.batch_rows = each * -(-validator.batch_rows // each)
    validator.max_batches = -(-rows // validator.batch_rows)


def data_folder(config: DataSet.Config) -> Path | None:
    """The given folder, else that of the embedded corpus, else None."""
    if config.folder:
        return Path(config.folder)
    if config.embedded:
        return _CORPORA[_extra(config)][0]
    return None


def fitted(config: Any) -> Any:
    """A copy of a ``Trainer.Config`` whose model has the ids and modalities of its data, as far as
    these are prepared already.
    """
    folder = data_folder(config.data)
    path = folder and folder / "tokenizers" / VOCABULARY_FILE
    if not path or not path.is_file():
        return config
    model = fit_vocabulary(config.model_spec.model, load_vocabulary(path))
    return replace(config, model_spec=replace(config.model_spec, model=model))


def _place(name: str) -> tuple[int, str]:
    """Sort key of sources: those of the embedded corpus in a fixed order, then by name."""
    corpus = list(_SPEECH_MIX)
    return (corpus.index(name) if name in corpus else len(corpus), name)


def _extra(config: DataSet.Config) -> str | None:
    """The option that selects the embedded corpus; None: that of text and image codes."""
    return next((name for name in _CORPORA if name and getattr(config, name)), None)


def _prepare_once(folder: Path, extra: str | None) -> None:
    """Local rank 0 of each host makes the embedded corpus; the others wait for its files."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        from earlyfuse.data.prepare.embedded import prepare_corpus  # imports fonts, tokenizers

        prepare_corpus(folder, extra=extra)
        return
    parts = [folder / split / name / MANIFEST for split in _SPLITS for name in _CORPORA[extra][1]]
    parts.append(folder / "validation" / "prompts.json")  # the last
    while not all(path.exists() for path in parts):
        time.sleep(1)


class NoTokenizer(Configurable):
    """Satisfies torchtitan, which builds a tokenizer for every run; token streams need none."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config, **_: Any):
        pass
