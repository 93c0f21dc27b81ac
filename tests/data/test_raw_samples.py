"""Samples as people have them: read right whatever wrote them, and what is not used is named."""

import base64
import json
import random

import pytest
from raw_samples import (
    IMAGE,
    SOUND,
    as_json,
    image,
    interleaved,
    mmc4,
    pairs,
    plain,
    text,
    write_tar,
)

from earlyfuse.data.documents import BadSample, Document
from earlyfuse.data.raw import read_documents


def documents(tmp_path, members, layout="auto"):
    shard = write_tar(tmp_path / "a.tar", members)
    return list(read_documents(shard, layout, image_first=1.0))


def read(tmp_path, members, layout="auto"):
    return [plain(document) for document in documents(tmp_path, members, layout)]


def unused(tmp_path, members, layout="auto"):
    return [pair for document in documents(tmp_path, members, layout) for pair in document.unused]


# ---------------------------------------------------------------- layout by sample


def test_each_sample_of_a_mixed_shard_is_read_in_its_own_layout(tmp_path):
    texts = sum(([(f"t{n}.txt", b"prose")] for n in range(16)), [])
    behind = [pairs(n) for n in range(100)] + [interleaved(1000), mmc4(1001)]
    found = read(tmp_path, texts + sum(behind, []))
    assert found[:16] == [["prose"]] * 16
    assert found[16:116] == [[image(n), "a caption"] for n in range(100)]
    assert found[116:] == [
        ["one", image(1000), "two", image(1100)],
        ["one", image(1001), image(1101), "two"],
    ]


def test_texts_between_interleaved_samples_are_texts_and_between_pairs_lost_captions(tmp_path):
    assert read(tmp_path, [*interleaved(1), *text(2)])[1] == ["prose 2, αβγ"]
    lone, pair = documents(tmp_path, [*text(2), *pairs(1)])
    assert (lone.cause, plain(pair)) == ("missing-member", [image(1), "a caption"])
    assert "shards of their own" in lone.message


# ---------------------------------------------------------------- MMC4


def mmc4_of(*infos, members=()):
    fields = as_json(text_list=["one", "two"], image_info=list(infos))
    return [("k.json", fields), *((f"k.{name}", data) for name, data in members)]


@pytest.mark.parametrize("name", ["Img.5.JPG", "k.Img.5.JPG", "K.img.5.jpg"])
@pytest.mark.parametrize("absent", [{}, {"image_base64": None}, {"image_base64": "nan"}])
def test_images_of_mmc4_may_be_members(tmp_path, name, absent):
    info = {"image_name": name, "matched_text_index": 1, **absent}
    (document,) = documents(tmp_path, mmc4_of(info, members=[("Img.5.JPG", IMAGE)]))
    assert plain(document) == ["one", IMAGE, "two"] and document.unused == ()


def test_images_of_mmc4_that_are_not_there_are_named(tmp_path):
    gone = {"image_name": "gone.png", "image_base64": None, "matched_text_index": 0}
    members = mmc4_of(gone, {"matched_text_index": 0}, members=[("other.png", IMAGE)])
    (document,) = documents(tmp_path, members)
    assert plain(document) == ["one", "two"]
    assert document.unused == (
        (".png", "k.other.png"),
        ("image_info without its image", "k.json image_info[0] 'gone.png'"),
        ("image_info without its image", "k.json image_info[1] None"),
    )


WHOLE = base64.b64encode(IMAGE + b"\xff\xff").decode()
assert WHOLE.endswith("=") and {"+", "/"} <= set(WHOLE)


@pytest.mark.parametrize(
    "written",
    [
        WHOLE,
        base64.encodebytes(IMAGE + b"\xff\xff").decode(),
        WHOLE.replace("A", "A\r\n "),
        f"  {WHOLE}\n",
        f"data:image/png;base64,{WHOLE}",
        f"DATA:image/svg+xml;charset=utf-8;BASE64,{WHOLE}",
        base64.urlsafe_b64encode(IMAGE + b"\xff\xff").decode(),
        WHOLE.rstrip("="),
        str(base64.b64encode(IMAGE + b"\xff\xff")),
        str(base64.encodebytes(IMAGE + b"\xff\xff")),
    ],
)
def test_base64_is_read_as_people_write_it(tmp_path, written):
    info = {"image_base64": written, "matched_text_index": 0}
    assert read(tmp_path, mmc4_of(info)) == [[IMAGE + b"\xff\xff", "one", "two"]]


