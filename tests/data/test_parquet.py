"""Parquet files: rows are the documents that a tar of the same data gives; columns are recognised
or refused; row groups are units of work; nothing in a file is fetched, followed out of the media
root, or decoded without bounds.
"""

import base64
import hashlib
import json
import os
import socket
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_shards import articles, contents, pairs, png, quiet, sentence, spec_of, write_tar

from earlyfuse.data import atomic
from earlyfuse.data.documents import BadSample, LostSamples
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.prepare.shard_files import find_shards
from earlyfuse.data.raw import parquet, read_documents
from earlyfuse.data.raw.shard import ReadOptions
from earlyfuse.models.vocabulary import Modality
from earlyfuse.tools import prepare as command

IMAGE, OTHER, SOUND = b"an image's bytes" * 9, b"another image" * 9, b"a sound" * 9
B64 = base64.b64encode
FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
CHAT = pa.struct([("role", pa.string()), ("content", pa.string())])
ANSWERED = pa.struct([("user", pa.string()), ("assistant", pa.string())])
INFO = pa.struct([("raw_url", pa.string()), ("matched_text_index", pa.int64())])
URL = "https://host/a.jpg"


def write(path, fields, rows, row_group_size=None):
    """``fields``: name → type; ``rows``: one value for each field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in fields]
    arrays = [pa.array(c, kind) for c, kind in zip(columns, fields.values(), strict=True)]
    table = pa.table(dict(zip(fields, arrays, strict=True)))
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def read(path, root=None, image_first=1.0, **columns):
    options = ReadOptions("auto", image_first, root, columns=tuple(columns.items()))
    return list(read_documents(path, options))


def shards(path, **columns):
    return parquet.row_groups(path, ReadOptions(columns=tuple(columns.items())))


def plain(documents):
    return [
        found.cause if isinstance(found, BadSample) else [s.payload for s in found.segments]
        for found in documents
    ]


def as_written(fields, rows, tmp_path, root=None):
    return plain(read(write(tmp_path / "a.parquet", fields, rows), root))


LAYOUTS = {
    "text": ({"text": pa.large_string(), "url": pa.string()}, ["prose, αβγ", URL], ["prose, αβγ"]),
    "one string": ({"story": pa.string(), "id": pa.int64()}, ["prose", 1], ["prose"]),
    "struct": ({"image": FILE, "caption": pa.string()}, [(IMAGE, "a.png"), "red"], [IMAGE, "red"]),
    "binary": ({"text": pa.string(), "image": pa.binary()}, ["red", IMAGE], [IMAGE, "red"]),
    "base64": (
        {"img_base64": pa.string(), "caption": pa.string(), "id": pa.string()},
        [B64(IMAGE).decode(), "red", "7"],
        [IMAGE, "red"],
    ),
    "speech": ({"audio": FILE, "sentence": pa.string()}, [(SOUND, None), "hi"], [SOUND, "hi"]),
    "several": (
        {"images": pa.list_(pa.binary()), "caption": pa.string()},
        [[IMAGE, OTHER], "two"],
        [IMAGE, OTHER, "two"],
    ),
    "interleaved": (
        {"images": pa.list_(FILE), "texts": pa.list_(pa.string()), "metadata": pa.string()},
        [[None, (IMAGE, None), None, (OTHER, None)], ["one", None, "two", None], "[]"],
        ["one", IMAGE, "two", OTHER],
    ),
    "turns": (
        {"images": pa.list_(FILE), "texts": pa.list_(ANSWERED)},
        [[(IMAGE, None)], [("what?", "a cat"), ("sure?", "yes")]],
        [IMAGE, "what?\na cat\nsure?\nyes"],
    ),
    "placeholders": (
        {"image": FILE, "conversations": pa.list_(TURN)},
        [(IMAGE, None), [("human", "see <image> here"), ("gpt", "yes")]],
        ["see ", IMAGE, " here\nyes"],
    ),
    "chat": (
        {"messages": pa.list_(CHAT), "prompt": pa.string()},
        [[("user", "a"), ("assistant", "b")], "a"],
        ["a\nb"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_recognised_from_the_schema(layout, tmp_path):
    fields, row, expected = LAYOUTS[layout]
    assert as_written(fields, [row], tmp_path) == [expected]


def test_columns_named_win_over_recognition(tmp_path):
    fields = {"caption": pa.string(), "text": pa.string(), "thumb": pa.binary(), "x": pa.binary()}
    path = write(tmp_path / "a.parquet", fields, [["short", "long", OTHER, IMAGE]])
    assert plain(read(path, text="caption", images="x")) == [[IMAGE, "short"]]
    assert plain(read(path, images="thumb")) == [[OTHER]]


def test_hugging_face_features_decide_the_medium(tmp_path):
    table = pa.table({"input": pa.array([(SOUND, None)], FILE), "text": ["hi"]})
    features = {"info": {"features": {"input": {"_type": "Audio"}, "text": {"_type": "Value"}}}}
    path = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    (document,) = read(path)
    assert [s.modality for s in document.segments] == [Modality.SPEECH, Modality.TEXT]


STRING = pa.string()
UNCLEAR = {
    "two texts": ({"text": STRING, "caption": STRING}, "'text' and 'caption' can each be the text"),
    "two images": ({"text": STRING, "image": FILE, "img": FILE}, "'image' and 'img' can each be"),
    "files of any kind": ({"text": STRING, "content_file": FILE}, "holds files"),
    "bytes of any kind": ({"text": STRING, "payload": pa.binary()}, "holds files"),
    "no text": ({"image": FILE, "label": pa.int64()}, "no column .* the text"),
    "captions of URLs": ({"url": STRING, "caption": STRING}, "never fetched"),
    "list beside item": ({"texts": pa.list_(STRING), "image": FILE}, "lists of media only"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_unclear_schemas_are_refused_with_the_schema_and_the_option(case, tmp_path):
    fields, problem = UNCLEAR[case]
    path = write(tmp_path / "a.parquet", fields, [])
    with pytest.raises(ValueError, match=f"a.parquet: .*{problem}") as refused:
        shards(path)
    shown = str(refused.value).partition("its columns are ")[2]
    assert all(f"{name}: " in shown for name in fields) and "--columns text=" in shown
    if "files" in case:
        assert f"text=text images={list(fields)[1]}" in shown


def test_extension_types_and_missing_columns_are_refused(tmp_path):
    table = pa.table({"text": pa.array(['"x"'], pa.json_()), "n": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    for columns in ({"text": "text"}, {"text": "n"}, {"text": "absent"}):
        with pytest.raises(ValueError, match=r"column .*--columns"):
            shards(tmp_path / "a.parquet", **columns)


def test_documents_equal_those_of_tars_with_the_same_data(tmp_path):
    """Every field of a document, keys included, hence also whether the image leads."""
    rng = np.random.default_rng(0)
    rows = [[(png(rng), None), sentence(rng)] for _ in range(40)]
    rows[5][1], rows[6][1], rows[7][0] = "nan", None, None
    fields = {"image": FILE, "caption": STRING}
    path = write(tmp_path / "a.parquet", fields, rows, row_group_size=16)
    members = [
        (f"a/{n // 16}/{n % 16}.{name}", content)
        for n, (image, text) in enumerate(rows)
        for name, content in (("jpg", image and image[0]), ("txt", text and text.encode()))
        if content is not None
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    found, expected = read(path, image_first=0.5), list(read_documents(tar))
    causes = [d.cause for d in found if isinstance(d, BadSample)]
    assert causes == [d.cause for d in expected if isinstance(d, BadSample)]
    assert causes == ["empty-text", "missing-member", "missing-member"]
    good = [d for d in found if not isinstance(d, BadSample)]
    assert good == [d for d in expected if not isinstance(d, BadSample)]
    assert 5 < sum(d.segments[0].modality == Modality.IMAGE for d in good) < 32


def test_bad_cells_are_counted_by_file_row_group_and_row(tmp_path):
    lists = {"texts": pa.list_(STRING), "images": pa.list_(STRING)}
    image = B64(IMAGE).decode()
    good = [[None, "a"], [image, None]]
    rows = [good, [["a"], [image]], [[None, "a"], ["no base64!", None]], [["a"], [URL]], good]
    found = read(write(tmp_path / "a.parquet", lists, rows, row_group_size=2))
    causes = ["foreign-layout", "corrupt-image", "remote-file"]
    assert plain(found) == [[IMAGE, "a"], *causes, [IMAGE, "a"]]
    for bad, key in zip(found[1:4], ("a/0/1", "a/1/0", "a/1/1"), strict=True):
        assert f"a.parquet: sample '{key}'" in str(bad)
    invalid = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "b.parquet")
    assert plain(read(tmp_path / "b.parquet")) == [["good"], "not-utf8"]


def hashed(url):
    return hashlib.sha256(url.encode()).hexdigest()


def test_urls_are_found_under_the_media_root_by_their_sha256(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # nothing may be fetched
    urls = [f"https://host/{n}.jpg?w=1" for n in range(5)]
    sha = [hashed(url) for url in urls]
    root = tmp_path / "media"
    names = [sha[0], f"{sha[1]}.png", f"{sha[2][:2]}/{sha[2]}", f"{sha[3][:2]}/{sha[3][2:4]}/"]
    names[3] += f"{sha[3]}.webp"
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE + bytes([number]))
    lists = {"texts": pa.list_(STRING), "images": pa.list_(STRING)}
    rows = [[[None] * 5 + ["end"], [*urls, None]], [["a", None], [None, urls[4]]]]
    path = write(tmp_path / "a.parquet", lists, rows)
    found, lost = read(path, root=root)
    assert plain([found]) == [[*(IMAGE + bytes([n]) for n in range(4)), "end"]]
    assert [kind for kind, _ in found.unused if kind != ".jpg"] == ["missing-file"]
    assert lost.cause == "missing-file" and urls[4] in str(lost)
    page = write(tmp_path / "p.parquet", {"url": STRING, "text": STRING}, [[urls[0], "a page"]])
    assert plain(read(page, root=root)) == [["a page"]]
    matched = {"text_list": pa.list_(STRING), "image_info": pa.list_(INFO)}
    row = [["one", "two"], [(urls[0], 1), (urls[4], 0)]]
    path = write(tmp_path / "m.parquet", matched, [row])
    assert plain(read(path, root=root)) == [["one", IMAGE + b"\0", "two"]]


def test_paths_stay_inside_the_media_root(tmp_path):
    root = tmp_path / "media"
    (root / "in").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(OTHER)
    (root / "in" / "a.jpg").write_bytes(IMAGE)
    (root / "in" / "same.jpg").symlink_to("a.jpg")
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(root / "pipe.jpg")
    inside = ["in/a.jpg", "in/same.jpg", str(root / "in" / "a.jpg")]
    outside = ["../secret.jpg", "out.jpg", str(tmp_path / "secret.jpg")]
    absent = ["gone.jpg", "pipe.jpg", "in", "a\0b"]
    rows = [[path, "red"] for path in (*inside, *outside, *absent)]
    fields = {"image_path": STRING, "text": STRING}
    assert as_written(fields, rows, tmp_path, root=root) == [
        *[[IMAGE, "red"]] * 3, *["unsafe-path"] * 3, *["missing-file"] * 4
    ]  # fmt: skip


def test_cells_and_row_groups_above_the_limits_are_refused(tmp_path, monkeypatch):
    """A dictionary makes one image of 1 MiB, 64 times a row, a file of about 1 MiB."""
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 128, pa.int32()), [os.urandom(1 << 20)])
    images = pa.ListArray.from_arrays([0, 64, 128], one)
    path = tmp_path / "a.parquet"
    table = pa.table({"images": images, "text": ["a", "b"]})
    pq.write_table(table, path, store_schema=False, dictionary_pagesize_limit=1 << 22)
    monkeypatch.setattr(parquet, "MOST_SAMPLE_BYTES", 16 << 20)
    before = pa.default_memory_pool().max_memory()
    assert plain(read(path)) == ["too-large"] * 2
    assert pa.default_memory_pool().max_memory() < before + (32 << 20)
    monkeypatch.setattr(parquet, "MOST_ROW_GROUP_BYTES", 1 << 19)
    with pytest.raises(ValueError, match=r"row group 0 has .* in columns text, images, above"):
        shards(path)


def test_damage_at_any_byte_is_a_loss_or_a_refusal(tmp_path, monkeypatch):
    """Never another document: pages have checksums; and every loss is counted in rows."""
    monkeypatch.setattr(parquet, "UNIT_BYTES", 1)
    table = pa.table({"text": [f"prose number {n} " * 3 for n in range(40)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=20, write_page_checksum=True)
    whole, good = path.read_bytes(), plain(read(path))
    start = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    outcomes = set()
    for at in range(4, len(whole), 13):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        try:
            found = read(path)
        except ValueError as error:  # other columns than they were
            assert at >= start and "a.parquet" in str(error)
            continue
        lost = [d for d in found if isinstance(d, LostSamples)]
        outcomes.add(len(lost))
        if at < start:
            rows = [d for d in plain(found) if d != "corrupt-file"]
            assert all(row in good for row in rows)
            assert len(rows) + sum(d.samples() for d in lost) == 40
    assert {0, 1} <= outcomes
    for cut in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.parquet is a parquet file that cannot be read"):
            find_shards("train/t", path)
        (shard,) = find_shards("train/t", path, failed=True)
        assert plain(read_documents(shard)) == ["corrupt-file"]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A specification of two sources, of three and two units."""
    monkeypatch.setattr(parquet, "UNIT_BYTES", 1)
    rng, folder = np.random.default_rng(0), tmp_path / "raw"
    texts = [["".join(sentence(rng) for _ in range(5))] for _ in range(80)]
    write(folder / "books" / "0.parquet", {"text": STRING}, texts, row_group_size=30)
    images = [[(png(rng), None), sentence(rng)] for _ in range(30)]
    write(folder / "pairs.parquet", {"image": FILE, "caption": STRING}, images, row_group_size=15)
    (folder / "books" / "README.md").touch()
    names = {"books": folder / "books", "pairs": f"{folder}/*.parquet"}
    return lambda out: spec_of(tmp_path, out, train=names, validation={})


