"""Reading prepared sources: what was written comes back, and damage is refused by name."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_sources import BOS, EOS, HASHES, image, mixed_document, write_source

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.shards import mapped_files
from earlyfuse.data.shards.manifest import manifest_hash
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.models.vocabulary import Vocabulary


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(1)
    documents = [mixed_document(rng) for _ in range(11)]
    return write_source(tmp_path / "mixed", documents, shards=3), documents


@pytest.fixture
def other(written, tmp_path):
    """Another source with files of the same sizes."""
    return write_source(tmp_path / "other", written[1][::-1], shards=3)


def read_all(folder):
    source = TokenSource(folder)
    return [source.document(number)[0].tolist() for number in range(len(source))]


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        read_all(folder)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


# ---------------------------------------------------------------- what was written


def test_documents_come_back_by_number(written):
    folder, documents = written
    source = TokenSource(folder)
    stored = [d for shard in range(3) for d in documents[shard::3]]
    assert len(source) == 11
    for number, expected in enumerate(stored):
        tokens, (text, images) = source.document(number)
        assert tokens.tolist() == expected and tokens.dtype == np.uint16
        assert text + images == len(expected) and images == sum(t >= 50 for t in expected)
    counts = [source.document(number)[1] for number in range(len(source))]
    assert np.sum(counts, axis=0).tolist() == list(source.tokens.values())
    assert np.concatenate(list(source.runs())).tolist() == sum(stored, [])
    with pytest.raises(ValueError, match="read-only"):
        source.document(0)[0][0] = 1
    for outside in (-1, 11):
        with pytest.raises(IndexError, match="which has 11"):
            source.document(outside)


def test_wide_vocabularies_and_empty_shards_are_read(tmp_path):
    wide = Vocabulary(size=70000, bos=1, eos=2, pad=0)
    documents = [[1, 69999, 2], [1, 2]]
    assert read_all(write_source(tmp_path / "wide", documents, 4, vocabulary=wide)) == documents
    with pytest.raises(ValueError, match="holds no token"):
        TokenSource(write_source(tmp_path / "none", [[], []], shards=1))


def test_identity_is_of_the_tokens_not_of_the_place(tmp_path):
    documents = [[BOS, *image(), EOS], [BOS, 9, EOS]]
    one = TokenSource(write_source(tmp_path / "a" / "x", documents))
    same = TokenSource(write_source(tmp_path / "b" / "y", documents))
    reversed_ = TokenSource(write_source(tmp_path / "c" / "x", documents[::-1]))
    assert one.identity == same.identity != reversed_.identity


def test_shards_remain_ordinary_tars(written):
    folder, documents = written
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = [np.load(io.BytesIO(tar.extractfile(name).read())) for name in tar.getnames()]
    assert np.concatenate(members).tolist() == [t for d in documents[::3] for t in d]


def test_sources_of_different_tokenizers_do_not_mix(tmp_path):
    def source(name, **options):
        documents = [[BOS, *image(), EOS]]
        return TokenSource(write_source(tmp_path / name, documents, shards=1, **options))

    ours = source("ours")
    wider = Vocabulary(size=67, bos=BOS, eos=EOS, pad=0, media=ours.vocabulary.media)
    for theirs, message in (
        (source("theirs", hashes=HASHES | {"image": "cc"}), r"image .*ours \(bb\) .*theirs \(cc\)"),
        (source("b/ours"), "both named 'ours'"),
        (source("w", vocabulary=wider), r"vocabulary of .*ours"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture((ours, theirs), (0.5, 0.5))


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", [".tar", ".index.npy", ".crc.npy"])
def test_missing_truncated_and_exchanged_files_are_named(written, other, suffix):
    folder, _ = written
    path = folder / f"shard-000001{suffix}"
    own, name = path.read_bytes(), re.escape(path.name)
    for content in (b"", own[:1], own[: len(own) // 2], own[:-1], own + b"0"):
        path.write_bytes(content)
        refused(folder, rf"{name} .*copy the shard again or prepare")
    for at in (0, 5, 40, 60, 64, 130, len(own) - 1) if suffix != ".tar" else ():
        path.write_bytes(own)
        flip(path, at)
        refused(folder, rf"{name}.*(copy|prepare)")
    theirs = (other / path.name).read_bytes()
    assert len(theirs) == len(own)
    path.write_bytes(theirs)
    refused(folder, rf"{name}")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        TokenSource(folder)


def test_a_changed_byte_of_any_document_is_found(written):
    folder, _ = written
    whole, source = read_all(folder), TokenSource(folder)
    source.verify()
    tar = folder / "shard-000001.tar"
    for place, offset in enumerate(source._open(1).entries[:, 0].tolist()):
        flip(tar, offset)
        refused(folder, rf"shard-000001\.tar: document {place} differs .* copy")
        with pytest.raises(ValueError, match=r"shard-000001\.tar: SHA-256 .* must be"):
            TokenSource(folder).verify()
        flip(tar, offset)
    assert read_all(folder) == whole


def test_an_index_of_another_shape_or_that_points_elsewhere_is_refused(written):
    folder, _ = written
    path, manifest = folder / "shard-000002.index.npy", folder / "manifest.json"
    index = np.load(path)
    np.save(path, index[:-1])
    refused(folder, r"index.npy holds \(2, 4\) .* expects \(3, 4\) int64")
    for column, change, message in (
        (0, -(10**6), "points outside"), (0, 1, "points outside"), (1, 10**6, "points outside"),
        (2, 1, r"counts \{.*manifest\.json"),
    ):  # fmt: skip
        changed = index.copy()
        changed[-1, column] += change
        np.save(path, changed)
        refused(folder, r"index\.npy: SHA-256")
        own = {"index_sha256": sha256_file(path)}
        rewrite(manifest, lambda m, own=own: m["shards"][2].update(own), sealed=True)
        refused(folder, message)


def test_a_shard_that_vanishes_or_changes_after_the_source_is_opened_is_named(written, other):
    folder, _ = written
    source = TokenSource(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing"):
        source.document(5)
    for path in other.glob("shard-000002*"):
        path.replace(folder / path.name)
    with pytest.raises(ValueError, match=r"shard-000002\.index\.npy: SHA-256"):
        source.document(10)


@pytest.mark.parametrize("most", [1, 5])
def test_any_number_of_shards_is_read_with_few_mapped(tmp_path, monkeypatch, most):
    """Two sources together map at most so many shards, in any order of reading."""
    rng = np.random.default_rng(4)
    documents = [[mixed_document(rng) for _ in range(24)] for _ in range(2)]
    folders = [write_source(tmp_path / str(i), d, shards=8) for i, d in enumerate(documents)]
    expected = [read_all(folder) for folder in folders]
    monkeypatch.setattr(mapped_files, "MOST_OPEN", most)
    sources = [TokenSource(folder) for folder in folders]
    for number in rng.permutation(48).tolist():
        source, place = sources[number % 2], number // 2
        assert source.document(place)[0].tolist() == expected[number % 2][place]
        if number % 6:
            continue
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped = {line.split()[-1] for line in maps if "shard-" in line and str(tmp_path) in line}
        assert len(mapped) <= 3 * most
    path = folders[0] / "shard-000003.index.npy"
    content = path.read_bytes()[::-1]
    path.unlink()
    path.write_bytes(content)  # one that is mapped again is checked again
    with pytest.raises(ValueError, match=r"shard-000003\.index\.npy"):
        [sources[0].document(place) for place in range(24)]


# ---------------------------------------------------------------- the manifest


def rewrite(path, change, sealed=False):
    """Edit a manifest; ``sealed``: with the hash that its writer would have given it."""
    manifest = json.loads(path.read_text())
    change(manifest)
    if sealed:
        manifest.pop("sha256", None)
        manifest["sha256"] = manifest_hash(manifest)
    path.write_text(json.dumps(manifest))


def test_a_manifest_without_a_hash_is_compared_with_its_records(written):
    folder, _ = written
    whole, path = read_all(folder), folder / "manifest.json"
    rewrite(path, lambda manifest: manifest.pop("sha256"))
    assert read_all(folder) == whole
    rewrite(path, lambda manifest: manifest["shards"][1].update(raw_sha256="0" * 64))
    refused(folder, r"manifest\.json has no sha256 .* prepare command again")


def test_unfinished_and_foreign_folders_are_refused(written, other):
    folder, _ = written
    path = folder / "manifest.json"
    path.write_bytes((other / "manifest.json").read_bytes())
    refused(folder, r"shard-000000\.index\.npy: SHA-256 .* by the manifest")
    rewrite(path, lambda manifest: manifest.update(format="other/2"))
    refused(folder, "other/2")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        TokenSource(folder)


def leaves(value, path=()):
    """Paths of all values in a JSON value, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from leaves(inner, (*path, key))


