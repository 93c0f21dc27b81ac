"""Raw shards: every layout is read as people write it, truncated files yield no partial document,
causes have names, and unused members are named.
"""

import base64
import gzip
import io
import json
import random
import tarfile

import numpy as np
import pytest
from raw_shards import write_tar

from earlyfuse.data.documents import BadSample, Document
from earlyfuse.data.raw import read_documents
from earlyfuse.data.raw.shard import ReadOptions
from earlyfuse.models.vocabulary import Modality

IMAGE = bytes(range(256)) * 2  # readers return bytes; nothing decodes them here
SOUND = IMAGE[::-1]
LAYOUT_NAMES = ["auto", "pairs", "interleaved", "mmc4", "text"]


def as_json(**fields):
    return json.dumps(fields).encode()


def image(number):
    return IMAGE + bytes([number % 256])


def pairs(number):
    key = f"{number:05d}"
    return [(f"{key}.jpg", image(number)), (f"{key}.txt", b"a caption"), (f"{key}.json", b"{}")]


def interleaved(number):
    texts, images = ["one", None, "two", None], [None, "0.png", None, "left.side.PNG"]
    members = {"json": as_json(texts=texts, images=images, metadata="[]")}
    members |= {"0.png": image(number), "left.side.PNG": image(number + 100)}
    return [(f"{number}.{name}", data) for name, data in members.items()]


def mmc4(number):
    infos = [
        {"image_base64": str(base64.b64encode(image(number))), "matched_text_index": 1},
        {"image_name": "gone.png", "matched_text_index": 0},
        {"image_base64": base64.b64encode(image(number + 100)).decode(), "matched_text_index": 1},
    ]
    return [(f"uuid-{number}.json", as_json(text_list=["one", "two"], image_info=infos))]


def text(number):
    return [(f"{number}.txt", f"prose {number}, αβγ".encode())]


SAMPLES = {"pairs": pairs, "interleaved": interleaved, "mmc4": mmc4, "text": text}
EXPECTED = {
    "pairs": lambda n: [image(n), "a caption"],
    "interleaved": lambda n: ["one", image(n), "two", image(n + 100)],
    "mmc4": lambda n: ["one", image(n), image(n + 100), "two"],
    "text": lambda n: [f"prose {n}, αβγ"],
}


def plain(document):
    """A document as strings and bytes, a bad sample as its cause."""
    if isinstance(document, BadSample):
        return document.cause
    return [segment.payload for segment in document.segments]


def documents(tmp_path, members, layout="auto", image_first=1.0, **options):
    shard = write_tar(tmp_path / "a.tar", members, **options)
    return list(read_documents(shard, ReadOptions(layout, image_first)))


def read(tmp_path, members, layout="auto", **options):
    return [plain(document) for document in documents(tmp_path, members, layout, **options)]


def read_file(shard):
    return [plain(document) for document in read_documents(shard, ReadOptions(image_first=1.0))]


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", SAMPLES)
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_every_layout_is_read_and_recognised(tmp_path, layout, asked):
    members = sum(map(SAMPLES[layout], range(4)), [])
    found = read(tmp_path, members, layout if asked == "named" else "auto")
    assert found == [EXPECTED[layout](number) for number in range(4)]


def mmc4_of(*infos, members=()):
    fields = as_json(text_list=["one", "two"], image_info=list(infos))
    return [("k.json", fields), *((f"k.{name}", data) for name, data in members)]


def base64_of(written):
    return mmc4_of({"image_base64": written, "matched_text_index": 0})


WHOLE = base64.b64encode(IMAGE + b"\xff\xff").decode()
assert WHOLE.endswith("=") and {"+", "/"} <= set(WHOLE)
DECODED = [IMAGE + b"\xff\xff", "one", "two"]
MIXED = as_json(
    texts=["one", None, None, "two", None],
    images=[None, None, "0.png", None, None],
    audio=[None, "0.WAV", None, None, "1.flac"],
)
FOLDER = tarfile.TarInfo("images")
FOLDER.type = tarfile.DIRTYPE
NAMED = as_json(texts=[None, "x"], images=["000.img1.jpg", None])

