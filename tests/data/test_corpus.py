"""The embedded corpus: the same bytes each time, true sentences, nothing held out in training."""

import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from string import ascii_lowercase

import numpy as np
import pytest
from PIL import Image
from raw_shards import contents

from earlyfuse.data.documents import Document
from earlyfuse.data.embedded import builder, compose, digits, glyphs, speech
from earlyfuse.data.embedded.builder import (
    SOURCES,
    CorpusPaths,
    build_corpus,
)
from earlyfuse.data.embedded.tasks import tasks as tasks_of
from earlyfuse.data.prepare import PrepareSpec
from earlyfuse.data.prepare import embedded as prepare_embedded
from earlyfuse.data.prepare.embedded import prepare_corpus
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.raw import read_documents
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.audio import waveform
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.evaluation.eval_tasks import load_tasks
from earlyfuse.parallel.evaluation.image_checks import ImageChecks
from earlyfuse.tools import prepare as command

SCALE = 0.03


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus") / "embedded", scale=SCALE)


def documents(corpus, split, source):
    shards = corpus.shards(split, source)
    assert shards, f"{split}/{source} has no shard"
    return [document for shard in shards for document in read_documents(shard)]


def parts(document):
    """(images, texts) of a document, each in order."""
    payloads = [segment.payload for segment in document.segments]
    return [p for p in payloads if isinstance(p, bytes)], [
        p for p in payloads if isinstance(p, str)
    ]


@pytest.fixture(scope="module")
def images(corpus):
    """All distinct images by split."""
    found = {"train": set(), "validation": set()}
    for split, pngs in found.items():
        for source in SOURCES:
            pngs.update(png for d in documents(corpus, split, source) for png in parts(d)[0])
    return found


@pytest.fixture(scope="module")
def tasks(corpus):
    return {task["name"]: task for task in json.loads(corpus.tasks.read_text())["tasks"]}


@pytest.fixture(scope="module")
def meaning(corpus):
    """PNG → digit or letter, by split, from the sources themselves."""
    found = {}
    scans = zip(("train", "validation"), digits.load(16, seed=0), strict=True)
    for split, scanned in scans:
        faces = glyphs.TRAIN_FACES if split == "train" else glyphs.HELD_OUT_FACES
        letters = {glyphs.glyph_png(face, c, 16): c for face in faces for c in ascii_lowercase}
        found[split] = letters | {digit.png: digit.value for digit in scanned}
    return found


def test_another_process_with_other_hashes_and_locale_writes_the_same_bytes(corpus, tmp_path):
    again = tmp_path / "again"
    program = (
        "import pathlib, sys; from earlyfuse.data.embedded.builder import build_corpus; "
        f"build_corpus(pathlib.Path(sys.argv[1]), scale={SCALE})"
    )
    odd = {"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", program, again], env=os.environ | odd, check=True)
    assert len(contents(again)) == 13
    assert contents(again) == contents(corpus.folder)


def test_another_seed_holds_out_other_images(corpus, tmp_path):
    other = build_corpus(tmp_path / "other", seed=1, scale=SCALE)
    assert contents(other.folder / "validation") != contents(corpus.folder / "validation")


def test_every_sample_is_read_and_every_image_is_small_rgb(corpus, images):
    for split in ("train", "validation"):
        for source in SOURCES:
            found = documents(corpus, split, source)
            assert all(isinstance(document, Document) for document in found)
            media = {segment.modality for document in found for segment in document.segments}
            assert media == {Modality.TEXT} | (set() if source == "text" else {Modality.IMAGE})
        for png in images[split]:
            image = Image.open(io.BytesIO(png))
            assert (image.format, image.size, image.mode) == ("PNG", (16, 16), "RGB")
    glyph_documents = documents(corpus, "train", "glyphs")
    first = sum(d.segments[0].modality == Modality.IMAGE for d in glyph_documents)
    assert 0.55 < first / len(glyph_documents) < 0.85  # images before their words


