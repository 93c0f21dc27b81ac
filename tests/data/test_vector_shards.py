"""Format 2, shards with vectors: a changed byte in any file is refused by name, or not read."""

import json

import numpy as np
import pytest
from tiny_sources import BEGIN, BOS, END, EOS

from earlyfuse.data.media import Vectors
from earlyfuse.data.shards.manifest import write_manifest
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.shards.writer import ShardRecord, Tokenised, write_shard
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

IMAGES = MediaCodes(Modality.IMAGE, start=50, count=1, begin=BEGIN, end=END, block=2)
VOCABULARY = Vocabulary(size=51, bos=BOS, eos=EOS, pad=0, media=(IMAGES,))
VECTORS = Vectors(width=4, dtype="float16", channels=2, media=("image",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One shard of two documents with an image each."""
    folder = tmp_path_factory.mktemp("vectors") / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    documents = [
        Tokenised(np.array([BOS, BEGIN, 50, 50, END, word, EOS]), [5, 2], rng.normal(size=(2, 4)))
        for word in (9, 10)
    ]
    record = ShardRecord("shard-000000.tar", "recipe", "raw.tar", 0, "")
    write_shard(folder, record, documents, VOCABULARY, VECTORS)
    write_manifest(folder, VOCABULARY, {"text": "aa", "image": "bb"}, [record], VECTORS)
    return folder


def everything(folder):
    """Tokens, counts, vectors and statistics, as plain values."""
    source = TokenSource(folder)
    documents = [source.document(number) for number in range(len(source))]
    vectors = [source.document_vectors(number).tolist() for number in range(len(source))]
    return [(ids.tolist(), counts) for ids, counts in documents], vectors, source.vectors


@pytest.mark.parametrize("name", [
    "manifest.json", "shard-000000.tar", "shard-000000.index.npy", "shard-000000.crc.npy",
    "shard-000000.vectors.npy",
])  # fmt: skip
def test_a_changed_byte_is_refused_by_name_or_changes_nothing_that_is_read(folder, name):
    """Every byte; of the tar's padding, which nothing reads, ``verify`` finds the change."""
    path, whole, read = folder / name, everything(folder), 0
    content = path.read_bytes()
    used = content.rstrip(b"\0") if name.endswith(".tar") else content
    places = [*range(len(used)), *range(len(used), len(content), 501)]
    try:
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            try:
                assert everything(folder) == whole, f"byte {place}"
            except ValueError as error:
                assert str(folder) in str(error) and name in str(error)
                continue
            if name == "manifest.json":  # 1e-05 and 1E-05 are one number
                assert json.loads(changed) == json.loads(content)
            else:
                read += 1
                with pytest.raises(ValueError, match=rf"{path}: SHA-256"):
                    TokenSource(folder).verify()
    finally:
        path.write_bytes(content)
    assert read < len(places) and everything(folder) == whole


def test_a_changed_byte_of_a_record_makes_its_shard_anew(folder):
    path, whole = folder / "shard-000000.json", ShardRecord.load(folder, 0)
    content = path.read_bytes()
    try:
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            assert ShardRecord.load(folder, 0) in (None, whole), f"byte {place}"
    finally:
        path.write_bytes(content)
    assert ShardRecord.load(folder, 0) == whole is not None


def test_vectors_that_contradict_their_type_are_not_written(folder, tmp_path):
    for bad in (np.zeros((2, 3)), np.full((2, 4), 1e6), np.full((2, 4), np.nan)):
        record = ShardRecord("shard-000000.tar", "recipe", "raw.tar", 0, "")
        document = Tokenised(np.array([BOS, BEGIN, 50, 50, END, EOS]), [4, 2], bad)
        with pytest.raises(ValueError, match=r"must be \(n, 4\) and finite in float16"):
            write_shard(tmp_path, record, [document], VOCABULARY, VECTORS)
        assert not list(tmp_path.glob("shard-*"))