GOOD = {  # members of one sample, its document
    "suffixes in upper case": ([("a.JPG", IMAGE), ("a.TXT", b"c")], [IMAGE, "c"]),
    "a caption in json": ([("b.Jpeg", IMAGE), ("b.Json", b'{"caption":"d"}')], [IMAGE, "d"]),
    "audio and txt": ([("a.wav", SOUND), ("a.txt", b"words")], [SOUND, "words"]),
    "audio and text": ([("b.flac", SOUND), ("b.json", as_json(text="said"))], [SOUND, "said"]),
    "audio and caption": (
        [("c.flac", SOUND), ("c.json", as_json(caption="c", text="not this"))], [SOUND, "c"]),
    "text, audio and images": (
        [("m.json", MIXED), ("m.0.WAV", SOUND), ("m.0.png", IMAGE), ("m.1.flac", SOUND)],
        ["one", SOUND, IMAGE, "two", SOUND]),
    "text and audio": (
        [("n.json", as_json(texts=[None, "x"], audio=["0.wav", None])), ("n.0.wav", SOUND)],
        [SOUND, "x"]),
    "audio that is null": ([("o.json", as_json(texts=["y"], audio=[None]))], ["y"]),
    "matched texts": (
        [("k.json", as_json(texts=["one", "two"], images=["0.jpg", None, "1.jpg"],
                            matched_text_indices=[1, 0, 0])),
         ("k.0.jpg", b"zero"), ("k.1.jpg", b"one")],
        [b"one", "one", b"zero", "two"]),
    "a member in lower case": (
        [("k.json", as_json(texts=[None], images=["DSC01.JPG"])), ("k.dsc01.jpg", IMAGE)], [IMAGE]),
    "a whole file name": (
        [("some/Folder/000.json", NAMED), ("some/Folder/000.img1.jpg", IMAGE)], [IMAGE, "x"]),
    "a whole path": (
        [("some/Folder/000.json", NAMED.replace(b"000.img1", b"some/Folder/000.IMG1")),
         ("some/Folder/000.img1.jpg", IMAGE)], [IMAGE, "x"]),
    "missing values of a data frame": (
        [("a.json", b'{"texts": ["one", NaN, "None"], "images": [NaN, "0.png", "nan"]}'),
         ("a.0.png", IMAGE)], ["one", IMAGE]),
    "a caption in json for a txt without": (
        [("a.jpg", IMAGE), ("a.txt", b"nan"), ("a.json", as_json(caption="real"))],
        [IMAGE, "real"]),
    "a missing-value word in a text": ([("a.txt", b"nan of it")], ["nan of it"]),
    "files without a sample": (
        [("images", FOLDER), ("__meta__.json", b"{}"), ("a.jpg", IMAGE), ("._a.txt", b"\0\5\x16"),
         ("a.txt", b"c")], [IMAGE, "c"]),
    "json with a BOM": (
        [("a.jpg", IMAGE), ("a.json", b'\xef\xbb\xbf{"caption": "c"}')], [IMAGE, "c"]),
    "json with infinity": (
        [("a.jpg", IMAGE), ("a.json", b'{"caption": "c", "x": 1e999, "y": -Infinity}')],
        [IMAGE, "c"]),
    "half a surrogate elsewhere": (
        [("a.jpg", IMAGE), ("a.json", b'{"caption": "c", "\\udc00": "\\ud800"}')], [IMAGE, "c"]),
    "base64": (base64_of(WHOLE), DECODED),
    "base64 in lines": (base64_of(base64.encodebytes(IMAGE + b"\xff\xff").decode()), DECODED),
    "base64 with spaces": (base64_of("  " + WHOLE.replace("A", "A\r\n ") + "\n"), DECODED),
    "base64 in a data URL": (
        base64_of(f"DATA:image/svg+xml;charset=utf-8;BASE64,{WHOLE}"), DECODED),
    "base64 of URLs": (
        base64_of(base64.urlsafe_b64encode(IMAGE + b"\xff\xff").decode()), DECODED),
    "base64 without padding": (base64_of(WHOLE.rstrip("=")), DECODED),
    "base64 as a bytes literal": (
        base64_of(str(base64.encodebytes(IMAGE + b"\xff\xff"))), DECODED),
}  # fmt: skip
for name in ("Img.5.JPG", "k.Img.5.JPG", "K.img.5.jpg"):
    for absent in ({}, {"image_base64": None}, {"image_base64": "nan"}):
        info = {"image_name": name, "matched_text_index": 1, **absent}
        members = mmc4_of(info, members=[("Img.5.JPG", IMAGE)])
        GOOD[f"mmc4 with members {name} {absent}"] = (members, ["one", IMAGE, "two"])


