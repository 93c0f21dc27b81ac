"""prepare: bad samples and what is not used are counted by cause, with an example of each; too many
bad samples, or nothing to train tokenizers on, stop it.
"""

import json
import shutil
import tarfile

import numpy as np
import pytest
from raw_shards import articles, contents, pairs, png, quiet, sentence, spec_of, write_tar
from sounds import encoded, sound, speech_spec

from earlyfuse.data.prepare import prepare, train_tokenizers
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.shards.manifest import read_manifest
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.tools import prepare as command


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def built(tmp_path, members, **changes):
    """Manifest of one source of one shard."""
    write_tar(tmp_path / "raw" / "0.tar", members)
    options = {"train": {"a": tmp_path / "raw"}, "validation": {}, **changes}
    (manifest,) = prepare(spec_of(tmp_path, tmp_path / "out", **options), quiet()).values()
    return manifest


def refusal(tmp_path, members, **changes):
    with pytest.raises(ValueError) as caught:
        built(tmp_path, members, **changes)
    assert not list((tmp_path / "out").rglob("manifest.json"))
    return str(caught.value)


# ---------------------------------------------------------------- one sample's fault


def spoken(rng, count):
    for number in range(count):
        bad = encoded(sound(rng, 0.3), 8000, subtype="GSM610")
        yield f"{number}.wav", bad if number == 3 else encoded(sound(rng, 0.3))
        yield f"{number}.txt", sentence(rng).encode()


def test_one_file_that_cannot_be_decoded_is_one_bad_sample_with_its_name(rng, tmp_path):
    write_tar(tmp_path / "raw" / "0.tar", spoken(rng, 14))
    options = {"train": {"said": tmp_path / "raw"}, "validation": {}, "image_tokenizer": "none"}
    spec = speech_spec(tmp_path, tmp_path / "out", **options, max_bad_rate=0.1)
    (manifest,) = prepare(spec, quiet()).values()
    assert (manifest["documents"], manifest["drops"]) == (13, {"corrupt-audio": 1})
    example = manifest["examples"]["corrupt-audio"]
    assert example.startswith("0.tar: sample '3': wav: audio is WAV in GSM 6.10")
    assert example in describe(tmp_path / "out")


def test_an_error_of_the_decoder_itself_is_that_samples_in_learning_and_in_tokenising(
    rng, tmp_path, monkeypatch
):
    from earlyfuse.data.tokenizers import pixels

    decoded = pixels._decoded

    def failing(image, draft):
        if b"absurdly large" in image:
            raise MemoryError
        return decoded(image, draft)

    monkeypatch.setattr(pixels, "_decoded", failing)
    absurd = [("x.png", png(rng) + b"absurdly large"), ("x.txt", b"words")]
    manifest = built(tmp_path, [*absurd, *pairs(rng, 20)], max_bad_rate=0.1)
    assert (manifest["documents"], manifest["drops"]) == (20, {"corrupt-image": 1})


@pytest.fixture
def bad(rng, tmp_path):
    """Two corrupt images and a missing caption in shard 0; shard 1 ends in its last sample."""
    uncaptioned = [("x.png", png(rng)), ("x.txt", b"nan")]
    write_tar(tmp_path / "bad" / "0.tar", [*pairs(rng, 20, corrupt=(3, 11)), *uncaptioned])
    whole = write_tar(tmp_path / "bad" / "1.tar", pairs(rng, 20))
    with tarfile.open(whole) as tar:
        last = tar.getmember("0019.png")
    whole.write_bytes(whole.read_bytes()[: last.offset_data + 30])
    return {"train": {"bad": tmp_path / "bad"}, "validation": {}}


def test_bad_samples_are_dropped_and_counted_by_cause_and_shard(raw, bad, tmp_path):
    spec = spec_of(raw, tmp_path / "out", max_bad_rate=0.1, on_bad="skip-shards", **bad)
    manifest = prepare(spec, quiet())["train/bad"]
    lost = manifest["drops"]["truncated"]
    assert 1 <= lost <= 6  # an estimate from sizes, in which padding is as large as five samples
    own, by_shard = {"corrupt-image": 2, "empty-text": 1}, manifest["drops_by_shard"]
    assert manifest["drops"] == own | {"truncated": lost}
    assert by_shard == {"0.tar": own, "1.tar": {"truncated": lost}}
    # the sample before a cut may count as incomplete, the one that is cut never as complete
    assert manifest["documents"] in (18 + 18, 18 + 19)
    page = describe(tmp_path / "out")
    assert f"train/bad dropped: corrupt-image 2, empty-text 1, truncated {lost}" in page
    assert "  0.tar: corrupt-image 2, empty-text 1" in page
    assert f"  1 of 2 shards end early: about {lost} samples are lost" in page


def test_too_many_bad_samples_end_it_with_the_worst_shard_and_one_of_each_cause(raw, bad, tmp_path):
    spec = spec_of(raw, tmp_path / "out", max_bad_rate=0.05, on_bad="skip-shards", **bad)
    message = (
        r"train/bad: 3 of (39|40) samples are bad.*max_bad_rate \(0.05\).*0\.tar: corrupt-image 2 "
        r"\(sample '0003': png: .*empty-text 1 \(sample 'x': txt holds 'nan'"
    )
    with pytest.raises(ValueError, match=message):
        prepare(spec, quiet())
    assert not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_ends_at_the_first_bad_sample(raw, bad, tmp_path, workers):
    spec = spec_of(raw, tmp_path / "out", on_bad="stop", workers=workers, **bad)
    with pytest.raises(ValueError, match=r"shard 0\.tar: .*corrupt-image.*on_bad is 'stop'"):
        prepare(spec, quiet())
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_examples_do_not_depend_on_where_the_raw_shards_lie(rng, tmp_path):
    members = [*pairs(rng, 20, corrupt=(3,)), ("x.png", png(rng)), ("x.txt", b""), ("y.cls", b"1")]
    built(tmp_path / "one", members, max_bad_rate=1.0)
    built(tmp_path / "other" / "place", members, max_bad_rate=1.0)
    found = contents(tmp_path / "one" / "out")
    assert found == contents(tmp_path / "other" / "place" / "out") and len(found) == 8