@pytest.mark.parametrize("written", ["*", "QQ==QQ==", "Q", "data:image/png,QQ==", 5, ["QQ=="]])
def test_base64_that_is_none_is_a_corrupt_image(tmp_path, written):
    info = {"image_base64": written, "matched_text_index": 0}
    assert read(tmp_path, mmc4_of(info)) == ["corrupt-image"]


# ---------------------------------------------------------------- names of members


@pytest.mark.parametrize("name", ["img1.jpg", "000.img1.jpg", "some/Folder/000.IMG1.jpg"])
def test_lists_may_name_members_by_their_whole_file_name(tmp_path, name):
    fields = as_json(texts=[None, "x"], images=[name, None])
    key = "some/Folder/000"
    found = documents(tmp_path, [(f"{key}.json", fields), (f"{key}.img1.jpg", IMAGE)])
    assert [plain(d) for d in found] == [[IMAGE, "x"]] and found[0].unused == ()


def test_a_name_in_another_folder_is_another_image(tmp_path):
    fields = as_json(texts=[None], images=["right/000.img1.jpg"])
    assert read(tmp_path, [("left/000.json", fields), ("left/000.img1.jpg", IMAGE)]) == [
        "missing-member"
    ]


def test_a_sample_of_no_layout_says_what_is_there_and_what_is_expected(tmp_path):
    dotted = [("s.input.jpg", IMAGE), ("s.outputs.txt", b"c")]
    (found,) = documents(tmp_path, dotted)
    assert found.cause == "foreign-layout"
    for said in ("'s'", "input.jpg, outputs.txt", "KEY.jpg and KEY.txt", "first dot"):
        assert said in found.message
    (found,) = documents(tmp_path, [(f"v1.{n}.jpg", IMAGE) for n in range(500)])
    assert "and 488 more" in found.message


# ---------------------------------------------------------------- what is not used


def test_members_that_no_segment_comes_from_are_named(tmp_path):
    extra = [("00001.cls", b"1"), ("00001.2.jpg", IMAGE), ("00001.2.txt", b"second pair")]
    assert unused(tmp_path, [*pairs(1), *extra]) == [
        (".json", "00001.json"),
        (".cls", "00001.cls"),
        (".jpg", "00001.2.jpg"),
        (".txt", "00001.2.txt"),
    ]
    assert unused(tmp_path, [*interleaved(1), ("1.9.png", IMAGE)]) == [(".png", "1.9.png")]
    spoken = [("a.wav", SOUND), ("a.txt", b"words"), ("a.mp3", b"x")]
    assert unused(tmp_path, spoken) == [(".mp3", "a.mp3")]
    assert unused(tmp_path, pairs(1), layout="text") == [
        (".jpg", "00001.jpg"),
        (".json", "00001.json"),
    ]
    both = [("a.jpg", IMAGE), ("a.txt", b" "), ("a.json", as_json(caption="c"))]
    assert unused(tmp_path, both) == []


def test_a_sample_that_is_used_whole_has_nothing_unused(tmp_path):
    for members in (interleaved(1), mmc4(1)[:1], text(1), pairs(1)[:2]):
        kinds = {kind for kind, _ in unused(tmp_path, members)}
        assert kinds <= {"image_info without its image"}


# ---------------------------------------------------------------- captions that are none


@pytest.mark.parametrize("word", ["nan", "NaN", "None", " None\n", "null", "<NA>"])
def test_a_word_for_no_caption_is_no_caption(tmp_path, word):
    pair = [("a.jpg", IMAGE), ("a.txt", word.encode())]
    (found,) = documents(tmp_path, pair)
    assert found.cause == "empty-text" and repr(word.strip()) in found.message
    assert read(tmp_path, [*pair, ("a.json", as_json(caption="real"))]) == [[IMAGE, "real"]]
    for name, layout in (("jpg", "pairs"), ("txt", "text")):
        members = [("a.json", as_json(caption=word, text=word))]
        members += [(f"a.{name}", IMAGE)] if name == "jpg" else []
        assert read(tmp_path, members, layout) == ["empty-text"]
    assert read(tmp_path, [("a.txt", word.encode())], "text") == ["empty-text"]
    assert read(tmp_path, [("a.txt", f"{word.strip()} of it".encode())], "text") != ["empty-text"]


