"""Tiny prepared sources for tests: 66 ids, images of 4 codes, written by prepare's own writer."""

import itertools
from pathlib import Path

import numpy as np
import torch

from earlyfuse.data.media import Vectors
from earlyfuse.data.shards.manifest import write_manifest
from earlyfuse.data.shards.writer import ShardRecord, Tokenised, shard_name, write_shard
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

PAD, BOS, EOS, BEGIN, END = 0, 1, 2, 3, 4
BLOCK, CODES = 4, range(50, 66)
IMAGES = MediaCodes(Modality.IMAGE, start=50, count=16, begin=BEGIN, end=END, block=BLOCK)
VOCABULARY = Vocabulary(size=66, bos=BOS, eos=EOS, pad=PAD, media=(IMAGES,))
HASHES = {"text": "aa", "image": "bb"}


# Sources use tokens of their own, so that a piece tells which source it came from.
def image(code: int = 0, first: int = 50) -> list[int]:
    return [BEGIN, *(first + (code + i) % 8 for i in range(BLOCK)), END]


def text(rng: np.random.Generator, longest: int, first: int) -> list[int]:
    return rng.integers(first, first + 20, rng.integers(1, longest)).tolist()


def text_document(rng: np.random.Generator) -> list[int]:
    return [BOS, *text(rng, 40, 5), EOS]


def mixed_document(rng: np.random.Generator) -> list[int]:
    def part():
        return text(rng, 6, 25) if rng.random() < 0.4 else image(int(rng.integers(8)), 58)

    return [BOS, *itertools.chain(*(part() for _ in range(6))), EOS]


def image_document(rng: np.random.Generator) -> list[int]:
    return [BOS, *image(int(rng.integers(8))), EOS]


def write_source(
    folder: Path,
    documents,
    shards=2,
    hashes=HASHES,
    vocabulary=VOCABULARY,
    vectors: Vectors | None = None,
    own=(),
) -> Path:
    """``own``: vectors of each document, of type ``vectors``."""
    folder.mkdir(parents=True)
    records, own = [], own or [None] * len(documents)
    for number in range(shards):
        part = [np.array(d, np.int64) for d in documents[number::shards]]
        modality = [vocabulary.modality_of(torch.from_numpy(d)) for d in part]
        counts = [[int((m == kind).sum()) for kind in vocabulary.modalities] for m in modality]
        record = ShardRecord(f"{shard_name(number)}.tar", "", f"raw-{number}", 0, "")
        found = map(Tokenised, part, counts, own[number::shards])
        write_shard(folder, record, found, vocabulary, vectors)
        records.append(record)
    write_manifest(folder, vocabulary, hashes, records, vectors)
    return folder


def write_three(root: Path) -> dict[str, Path]:
    """Sources of text alone, of images alone, and of both."""
    rng = np.random.default_rng(0)
    kinds = {"prose": text_document, "pairs": image_document, "mixed": mixed_document}
    return {
        name: write_source(root / name, [make(rng) for _ in range(count)])
        for (name, make), count in zip(kinds.items(), (23, 17, 31), strict=True)
    }


def loader(sources, rank=0, ranks=1, local=2, seq_len=24, batch=8, **options) -> LaneLoader:
    """As the trainer builds it; ``sources``: folder → share."""
    shares = {str(folder): share for folder, share in sources.items()}
    config = LaneLoader.Config(sources=shares, global_batch_size=batch, **options)
    return config.build(
        dp_world_size=ranks, dp_rank=rank, tokenizer=None, seq_len=seq_len,
        local_batch_size=local, snapshot_every_n_steps=1,
    )  # fmt: skip


def steps(ranks: list[LaneLoader], number: int) -> list[dict[str, torch.Tensor]]:
    """``number`` global batches, their rows in lane order, from simulated ranks."""
    iterators = [iter(rank) for rank in ranks]
    batches = []
    for _ in range(number):
        fields = [
            next(iterator)[0]["batch"].tensors()
            for rank, iterator in zip(ranks, iterators, strict=True)
            for _ in range(len(rank.lanes) // rank.rows)
        ]
        batches.append({name: torch.cat([f[name] for f in fields]) for name in fields[0]})
    return batches