def test_nothing_held_out_is_in_training(corpus, images, tasks):
    assert set(glyphs.TRAIN_FACES).isdisjoint(glyphs.HELD_OUT_FACES)
    assert images["train"].isdisjoint(images["validation"])
    for task in tasks.values():
        assert {base64.b64decode(item["image"]) for item in task["items"]} <= images["validation"]
    train, held_out = (
        {parts(d)[1][0] for d in documents(corpus, split, "text")}
        for split in ("train", "validation")
    )
    assert held_out and train.isdisjoint(held_out)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_name_and_label_is_true(corpus, meaning, split):
    faces = glyphs.TRAIN_FACES if split == "train" else glyphs.HELD_OUT_FACES
    for document in documents(corpus, split, "glyphs"):
        (png,), (text,) = parts(document)
        character = unicodedata.lookup(text.removeprefix("glyph: "))
        able = [face for face in faces if glyphs.covered(face, character)]
        assert png in [glyphs.glyph_png(face, character, 16) for face in able], text
    for document in documents(corpus, split, "digits"):
        pngs, texts = parts(document)
        shown = [digits.NUMBER_WORDS[meaning[split][png]] for png in pngs]
        assert texts == [f"handwritten digit {word}" for word in shown]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_composed_sentence_is_true(corpus, meaning, split):
    scans = [digits.Digit(png, v) for png, v in meaning[split].items() if isinstance(v, int)]
    faces = glyphs.TRAIN_FACES if split == "train" else glyphs.HELD_OUT_FACES
    more = compose.interleaved_documents(
        600, scans, faces, ["spam", "eggs"], 16, random.Random(0), 0.5
    )  # so that rare cases occur, a tie of two digits among them
    split_parts = [parts(document) for document in documents(corpus, split, "interleaved")]
    split_parts += [
        ([p for p in made if isinstance(p, bytes)], [p for p in made if isinstance(p, str)])
        for made in more
    ]
    kinds = Counter()
    for pngs, texts in split_parts:
        shown = [meaning[split][png] for png in pngs]
        kind, _, rest = texts[0].partition(" ")
        kinds[kind] += 1
        if kind == "plus":
            total = shown[0] + shown[1]
            assert texts[1] == f"makes {digits.NUMBER_WORDS[total]}"
            assert shown[2:] in ([], [total])
        elif kind == "reads":
            assert rest.split() == [digits.NUMBER_WORDS[value] for value in shown]
        elif kind == "spells":
            assert rest == "".join(shown)
        else:
            first, second = shown
            relation = (first > second) - (first < second)
            assert texts[0] == ("is equal to", "is greater than", "is less than")[relation]
    assert kinds.keys() == {"plus", "reads", "spells", "is"}


def test_glyphs_are_drawn_legibly_and_each_has_a_shape_of_its_own():
    characters = glyphs.characters()
    drawn = [glyphs.glyph_pixels(glyphs.REFERENCE_FACE, c, 16) for c in characters]
    assert len({image.tobytes() for image in drawn}) == len(characters) > 2000
    for image in drawn:
        assert image.min() < 160, "no ink"
    for face in (*glyphs.TRAIN_FACES, *glyphs.HELD_OUT_FACES):
        box = glyphs.glyph_pixels(face, "H", 16) < 128
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert 10 <= rows[-1] - rows[0] + 1 <= 14  # capitals fill the square
        assert abs(rows[0] + rows[-1] - 15) <= 1 and abs(columns[0] + columns[-1] - 15) <= 2


def test_a_face_draws_only_what_it_has():
    box = chr(0x2FFFE)  # no character, so drawn as the box of .notdef
    assert glyphs.covered("STIXGeneral", box + "A") == ["A"]
    canadian = chr(0x1401)  # in DejaVu Sans, not in STIX
    assert glyphs.covered("DejaVuSans", canadian) and not glyphs.covered("STIXGeneral", canadian)


def test_no_script_word_dominates(corpus):
    words = json.loads((corpus.folder / "corpus.json").read_text())["script_words"]
    assert max(words.values()) < 0.12 * sum(words.values())