# ---------------------------------------------------------------- nothing to learn from


def dotted(rng):
    for number in range(6):
        yield f"{number}.input.png", png(rng)
        yield f"{number}.outputs.txt", sentence(rng).encode()


def unsorted(rng):
    yield from sorted(pairs(rng, 6), key=lambda member: member[0][::-1])


def with_json(rng, image=True, **fields):
    for number in range(6):
        if image:
            yield f"{number}.png", png(rng)
        yield f"{number}.json", json.dumps(fields).encode()


GONE = [{"image_name": "a.png", "image_base64": None, "matched_text_index": 0}]


@pytest.mark.parametrize(
    ("members", "counted", "example"),
    [
        (dotted, "foreign-layout 6", "sample '0': its members are input.png, outputs.txt"),
        (unsorted, "duplicate-key 6", "key '0000' occurs again"),
        (lambda rng: with_json(rng, text="caption in another field"),
         "empty-text 6", "sample '0': no caption; json has no text in"),
        (lambda rng: with_json(rng, image=False, text_list=["words"], image_info=GONE),
         "image_info without its image 6", "0.json image_info[0] 'a.png'"),
        (lambda rng: pairs(rng, 6, corrupt=range(6)),
         "corrupt-image 6", "sample '0000': png: image cannot be decoded"),
    ],
)  # fmt: skip
def test_sources_whose_images_are_lost_are_told_why_and_not_to_go_without(
    rng, tmp_path, members, counted, example
):
    message = refusal(tmp_path, members(rng))
    assert f"{counted} ({tmp_path / 'raw' / '0.tar'}: {example}" in message
    assert "none'" not in message and "sentencepiece" not in message


def test_sources_of_text_are_told_how_to_prepare_it_alone(rng, tmp_path):
    members = [*articles(rng, 20), ("x.txt", b"words"), ("x.json", b'{"url": "u"}')]
    message = refusal(tmp_path, members)
    assert "21 documents without any" in message and "image_tokenizer 'none'" in message


def test_sources_without_text_are_told_before_a_tokenizer_is_learnt(rng, tmp_path):
    fields = json.dumps({"texts": [None], "images": ["0.png"]}).encode()
    members = sum(([(f"{n}.json", fields), (f"{n}.0.png", png(rng))] for n in range(8)), [])
    message = refusal(tmp_path, members)
    assert "hold no text" in message and "8 documents without any" in message
    assert "sentencepiece" not in message


def test_too_little_is_told_with_what_was_lost(rng, tmp_path):
    few = [("a.png", png(rng)), ("a.txt", b"one two")]
    lost = sum(([(f"{n}.png", png(rng)), (f"{n}.txt", b"None")] for n in range(8)), [])
    message = refusal(tmp_path, few + lost, codes=4)
    assert "does not fit the training texts" in message and "INTERNAL" not in message
    assert "empty-text 8 (" in message


def test_images_far_behind_texts_are_found(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizers, "_FRUITLESS_DOCUMENTS", 10)
    texts = [(f"t{name}", text) for name, text in articles(rng, 30)]
    manifest = built(tmp_path, [*texts, *pairs(rng, 20)])
    assert (manifest["documents"], manifest["tokens"]["image"]) == (50, 20 * 4)


# ---------------------------------------------------------------- what is not used


def test_what_is_not_used_is_counted_in_the_manifest_and_shown(rng, tmp_path, capsys):
    extra = sum(([(f"{n:04d}.cls", b"1"), (f"{n:04d}.2.png", b"x")] for n in range(20)), [])
    members = sorted([*pairs(rng, 20), *extra, ("0000.\x1b[2J", b"")])
    manifest = built(tmp_path, members)
    assert manifest["unused"] == {".cls": 20, ".png": 20, ".\x1b[2j": 1}
    assert manifest["examples"][".cls"] == "0.tar: 0000.cls"
    assert read_manifest(tmp_path / "out" / "train" / "a") == manifest
    assert command.main(["inspect", str(tmp_path / "out")]) == 0
    page = capsys.readouterr().out
    assert "train/a unused:" in page and ".cls 20 (0.tar: 0000.cls), .png 20 (" in page
    assert "\x1b" not in page


def test_counts_survive_a_repeated_command(rng, tmp_path):
    members = [*pairs(rng, 20, corrupt=(1,)), ("0019.cls", b"1")]
    manifest = built(tmp_path, members, max_bad_rate=0.1)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train" / "a" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "raw")
    assert built(tmp_path, members, max_bad_rate=0.1) == manifest
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------- text tokenizer


def test_an_error_of_the_texts_is_not_taken_for_a_lack_of_text():
    def texts():
        yield from ["some words to learn from"] * 50
        raise OSError(5, "disk gone")

    with pytest.raises(OSError, match="disk gone"):
        TextTokenizer.train(texts(), 330)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", ""]])
def test_no_text_at_all_is_told_before_sentencepiece(texts):
    with pytest.raises(ValueError, match="learnt from text, and there is none"):
        TextTokenizer.train(texts, 330)
