"""Inputs as people have them: JSON lines, tables, plain text and folders give the documents that a
tar with the same content gives; what is hostile or damaged is counted or refused by name.
"""

import base64
import gzip
import io
import json
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image
from raw_shards import contents, png, sentence, write_tar

from earlyfuse.data import prepare as prepare_module
from earlyfuse.data.documents import BadSample, LostSamples
from earlyfuse.data.prepare.shard_files import find_shards
from earlyfuse.data.raw import archive_stream, lines, loose_files, read_documents
from earlyfuse.data.raw.shard import ReadOptions
from earlyfuse.data.shards.manifest import read_manifest
from earlyfuse.data.tokenizers.audio import waveform
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.tools import prepare as command

CAPTIONS = ["a red disc", "ein grüner Kreis", "青い円"]
MEDIA_FIRST = ReadOptions(image_first=1.0)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [png(rng) for _ in CAPTIONS]


def rows(path, *fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(json.dumps(row).encode() + b"\n" for row in fields)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def plain(document):
    if isinstance(document, BadSample):
        return document.cause
    return [segment.payload for segment in document.segments]


def read(path, options=MEDIA_FIRST):
    return [
        plain(document)
        for shard in find_shards("train/t", path, options)
        for document in read_documents(shard, options)
    ]


def write(folder, **files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_the_same_pairs_from_tar_json_lines_table_and_folder_are_the_same_documents(
    tmp_path, images
):
    members, listed, table = [], [], ["file_name,caption"]
    for n, (image, caption) in enumerate(zip(images, CAPTIONS, strict=True)):
        members += [(f"{n}.png", image), (f"{n}.txt", caption.encode())]
        listed.append({"image": f"pictures/{n}.png", "caption": caption})
        table.append(f'pictures/{n}.png,"{caption}"')
    write(tmp_path / "loose", **dict(members))
    write(tmp_path / "pictures", **{name: content for name, content in members if "png" in name})
    (tmp_path / "t.csv").write_text("\r\n".join(table), encoding="utf-8")
    expected = read(write_tar(tmp_path / "a.tar", members))
    assert expected == [[i, c] for i, c in zip(images, CAPTIONS, strict=True)]
    assert read(rows(tmp_path / "a.jsonl", *listed)) == expected
    assert read(rows(tmp_path / "a.jsonl.gz", *listed)) == expected
    assert read(tmp_path / "t.csv") == expected
    assert read(tmp_path / "loose") == expected
    assert read(f"{tmp_path}/loose/{{0..2}}.png") == expected
    encoded = [base64.b64encode(image).decode() for image in images]
    urls = [{"image": f"data:image/png;base64,{e}", "text": c}
            for e, c in zip(encoded, CAPTIONS, strict=True)]  # fmt: skip
    assert read(rows(tmp_path / "b.jsonl", *urls)) == expected
    # the same rows elsewhere, with the folder of the images named
    moved = rows(tmp_path / "else" / "a.jsonl", *listed)
    assert read(moved, ReadOptions(image_first=1.0, media_root=tmp_path)) == expected
    assert read(moved) == ["missing-file"] * 3


def test_the_same_texts_from_tar_json_lines_and_plain_files_are_the_same_documents(tmp_path):
    texts = ["one\n\nof two paragraphs\n", "two", "drei ä"]
    expected = [[text] for text in texts]
    members = {f"{n}.txt": text.encode() for n, text in enumerate(texts)}
    assert read(write_tar(tmp_path / "a.tar", members.items())) == expected
    assert read(rows(tmp_path / "a.jsonl", *({"text": text} for text in texts))) == expected
    assert read(write(tmp_path / "texts", **members)) == expected
    packed = {f"{name}.gz": gzip.compress(content) for name, content in members.items()}
    assert read(write(tmp_path / "packed", **packed)) == expected
    paragraphs = [["one"], ["of two paragraphs"], ["two"], ["drei ä"]]
    for unit, found in (("paragraph", paragraphs), ("line", paragraphs)):
        assert read(tmp_path / "texts", ReadOptions(text_unit=unit)) == found
        assert read(tmp_path / "packed", ReadOptions(text_unit=unit)) == found
    (tmp_path / "p.txt").write_bytes(b"\r\na\r\nb\r\n\r\n\r\nc")
    assert read(tmp_path / "p.txt", ReadOptions(text_unit="paragraph")) == [["a\nb"], ["c"]]


def test_parts_of_a_file_hold_each_of_its_lines_once(tmp_path, monkeypatch):
    """And keys, hashes and paragraphs are those of the whole."""
    monkeypatch.setattr(lines, "_PART_LINES", 7)
    monkeypatch.setattr(lines, "_CHUNK", 64)
    texts = [f"text {n} " + "x" * (n % 50) for n in range(60)]
    path = rows(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    shards = find_shards("train/t", path)
    assert len(shards) == 9 and sum(shard.size for shard in shards) == path.stat().st_size
    documents = [d for shard in shards for d in read_documents(shard)]
    assert [plain(d) for d in documents] == [[text] for text in texts]
    assert [d.key for d in documents] == [f"a.jsonl:{n + 1}" for n in range(60)]
    assert [shard.name for shard in shards][:2] == ["a.jsonl#0", "a.jsonl#1"]
    before = [shard.sha256() for shard in shards]
    assert len(set(before)) == 9
    with open(path, "ab") as file:  # more lines change the last part and add others
        file.write(b'{"text": "new"}\n' * 7)
    assert [shard.sha256() for shard in find_shards("train/t", path)][:8] == before[:8]
    (tmp_path / "b.txt").write_text("\n\n".join("l\n" * (n + 1) for n in range(9)))
    options = ReadOptions(text_unit="paragraph")
    assert len(find_shards("train/t", tmp_path / "b.txt", options)) > 3
    assert [len(text) for (text,) in read(tmp_path / "b.txt", options)] == list(range(1, 18, 2))
    quoted = "file_name,text\n" + "".join(f'{n}.png,"a\n""{n}""\nb"\n' for n in range(9))
    (tmp_path / "c.csv").write_text(quoted)
    write(tmp_path, **{f"{n}.png": bytes([n]) for n in range(9)})
    assert len(find_shards("train/t", tmp_path / "c.csv")) > 2
    assert read(tmp_path / "c.csv") == [[bytes([n]), f'a\n"{n}"\nb'] for n in range(9)]


A, B = b"image a", b"image b"
ENCODED = base64.b64encode(A * 200).decode()
ROWS = {  # a row, its document
    "text": ({"text": "t", "url": "https://x/y.png", "meta": {"a": 1}}, ["t"]),
    "content": ({"content": "t", "path": "src/main.py"}, ["t"]),
    "audio": ({"audio_filepath": "s.flac", "text": "t", "duration": 1.5}, [B, "t"]),
    "sentence": ({"path": "s.flac", "sentence": "t"}, [B, "t"]),
    "several images": ({"images": ["a.png", "b.JPG"], "text": "t"}, [A, B, "t"]),
    "no image": ({"image": None, "images": [], "text": "t"}, ["t"]),
    "placeholders": (
        {"images": ["a.png", "b.JPG"], "text": "x <image> y\n<image>\nz"}, ["x ", A, " y", B, "z"]),
    "two media": (
        {"image": "a.png", "audio": "s.flac", "text": "<audio> is <image>"}, [B, " is ", A]),
    "base64": ({"image_base64": ENCODED, "text": "t"}, [A * 200, "t"]),
    "bytes": ({"image": {"bytes": ENCODED, "path": "gone.png"}, "text": "t"}, [A * 200, "t"]),
    "llava": (
        {"id": "7", "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A disc."}]},
        [A, "What?\nA disc."]),
    "llava without image": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        ["Hi\nHo"]),
    "llava without placeholder": (
        {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A disc.", "source": "s"}]},
        [A, "What?\nA disc."]),
    "messages": (
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A disc."}]},
        [A, "What?\nA disc."]),
    "messages by url": (
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "See"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}}]}]},
        ["See", A * 200]),
    "interleaved": (
        {"texts": ["x", None, "y"], "images": [None, "a.png", None]}, ["x", A, "y"]),
    "interleaved base64": (
        {"texts": ["x", None], "images": [None, ENCODED]}, ["x", A * 200]),
    "mmc4": (
        {"text_list": ["x", "y"], "image_info": [
            {"image_name": "a.png", "matched_text_index": 1},
            {"image_name": "gone.png", "matched_text_index": 0}]},
        ["x", A, "y"]),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_recognised(tmp_path, row):
    write(tmp_path, **{"a.png": A, "b.JPG": B, "s.flac": B})
    assert read(rows(tmp_path / "a.jsonl", ROWS[row][0])) == [ROWS[row][1]]


