"""Learning tokenizers from a part of the training data."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from time import perf_counter

import numpy as np

from earlyfuse.data.documents import BadSample, Document, LostSamples, Tally
from earlyfuse.data.media import MediaTokenizer, Medium
from earlyfuse.data.prepare.bad_samples import count_bad
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import PrepareSpec
from earlyfuse.data.raw import read_documents
from earlyfuse.data.tokenizers.text import TextTokenizer

_CHARACTERS_A_PIECE = 4096  # of training data that the text tokenizer sees
# a shard whose first documents hold nothing of the modality (images in books) is not read further
_FRUITLESS_DOCUMENTS = 1000
_DOCUMENTS = "documents"
_METADATA = "unused .json"  # beside images and text as most tools write it: no loss


@dataclass
class Seen(Tally):
    """Documents, bad samples by cause and what good ones do not use; ``shard`` is read now."""

    shard: Path = Path()

    @contextmanager
    def decoded(self, document: Document, origin: str) -> Iterator[None]:
        """Counts a medium that cannot be decoded; it counts again when its shard is tokenised."""
        try:
            yield
        except BadSample as bad:
            self.add(
                bad.cause,
                f"{self.shard}: sample {document.key!r}: {origin}: {bad.message}",
            )

    @contextmanager
    def stated(self) -> Iterator[None]:
        """Adds what was lost to an error about too little data."""
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
        """All but the documents."""
        counts = {kind: count for kind, count in self.counts.items() if kind != _DOCUMENTS}
        return Tally(counts, self.examples)

    def nothing(self, what: str) -> ValueError:
        """The error for sources without any ``what`` that a tokenizer could learn from."""
        documents, lost = self.counts.get(_DOCUMENTS, 0), self.lost()
        found = f"{documents} documents without any" if documents else "no document"
        message = f"the training sources hold no {what} that can be learnt from: {found}"
        if lost.counts:
            message += f"; not used, with the first of each: {lost}"
        if lost.counts.keys() - {_METADATA}:
            message += "; mend these samples, or write them in another layout (docs/data.md)"
        elif what == "text" or not documents:
            message += f"; give other shards, or a ready {what} tokenizer"
        else:
            message += f"; give {what}_tokenizer 'none' to prepare the rest alone"
        return ValueError(message)


@dataclass(frozen=True)
class Sample:
    """Which documents tokenizers learn from. ``expected_sizes``: of ``shards``, see ``Source``."""

    shards: tuple[Path, ...]
    expected_sizes: tuple[float, ...]
    on_bad: str
    layout: str
    image_first: float

    def documents(
        self, budget: int, size_of: Callable[[Document], int], seen: Seen
    ) -> Iterator[Document]:
        """Documents until their sizes reach ``budget``, which the shards share equally.

        What a shard leaves over goes to the ones behind it; so a small corpus is read whole. Shards
        that begin fruitlessly are read to their end only where nothing else is found.
        """
        left, fruitless = budget, []
        for number in range(len(self.shards)):
            share = left // (len(self.shards) - number)
            taken = yield from self._of_shard(
                number, share, size_of, seen, most=_FRUITLESS_DOCUMENTS
            )
            if taken is None:
                fruitless.append(number)
            left -= taken or 0
        if left == budget:
            for place, number in enumerate(fruitless):
                share = left // (len(fruitless) - place)
                taken = yield from self._of_shard(
                    number, share, size_of, seen, skip=_FRUITLESS_DOCUMENTS
                )
                left -= taken or 0

    def _of_shard(
        self,
        number: int,
        share: int,
        size_of: Callable[[Document], int],
        seen: Seen,
        skip: int = 0,
        most: int | None = None,
    ) -> Generator[Document, None, int | None]:
        """What was taken of shard ``number``; none where ``most`` documents came first in which
        there is nothing.
        """
        taken, shard = 0, self.shards[number]
        seen.shard = shard
        documents = read_documents(shard, self.layout, image_first=self.image_first)
        for place, document in enumerate(islice(documents, skip, None)):
            if taken >= share:
                break
            if taken == 0 and place == most:
                return None
            if isinstance(document, LostSamples) and self.on_bad == "skip":
                count_bad(document, self.on_bad, shard, shard.name, self.expected_sizes[number])
            if isinstance(document, BadSample):
                seen.add(document.cause, document.message)
                continue
            seen.add(_DOCUMENTS, f"{shard}: {document.key}")
            for kind, name in document.unused:
                seen.add(f"unused {kind}", f"{shard}: {name}")
            taken += size_of(document)
            yield document
        return taken


def learn_text(job: tuple[Sample, int, tuple[str, ...], Path]) -> None:
    """A job of a ``ProcessPool``: documents, pieces, labels of media, file to write.

    ``ValueError`` without text to learn from.
    """
    sample, pieces, media, path = job
    seen = Seen()
    documents = sample.documents(
        pieces * _CHARACTERS_A_PIECE, lambda d: sum(map(len, _texts(d))), seen
    )
    texts = (text for d in documents for text in _texts(d))
    first = next(texts, None)
    if first is None:
        raise seen.nothing("text")
    with seen.stated():
        TextTokenizer.train(chain([first], texts), pieces, media).save(path)


def learn_medium(
    medium: Medium, spec: PrepareSpec, sample: Sample, progress: Progress
) -> MediaTokenizer:
    """The tokenizer of ``medium`` that ``spec`` asks for. ``ValueError`` without data for it."""
    began = perf_counter()
    module, seen = medium.module(), Seen()
    sampling = module.sampling(spec)
    items: list[np.ndarray] = []

    def size_of(document: Document) -> int:
        before = len(items)
        for segment in document.segments:
            if segment.modality == medium.modality:
                assert isinstance(segment.payload, bytes), "of media"
                with seen.decoded(document, segment.origin):
                    items.append(sampling.read(segment.payload))
        return sum(map(sampling.size, items[before:]))

    for _ in sample.documents(sampling.budget, size_of, seen):
        pass  # its items are taken when they are counted
    if not items:
        raise seen.nothing(medium.label)
    with seen.stated():
        tokenizer, quality = module.train(items, spec, progress)
    progress.tell(f"{medium.label} tokenizer: {quality}, {perf_counter() - began:.1f} s")
    return tokenizer


def _texts(document: Document) -> list[str]:
    return [s.payload for s in document.segments if isinstance(s.payload, str)]