def test_tasks_ask_for_a_word_that_chance_seldom_gives(tasks):
    assert tasks.keys() == {"digit label", "glyph script"}
    labels = tasks["digit label"]
    assert sorted(labels["candidates"]) == sorted(digits.NUMBER_WORDS[:10])
    for task in tasks.values():
        answers = Counter(item["answer"] for item in task["items"])
        assert answers.keys() == set(task["candidates"])
        assert task["prefix"].endswith(" ")
        assert max(answers.values()) <= 0.25 * len(task["items"])


def test_a_task_is_even_over_its_answers():
    labelled = [
        digits.Digit(bytes([value, n % 256]), value) for value in range(3) for n in range(90)
    ]
    drawn = [(c, c.encode()) for c in "abcdefghijklmnopqrstuvwxyz" * 40 + "αβγδεζηθικλμνξο" * 9]
    for task in tasks_of(labelled, drawn, seed=0)["tasks"]:
        counts = Counter(item["answer"] for item in task["items"])
        assert max(counts.values()) - min(counts.values()) <= 2
        assert 180 <= len(task["items"]) <= 220


def test_validation_says_what_the_tasks_ask(corpus, tasks):
    """An item's image stands in a validation document whose words are prefix and answer."""
    said = {}
    for source in ("glyphs", "digits"):
        for document in documents(corpus, "validation", source):
            (png,), (text,) = parts(document)
            said[png] = text
    for task in tasks.values():
        for item in task["items"]:
            text = said[base64.b64decode(item["image"])]
            assert text.removeprefix(task["prefix"]).split()[0] == item["answer"]


def test_a_finished_corpus_is_not_built_again(corpus, monkeypatch):
    before = contents(corpus.folder)
    monkeypatch.setattr(builder, "_write", None)  # would fail if called
    assert build_corpus(corpus.folder, scale=SCALE) == corpus
    assert contents(corpus.folder) == before


def test_prompts_are_held_out_captions_and_their_images(corpus, images):
    prompts = json.loads(corpus.prompts.read_text())["prompts"]
    assert len(prompts) == 30 and len({prompt["caption"] for prompt in prompts[:12]}) == 12
    held_out = {
        (text, png)
        for source in ("glyphs", "digits")
        for document in documents(corpus, "validation", source)
        for png, text in zip(*parts(document), strict=True)
    }
    for number, prompt in enumerate(prompts):
        png = base64.b64decode(prompt["image"])
        assert (prompt["caption"], png) in held_out and png not in images["train"]
        kind = compose.DIGIT_PREFIX if number % 3 == 2 else compose.GLYPH_PREFIX
        assert prompt["caption"].startswith(kind)


def test_a_build_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(builder, "tasks", full)
    with pytest.raises(OSError, match="disk full"):
        build_corpus(tmp_path / "corpus", scale=0.01)
    assert not list(tmp_path.iterdir())


def test_two_builders_at_once_end_with_one_corpus(tmp_path, monkeypatch):
    folder, write = tmp_path / "corpus", builder._write
    folder.mkdir()  # an empty folder is as good as none

    def overtaken(made, *arguments):
        write(made, *arguments)
        monkeypatch.setattr(builder, "_write", write)
        build_corpus(folder, scale=0.01)

    monkeypatch.setattr(builder, "_write", overtaken)
    assert build_corpus(folder, scale=0.01).tasks.is_file()
    assert list(tmp_path.iterdir()) == [folder]


def test_without_espeak_the_corpus_with_speech_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"espeak-ng.*apt-get install espeak-ng"):
        build_corpus(out / "raw", scale=0.01, extra="speech")
    assert command.main(["corpus", str(out), "--speech", "--scale", "0.01"]) == 2
    assert "apt-get install espeak-ng" in capsys.readouterr().err and not out.exists()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    if shutil.which(speech.PROGRAM) is None:
        pytest.skip(f"{speech.PROGRAM} is not installed")
    out = tmp_path_factory.mktemp("spoken") / "out"
    options = {"text_vocab": 400, "codes": 24, "speech_codes": 32, "workers": 1}
    prepare_corpus(out, scale=SCALE, extra="speech", progress=Progress(io.StringIO()), **options)
    return out


