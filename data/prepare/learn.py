"""Learning tokenizers from a part of the training data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from earlyfuse.data.documents import BadSample, Document, LostSamples
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
from earlyfuse.models.modality import Modality

# how much training data a tokenizer sees
_CHARACTERS_A_PIECE = 4096
_PATCHES = {"kmeans": 1 << 16, "vqvae": 1 << 18}
_PIXEL_BYTES = 1 << 28
_FRAMES = 1 << 16  # of speech
# a shard whose first documents hold nothing of the modality (images in books) is not read further
_FRUITLESS_DOCUMENTS = 1000


@dataclass(frozen=True)
class Sample:
    """Which documents tokenizers learn from. ``expected_sizes``: of ``shards``, see ``Source``."""

    shards: tuple[Path, ...]
    expected_sizes: tuple[float, ...]
    on_bad: str
    layout: str
    image_first: float

    def documents(self, budget: int, size_of: Callable[[Document], int]) -> Iterator[Document]:
        """Documents until their sizes reach ``budget``, which the shards share equally.

        What a shard leaves over goes to the ones behind it; so a small corpus is read whole.
        """
        for number, shard in enumerate(self.shards):
            share = budget // (len(self.shards) - number)
            taken = 0
            documents = read_documents(shard, self.layout, image_first=self.image_first)
            for seen, document in enumerate(documents):
                if taken >= share or (taken == 0 and seen >= _FRUITLESS_DOCUMENTS):
                    break
                if isinstance(document, LostSamples) and self.on_bad == "skip":
                    count_bad(document, self.on_bad, shard.name, self.expected_sizes[number])
                if isinstance(document, BadSample):
                    continue  # counted when the shard is tokenised
                taken += size_of(document)
                yield document
            budget -= taken


def learn_text(job: tuple[Sample, int, bool, Path]) -> None:
    """A job of a ``ProcessPool``: documents, pieces, whether there is speech, file to write."""
    sample, pieces, speech, path = job
    documents = sample.documents(pieces * _CHARACTERS_A_PIECE, lambda d: sum(map(len, _texts(d))))
    texts = (text for d in documents for text in _texts(d))
    TextTokenizer.train(texts, pieces, speech).save(path)


def learn_image(spec: PrepareSpec, sample: Sample, progress: Progress) -> ImageTokenizer:
    """The image tokenizer that ``spec`` asks for. ``ValueError`` without images to learn from."""
    began = perf_counter()
    images = _images(spec, sample)
    if not len(images):
        raise ValueError(
            "the training sources hold no image that decodes; "
            "give image_tokenizer 'none' to prepare text only"
        )
    progress.tell(
        f"image tokenizer: {spec.image_tokenizer} of {spec.codes} codes from {len(images)} images"
    )
    tokenizer: ImageTokenizer
    if spec.image_tokenizer == "kmeans":
        # seconds on one thread; more would wait for one another while the text tokenizer learns
        with _one_thread():
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
    utterances = _utterances(spec, sample)
    if not utterances:
        raise ValueError(
            "the training sources hold no audio that decodes; "
            "give speech_tokenizer 'none' to prepare without speech"
        )
    seconds = sum(map(len, utterances)) * spec.speech_frame_ms / 1000
    progress.tell(
        f"speech tokenizer: kmeans of {spec.speech_codes} codes from {len(utterances)} "
        f"utterances, {seconds:.0f} s"
    )
    with _one_thread():
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


def _images(spec: PrepareSpec, sample: Sample) -> np.ndarray:
    """uint8 (N, size, size, 3): training images, as many as the tokenizer profits from, or none."""
    block = (spec.image_size // spec.patch) ** 2
    wanted = max(1024, _PATCHES[spec.image_tokenizer] // block)
    budget = min(wanted, max(1, _PIXEL_BYTES // (3 * spec.image_size**2)))
    images = []
    for document in sample.documents(budget, lambda d: len(_encoded(d, Modality.IMAGE))):
        for encoded in _encoded(document, Modality.IMAGE):
            try:
                images.append(image_pixels(encoded, spec.image_size))
            except BadSample:
                continue  # counted when the shard is tokenised
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def _utterances(spec: PrepareSpec, sample: Sample) -> list[np.ndarray]:
    """Features of training utterances, uint8 (U, D) each, as many as the tokenizer profits from."""
    utterances: list[np.ndarray] = []

    def frames_of(document: Document) -> int:
        before = len(utterances)
        for encoded in _encoded(document, Modality.SPEECH):
            try:
                wave = waveform(encoded, RATE, spec.speech_seconds)
                utterances.append(levels(wave, spec.speech_frame_ms // 10))
            except BadSample:
                continue  # counted when the shard is tokenised
        return sum(map(len, utterances[before:]))

    for _ in sample.documents(_FRAMES, frames_of):
        pass  # its frames are taken when they are counted
    return utterances


def _texts(document: Document) -> list[str]:
    return [s.payload for s in document.segments if isinstance(s.payload, str)]


def _encoded(document: Document, modality: Modality) -> list[bytes]:
    return [
        segment.payload
        for segment in document.segments
        if segment.modality == modality and isinstance(segment.payload, bytes)
    ]