class Stopped(BaseException):
    pass


def test_row_groups_are_units_that_resume_to_the_same_bytes(tables, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    manifests = prepare(tables(whole), quiet())
    assert [shard["raw"] for shard in manifests["train/books"]["shards"]] == [
        f"0.parquet#{n}" for n in range(3)
    ]
    assert manifests["train/pairs"]["documents"] == 30
    rename, allowed = os.replace, 0

    def rename_some(source, target):
        nonlocal allowed
        if allowed == 0:
            raise Stopped
        allowed -= 1
        rename(source, target)

    spec = replace(tables(tmp_path / "parts"), tokenizers=whole / "tokenizers", text_vocab=2048)
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", rename_some)
        for attempt in range(1, 50):
            allowed = 3 + attempt % 3
            try:
                prepare(spec, quiet())
                break
            except Stopped:
                pass
    assert attempt > 4
    assert contents(tmp_path / "parts") == contents(whole)


def test_prepared_like_tars_of_the_same_texts(tables, tmp_path):
    """Tokens equal, whichever file the texts came in."""
    rng = np.random.default_rng(0)
    members = list(articles(rng, 80))
    write_tar(tmp_path / "tars" / "0.tar", members)
    pictures = list(pairs(rng, 30))
    write_tar(tmp_path / "tars" / "1.tar", pictures)
    out = tmp_path / "out"
    ready = prepare(tables(out), quiet())
    rows = [[text.decode()] for _, text in members]
    path = write(tmp_path / "again.parquet", {"text": STRING}, rows, row_group_size=100)
    spec = {"tokenizers": out / "tokenizers", "max_bad_rate": 0.0, "workers": 1}
    both = [
        prepare(PrepareSpec(tmp_path / name, {"t": source}, **spec), quiet())["train/t"]
        for name, source in (("x", path), ("y", tmp_path / "tars" / "0.tar"))
    ]
    assert both[0]["shards"][0]["sha256"] == both[1]["shards"][0]["sha256"]
    assert ready["train/books"]["documents"] == both[0]["documents"] == 80


def test_images_that_arrive_later_are_noticed(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "media"
    root.mkdir()
    rows = [[f"https://host/{n}", sentence(rng) * 9] for n in range(40)]
    path = write(tmp_path / "a.parquet", {"url": STRING, "caption": STRING}, rows)
    for url, _ in rows[1:]:
        (root / hashed(url)).write_bytes(png(rng))
    options = {"train": {"a": path}, "validation": {}, "media_root": root, "max_bad_rate": 0.5}
    spec = spec_of(tmp_path, tmp_path / "out", **options)
    assert prepare(spec, quiet())["train/a"]["drops"] == {"missing-file": 1}
    assert "a.parquet: sample 'a/0/0': 'https://host/0' is not" in describe(tmp_path / "out")
    (root / hashed(rows[0][0])).write_bytes(png(rng))
    with pytest.raises(ValueError, match="--replace"):
        prepare(spec, quiet())


def test_the_command_takes_columns_for_each_source(tmp_path, capsys):
    rng = np.random.default_rng(0)
    texts = [[sentence(rng) * 9, "x"] for _ in range(40)]
    write(tmp_path / "t.parquet", {"text": STRING, "caption": STRING}, texts)
    images = [[png(rng), sentence(rng), ""] for _ in range(20)]
    write(tmp_path / "p.parquet", {"im": pa.binary(), "text": STRING, "caption": STRING}, images)
    arguments = [
        "build", "--out", str(tmp_path / "out"), "--train", f"t={tmp_path / 't.parquet'}",
        f"p={tmp_path / 'p.parquet'}", "--text-vocab", "330", "--image-size", "8", "--codes", "16",
        "--columns", "text=text",
    ]  # fmt: skip
    assert command.main([*arguments, "q:images=im"]) == 2
    assert "'q:images'" in capsys.readouterr().err
    assert command.main([*arguments, "p:images=im", "p:text=text", "--workers", "1"]) == 0
    assert "2 of 2 shards, 60 documents" in capsys.readouterr().err
    (tmp_path / "tar").mkdir()
    write_tar(tmp_path / "tar" / "0.tar", articles(rng, 5))
    write(tmp_path / "tar" / "0.parquet", {"caption": STRING, "url": STRING}, [["a", URL]])
    assert command.main(["build", "--out", str(tmp_path / "o"), "--train",
                         f"t={tmp_path / 'tar'}", "--columns", "text=caption"]) == 2  # fmt: skip
    assert "of parquet files" in capsys.readouterr().err  # of a folder of tars, those are read