def changed_at(value, path, new):
    *before, last = path
    for key in before:
        value = value[key]
    if new is _GONE:
        del value[last]
    else:
        value[last] = new


_GONE = object()
DAMAGES = [_GONE, None, True, -1, 7, 10**30, 0.5, float("nan"), "x", "\x1b[2J", [], {}, [[[]]]]


@pytest.mark.parametrize("sealed", [False, True])
def test_every_field_of_a_manifest_is_what_was_written(tmp_path, sealed):
    """Whatever is edited, added or lost, by a text editor or by one who puts the hash right, the
    source is not read as another one: refused by file, or every document is as before.
    """
    documents = [mixed_document(np.random.default_rng(1)) for _ in range(3)]
    folder = write_source(tmp_path / "mixed", documents, shards=2)
    whole, path, tokens = read_all(folder), folder / "manifest.json", TokenSource(folder).tokens
    original = path.read_text()
    same, read = json.dumps(json.loads(original)), 0
    for place in leaves(json.loads(original)):
        for damage in DAMAGES:
            path.write_text(original)
            rewrite(path, lambda manifest, p=place, d=damage: changed_at(manifest, p, d), sealed)
            if path.read_text() == same:
                continue
            try:
                assert TokenSource(folder).tokens == tokens and read_all(folder) == whole
                read += 1
            except ValueError as error:
                message = str(error)
                assert str(folder) in message and "\x1b" not in message
                assert re.search("again|leave it out", message), message
    # without its hash a manifest is compared with the records; with the right one names of raw
    # shards and the like may say anything: nothing reads them
    assert read == 1 if not sealed else read > 1
