"""Raw shards: every layout is read, a cut file yields no partial document, causes have names."""

import gzip
import io
import random
import tarfile

import numpy as np
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
from earlyfuse.models.vocabulary import Modality


def read(path, layout="auto", **options):
    return [plain(document) for document in read_documents(path, layout, **options)]


SAMPLES = {"pairs": pairs, "interleaved": interleaved, "mmc4": mmc4, "text": text}
EXPECTED = {
    "pairs": lambda n: [image(n), "a caption"],
    "interleaved": lambda n: ["one", image(n), "two", image(n + 100)],
    "mmc4": lambda n: ["one", image(n), image(n + 100), "two"],
    "text": lambda n: [f"prose {n}, αβγ"],
}
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("layout", SAMPLES)
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_every_layout_is_read_and_found(tmp_path, layout, asked):
    shard = write_tar(tmp_path / "a.tar", sum(map(SAMPLES[layout], range(4)), []))
    found = read(shard, layout if asked == "named" else "auto", image_first=1.0)
    assert found == [EXPECTED[layout](number) for number in range(4)]


def test_modalities_and_keys_are_those_of_the_members(tmp_path):
    shard = write_tar(tmp_path / "a.tar", interleaved(7))
    (document,) = read_documents(shard)
    assert isinstance(document, Document) and document.key == "7"
    kinds = [segment.modality for segment in document.segments]
    assert kinds == [Modality.TEXT, Modality.IMAGE, Modality.TEXT, Modality.IMAGE]


@pytest.mark.parametrize("layout", SAMPLES)
def test_a_cut_at_any_byte_yields_whole_documents_then_truncated(tmp_path, layout):
    whole = write_tar(tmp_path / "whole.tar", sum(map(SAMPLES[layout], range(3)), []))
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # where the zeros that end the archive begin
    documents = read(whole, image_first=1.0)
    assert len(documents) == 3
    cut_file = tmp_path / "cut.tar"
    counts = set()
    near_blocks = sorted({at + d for at in range(0, end + 1024, 512) for d in (0, 1, 7, 255, 511)})
    for cut in near_blocks if layout != "text" else range(end + 1024):
        cut_file.write_bytes(data[:cut])
        found = read(cut_file, image_first=1.0)
        if cut >= end + 512:
            assert found == documents, cut
        else:
            assert found[-1] == "truncated", cut
            assert found[:-1] == documents[: len(found) - 1], cut
            counts.add(len(found) - 1)
    assert counts == {0, 1, 2}  # complete documents are not held back for the rest's sake


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_are_read_and_cut_safely(tmp_path, format):
    folder = "f" * 60 + "/" + "g" * (30 if format == tarfile.USTAR_FORMAT else 150)
    members = [(f"{folder}/ä{i}.{kind}", b"x" * 600) for i in range(3) for kind in ("jpg", "txt")]
    whole = write_tar(tmp_path / "whole.tar", members, format)
    keys = [document.key for document in read_documents(whole)]
    assert keys == [f"{folder}/ä{i}" for i in range(3)]
    data, cut_file = whole.read_bytes(), tmp_path / "cut.tar"
    for cut in [*range(0, len(data) - 10240, 13), *range(0, len(data) - 10240, 512)]:
        cut_file.write_bytes(data[:cut])
        *found, last = read_documents(cut_file)
        assert last.cause == "truncated"
        assert [document.key for document in found] == keys[: len(found)]
        assert all(len(document.segments) == 2 for document in found)


def test_a_cut_gzip_yields_whole_documents_then_truncated(tmp_path):
    noise = random.Random(0)
    members = [(f"{i}.{kind}", noise.randbytes(900)) for i in range(3) for kind in ("jpg", "json")]
    members = [(n, d if n.endswith("jpg") else as_json(caption="c")) for n, d in members]
    data = gzip.compress(write_tar(tmp_path / "plain.tar", members).read_bytes())
    shard = tmp_path / "a.tar.gz"
    shard.write_bytes(data)
    documents = read(shard)
    assert len(documents) == 3 and "truncated" not in documents
    for cut in range(2, len(data), 5):
        shard.write_bytes(data[:cut])
        *found, last = read(shard)
        assert last == "truncated" and found == documents[: len(found)], cut


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


