"""Trains tokenizers on a part of the training data."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter

import numpy as np

from earlyfuse.data.documents import BadSample, Document, LostSamples, Tally
from earlyfuse.data.media import MediaTokenizer, Medium
from earlyfuse.data.prepare.bad_samples import count_bad
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import PrepareSpec
from earlyfuse.data.raw import read_documents
from earlyfuse.data.raw.shard import RawShard, ReadOptions
from earlyfuse.data.tokenizers.text import TextTokenizer

_CHARACTERS_A_PIECE = 4096  # of training data for the text tokenizer
# documents after which a shard without any of the modality is given up (images in books)
_FRUITLESS_DOCUMENTS = 1000
_DOCUMENTS = "documents"
_METADATA = "unused .json"  # beside images and text, as most tools write it: no loss


@dataclass
class _Counts(Tally):
    """Documents read, bad samples by cause, and members that good samples do not use.

    ``shard``: the one being read.
    """

    shard: RawShard | None = None

    @contextmanager
    def decoded(self, document: Document, origin: str) -> Iterator[None]:
        """Count an item that cannot be decoded."""
        try:
            yield
        except BadSample as bad:
            where = f"{self.shard}: sample {document.key!r}: {origin}"
            self.add(bad.cause, f"{where}: {bad.message}")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Add what was not used to an error about too little data."""
        try:
            yield
        except ValueError as error:
            lost = self.lost()
            if not lost.counts or isinstance(error, UnicodeError):
                raise
            raise ValueError(
                f"{error}. Not used of the training sources, with the first of each: {lost}"
            ) from error

    def lost(self) -> Tally:
        """All counts but that of documents."""
        counts = {kind: count for kind, count in self.counts.items() if kind != _DOCUMENTS}
        return Tally(counts, self.examples)

    def nothing(self, what: str) -> ValueError:
        """The error for sources without any ``what`` to train a tokenizer on."""
        documents, lost = self.counts.get(_DOCUMENTS, 0), self.lost()
        found = f"{documents} documents without any" if documents else "no document"
        if lost.counts:
            found += f"; not used, with the first of each: {lost}"
        if lost.counts.keys() - {_METADATA}:
            remedy = "mend these samples, or write them in another layout (docs/data.md)"
        elif what == "text" or not documents:
            remedy = f"give other shards, or a ready {what} tokenizer"
        else:
            remedy = f"give {what}_tokenizer 'none' to prepare the rest alone"
        return ValueError(
            f"the training sources hold no {what} to train a tokenizer on: {found}; {remedy}"
        )


@dataclass(frozen=True)
class TrainingShards:
    """Shards that tokenizers are trained on. ``expected_sizes``: see ``Source``."""

    shards: tuple[RawShard, ...]
    expected_sizes: tuple[float, ...]
    on_bad: str
    reading: ReadOptions

    def documents(
        self, budget: int, size_of: Callable[[Document], int], counts: _Counts
    ) -> Iterator[Document]:
        """Documents until their sizes sum to ``budget``, which is divided equally among the shards.

        The shards that follow get what a shard leaves over, so a small corpus is read whole. Only
        where the first documents of all shards have no size are shards read to their end.
        """
        left = yield from self._read(budget, size_of, counts, _FRUITLESS_DOCUMENTS)
        if left == budget:
            counts.counts.clear()
            counts.examples.clear()
            yield from self._read(budget, size_of, counts, None)

    def _read(
        self, left: int, size_of: Callable[[Document], int], counts: _Counts, fruitless: int | None
    ) -> Generator[Document, None, int]:
        """Read each shard up to its share of ``left``, or ``fruitless`` documents of no size.

        Returns what is left of the budget.
        """
        for number, (shard, expected) in enumerate(
            zip(self.shards, self.expected_sizes, strict=True)
        ):
            share, taken = left // (len(self.shards) - number), 0
            counts.shard = shard
            documents = read_documents(shard, self.reading)
            for place, document in enumerate(documents):
                if taken >= share or (taken == 0 and place == fruitless):
                    break
                if isinstance(document, LostSamples) and self.on_bad == "skip":
                    count_bad(document, self.on_bad, shard, shard.name, expected)
                if isinstance(document, BadSample):
                    counts.add(document.cause, document.message)
                    continue
                counts.add(_DOCUMENTS, f"{shard}: {document.key}")
                for kind, name in document.unused:
                    counts.add(f"unused {kind}", f"{shard}: {name}")
                taken += size_of(document)
                yield document
            left -= taken
        return left


def train_text(job: tuple[TrainingShards, int, tuple[str, ...], Path]) -> None:
    """A job of a ``ProcessPool``: shards, number of pieces, labels of media, file to write.

    Raises ``ValueError`` without text to train on.
    """
    shards, pieces, media, path = job
    counts = _Counts()
    documents = shards.documents(
        pieces * _CHARACTERS_A_PIECE, lambda d: sum(map(len, _texts(d))), counts
    )
    texts = (text for d in documents for text in _texts(d))
    first = next(texts, None)
    if first is None:
        raise counts.nothing("text")
    with counts.explaining():
        TextTokenizer.train(chain([first], texts), pieces, media).save(path)


def train_medium(
    medium: Medium, spec: PrepareSpec, shards: TrainingShards, progress: Progress
) -> MediaTokenizer:
    """Train the tokenizer of ``medium`` that ``spec`` asks for. ``ValueError`` without data."""
    began = perf_counter()
    module, counts = medium.module(), _Counts()
    sampling = module.sampling(spec)
    items: list[np.ndarray] = []

    def size_of(document: Document) -> int:
        before = len(items)
        for segment in document.segments:
            if segment.modality == medium.modality:
                assert isinstance(segment.payload, bytes), "of media"
                with counts.decoded(document, segment.origin):
                    items.append(sampling.read(segment.payload))
        return sum(map(sampling.size, items[before:]))

    for _ in shards.documents(sampling.budget, size_of, counts):
        pass  # ``size_of`` collects the items
    if not items:
        raise counts.nothing(medium.label)
    with counts.explaining():
        tokenizer, quality = module.train(items, spec, progress)
    progress.tell(f"{medium.label} tokenizer: {quality}, {perf_counter() - began:.1f} s")
    return tokenizer


def _texts(document: Document) -> list[str]:
    return [s.payload for s in document.segments if isinstance(s.payload, str)]