def test_the_corpus_with_speech_is_the_other_one_and_a_source_more(corpus, spoken):
    plain, with_speech = contents(corpus.folder), contents(spoken / "raw")
    own = {name for name in with_speech if "/speech/" in name}
    about = {"corpus.json", "README.md", "validation/tasks.json"}
    assert own and with_speech.keys() - own == plain.keys()
    assert {name for name in plain if plain[name] != with_speech[name]} == about
    described = json.loads((spoken / "raw" / "corpus.json").read_text())
    assert "eSpeak NG" in described["versions"]["espeak-ng"]
    assert described["documents"]["train"]["speech"] == 120


def test_every_spoken_document_is_words_and_their_sound(corpus, spoken, meaning):
    raw = CorpusPaths(spoken / "raw")
    orders, utterances = set(), {"train": set(), "validation": set()}
    for split, flacs in utterances.items():
        for document in documents(raw, split, "speech"):
            kinds = tuple(segment.modality for segment in document.segments)
            orders.add(kinds)
            by_kind = {s.modality: s.payload for s in document.segments}
            flac, text = by_kind[Modality.SPEECH], by_kind[Modality.TEXT]
            flacs.add(flac)
            seconds = len(waveform(flac, 16_000)) / 16_000
            assert 0.15 < seconds < 9
            if Modality.IMAGE not in by_kind:
                assert text.startswith("spoken: ")
            elif text.startswith("handwritten digit "):
                shown = meaning[split][by_kind[Modality.IMAGE]]
                assert text == f"handwritten digit {digits.NUMBER_WORDS[shown]}"
            else:
                unicodedata.lookup(text.removeprefix("glyph: "))
    assert len(orders) == 6  # speech and text either way; with an image, it and speech either way
    assert utterances["train"].isdisjoint(utterances["validation"])
    assert set(speech.TIMBRES).isdisjoint(speech.HELD_OUT_TIMBRES)


def test_an_utterance_is_the_same_each_time_and_every_voice_is_another(spoken, monkeypatch):
    timbres = (*speech.TIMBRES, *speech.HELD_OUT_TIMBRES)
    names = [f"{accent}+{timbre}" for accent in speech.ACCENTS for timbre in timbres]
    said = [speech.speak("--seven", speech.Voice(name, 150, 50)) for name in [*names, names[0]]]
    assert len(set(said)) == len(names) and said[0] == said[-1]
    monkeypatch.setattr(speech, "TIMBRES", ("m1", "m99"))  # it would speak, with another voice
    with pytest.raises(ValueError, match="has no voices !v/m99"):
        speech.espeak_version()


def test_spoken_digits_are_a_task_of_validation(spoken):
    tasks = {task.name: task for task in load_tasks(spoken)}
    assert tasks.keys() == {"digit label", "glyph script", "spoken digit"}
    task, tokenizers = tasks["spoken digit"], Tokenizers.load(spoken / "tokenizers")
    medium = tokenizers.vocabulary.medium(Modality.SPEECH)
    for prompt in task.prompts:
        assert prompt[1] == medium.begin and medium.end in prompt
    words = [tokenizers.text.encode("spoken: " + word) for word in sorted(digits.NUMBER_WORDS[:10])]
    assert [[*task.prompts[0][task.prompts[0].index(medium.end) + 1 :], *c] for c in
            task.candidates] == words  # fmt: skip


def test_a_finished_corpus_with_speech_needs_no_espeak(spoken, monkeypatch):
    before = contents(spoken / "raw")
    monkeypatch.setenv("PATH", "")
    build_corpus(spoken / "raw", scale=SCALE, extra="speech")
    assert contents(spoken / "raw") == before
    with pytest.raises(ValueError, match="asked for is"):
        build_corpus(spoken / "raw", scale=SCALE)


# ---- clips -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    out = tmp_path_factory.mktemp("moving") / "out"
    options = {"text_vocab": 399, "codes": 24, "workers": 1}
    prepare_corpus(out, scale=SCALE, extra="clips", progress=Progress(io.StringIO()), **options)
    return out


