"""Writes a tiny prepared data folder with the real writer, for tests of the trainer.

Documents are counting sequences and images whose codes follow from a label word, so losses can
fall.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.data.media import Vectors
from earlyfuse.data.shards.manifest import write_manifest
from earlyfuse.data.shards.writer import ShardRecord, Tokenised, shard_name, write_shard
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

BLOCK = 4
VOCABULARY = Vocabulary(
    size=48,
    bos=0,
    eos=1,
    pad=2,
    media=(MediaCodes(Modality.IMAGE, 32, 16, begin=3, end=4, block=BLOCK),),
)

# the same with images as vectors
WIDTH = 12
VECTORS = Vectors(WIDTH, "float32", 3, ("image",))
VECTOR_VOCABULARY = replace(
    VOCABULARY, media=(MediaCodes(Modality.IMAGE, 47, 1, begin=3, end=4, block=BLOCK),)
)


def text_document(rng: random.Random) -> list[int]:
    start, length = rng.randrange(20), rng.randrange(3, 24)
    return [0, *(5 + (start + i) % 27 for i in range(length)), 1]


def image_document(rng: random.Random) -> list[int]:
    label = rng.randrange(8)
    codes = [32 + (label * 2 + i) % 16 for i in range(BLOCK)]
    return [0, 3, *codes, 4, 5 + label, 1]


def vector_document(rng: random.Random) -> list[int]:
    label = rng.randrange(8)
    image = [3, *[47] * BLOCK, 4]
    caption_first = rng.random() < 0.8
    return [0, *([5 + label, *image] if caption_first else [*image, 5 + label]), 1]


def vectors_of(document: list[int]) -> np.ndarray:
    """(n, WIDTH) vectors of a document's image, which its caption decides."""
    count = document.count(47)
    label = next(token for token in document if token >= 5)
    rng = np.random.default_rng(label)
    return rng.standard_normal((count, WIDTH)).astype(np.float32)


def write_source(
    folder: Path,
    documents: list[list[int]],
    tokenizers: dict[str, str],
    vocabulary: Vocabulary = VOCABULARY,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    media = range(vocabulary.media[0].start, vocabulary.media[0].start + vocabulary.media[0].count)
    vectors = VECTORS if len(media) == 1 else None
    found = []
    for document in documents:
        codes = sum(token in media for token in document)
        own = vectors_of(document) if vectors and codes else None
        found.append(Tokenised(np.array(document), [len(document) - codes, codes], own))
    record = ShardRecord(f"{shard_name(0)}.tar", "toy", "toy.tar", 0, "")
    write_shard(folder, record, found, vocabulary, vectors)
    write_manifest(folder, vocabulary, tokenizers, [record], vectors)


def make_data(
    folder: Path, seed: int = 0, tokenizer: str = "aa", vocabulary: Vocabulary = VOCABULARY
) -> Path:
    """``folder`` with train/{text,pairs}, validation/{text,pairs}, tokenizers/vocabulary.json."""
    rng = random.Random(seed)
    hashes = {"text": tokenizer, "image": "bb"}
    pair_document = vector_document if vocabulary.media[0].count == 1 else image_document
    for split, count in (("train", 300), ("validation", 40)):
        for name, document in (("text", text_document), ("pairs", pair_document)):
            documents = [document(rng) for _ in range(count)]
            write_source(folder / split / name, documents, hashes, vocabulary)
    (folder / "tokenizers").mkdir(exist_ok=True)
    atomic_write_json(folder / "tokenizers" / "vocabulary.json", vocabulary.to_dict())
    return folder