@pytest.mark.parametrize("value", ["null", "NaN", '"nan"', '""'])
def test_json_without_a_caption_is_no_caption(tmp_path, value):
    fields = f'{{"caption": {value}, "url": "u"}}'.encode()
    (found,) = documents(tmp_path, [("a.jpg", IMAGE), ("a.json", fields)])
    assert found.cause == "empty-text" and "caption, url" in found.message


def test_lists_of_a_data_frame_have_nothing_where_it_wrote_nan(tmp_path):
    fields = b'{"texts": ["one", NaN, "None"], "images": [NaN, "0.png", "nan"]}'
    assert read(tmp_path, [("a.json", fields), ("a.0.png", IMAGE)]) == [["one", IMAGE]]


# ---------------------------------------------------------------- JSON and text


JSON = {
    "deep": (b'{"caption": "c", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "bad-json"),
    "very deep": (b"[" * 200_000, "bad-json"),
    "a number of many digits": (b'{"caption": "c", "x": ' + b"9" * 5000 + b"}", "bad-json"),
    "a field twice": (b'{"caption": "c", "caption": "d"}', "bad-json"),
    "cut": (b'{"caption": "c"', "bad-json"),
    "UTF-16": ('{"caption": "c"}'.encode("utf-16"), "not-utf8"),
    "Latin-1": ('{"caption": "é"}'.encode("latin-1"), "not-utf8"),
    "a surrogate in a name": (b'{"\\ud800": 1}', "empty-text"),
    "a caption that is a number": (b'{"caption": 5}', "foreign-layout"),
    "a caption that is a list": (b'{"caption": ["c"]}', "foreign-layout"),
    "BOM": (b'\xef\xbb\xbf{"caption": "c"}', None),
    "infinite": (b'{"caption": "c", "x": 1e999, "y": -Infinity}', None),
    "a surrogate elsewhere": (b'{"caption": "c", "\\udc00": "\\ud800"}', None),
}


@pytest.mark.parametrize("what", JSON)
def test_json_is_read_or_a_bad_sample(tmp_path, what):
    content, cause = JSON[what]
    (found,) = documents(tmp_path, [("a.jpg", IMAGE), ("a.json", content)], "pairs")
    assert plain(found) == (cause or [IMAGE, "c"])
    if cause:
        assert found.message.isprintable() and "'a'" in found.message


def test_what_a_message_quotes_is_escaped(tmp_path):
    fields = as_json(texts=[None], images=["\x1b[2J\u202e.png"])
    (found,) = documents(tmp_path, [("a.json", fields), ("a.\x1b[31m.png", IMAGE)])
    assert found.cause == "missing-member" and found.message.isprintable()


def test_damaged_json_gives_a_document_or_a_bad_sample(tmp_path):
    rng = random.Random(0)
    good = [interleaved(1), mmc4(2), [("3.jpg", IMAGE), ("3.json", as_json(caption="a", text=[]))]]
    words = [b"null", b"[]", b"{}", b"NaN", b"-1", b'"x"', b"true", b"1e400", b"[[[", b'"\\ud800"']
    for _ in range(400):
        members = []
        for name, data in rng.choice(good):
            content = bytearray(data)
            if name.endswith("json"):
                for _ in range(rng.randint(1, 3)):
                    at = rng.randrange(len(content))
                    if rng.random() < 0.5:
                        content[at] ^= 1 << rng.randrange(8)
                    else:
                        content[at : at + rng.randrange(12)] = rng.choice(words)
            members.append((name, bytes(content)))
        layout = rng.choice(["auto", "pairs", "interleaved", "mmc4", "text"])
        for found in documents(tmp_path, members, layout):
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
        layout = rng.choice(["auto", "pairs", "interleaved", "mmc4", "text"])
        for found in documents(tmp_path, members, layout):
            assert isinstance(found, Document | BadSample)