def test_archives_end_to_end_are_read_on(tmp_path):
    first = write_tar(tmp_path / "1.tar", text(1)).read_bytes()
    second = write_tar(tmp_path / "2.tar", text(2)).read_bytes()
    both = tmp_path / "both.tar"
    both.write_bytes(first + second)
    assert read(both) == [EXPECTED["text"](1), EXPECTED["text"](2)]
    both.write_bytes(first + b"left by a tape drive" * 60)
    assert read(both) == [EXPECTED["text"](1)]


def test_files_without_a_sample_are_passed_over(tmp_path):
    members = [
        ("__meta__.json", b"{}"),
        ("a.jpg", IMAGE),
        ("._a.txt", b"\0\5\x16"),
        ("a.txt", b"c"),
    ]
    folder = tarfile.TarInfo("images")
    folder.type = tarfile.DIRTYPE
    shard = write_tar(tmp_path / "a.tar", [("images", folder), *members])
    assert read(shard, image_first=1.0) == [[IMAGE, "c"]]


def test_audio_is_read_in_pairs_and_in_step_with_texts_and_images(tmp_path):
    spoken = [
        ("a.wav", SOUND), ("a.txt", b"words"),
        ("b.flac", SOUND), ("b.json", as_json(text="of the json")),
        ("c.flac", SOUND), ("c.json", as_json(caption="a caption", text="not this")),
    ]  # fmt: skip
    heard = [[SOUND, "words"], [SOUND, "of the json"], [SOUND, "a caption"]]
    shard = write_tar(tmp_path / "a.tar", spoken)
    assert read(shard, image_first=1.0) == heard
    assert read(shard, image_first=0.0) == [parts[::-1] for parts in heard]
    mixed = as_json(
        texts=["one", None, None, "two", None],
        images=[None, None, "0.png", None, None],
        audio=[None, "0.WAV", None, None, "1.flac"],
    )
    members = [("m.json", mixed), ("m.0.WAV", SOUND), ("m.0.png", IMAGE), ("m.1.flac", SOUND)]
    alone = [("n.json", as_json(texts=[None, "x"], audio=["0.wav", None])), ("n.0.wav", SOUND)]
    silent = [("o.json", as_json(texts=["y"], audio=[None]))]
    shard = write_tar(tmp_path / "b.tar", [*members, *alone, *silent])
    found = list(read_documents(shard))
    assert [plain(d) for d in found] == [["one", SOUND, IMAGE, "two", SOUND], [SOUND, "x"], ["y"]]
    text, image, speech = Modality
    assert [s.modality for s in found[0].segments] == [text, speech, image, text, speech]


def test_an_image_pair_takes_no_caption_from_other_fields(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("0.jpg", IMAGE), ("0.json", as_json(text="alt"))])
    assert read(shard) == ["empty-text"]