def test_the_corpus_with_clips_is_the_other_one_and_a_source_more(corpus, moving):
    plain, with_clips = contents(corpus.folder), contents(moving / "raw")
    own = {name for name in with_clips if "/clips/" in name}
    about = {"corpus.json", "README.md", "validation/tasks.json"}
    assert own and with_clips.keys() - own == plain.keys()
    assert {name for name in plain if plain[name] != with_clips[name]} == about
    assert {json.loads((moving / "raw" / "corpus.json").read_text())["documents"][split]["clips"]
            for split in ("train", "validation")} == {90, 9}  # fmt: skip


def clip_of(document):
    """Frames as grey levels, the number of them before the text, and the text."""
    frames = [s.payload for s in document.segments if isinstance(s.payload, bytes)]
    before = 0
    for segment in document.segments:
        if isinstance(segment.payload, str):
            text = segment.payload
            break
        before += 1
    return [np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in frames], before, text


def ink(frame):
    """Centre (row, column) and amount of what is drawn."""
    dark = 255.0 - frame
    rows, columns = np.mgrid[: len(frame), : len(frame)]
    return (rows * dark).sum() / dark.sum(), (columns * dark).sum() / dark.sum(), dark.sum()


MOVED = {
    "moves left": lambda a, b: b[1] < a[1] - 0.9 and abs(b[0] - a[0]) < 0.1,
    "moves right": lambda a, b: b[1] > a[1] + 0.9 and abs(b[0] - a[0]) < 0.1,
    "moves up": lambda a, b: b[0] < a[0] - 0.9 and abs(b[1] - a[1]) < 0.1,
    "moves down": lambda a, b: b[0] > a[0] + 0.9 and abs(b[1] - a[1]) < 0.1,
    "grows": lambda a, b: b[2] > a[2],
    "shrinks": lambda a, b: b[2] < a[2],
    "turns left": lambda a, b: True,
    "turns right": lambda a, b: True,
    "stands still": lambda a, b: a == b,
}


def test_a_clip_does_what_is_said_and_a_streamed_one_is_named_when_it_is_clear(moving):
    streamed, said, ends = 0, set(), set()
    for document in documents(CorpusPaths(moving / "raw"), "train", "clips"):
        frames, before, text = clip_of(document)
        (motion,) = [m for m in MOVED if m in text]
        said.add(motion)
        assert 3 <= len(frames) <= 8
        places = [ink(frame) for frame in frames]
        if text != f"motion: {motion}":
            assert before in (0, len(frames))
            assert all(MOVED[motion](a, b) for a, b in pairwise(places[::3]))
            continue
        streamed += 1
        ends.add(before == len(frames))
        if motion == "stands still":
            assert before == len(frames) == 8 and len({f.tobytes() for f in frames}) == 1
        else:
            assert MOVED[motion](places[before - 3], places[before - 1])
            assert len({f.tobytes() for f in frames[: before - 2]}) == 1, "still until then"
    assert said == MOVED.keys() and streamed > 20 and ends == {True, False}


def test_clips_fill_the_vocabulary_of_the_corpus_without_and_the_motion_is_a_task(moving):
    tokenizers = Tokenizers.load(moving / "tokenizers")
    vocabulary = tokenizers.vocabulary
    medium = vocabulary.medium(Modality.IMAGE)
    assert (vocabulary.size, medium.separator) == (399 + 24 + 1, 399 + 24)
    assert prepare_embedded.OPTIONS["clips"]["text_vocab"] + 1 == PrepareSpec.text_vocab
    task = {task.name: task for task in load_tasks(moving)}["clip motion"]
    for prompt in task.prompts:
        frames = prompt.count(medium.separator) + 1
        assert 4 <= frames <= 8 and prompt[1] == medium.begin
        assert prompt[1 + frames * 17] == medium.end and prompt.count(medium.end) == 1
    assert len(task.candidates) == 9


@pytest.mark.parametrize("frames", [[], "a", ["a"], [1]])
def test_a_task_with_other_frames_is_refused(moving, tmp_path, frames):
    shutil.copytree(moving / "tokenizers", tmp_path / "tokenizers")
    item = {"frames": frames, "answer": "grows"}
    task = {"name": "motion", "prefix": "motion: ", "candidates": ["grows"], "items": [item]}
    path = tmp_path / "validation" / "tasks.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"tasks": [task]}))
    with pytest.raises(ValueError, match=r"tasks.json: tasks\[0\]: items\[0\].*(frames|image)"):
        load_tasks(tmp_path)


