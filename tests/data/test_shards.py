"""Reading prepared sources: what was written comes back, and damage is refused by name."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_sources import BOS, EOS, HASHES, image, mixed_document, write_source

from earlyfuse.data.shards import source as token_source
from earlyfuse.data.shards import writer
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.lanes import Blend
from earlyfuse.models.vocabulary import Vocabulary


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(1)
    documents = [mixed_document(rng) for _ in range(11)]
    return write_source(tmp_path / "mixed", documents, shards=3), documents


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
    with pytest.raises(ValueError, match="read-only"):
        source.document(0)[0][0] = 1
    for outside in (-1, 11):
        with pytest.raises(IndexError, match="which has 11"):
            source.document(outside)


def test_wide_vocabularies_are_read_as_uint32(tmp_path):
    wide = Vocabulary(size=70000, bos=1, eos=2, pad=0)
    folder = write_source(tmp_path / "wide", [[1, 69999, 2], [1, 2]], shards=1, vocabulary=wide)
    tokens, _ = TokenSource(folder).document(0)
    assert tokens.tolist() == [1, 69999, 2]


def test_empty_shards_are_skipped(tmp_path):
    rng = np.random.default_rng(2)
    documents = [mixed_document(rng) for _ in range(2)]
    folder = write_source(tmp_path / "few", documents, shards=4)
    source = TokenSource(folder)
    assert [source.document(i)[0].tolist() for i in range(2)] == documents


def test_identity_is_of_the_tokens_not_of_the_place(tmp_path):
    documents = [[BOS, *image(), EOS], [BOS, 9, EOS]]
    one = TokenSource(write_source(tmp_path / "a" / "x", documents))
    same = TokenSource(write_source(tmp_path / "b" / "y", documents))
    other = TokenSource(write_source(tmp_path / "c" / "x", documents[::-1]))
    assert one.identity == same.identity != other.identity


def test_a_truncated_or_missing_shard_is_refused_with_its_bytes(written):
    folder, _ = written
    tar = folder / "shard-000001.tar"
    content = tar.read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        tar.write_bytes(content[:size])
        message = f"shard-000001.tar is truncated: .* {len(content)} bytes, found {size};"
        with pytest.raises(ValueError, match=message):
            TokenSource(folder)
    tar.unlink()
    with pytest.raises(ValueError, match=f"shard-000001.tar is missing: .* {len(content)} bytes"):
        TokenSource(folder)


def test_a_damaged_index_is_refused(written):
    folder, _ = written
    path = folder / "shard-000002.index.npy"
    index = np.load(path)
    source = TokenSource(folder)
    np.save(path, index[:-1])
    with pytest.raises(ValueError, match=r"index.npy holds \(2, 4\) .* expects \(3, 4\) int64"):
        source.document(10)
    index[-1, 1] += 10**6
    np.save(path, index)
    with pytest.raises(ValueError, match="points past the"):
        TokenSource(folder).document(10)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-000002\.index\.npy is missing"):
        TokenSource(folder)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def read_all(folder):
    source = TokenSource(folder)
    return [source.document(number)[0].tolist() for number in range(len(source))]


def test_tokens_that_were_not_prepared_are_never_read(written, tmp_path):
    """A changed byte of any document, and files of another source of the same size."""
    folder, documents = written
    whole = read_all(folder)
    begin = TokenSource(folder)._open(1).entries[:, 0]
    tar = folder / "shard-000001.tar"
    for place, offset in enumerate(begin.tolist()):
        flip(tar, offset)
        with pytest.raises(
            ValueError, match=rf"shard-000001\.tar: document {place} is not .* copy"
        ):
            read_all(folder)
        flip(tar, offset)
    assert read_all(folder) == whole
    other = write_source(tmp_path / "other", documents[::-1], shards=3)
    for suffix in (".tar", ".index.npy", ".crc.npy"):
        path = tar.with_suffix(suffix)
        own = path.read_bytes()
        path.write_bytes((other / path.name).read_bytes())
        assert len(own) == path.stat().st_size
        with pytest.raises(ValueError, match=r"shard-000001\."):
            read_all(folder)
        path.write_bytes(own)
    (folder / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match=r"shard-000000\.index\.npy: SHA-256 .* by the manifest"):
        read_all(folder)


@pytest.mark.parametrize("suffix", [".index.npy", ".crc.npy"])
def test_damaged_index_and_checksums_are_named(written, suffix):
    folder, _ = written
    path = folder / f"shard-000000{suffix}"
    own = path.read_bytes()
    for at in (0, 5, 40, 60, 64, 130, len(own) - 1):
        flip(path, at)
        with pytest.raises(
            ValueError, match=rf"{path.name}.*(copy|prepare) it again|{path.name}.*cop"
        ):
            read_all(folder)
        path.write_bytes(own)
    for content in (b"", own[:-1], own + b"0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} .*copy it again"):
            read_all(folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing"):
        TokenSource(folder)


def test_a_shard_that_vanishes_or_changes_after_the_source_is_opened_is_named(written, tmp_path):
    folder, documents = written
    source = TokenSource(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing"):
        source.document(5)
    other = write_source(tmp_path / "other", documents[::-1], shards=3)
    for path in other.glob("shard-000002*"):
        path.replace(folder / path.name)
    with pytest.raises(ValueError, match=r"shard-000002\.index\.npy: SHA-256"):
        source.document(10)


@pytest.mark.parametrize("most", [1, 5])
def test_any_number_of_shards_is_read_with_few_mapped(tmp_path, monkeypatch, most):
    """Of two sources together no more than so many are mapped, whatever the order of reading."""
    rng = np.random.default_rng(4)
    documents = [[mixed_document(rng) for _ in range(24)] for _ in range(2)]
    folders = [write_source(tmp_path / str(i), d, shards=8) for i, d in enumerate(documents)]
    expected = [read_all(folder) for folder in folders]
    monkeypatch.setattr(token_source, "MOST_OPEN", most)
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
    other = path.read_bytes()[::-1]
    path.unlink()
    path.write_bytes(other)  # one that is mapped again is checked again
    with pytest.raises(ValueError, match=r"shard-000003\.index\.npy"):
        [sources[0].document(place) for place in range(24)]


def rewrite(path, change, sealed=False):
    """Edit a manifest; ``sealed``: with the hash that its writer would have given it."""
    manifest = json.loads(path.read_text())
    change(manifest)
    if sealed:
        manifest.pop("sha256", None)
        manifest["sha256"] = writer._digest(manifest)
    path.write_text(json.dumps(manifest))


def test_a_manifest_of_before_it_vouched_for_itself_is_read_by_its_records(written):
    folder, _ = written
    whole = read_all(folder)
    path = folder / "manifest.json"
    rewrite(path, lambda manifest: manifest.pop("sha256"))
    assert read_all(folder) == whole
    rewrite(path, lambda manifest: manifest["shards"][1].update(raw_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"manifest\.json has no sha256 .* prepare command again"):
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
    whole, path = read_all(folder), folder / "manifest.json"
    original = path.read_text()
    same = json.dumps(json.loads(original))
    tokens = TokenSource(folder).tokens
    read = 0
    for place in leaves(json.loads(original)):
        for damage in DAMAGES:
            path.write_text(original)
            rewrite(path, lambda manifest, p=place, d=damage: changed_at(manifest, p, d), sealed)
            if path.read_text() == same:
                continue
            try:
                source = TokenSource(folder)
                documents = [source.document(number)[0].tolist() for number in range(len(source))]
                assert source.tokens == tokens and documents == whole
                read += 1
            except ValueError as error:
                message = str(error)
                assert str(folder) in message and "\x1b" not in message
                assert re.search("again|leave it out", message), message
    # without its hash a manifest is compared with the records; with the right one names of raw
    # shards and the like may say anything: nothing reads them
    assert read == 1 if not sealed else read > 1


def test_verify_finds_a_changed_byte(written):
    folder, _ = written
    source = TokenSource(folder)
    source.verify()
    tar = folder / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: SHA-256 .* must be"):
        TokenSource(folder).verify()


def test_unfinished_or_foreign_folders_are_refused(written):
    folder, _ = written
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": "other/2"}))
    with pytest.raises(ValueError, match="other/2"):
        TokenSource(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        TokenSource(folder)


def test_a_source_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no token"):
        TokenSource(write_source(tmp_path / "none", [[], []], shards=1))


def test_sources_of_different_tokenizers_do_not_mix(tmp_path):
    documents = [[BOS, *image(), EOS]]
    ours = TokenSource(write_source(tmp_path / "ours", documents, shards=1))
    hashes = HASHES | {"image": "cc"}
    theirs = TokenSource(write_source(tmp_path / "theirs", documents, shards=1, hashes=hashes))
    message = r"image tokenizer of .*ours \(bb\) and of .*theirs \(cc\) must be the same"
    with pytest.raises(ValueError, match=message):
        Blend((ours, theirs), (0.5, 0.5))
    again = TokenSource(write_source(tmp_path / "b" / "ours", documents, shards=1))
    with pytest.raises(ValueError, match="both named 'ours'"):
        Blend((ours, again), (0.5, 0.5))
    wider = Vocabulary(size=67, bos=BOS, eos=EOS, pad=0, media=ours.vocabulary.media)
    other = TokenSource(write_source(tmp_path / "w", documents, shards=1, vocabulary=wider))
    with pytest.raises(ValueError, match=r"vocabulary of .*ours"):
        Blend((ours, other), (0.5, 0.5))


def test_shards_remain_ordinary_tars(written):
    folder, documents = written
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = [np.load(io.BytesIO(tar.extractfile(name).read())) for name in tar.getnames()]
    assert np.concatenate(members).tolist() == [t for d in documents[::3] for t in d]