@pytest.mark.parametrize("what", GOOD)
def test_samples_are_read_as_people_write_them(tmp_path, what):
    members, expected = GOOD[what]
    (found,) = documents(tmp_path, members)
    assert plain(found) == expected
    assert {kind for kind, _ in found.unused} <= {".json"}


def test_modalities_and_keys_are_those_of_the_members(tmp_path):
    found = documents(tmp_path, [*interleaved(7), ("m.json", MIXED), ("m.0.WAV", SOUND),
                                 ("m.0.png", IMAGE), ("m.1.flac", SOUND)])  # fmt: skip
    assert [document.key for document in found] == ["7", "m"]
    text, image, speech = Modality
    kinds = [[segment.modality for segment in document.segments] for document in found]
    assert kinds == [[text, image, text, image], [text, speech, image, text, speech]]


def test_each_sample_of_a_mixed_shard_is_read_in_its_own_layout(tmp_path):
    texts = sum(([(f"t{n}.txt", b"prose")] for n in range(16)), [])
    behind = [pairs(n) for n in range(100)] + [interleaved(1000), mmc4(1001)]
    found = read(tmp_path, texts + sum(behind, []))
    assert found[:16] == [["prose"]] * 16
    assert found[16:116] == [EXPECTED["pairs"](n) for n in range(100)]
    assert found[116:] == [EXPECTED["interleaved"](1000), EXPECTED["mmc4"](1001)]


def test_texts_between_interleaved_samples_are_texts_and_between_pairs_lost_captions(tmp_path):
    assert read(tmp_path, [*interleaved(1), *text(2)])[1] == ["prose 2, αβγ"]
    lone, pair = documents(tmp_path, [*text(2), *pairs(1)])
    assert (lone.cause, plain(pair)) == ("missing-member", EXPECTED["pairs"](1))
    assert "shards of their own" in lone.message


def test_image_first_is_a_share_decided_by_the_key(tmp_path):
    def leads(members, share):
        found = documents(tmp_path, members, image_first=share)
        return {d.key: d.segments[0].modality == Modality.IMAGE for d in found}

    samples = [pairs(number) for number in range(400)]
    half = leads(sum(samples, []), 0.5)
    assert 160 < sum(half.values()) < 240
    assert leads(sum(reversed(samples), []), 0.5) == half
    more = leads(sum(samples, []), 0.7)
    assert all(more[key] for key, first in half.items() if first)
    assert not any(leads(sum(samples, []), 0.0).values())


def test_shards_that_webdataset_writes_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for number in range(3):
            members = {name.split(".", 1)[1]: data for name, data in interleaved(number)}
            writer.write({"__key__": str(number), **members})
    expected = [EXPECTED["interleaved"](number) for number in range(3)]
    assert read_file(tmp_path / "a.tar") == expected


