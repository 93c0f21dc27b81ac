"""The tokenizers of a prepared folder: made there once, from training data, and then kept."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from earlyfuse.data.atomic import atomic_write_bytes, atomic_write_json, remove_temporaries
from earlyfuse.data.documents import BadSample, Document
from earlyfuse.data.prepare.pool import ProcessPool
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import IMAGE_KINDS, PrepareSpec
from earlyfuse.data.raw import read_documents
from earlyfuse.data.tokenised import MANIFEST, read_manifest
from earlyfuse.data.tokenizers import (
    IMAGE_FILE,
    TEXT_FILES,
    VOCABULARY_FILE,
    Tokenizers,
    text_file,
)
from earlyfuse.data.tokenizers.image import (
    ImageTokenizer,
    load_image_tokenizer,
    measure,
    save_image_tokenizer,
)
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_vqvae import VQVAETokenizer
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.tokenizers.text import TextTokenizer

# how much training data a tokenizer sees
_CHARACTERS_A_PIECE = 4096
_PATCHES = {"kmeans": 1 << 16, "vqvae": 1 << 18}
_PIXEL_BYTES = 1 << 28
# a shard whose first documents hold nothing of the modality (images in books) is not read further
_FRUITLESS_DOCUMENTS = 1000


@dataclass(frozen=True)
class Sample:
    """Which documents tokenizers learn from."""

    shards: tuple[Path, ...]
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
                if isinstance(document, BadSample):
                    continue  # counted when the shard is tokenised
                taken += size_of(document)
                yield document
            budget -= taken


def check_existing(spec: PrepareSpec) -> None:
    """Refuse a folder prepared with other tokenizers than ``spec`` asks for; writes nothing.

    Raises ``ValueError`` that names both.
    """
    folder = spec.out / "tokenizers"
    text, image = text_file(folder), folder / IMAGE_FILE
    asked_text = None if spec.text_tokenizer is None else TextTokenizer.load(spec.text_tokenizer)
    asked_image = None
    if spec.tokenizers is not None:
        asked = Tokenizers.load(spec.tokenizers)
        asked_text, asked_image = asked.text, asked.image
        _check_vocabulary(spec, folder / VOCABULARY_FILE, asked)
    elif spec.image_tokenizer not in IMAGE_KINDS:
        asked_image = load_image_tokenizer(Path(spec.image_tokenizer))
    if text.exists():
        there = TextTokenizer.load(text)
        if asked_text is not None and asked_text.sha256 != there.sha256:
            _refuse(spec, "text", there.sha256, asked_text.sha256)
        if asked_text is None and there.size != spec.text_vocab:
            made = f"{there.sha256} of {there.size} pieces"
            _refuse(spec, "text", made, f"one of {spec.text_vocab} pieces")
    if image.exists():
        ready = load_image_tokenizer(image)
        made = f"{ready.sha256} ({ready.kind}, {ready.settings})"
        if asked_image is not None:
            if asked_image.sha256 != ready.sha256:
                _refuse(spec, "image", made, asked_image.sha256)
        elif spec.tokenizers is not None:
            _refuse(spec, "image", made, f"none ({spec.tokenizers})")
        else:
            settings = _image_settings(spec)
            differs = any(ready.settings.get(key) != value for key, value in settings.items())
            if ready.kind != spec.image_tokenizer or differs:
                _refuse(spec, "image", made, f"{spec.image_tokenizer}, {settings}")
    wants_image = asked_image is not None or (
        spec.tokenizers is None and spec.image_tokenizer != "none"
    )
    for path in sorted(spec.out.glob(f"*/*/{MANIFEST}")):
        _check_manifest(spec, path.parent, text, image, wants_image)


def make_tokenizers(
    spec: PrepareSpec, shards: Sequence[Path], pool: ProcessPool, progress: Progress
) -> Tokenizers:
    """Those in ``<out>/tokenizers``; absent ones are copied there or learnt first."""
    folder = spec.out / "tokenizers"
    folder.mkdir(exist_ok=True)
    remove_temporaries(folder)
    if spec.tokenizers is not None:
        for name in (*TEXT_FILES, IMAGE_FILE, VOCABULARY_FILE):
            if (spec.tokenizers / name).exists() and not (folder / name).exists():
                atomic_write_bytes(folder / name, (spec.tokenizers / name).read_bytes())
        return _with_vocabulary(folder)
    sample = Sample(tuple(shards), spec.layout, spec.image_first)
    text_ready: Callable[[], None] | None = None
    if not text_file(folder).exists():
        if spec.text_tokenizer is not None:
            ready = TextTokenizer.load(spec.text_tokenizer)
            ready.save(folder / ready.file_name)
        else:
            progress.tell(f"text tokenizer: learning {spec.text_vocab} pieces")
            text_ready = pool.start(_train_text, (sample, spec.text_vocab, text_file(folder)))
    if spec.image_tokenizer != "none" and not (folder / IMAGE_FILE).exists():
        if spec.image_tokenizer in IMAGE_KINDS:
            image = _train_image(spec, sample, progress)
        else:
            image = load_image_tokenizer(Path(spec.image_tokenizer))
        save_image_tokenizer(image, folder / IMAGE_FILE)
    if text_ready is not None:
        text_ready()
    return _with_vocabulary(folder)


def _with_vocabulary(folder: Path) -> Tokenizers:
    """The tokenizers of ``folder``, their vocabulary stored beside them."""
    tokenizers = Tokenizers.load(folder)
    atomic_write_json(folder / VOCABULARY_FILE, tokenizers.vocabulary.to_dict())
    return tokenizers


def _train_text(job: tuple[Sample, int, Path]) -> None:
    sample, pieces, path = job
    documents = sample.documents(pieces * _CHARACTERS_A_PIECE, lambda d: sum(map(len, _texts(d))))
    TextTokenizer.train((text for d in documents for text in _texts(d)), pieces).save(path)


def _train_image(spec: PrepareSpec, sample: Sample, progress: Progress) -> ImageTokenizer:
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
    for document in sample.documents(budget, lambda d: len(_encoded(d))):
        for encoded in _encoded(document):
            try:
                images.append(image_pixels(encoded, spec.image_size))
            except BadSample:
                continue  # counted when the shard is tokenised
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def _texts(document: Document) -> list[str]:
    return [s.payload for s in document.segments if isinstance(s.payload, str)]


def _encoded(document: Document) -> list[bytes]:
    return [s.payload for s in document.segments if isinstance(s.payload, bytes)]


def _image_settings(spec: PrepareSpec) -> dict[str, Any]:
    settings = {
        "image_size": spec.image_size,
        "patch": spec.patch,
        "codes": spec.codes,
        "seed": spec.seed,
    }
    if spec.image_tokenizer == "vqvae":
        settings["steps"] = spec.vq_steps
    return settings


def _check_vocabulary(spec: PrepareSpec, stored: Path, asked: Tokenizers) -> None:
    wanted = asked.vocabulary.to_dict()
    if stored.exists() and json.loads(stored.read_bytes()) != wanted:
        raise ValueError(
            f"out ({spec.out}) was prepared with another vocabulary ({stored}) than that of "
            f"tokenizers ({spec.tokenizers}); ask for the same, or choose another folder"
        )


def _check_manifest(
    spec: PrepareSpec, folder: Path, text: Path, image: Path, wants_image: bool
) -> None:
    recorded = read_manifest(folder)["tokenizers"]
    if not text.exists():
        _refuse(spec, "text", recorded["text"], "a new one, as the tokenizers folder is gone")
    if not image.exists() and wants_image:
        asked = spec.tokenizers or spec.image_tokenizer
        _refuse(spec, "image", f"none ({folder})", str(asked))
    hashes = {"text": TextTokenizer.load(text).sha256}
    if image.exists():
        hashes["image"] = load_image_tokenizer(image).sha256
    for kind in sorted(recorded.keys() | hashes.keys()):
        if recorded.get(kind) != hashes.get(kind):
            _refuse(
                spec,
                kind,
                f"{recorded.get(kind)} ({folder})",
                f"{hashes.get(kind)} ({text.parent})",
            )


def _refuse(spec: PrepareSpec, kind: str, made_with: str, asked: str) -> None:
    raise ValueError(
        f"out ({spec.out}) was prepared with {kind} tokenizer {made_with}, but asked for is "
        f"{asked}; ask for the same, or choose another folder"
    )