# ---- captions first ----------------------------------------------------------------------------


def test_image_first_reorders_documents_and_changes_nothing_else(corpus, tmp_path):
    other = build_corpus(tmp_path / "corpus", scale=SCALE, image_first=0.2)
    for split in ("train", "validation"):
        for source in SOURCES:
            pairs = list(zip(*(documents(c, split, source) for c in (corpus, other)), strict=True))
            for one, two in pairs:
                assert [sorted(p, key=str) for p in parts(one)] == [
                    sorted(p, key=str) for p in parts(two)
                ]
    said = {json.loads((c.folder / "corpus.json").read_text())["spec"].get("image_first")
            for c in (corpus, other)}  # fmt: skip
    assert said == {None, 0.2}, "a corpus of before is the one of today"
    glyphs = [d.segments[0].modality for d in documents(other, "train", "glyphs")]
    share = sum(m == Modality.IMAGE for m in glyphs) / len(glyphs)
    assert len(glyphs) > 100 and share == pytest.approx(0.2, abs=0.1)
    about = {"corpus.json"}
    one, two = contents(corpus.folder), contents(other.folder)
    assert {n for n in one if one[n] != two[n] and not n.endswith(".tar")} == about


def test_the_corpus_of_vectors_has_few_glyphs_captions_first_and_patches(corpus, tmp_path):
    out = tmp_path / "out"
    options = ["--scale", str(SCALE), "--text-vocab", "399", "--workers", "1"]
    assert command.main(["corpus", str(out), "--vectors", *options]) == 0
    captions_first = json.loads((out / "raw" / "corpus.json").read_text())["spec"]["image_first"]
    assert captions_first == 0.2
    tokenizers = Tokenizers.load(out / "tokenizers")
    medium = tokenizers.vocabulary.medium(Modality.IMAGE)
    assert (medium.start, medium.count, medium.block) == (399, 1, 16)
    assert tokenizers.vocabulary.size == 400, "2,048 without --text-vocab"
    assert prepare_embedded.OPTIONS["vectors"]["text_vocab"] == 2047
    assert {path.parent.name for path in (out / "train").glob("*/manifest.json")} == set(SOURCES)
    source = TokenSource(out / "train" / "digits")
    assert source.vectors.width == 48
    (png, *_), _ = parts(next(iter(documents(CorpusPaths(out / "raw"), "train", "digits"))))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    first = source.document_vectors(0)[0].reshape(4, 4, 3)
    assert np.array_equal(np.round((first.astype(float) + 1) * 127.5), pixels[:4, :4])
    task = load_tasks(out)[0]
    assert task.vectors[0].shape == (16, 48) and task.prompts[0].count(399) == 16
    checks = ImageChecks.load(out)
    assert len(checks.labels) == 10 and checks.prefix == "handwritten digit "
    plain, other = contents(corpus.folder), contents(out / "raw")
    assert plain.keys() == other.keys()
    assert plain["validation/labelled.json"] == other["validation/labelled.json"]
    few, all_of_them = (
        json.loads((folder / "corpus.json").read_text())["script_words"].keys()
        for folder in (out / "raw", corpus.folder)
    )
    assert {"greek", "latin"} <= few and "cyrillic" in all_of_them - few


def test_wrong_requests_are_refused(corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for folder, options, said in (
        (tmp_path / "corpus", {"scale": 0}, r"scale \(0\)"),
        (tmp_path / "corpus", {"image_size": 12}, r"image_size \(12\) must be a multiple of 8"),
        (corpus.folder, {"scale": SCALE, "seed": 5}, "asked for is"),
        (corpus.folder, {"scale": SCALE, "image_first": 0.2}, "asked for is"),
        (tmp_path / "corpus", {"image_first": 1.5}, r"image_first \(1.5\) must lie in"),
        (tmp_path, {}, "holds something else"),
        (
            tmp_path / "corpus",
            {"extra": "smell"},
            r"extra \('smell'\) must be one of speech, clips",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            build_corpus(folder, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