def test_members_that_no_segment_comes_from_are_named(tmp_path):
    extra = [("00001.cls", b"1"), ("00001.2.jpg", IMAGE), ("00001.2.txt", b"second pair")]
    gone = {"image_name": "gone.png", "image_base64": None, "matched_text_index": 0}
    absent = mmc4_of(gone, {"matched_text_index": 0}, members=[("other.png", IMAGE)])
    jpg, fields = (".jpg", "00001.jpg"), (".json", "00001.json")
    both = [("a.jpg", IMAGE), ("a.txt", b" "), ("a.json", as_json(caption="c"))]
    for members, layout, unused in (
        ([*pairs(1), *extra], "auto",
         [fields, (".cls", "00001.cls"), (".jpg", "00001.2.jpg"), (".txt", "00001.2.txt")]),
        ([*interleaved(1), ("1.9.png", IMAGE)], "auto", [(".png", "1.9.png")]),
        ([("a.wav", SOUND), ("a.txt", b"words"), ("a.m4a", b"x")], "auto", [(".m4a", "a.m4a")]),
        (pairs(1), "text", [jpg, fields]),
        (both, "auto", []),
        (interleaved(1), "auto", []),
        (pairs(1)[:2], "auto", []),
        (absent, "auto", [(".png", "k.other.png"),
                          ("image_info without its image", "k.json image_info[0] 'gone.png'"),
                          ("image_info without its image", "k.json image_info[1] None")]),
    ):  # fmt: skip
        (document,) = documents(tmp_path, members, layout)
        assert list(document.unused) == unused


# ---------------------------------------------------------------- bad samples


def captioned(fields):
    return [("0.jpg", IMAGE), ("0.json", fields)]


def listing(*members, **fields):
    return [("0.json", as_json(**fields)), *((f"0.{name}", data) for name, data in members)]


SOUND0 = ("0.wav", SOUND)
MATCHED = {"texts": ["a"], "images": [None, None], "audio": ["0.wav", None]}
BAD = {
    "missing-member": {
        "an image that json names": interleaved(0)[:2],
        "a pair's image": [("0.txt", b"caption")],
        "a pair's caption": [("0.jpg", IMAGE)],
        "audio that json names": listing(("1.wav", SOUND), texts=[None], audio=["0.wav"]),
        "an image in another folder": [
            ("left/000.json", as_json(texts=[None], images=["right/000.img1.jpg"])),
            ("left/000.img1.jpg", IMAGE),
        ],
        "a name with control characters": listing(
            ("\x1b[31m.png", IMAGE), texts=[None], images=["\x1b[2J\u202e.png"]),
    },
    "empty-text": {
        "an empty caption": [("0.jpg", IMAGE), ("0.txt", b" \n")],
        "an image with text elsewhere": captioned(as_json(text="alt")),
        "audio without its words": [("0.wav", SOUND), ("0.json", b"{}")],
        "an interleaved document of nothing": listing(texts=[None], images=[None]),
        "a surrogate in a name": captioned(b'{"\\ud800": 1}'),
        "a null caption": captioned(b'{"caption": null}'),
        "a NaN caption": captioned(b'{"caption": NaN}'),
    },
    "foreign-layout": {
        "two images in a pair": [("0.jpg", IMAGE), ("0.png", IMAGE), ("0.txt", b"c")],
        "an image and audio in a pair": [("0.jpg", IMAGE), ("0.wav", SOUND), ("0.txt", b"c")],
        "a caption that is a number": captioned(b'{"caption": 5}'),
        "a caption that is a list": captioned(b'{"caption": ["c"]}'),
        "a member without a name": [*pairs(0), ("00000", b"x")],
        "lists of two lengths": listing(texts=["a"], images=[]),
        "text and image in one place": listing(("0.png", IMAGE), texts=["a"], images=["0.png"]),
        "text and audio in one place": listing(SOUND0, texts=["a"], images=[None], audio=["0.wav"]),
        "audio of another length": listing(SOUND0, texts=[None, "a"], audio=["0.wav"]),
        "audio beside matched images": listing(SOUND0, matched_text_indices=[0, 0], **MATCHED),
        "a name that is a number": listing(("3.wav", SOUND), texts=[None], audio=[3]),
        "a match to no text": listing(
            text_list=["a"], image_info=[{"image_base64": "QQ==", "matched_text_index": 1}]),
    },
    "bad-json": {
        "cut": captioned(b'{"caption": '),
        "deep": captioned(b'{"caption": "c", "x": ' + b"[" * 200 + b"]" * 200 + b"}"),
        "very deep": captioned(b"[" * 200_000),
        "a number of many digits": captioned(b'{"caption": "c", "x": ' + b"9" * 5000 + b"}"),
        "a field twice": captioned(b'{"caption": "c", "caption": "d"}'),
        "a list": captioned(b"[]"),
    },
    "not-utf8": {
        "text in Latin-1": [("0.jpg", IMAGE), ("0.txt", "é".encode("latin-1"))],
        "json in Latin-1": captioned('{"caption": "é"}'.encode("latin-1")),
        "json in UTF-16": captioned('{"caption": "c"}'.encode("utf-16")),
        "half a surrogate pair": captioned(b'{"caption": "\\ud800"}'),
    },
    "unsafe-member": {
        "pickle": [*pairs(0), ("00000.pickle", b"x")],
        "pkl.gz": [*pairs(0), ("00000.state.PKL.gz", b"x")],
        "pth": [*pairs(0), ("00000.pth", b"x")],
    },
    "duplicate-key": {
        "one key twice in a row": [*pairs(0), *pairs(0)],
        "a suffix in both cases": [("a.jpg", IMAGE), ("a.JPG", IMAGE), ("a.txt", b"c")],
    },
    "unsupported-media": {
        "video": listing(texts=[None], images=["0.mp4"]),
        "another audio container": listing(
            ("0.m4a", SOUND), texts=[None], images=[None], audio=["0.m4a"]),
    },
    "corrupt-image": {
        f"base64 {written!r}": base64_of(written)
        for written in ("*", "b'*'", "QQ==QQ==", "Q", "data:image/png,QQ==", 5, ["QQ=="])
    },
}  # fmt: skip