BAD = {
    "an image that json names": ("missing-member", interleaved(0)[:2]),
    "a pair's image": ("missing-member", [("0.txt", b"caption")]),
    "a pair's caption": ("missing-member", [("0.jpg", IMAGE)]),
    "an empty caption": ("empty-text", [("0.jpg", IMAGE), ("0.txt", b" \n")]),
    "two images in a pair": (
        "foreign-layout",
        [("0.jpg", IMAGE), ("0.png", IMAGE), ("0.txt", b"c")],
    ),
    "json that is none": ("bad-json", [("0.jpg", IMAGE), ("0.json", b'{"caption": ')]),
    "json too deep": ("bad-json", [("0.jpg", IMAGE), ("0.json", b"[" * 100_000)]),
    "json that is a list": ("bad-json", [("0.jpg", IMAGE), ("0.json", b"[]")]),
    "text in another encoding": ("not-utf8", [("0.jpg", IMAGE), ("0.txt", "é".encode("latin-1"))]),
    "half a surrogate pair": (
        "not-utf8",
        [("0.jpg", IMAGE), ("0.json", b'{"caption": "\\ud800"}')],
    ),
    "pickle": ("unsafe-member", [*pairs(0), ("00000.pickle", b"x")]),
    "pkl.gz": ("unsafe-member", [*pairs(0), ("00000.state.PKL.gz", b"x")]),
    "pth": ("unsafe-member", [*pairs(0), ("00000.pth", b"x")]),
    "one key twice in a row": ("duplicate-key", [*pairs(0), *pairs(0)]),
    "a member without a name": ("foreign-layout", [*pairs(0), ("00000", b"x")]),
    "lists of two lengths": ("foreign-layout", [("0.json", as_json(texts=["a"], images=[]))]),
    "text and image in one place": (
        "foreign-layout",
        [("0.json", as_json(texts=["a"], images=["0.png"])), ("0.0.png", IMAGE)],
    ),
    "video": ("unsupported-media", [("0.json", as_json(texts=[None], images=["0.mp4"]))]),
    "audio in a container that is not read": (
        "unsupported-media",
        [("0.json", as_json(texts=[None], images=[None], audio=["0.mp3"])), ("0.0.mp3", SOUND)],
    ),
    "text and audio in one place": (
        "foreign-layout",
        [("0.json", as_json(texts=["a"], images=[None], audio=["0.wav"])), ("0.0.wav", SOUND)],
    ),
    "audio of another length": (
        "foreign-layout",
        [("0.json", as_json(texts=[None, "a"], audio=["0.wav"])), ("0.0.wav", SOUND)],
    ),
    "audio beside matched images": (
        "foreign-layout",
        [
            (
                "0.json",
                as_json(
                    texts=["a"],
                    images=[None, None],
                    audio=["0.wav", None],
                    matched_text_indices=[0, 0],
                ),
            ),
            ("0.0.wav", SOUND),
        ],
    ),
    "audio that json names": (
        "missing-member",
        [("0.json", as_json(texts=[None], audio=["0.wav"])), ("0.1.wav", SOUND)],
    ),
    "a name of audio that is none": (
        "foreign-layout",
        [("0.json", as_json(texts=[None], audio=[3])), ("0.3.wav", SOUND)],
    ),
    "an image and audio in a pair": (
        "foreign-layout",
        [("0.jpg", IMAGE), ("0.wav", SOUND), ("0.txt", b"c")],
    ),
    "audio without its words": ("empty-text", [("0.wav", SOUND), ("0.json", b"{}")]),
    "an interleaved document of nothing": (
        "empty-text",
        [("0.json", as_json(texts=[None], images=[None]))],
    ),
    "base64 that is none": (
        "corrupt-image",
        [("0.json", as_json(text_list=["a"], image_info=[{"image_base64": "b'*'"}]))],
    ),
    "a match to no text": (
        "foreign-layout",
        [
            (
                "0.json",
                as_json(
                    text_list=["a"], image_info=[{"image_base64": "QQ==", "matched_text_index": 1}]
                ),
            )
        ],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_sample_has_its_cause_and_costs_only_itself(tmp_path, what):
    cause, members = BAD[what]
    names = {name for name, _ in members}
    fields = b"".join(data for name, data in members if name.endswith("json"))
    layout = "mmc4" if b"text_list" in fields else "interleaved" if b"texts" in fields else "pairs"
    good = [(f"good{name}", data) for name, data in SAMPLES[layout](0)]
    shard = write_tar(tmp_path / "a.tar", [*members, *good])
    assert names and read(shard, image_first=1.0) == [cause, EXPECTED[layout](0)]
    (bad, _) = read_documents(shard)
    assert str(shard) in str(bad)  # says where


def test_suffixes_in_upper_case_are_those_in_lower_case(tmp_path):
    members = [("a.JPG", IMAGE), ("a.TXT", b"c"), ("b.Jpeg", IMAGE), ("b.Json", b'{"caption":"d"}')]
    shard = write_tar(tmp_path / "a.tar", members)
    assert read(shard, image_first=1.0) == [[IMAGE, "c"], [IMAGE, "d"]]
    named = [("k.json", as_json(texts=[None], images=["0.png"])), ("k.0.PNG", IMAGE)]
    assert read(write_tar(tmp_path / "b.tar", named)) == [[IMAGE]]
    both = [("a.jpg", IMAGE), ("a.JPG", IMAGE), ("a.txt", b"c")]
    assert read(write_tar(tmp_path / "c.tar", both)) == ["duplicate-key"]


def test_matched_texts_place_images_without_base64(tmp_path):
    fields = as_json(
        texts=["one", "two"], images=["0.jpg", None, "1.jpg"], matched_text_indices=[1, 0, 0]
    )
    members = [("k.json", fields), ("k.0.jpg", b"zero"), ("k.1.jpg", b"one")]
    assert read(write_tar(tmp_path / "a.tar", members)) == [[b"one", "one", b"zero", "two"]]


def test_an_image_is_found_where_its_name_was_put_in_lower_case(tmp_path):
    members = [("k.json", as_json(texts=[None], images=["DSC01.JPG"])), ("k.dsc01.jpg", IMAGE)]
    assert read(write_tar(tmp_path / "a.tar", members)) == [[IMAGE]]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("00000.png")
    link.type, link.linkname = kind, "/etc/hostname"
    shard = write_tar(tmp_path / "a.tar", [*pairs(0), ("link", link), *pairs(1)])
    assert read(shard, image_first=1.0) == ["unsafe-member", EXPECTED["pairs"](1)]


@pytest.mark.parametrize("archive", [False, True])
def test_numpy_members_may_hold_numbers_but_no_pickles(tmp_path, archive):
    def stored(array):
        stream = io.BytesIO()
        np.savez(stream, a=array) if archive else np.save(stream, array)
        return stream.getvalue()

    name = "npz" if archive else "npy"
    for array, cause in ((np.zeros(3), None), (np.array([{}], dtype=object), "unsafe-member")):
        members = [*pairs(0), (f"00000.{name}", stored(array))]
        shard = write_tar(tmp_path / "a.tar", members)
        assert read(shard, image_first=1.0) == [cause or EXPECTED["pairs"](0)]


def test_a_key_that_returns_is_not_merged(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [*pairs(0), *pairs(1), *pairs(0)])
    expected = [EXPECTED["pairs"](0), EXPECTED["pairs"](1), "duplicate-key"]
    assert read(shard, image_first=1.0) == expected


def test_a_foreign_shard_is_described(tmp_path):
    members = [
        (f"{i}.{k}", b"{}" if k == "json" else b"x") for i in range(3) for k in ("cls", "wav")
    ]
    members += [("3.json", as_json(question="?", answer="!"))]
    found = list(read_documents(write_tar(tmp_path / "a.tar", members)))
    assert [bad.cause for bad in found] == ["foreign-layout"] * 4
    for seen in ("cls", "wav", "question", "pairs"):
        assert seen in str(found[0])


def test_a_first_sample_without_image_does_not_make_it_a_text_shard(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("0.txt", b"lost its image"), *pairs(1)])
    assert read(shard, image_first=1.0) == ["missing-member", EXPECTED["pairs"](1)]


def test_image_first_is_a_share_decided_by_the_key(tmp_path):
    def leads(members, share):
        shard = write_tar(tmp_path / "a.tar", members)
        documents = list(read_documents(shard, image_first=share))
        return {d.key: d.segments[0].modality == Modality.IMAGE for d in documents}

    samples = [pairs(number) for number in range(400)]
    half = leads(sum(samples, []), 0.5)
    assert 160 < sum(half.values()) < 240
    assert leads(sum(reversed(samples), []), 0.5) == half
    more = leads(sum(samples, []), 0.7)
    assert all(more[key] for key, first in half.items() if first)
    assert not any(leads(sum(samples, []), 0.0).values())
    assert all(leads(sum(samples, []), 1.0).values())


def test_shards_that_webdataset_writes_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for number in range(3):
            members = {name.split(".", 1)[1]: data for name, data in interleaved(number)}
            writer.write({"__key__": str(number), **members})
    assert read(tmp_path / "a.tar") == [EXPECTED["interleaved"](number) for number in range(3)]


@pytest.mark.parametrize(
    "shard", ["pipe:cat a.tar", "PIPE: curl x", "https://x/a.tar", "s3://b/a.tar"]
)
def test_commands_and_urls_are_refused_unopened(shard):
    with pytest.raises(ValueError, match="shell command" if shard[0] in "pP" else "URL"):
        read_documents(shard)


def test_what_is_no_tar_or_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_documents(tmp_path / "none.tar")
    with pytest.raises(FileNotFoundError, match="not a plain file"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="layout 'obelics' must be"):
        read_documents(tmp_path, "obelics")
    with pytest.raises(ValueError, match=r"image_first \(1.5\)"):
        read_documents(tmp_path, image_first=1.5)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 999)
    assert read(tmp_path / "a.parquet") == ["corrupt-tar"]
    (tmp_path / "empty.tar").write_bytes(b"")
    assert read(tmp_path / "empty.tar") == ["truncated"]
