"""Learning tokenizers from a part of the training data."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from earlyfuse.data.documents import BadSample, Document, LostSamples, Tally, decoding
from earlyfuse.data.prepare.bad_samples import count_bad
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import PrepareSpec
from earlyfuse.data.raw import read_documents
from earlyfuse.data.tokenizers.audio import waveform
from earlyfuse.data.tokenizers.image import ImageTokenizer, code_usage, measure
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.speech_kmeans import RATE, SpeechTokenizer, levels, log_mel_error
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.vocabulary import Modality

# how much training data a tokenizer sees
_CHARACTERS_A_PIECE = 4096
_PATCHES = {"kmeans": 1 << 16, "vqvae": 1 << 18}
_PIXEL_BYTES = 1 << 28
_FRAMES = 1 << 16  # of speech
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


def learn_text(job: tuple[Sample, int, bool, Path]) -> None:
    """A job of a ``ProcessPool``: documents, pieces, whether there is speech, file to write.

    ``ValueError`` without text to learn from.
    """
    sample, pieces, speech, path = job
    seen = Seen()
    documents = sample.documents(
        pieces * _CHARACTERS_A_PIECE, lambda d: sum(map(len, _texts(d))), seen
    )
    texts = (text for d in documents for text in _texts(d))
    first = next(texts, None)
    if first is None:
        raise seen.nothing("text")
    with seen.stated():
        TextTokenizer.train(chain([first], texts), pieces, speech).save(path)


def learn_image(spec: PrepareSpec, sample: Sample, progress: Progress) -> ImageTokenizer:
    """The image tokenizer that ``spec`` asks for. ``ValueError`` without images to learn from."""
    began = perf_counter()
    seen = Seen()
    images = _images(spec, sample, seen)
    if not len(images):
        raise seen.nothing("image")
    progress.tell(
        f"image tokenizer: {spec.image_tokenizer} of {spec.codes} codes from {len(images)} images"
    )
    tokenizer: ImageTokenizer
    if spec.image_tokenizer == "kmeans":
        # seconds on one thread; more would wait for one another while the text tokenizer learns
        with _one_thread(), seen.stated():
            tokenizer = KMeansTokenizer.train(
                images, patch=spec.patch, codes=spec.codes, seed=spec.seed
            )
    else:
        with progress.steps("vqvae", spec.vq_steps) as show:
            tokenizer = VQVAETokenizer.train(
                images,
                patch=spec.patch,
                codes=spec.codes,
                steps=spec.vq_steps,
                seed=spec.seed,
                progress=show,
            )
    quality = measure(tokenizer, images[:4096])
    progress.tell(
        f"image tokenizer: PSNR {quality.psnr:.1f} dB, {quality.used} of {spec.codes} codes used, "
        f"perplexity {quality.perplexity:.0f}, {perf_counter() - began:.1f} s"
    )
    return tokenizer


def learn_speech(spec: PrepareSpec, sample: Sample, progress: Progress) -> SpeechTokenizer:
    """The speech tokenizer that ``spec`` asks for. ``ValueError`` without speech to learn from."""
    began = perf_counter()
    seen = Seen()
    utterances = _utterances(spec, sample, seen)
    if not utterances:
        raise seen.nothing("speech")
    seconds = sum(map(len, utterances)) * spec.speech_frame_ms / 1000
    progress.tell(
        f"speech tokenizer: kmeans of {spec.speech_codes} codes from {len(utterances)} "
        f"utterances, {seconds:.0f} s"
    )
    with _one_thread():
        with seen.stated():
            tokenizer = SpeechTokenizer.train(
                utterances, frame_ms=spec.speech_frame_ms, codes=spec.speech_codes, seed=spec.seed
            )
        features = np.concatenate(utterances)
        codes = tokenizer.encode(features)
    error = log_mel_error(tokenizer.squared_error(features, codes), features.size)
    used, perplexity = code_usage(np.bincount(codes, minlength=tokenizer.codes))
    progress.tell(
        f"speech tokenizer: log-mel error {error:.1f} dB, {used} of {tokenizer.codes} codes used, "
        f"perplexity {perplexity:.0f}, {perf_counter() - began:.1f} s"
    )
    return tokenizer


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _images(spec: PrepareSpec, sample: Sample, seen: Seen) -> np.ndarray:
    """uint8 (N, size, size, 3): training images, as many as the tokenizer profits from, or none."""
    block = (spec.image_size // spec.patch) ** 2
    wanted = max(1024, _PATCHES[spec.image_tokenizer] // block)
    budget = min(wanted, max(1, _PIXEL_BYTES // (3 * spec.image_size**2)))
    images: list[np.ndarray] = []
    for document in sample.documents(budget, lambda d: len(_encoded(d, Modality.IMAGE)), seen):
        for origin, encoded in _encoded(document, Modality.IMAGE):
            with seen.decoded(document, origin):
                images.append(image_pixels(encoded, spec.image_size))
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def _utterances(spec: PrepareSpec, sample: Sample, seen: Seen) -> list[np.ndarray]:
    """Features of training utterances, uint8 (U, D) each, as many as the tokenizer profits from."""
    utterances: list[np.ndarray] = []

    def frames_of(document: Document) -> int:
        before = len(utterances)
        for origin, encoded in _encoded(document, Modality.SPEECH):
            with seen.decoded(document, origin), decoding("corrupt-audio", "audio"):
                wave = waveform(encoded, RATE, spec.speech_seconds)
                utterances.append(levels(wave, spec.speech_frame_ms // 10))
        return sum(map(len, utterances[before:]))

    for _ in sample.documents(_FRAMES, frames_of, seen):
        pass  # its frames are taken when they are counted
    return utterances


def _texts(document: Document) -> list[str]:
    return [s.payload for s in document.segments if isinstance(s.payload, str)]


def _encoded(document: Document, modality: Modality) -> list[tuple[str, bytes]]:
    """Origin and bytes of each medium."""
    return [
        (segment.origin, segment.payload)
        for segment in document.segments
        if segment.modality == modality and isinstance(segment.payload, bytes)
    ]