@pytest.mark.parametrize(("cause", "what"), [(cause, what) for cause in BAD for what in BAD[cause]])
def test_a_bad_sample_has_its_cause_and_costs_only_itself(tmp_path, cause, what):
    members = BAD[cause][what]
    fields = b"".join(data for name, data in members if name.endswith("json"))
    layout = "mmc4" if b"text_list" in fields else "interleaved" if b"texts" in fields else "pairs"
    good = [(f"good{name}", data) for name, data in SAMPLES[layout](0)]
    bad, behind = documents(tmp_path, [*members, *good])
    assert (plain(bad), plain(behind)) == (cause, EXPECTED[layout](0))
    assert str(tmp_path / "a.tar") in str(bad) and bad.message.isprintable()


@pytest.mark.parametrize("word", ["nan", "NaN", "None", " None\n", "null", "<NA>", ""])
def test_a_word_for_a_missing_caption_is_no_caption(tmp_path, word):
    (found,) = documents(tmp_path, [("a.jpg", IMAGE), ("a.txt", word.encode())])
    assert found.cause == "empty-text" and (not word or repr(word.strip()) in found.message)
    fields = as_json(caption=word, text=word, url="u")
    (found,) = documents(tmp_path, [("a.jpg", IMAGE), ("a.json", fields)])
    assert found.cause == "empty-text" and "caption, text, url" in found.message
    for name, content in (("json", fields), ("txt", word.encode())):
        assert read(tmp_path, [(f"a.{name}", content)], "text") == ["empty-text"]