BAD_ROWS = {
    "unsafe-path": [{"image": "../a.png", "text": "t"}, {"image": "/etc/a.png", "text": "t"},
                    {"image": "link.png", "text": "t"}, {"image": "x/../../a.png", "text": "t"},
                    {"images": ["/dev/stdin.png"], "texts": [None]}],
    "remote-file": [{"image": "https://host/a.png?x=1", "text": "t"},
                    {"images": ["s3://b/a.png"], "texts": [None]}],
    "missing-file": [{"image": "gone.png", "text": "t"}, {"image": "a\0.png", "text": "t"},
                     {"image": "folder.png", "text": "t"}],
    "unsupported-media": [{"image": "a.mp4", "text": "t"}, {"image": "a.png", "text": "<video>"}],
    "foreign-layout": [{"score": 3}, {"image": 3, "text": "t"}, {"image": "a.png", "text": ["t"]},
                       {"image": "a.png", "text": "<image> <image>"},
                       {"conversations": [{"from": "human", "value": "<image> what"}]},
                       {"conversations": [{"from": "human"}]}],
    "empty-text": [{"image": "a.png", "text": " "[:0]}, {"image": "a.png", "caption": "nan"}],
    "corrupt-image": [{"image": "data:image/png;base64,%%%", "text": "t"}],
    "not-utf8": [{"text": "\ud800"}, {"image": "a.png", "text": "\ud800"}],
}  # fmt: skip


