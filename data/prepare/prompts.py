"""Makes ``validation/prompts.json`` from validation pairs, so that runs on the data draw samples.

Its format is that of the embedded corpus (``data/embedded/tasks.py``).
"""

import base64
import hashlib
import io
from collections.abc import Iterator
from heapq import nsmallest
from itertools import chain, islice, zip_longest

import numpy as np
from PIL import Image

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.documents import BadSample, Document
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.prepare.spec import PrepareSpec, Source
from earlyfuse.data.raw import read_documents
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.image_tokenizer import ImageTokenizer
from earlyfuse.models.vocabulary import Modality

PROMPTS = 30
_READ = 2000  # samples of a source that prompts are chosen among
_LONGEST_CAPTION = 1000  # characters
_MOST_BYTES = 1 << 23  # of an image file; twice as many as prompts are in memory


def make_prompts(spec: PrepareSpec, progress: Progress) -> None:
    """Writes captions and images of held-out pairs, about as many of each source of ``spec``.

    The hash of a sample's key decides, so equal shards give equal prompts. Images are PNGs of the
    pixels that the tokenizer reads. A file that exists already is left alone.
    """
    path = spec.out / "validation" / "prompts.json"
    sources = [source for source in spec.sources() if source.split == "validation"]
    if path.exists() or not sources:
        return
    image = Tokenizers.load(spec.out / "tokenizers").image
    if image is None or not image.decodes:
        return
    found = [_prompts(source, spec, image) for source in sources]
    turns = chain.from_iterable(zip_longest(*found))
    prompts = list(islice((prompt for prompt in turns if prompt), PROMPTS))
    if prompts:
        atomic_write_json(path, {"prompts": prompts})
        progress.tell(f"{len(prompts)} held-out pairs are the prompts of samples, in {path}")
    else:
        progress.tell("no held-out pair of an image and a caption: runs draw no samples")


def _prompts(source: Source, spec: PrepareSpec, image: ImageTokenizer) -> list[dict[str, str]]:
    candidates = nsmallest(2 * PROMPTS, islice(_pairs(source, spec), _READ), key=lambda one: one[0])
    prompts = []
    for _, caption, payload in candidates:
        try:
            pixels = image.features(payload)
        except BadSample:  # counted where it is tokenised
            continue
        prompts.append({"caption": caption, "image": base64.b64encode(_png(pixels)).decode()})
    return prompts


def _pairs(source: Source, spec: PrepareSpec) -> Iterator[tuple[bytes, str, bytes]]:
    """Hash of the key, caption and image file of each document that is a pair."""
    reading = spec.reading_of(source.name)
    for shard in source.shards:
        for document in read_documents(shard, reading):
            if isinstance(document, Document) and (pair := _pair(document)):
                yield hashlib.blake2b(document.key.encode(), digest_size=8).digest(), *pair


def _pair(document: Document) -> tuple[str, bytes] | None:
    """The caption and the image of ``document``, if it has nothing else."""
    by_modality = {segment.modality: segment.payload for segment in document.segments}
    caption, image = by_modality.get(Modality.TEXT), by_modality.get(Modality.IMAGE)
    if len(document.segments) != 2 or not isinstance(caption, str) or not isinstance(image, bytes):
        return None
    return (caption, image) if _fits(caption, image) else None


def _fits(caption: str, image: bytes) -> bool:
    return len(caption) <= _LONGEST_CAPTION and len(image) <= _MOST_BYTES


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