def test_a_foreign_shard_is_described(tmp_path):
    dotted = [("s.input.jpg", IMAGE), ("s.outputs.txt", b"c")]
    members = [*dotted, ("2.cls", b"x"), ("2.wav", b"x"), ("3.json", as_json(question="?"))]
    found = documents(tmp_path, members)
    assert [bad.cause for bad in found] == ["foreign-layout"] * 3
    for said in ("'s'", "input.jpg, outputs.txt", "KEY.jpg and KEY.txt", "cls", "wav", "question"):
        assert said in found[0].message
    (found,) = documents(tmp_path, [(f"v1.{n}.jpg", IMAGE) for n in range(500)])
    assert "and 488 more" in found.message


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("00000.png")
    link.type, link.linkname = kind, "/etc/hostname"
    found = read(tmp_path, [*pairs(0), ("link", link), *pairs(1)])
    assert found == ["unsafe-member", EXPECTED["pairs"](1)]


@pytest.mark.parametrize("name", ["npy", "npz"])
def test_numpy_members_may_hold_numbers_but_no_pickles(tmp_path, name):
    for array, cause in ((np.zeros(3), None), (np.array([{}], dtype=object), "unsafe-member")):
        stream = io.BytesIO()
        np.savez(stream, a=array) if name == "npz" else np.save(stream, array)
        found = read(tmp_path, [*pairs(0), (f"00000.{name}", stream.getvalue())])
        assert found == [cause or EXPECTED["pairs"](0)]


def test_a_key_that_returns_is_not_merged(tmp_path):
    found = read(tmp_path, [*pairs(0), *pairs(1), *pairs(0)])
    assert found == [EXPECTED["pairs"](0), EXPECTED["pairs"](1), "duplicate-key"]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("layout", SAMPLES)
def test_a_cut_at_any_byte_yields_whole_documents_then_truncated(tmp_path, layout):
    whole = write_tar(tmp_path / "whole.tar", sum(map(SAMPLES[layout], range(3)), []))
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # where the zeros that end the archive begin
    expected = read_file(whole)
    assert len(expected) == 3
    shard, counts = tmp_path / "cut.tar", set()
    near_blocks = {at + d for at in range(0, end + 1024, 512) for d in (0, 1, 7, 255, 511)}
    for cut in sorted(near_blocks) if layout != "text" else range(0, end + 1024, 3):
        shard.write_bytes(data[:cut])
        found = read_file(shard)
        if cut >= end + 512:
            assert found == expected, cut
        else:
            assert found[-1] == "truncated", cut
            assert found[:-1] == expected[: len(found) - 1], cut
            counts.add(len(found) - 1)
    assert counts == {0, 1, 2}  # complete documents are returned before the shard's end is known


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_and_cut_safely(tmp_path, format):
    folder = "f" * 60 + "/" + "g" * (30 if format == tarfile.USTAR_FORMAT else 150)
    members = [(f"{folder}/ä{i}.{kind}", b"x" * 600) for i in range(3) for kind in ("jpg", "txt")]
    keys = [document.key for document in documents(tmp_path, members, format=format)]
    assert keys == [f"{folder}/ä{i}" for i in range(3)]
    data, shard = (tmp_path / "a.tar").read_bytes(), tmp_path / "cut.tar"
    for cut in [*range(0, len(data) - 10240, 41), *range(0, len(data) - 10240, 512)]:
        shard.write_bytes(data[:cut])
        *found, last = read_documents(shard)
        assert last.cause == "truncated"
        assert [document.key for document in found] == keys[: len(found)]
        assert all(len(document.segments) == 2 for document in found)


def test_a_cut_gzip_yields_whole_documents_then_truncated(tmp_path):
    noise = random.Random(0)
    members = sum(([(f"{i}.jpg", noise.randbytes(900)), (f"{i}.txt", b"c")] for i in range(3)), [])
    data = gzip.compress(write_tar(tmp_path / "plain.tar", members).read_bytes())
    shard = tmp_path / "a.tar.gz"
    shard.write_bytes(data)
    expected = read_file(shard)
    assert len(expected) == 3 and "truncated" not in expected
    for cut in range(2, len(data), 11):
        shard.write_bytes(data[:cut])
        *found, last = read_file(shard)
        assert last == "truncated" and found == expected[: len(found)], cut