@pytest.mark.parametrize("cause", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_counted_by_its_line(tmp_path, cause):
    folder = write(tmp_path / "in", **{"a.png": A})
    write(tmp_path, **{"a.png": A})
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    (folder / "folder.png").mkdir()
    path = rows(folder / "a.jsonl", {"text": "good"}, *BAD_ROWS[cause], {"text": "good"})
    documents = list(read_documents(path))
    assert [plain(d) for d in documents] == [["good"], *[cause] * len(BAD_ROWS[cause]), ["good"]]
    assert "a.jsonl:2" in documents[1].message and str(path) in documents[1].message


def test_damaged_lines_cost_only_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MOST_LINE", 400)
    monkeypatch.setattr(lines, "_CHUNK", 64)
    content = [
        b'\xef\xbb\xbf{"text": "bom"}', b'{"text": "caf\xe9"}', b"", b"[1]", b'{"text": "cut',
        b'{"text": "' + b"x" * 900 + b'"}', b'{"text": "a", "text": "b"}', b"[" * 300,
        b'{"text": "last"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(content))
    assert read(tmp_path / "a.jsonl") == [
        ["bom"], "not-utf8", "bad-json", "bad-json", "too-large", "bad-json", "bad-json", ["last"],
    ]  # fmt: skip


def zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_damaged_compressed_file_is_lost_as_a_whole(tmp_path, pack, monkeypatch):
    content = b"".join(b'{"text": "%d"}\n' % n for n in range(2000))
    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    whole = pack(content)
    path.write_bytes(whole + pack(b'{"text": "more"}'))
    assert len(read(path)) == 2001
    for cut in range(30, len(whole), len(whole) // 7):
        path.write_bytes(whole[:cut])
        assert read(path) == ["truncated"]
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :])
    (lost,) = read_documents(path)
    assert isinstance(lost, LostSamples) and lost.cause in ("corrupt-file", "truncated")
    # a bomb: a line of one letter
    monkeypatch.setattr(archive_stream, "_FREE_BYTES", 1 << 20)
    path.write_bytes(pack(b'{"text": "' + b"a" * (4 << 20)))
    (lost,) = read_documents(path)
    assert lost.cause == "corrupt-file" and "250 times" in lost.message


def test_zstd_without_its_package_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is .*pip install zstandard"):
        find_shards("train/t", tmp_path)


def test_files_that_are_not_what_their_names_say_are_refused_by_name(tmp_path):
    for name, content, said in (
        ("a.jsonl", b"", "an empty file, not JSON lines"),
        ("a.jsonl", b"PAR1" + bytes(9), "a parquet file, not JSON lines"),
        ("a.jsonl", b'[\n{"text": "a"}]', r"a JSON file, not JSON lines: .*jq"),
        ("a.jsonl", "{}".encode("utf-16"), "text in UTF-16, not JSON lines"),
        ("a.jsonl", gzip.compress(b"<!DOCTYPE html>"), "gzip of an HTML page"),
        ("a.tsv", b"\x89PNG", "a PNG image, not a table"),
        ("a.tsv", b"path\tscore\na.png\t1\n", r"a\.tsv must have a heading with a column of"),
        ("a.csv", b"id,sentence\n1,a\n", r"a\.csv must have a heading"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            find_shards("train/t", tmp_path / name)


# ---------------------------------------------------------------- speech


def test_corpora_of_speech_are_read_as_published(tmp_path):
    """LibriSpeech, LibriTTS, Common Voice, LJSpeech, Hugging Face's audio folders."""
    expected = [[b"\1", "ONE TWO"], [b"\2", "THREE"]]
    libri = write(tmp_path / "libri", **{
        "1/2/1-2-0000.flac": b"\1", "1/2/1-2-0001.flac": b"\2", "README.TXT": b"About",
        "1/2/1-2.trans.txt": b"1-2-0000 ONE TWO\n1-2-0001 THREE\n"})  # fmt: skip
    assert read(libri) == expected
    tts = write(tmp_path / "tts", **{
        "1/1_0.wav": b"\1", "1/1_0.normalized.txt": b"ONE TWO", "1/1_0.original.txt": b"1 2",
        "1/1_1.wav": b"\2", "1/1_1.normalized.txt": b"THREE"})  # fmt: skip
    assert read(tts) == expected
    voice = write(tmp_path / "cv", **{
        "clips/a.mp3": b"\1", "clips/b.mp3": b"\2",
        "train.tsv": b'client_id\tpath\tsentence\nx\ta.mp3\tONE TWO\nx\tb.mp3\tTHREE\n',
        "test.tsv": b"client_id\tpath\tsentence\nx\tc.mp3\tFOUR \"quoted\n"})  # fmt: skip
    assert read(voice / "train.tsv") == expected
    assert read(voice / "test.tsv") == ["missing-file"]
    lj = write(tmp_path / "lj", **{
        "wavs/LJ1.wav": b"\1", "wavs/LJ2.wav": b"\2",
        "metadata.csv": b"LJ1|1 2|ONE TWO\nLJ2|3|THREE\n"})  # fmt: skip
    assert read(lj) == read(lj / "metadata.csv") == expected
    hub = write(tmp_path / "hub", **{
        "a.ogg": b"\1", "b.opus": b"\2",
        "metadata.csv": b"file_name,transcription\na.ogg,ONE TWO\nb.opus,THREE\nc\n"})  # fmt: skip
    assert read(hub) == [*expected, "bad-row"]


def test_loose_media_without_text_and_double_names_are_counted(tmp_path):
    folder = write(tmp_path / "a", **{
        "a.wav": b"\1", "b.flac": b"\2", "b.wav": b"\3", "b.txt": b"b", "c.txt": b"c",
        ".hidden.wav": b"\4"})  # fmt: skip
    (folder / "d.wav").symlink_to(tmp_path / "outside.wav")
    write(tmp_path, **{"outside.wav": b"\5"})
    assert read(folder) == ["missing-member", [b"\2", "b"], "duplicate-key", "unsafe-path"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="the folder holds nothing"):
        find_shards("train/t", tmp_path / "none")


def test_large_folders_are_divided_and_a_text_above_the_limit_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(loose_files, "_GROUP_FILES", 2)
    monkeypatch.setattr(loose_files, "MOST_TEXT", 5)
    folder = write(tmp_path / "a", **{f"{n}.txt": b"x" * (n + 2) for n in range(5)})
    shards = find_shards("train/t", folder)
    assert [shard.name for shard in shards] == ["a#0", "a#1", "a#2"]
    assert read(folder) == [["xx"], ["xxx"], ["xxxx"], ["xxxxx"], "too-large"]
    hashes = [shard.sha256() for shard in shards]
    (folder / "4.txt").write_bytes(b"y")
    assert [a == b.sha256() for a, b in zip(hashes, shards, strict=True)] == [True, True, False]


@pytest.mark.parametrize(("kind", "subtype"), [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_compressed_audio_is_decoded_and_a_cut_file_refused(kind, subtype):
    wave = 0.3 * np.sin(np.arange(64000) * (2 * np.pi * 440 / 16000))
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, format=kind, subtype=subtype)
    decoded = waveform(file.getvalue(), 16000)
    assert abs(len(decoded) - len(wave)) < 1600
    spectrum = np.abs(np.fft.rfft(decoded[4000:20000]))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    with pytest.raises(BadSample, match="corrupt-audio"):
        waveform(file.getvalue()[: len(file.getvalue()) * 2 // 3], 16000)


# ---------------------------------------------------------------- MINT-1T


def test_pages_of_a_tiff_take_the_places_of_the_names(tmp_path):
    pages = [Image.new(mode, (9, 8), colour) for mode, colour in (("RGB", "red"), ("L", 7))]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    names = ["page_0_image_85", None, "page_1_image_2"]
    fields = {"texts": [None, "between", None], "images": names, "pdf_name": "x.pdf"}

    def tar(name, tiff, fields):
        members = [("k.json", json.dumps(fields).encode()), ("k.tiff", tiff)]
        return write_tar(tmp_path / name, members)

    (document,) = read_documents(tar("a.tar", file.getvalue(), fields))
    first, between, last = (segment.payload for segment in document.segments)
    assert between == "between" and document.unused == ()
    for payload, page in ((first, pages[0]), (last, pages[1])):
        assert (image_pixels(payload, 8) == np.asarray(page.convert("RGB"))[:8, :8]).all()
    fewer = {**fields, "images": [names[0], None, None], "texts": [None, "between", "x"]}
    assert read(tar("b.tar", file.getvalue(), fewer)) == ["foreign-layout"]
    assert read(tar("c.tar", file.getvalue()[:200], fields)) == ["corrupt-image"]
    # a TIFF alone is an image like any other
    pair = write_tar(tmp_path / "d.tar", [("k.tif", file.getvalue()), ("k.txt", b"t")])
    assert read(pair) == [[file.getvalue(), "t"]]


# ---------------------------------------------------------------- prepare


@pytest.fixture
def command_line(tmp_path, capsys):
    def build(*arguments, out="out"):
        options = ["--out", str(tmp_path / out), "--workers", "1", "--text-vocab", "322"]
        media = ["--image-size", "8", "--image-tokenizer", "pixels"]
        status = command.main(["build", *options, *media, *map(str, arguments)])
        return status, capsys.readouterr()

    return build


def test_a_source_in_parts_resumes_to_the_same_bytes(tmp_path, monkeypatch, command_line, images):
    """JSON lines in parts and a folder in groups, stopped after some of them."""
    monkeypatch.setattr(lines, "_PART_LINES", 5)
    monkeypatch.setattr(loose_files, "_GROUP_FILES", 2)
    rng = np.random.default_rng(1)
    rows(tmp_path / "a.jsonl", *({"text": sentence(rng)} for _ in range(23)))
    for n, image in enumerate(images * 2):
        write(tmp_path / "loose", **{f"{n}.png": image, f"{n}.txt": sentence(rng).encode()})
    sources = ["--train", f"rows={tmp_path / 'a.jsonl'}", f"loose={tmp_path / 'loose'}"]
    assert command_line(*sources, out="whole")[0] == 0
    made = read_manifest(tmp_path / "whole" / "train" / "rows")
    assert [shard["raw"] for shard in made["shards"]] == [f"a.jsonl#{n}" for n in range(5)]
    assert made["documents"] == 23
    assert read_manifest(tmp_path / "whole" / "train" / "loose")["documents"] == 6
    done, finish = [], prepare_module.tokenise_shard

    def stops(job):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(job.raw)
        return finish(job)

    monkeypatch.setattr(prepare_module, "tokenise_shard", stops)
    assert command_line(*sources)[0] != 0
    monkeypatch.setattr(prepare_module, "tokenise_shard", lambda job: done.append(0) or finish(job))
    assert command_line(*sources)[0] == 0
    assert len(done) == 8 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_that_were_missing_are_read_when_the_command_is_repeated(
    tmp_path, command_line, images
):
    listed = [{"image": f"{n}.png", "text": "words of it"} for n in range(3)]
    path = rows(tmp_path / "rows" / "a.jsonl", *listed)
    rng = np.random.default_rng(2)
    texts = rows(tmp_path / "t.jsonl", *({"text": sentence(rng)} for _ in range(30)))
    source = ["--train", f"a={path}", f"t={texts}"]
    given = ("--media-root", tmp_path / "media")
    status, said = command_line(*source, *given)
    assert status == 2 and "media_root" in said.err and not (tmp_path / "out").exists()
    write(tmp_path / "media", **{"0.png": images[0]})
    status, said = command_line(*source, *given)
    assert status == 2 and "2 of 3 samples are bad" in said.err and "a.jsonl:2" in said.err
    write(tmp_path / "media", **{"1.png": images[1], "2.png": images[2]})
    assert command_line(*source, *given)[0] == 0
    assert read_manifest(tmp_path / "out" / "train" / "a")["documents"] == 3


def test_options_that_mean_nothing_to_the_sources_are_refused(tmp_path, command_line):
    write(tmp_path / "a", **{"a.txt": b"text"})
    rows(tmp_path / "b" / "a.jsonl", {"text": "t"})
    for source, option, value in (("a", "media_root", tmp_path), ("b", "text_unit", "line")):
        name = f"--{option.replace('_', '-')}"
        status, said = command_line("--train", f"s={tmp_path / source}", name, value)
        assert status == 2 and f"{option} ({value}) means nothing" in said.err


def test_validation_on_a_file_below_the_training_folder_is_refused(tmp_path, command_line):
    write(tmp_path / "all", **{f"{n}/{n}.txt": b"text" for n in range(3)})
    sources = ["--train", f"a={tmp_path}/all", "--validation", f"a={tmp_path}/all/1"]
    status, said = command_line(*sources)
    assert status == 2 and "1.txt of validation/a is a training shard too" in said.err