def test_damage_is_reported_and_never_raised(tmp_path):
    data = write_tar(tmp_path / "a.tar", sum(map(pairs, range(6)), [])).read_bytes()
    shard, rng = tmp_path / "b.tar", random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(data) - 9000)] = rng.randrange(256)
        shard.write_bytes(damaged)
        for document in read_documents(shard):
            assert isinstance(document, Document | BadSample)


def test_damaged_json_gives_a_document_or_a_bad_sample(tmp_path):
    rng = random.Random(0)
    good = [interleaved(1), mmc4(2), [("3.jpg", IMAGE), ("3.json", as_json(caption="a", text=[]))]]
    words = [b"null", b"[]", b"{}", b"NaN", b"-1", b'"x"', b"true", b"1e400", b"[[[", b'"\\ud800"']
    for _ in range(400):
        members = []
        for name, data in rng.choice(good):
            content = bytearray(data)
            for _ in range(rng.randint(1, 3) if name.endswith("json") else 0):
                at = rng.randrange(len(content))
                if rng.random() < 0.5:
                    content[at] ^= 1 << rng.randrange(8)
                else:
                    content[at : at + rng.randrange(12)] = rng.choice(words)
            members.append((name, bytes(content)))
        for found in documents(tmp_path, members, rng.choice(LAYOUT_NAMES)):
            assert isinstance(found, Document | BadSample)


def test_fields_of_any_type_give_a_document_or_a_bad_sample(tmp_path):
    names = ["texts", "images", "audio", "video", "matched_text_indices", "text_list", "image_info"]
    names += ["caption", "text"]
    values = [None, 0, 1e300, "x", "0.png", [], {}, [None], ["0.png", None], [[1]], [{}], True]
    values += [[{"image_base64": {}, "image_name": 5}], [{"image_name": ["0.png"]}], [0, 1]]
    rng = random.Random(0)
    for _ in range(400):
        fields = {name: rng.choice(values) for name in rng.sample(names, rng.randint(1, 5))}
        members = [("a.json", json.dumps(fields).encode()), ("a.0.png", IMAGE)]
        members += [("a.jpg", IMAGE)] if rng.random() < 0.3 else []
        for found in documents(tmp_path, members, rng.choice(LAYOUT_NAMES)):
            assert isinstance(found, Document | BadSample)


def test_archives_end_to_end_are_read_on(tmp_path):
    first = write_tar(tmp_path / "1.tar", text(1)).read_bytes()
    second = write_tar(tmp_path / "2.tar", text(2)).read_bytes()
    both = tmp_path / "both.tar"
    both.write_bytes(first + second)
    assert read_file(both) == [EXPECTED["text"](1), EXPECTED["text"](2)]
    both.write_bytes(first + b"left by a tape drive" * 60)
    assert read_file(both) == [EXPECTED["text"](1)]


# ---------------------------------------------------------------- refusals of the call


@pytest.mark.parametrize(
    ("shard", "options", "error", "said"),
    [
        ("pipe:cat a.tar", {}, ValueError, "shell command"),
        ("PIPE: curl x", {}, ValueError, "shell command"),
        ("https://x/a.tar", {}, ValueError, "URL"),
        ("s3://b/a.tar", {}, ValueError, "URL"),
        ("/none.tar", {}, FileNotFoundError, "does not exist"),
        ("/", {}, FileNotFoundError, "not a plain file"),
        ("/", {"layout": "obelics"}, ValueError, r"layout \(obelics\) must be"),
        ("/", {"image_first": 1.5}, ValueError, r"image_first \(1.5\)"),
    ],
)
def test_what_cannot_be_read_is_refused_unopened(shard, options, error, said):
    with pytest.raises(error, match=said):
        read_documents(shard, ReadOptions(**options))


def test_what_is_no_tar_is_lost_as_a_whole(tmp_path):
    for content, cause in ((b"PAR1" * 999, "corrupt-tar"), (b"", "truncated")):
        (tmp_path / "a.tar").write_bytes(content)
        assert read_file(tmp_path / "a.tar") == [cause]
