"""Videos: frames of lists and of animated files, between separators; never split inside a frame."""

import io
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from raw_shards import articles, documents_of, pairs, png, quiet, spec_of, write_tar
from test_stream import mixture_of, rows_of
from tiny_sources import BEGIN, BLOCK, BOS, CODES, END, EOS, VOCABULARY, image, write_source

from earlyfuse.data.documents import BadSample, Document, Segment
from earlyfuse.data.json_files import JsonObject
from earlyfuse.data.prepare import prepare
from earlyfuse.data.prepare.frames import FrameRule, chosen_frames
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.raw import read_documents
from earlyfuse.data.shards.manifest import read_manifest
from earlyfuse.data.stream.lanes import Lane
from earlyfuse.data.tokenizers import Tokenizers, animation
from earlyfuse.data.tokenizers.animation import animation_frames
from earlyfuse.data.tokenizers.pixels import image_pixels
from earlyfuse.data.vocabulary import load_vocabulary
from earlyfuse.models.generate.constrained import Draft, allowed_ids
from earlyfuse.models.state_dicts.vocabulary_map import from_vocabulary, to_vocabulary
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.tools.documents import read_prompts, to_prompt, to_segments

SEPARATOR = VOCABULARY.size
IMAGES = replace(VOCABULARY.media[0], separator=SEPARATOR)
VIDEOS = replace(VOCABULARY, size=SEPARATOR + 1, media=(IMAGES,))


def video(frames, first=0):
    return IMAGES.block_of([image(first + number)[1:-1] for number in range(frames)])


def pictures(count, seed=0):
    """Different images of 8 × 8."""
    rng = np.random.default_rng(seed)
    return [Image.open(io.BytesIO(png(rng))) for _ in range(count)]


def animated(frames, kind, **options):
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def webp(frames):
    return animated(frames, "WEBP", lossless=True)


def gif(frames):
    return animated(frames, "GIF")


def all_of(count):
    return range(count)


def pixels(encoded):
    return image_pixels(encoded, 8)


# ---- which frames ------------------------------------------------------------------------------


def test_stride_and_number_choose_frames():
    assert FrameRule(8, 1, "drop").choose(8) == [*range(8)]
    assert FrameRule(8, 3, "drop").choose(8) == [0, 3, 6]
    assert FrameRule(4, 1, "first").choose(9) == [0, 1, 2, 3]
    assert FrameRule(4, 1, "even").choose(10) == [0, 3, 6, 9]
    assert FrameRule(3, 2, "even").choose(11) == [0, 4, 10]
    assert FrameRule(1, 1, "even").choose(5) == [0]
    for rule, count in ((FrameRule(4, 2, "drop"), 9), (FrameRule(9, 1, "first"), 5000)):
        with pytest.raises(BadSample, match=r"\[long-video\]"):
            rule.choose(count)


@pytest.mark.parametrize("make", [gif, webp])
def test_frames_of_an_animation_are_its_whole_pictures(make):
    frames = pictures(6)
    found = [pixels(frame) for frame in animation_frames(make(frames), all_of)]
    error = 40 if make is gif else 0  # a palette for each frame
    for picture, frame in zip(frames, found, strict=True):
        assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - frame).max() <= error
    some = animation_frames(make(frames), lambda count: [count - 6, 2, 5])
    assert [pixels(frame).tobytes() for frame in some] == [found[i].tobytes() for i in (0, 2, 5)]
    assert pixels(make(frames)).tobytes() == found[0].tobytes(), "alone it is its first frame"


def test_a_gif_that_draws_changes_alone_gives_whole_frames_on_white():
    def drawn(*boxes):
        picture = Image.new("RGBA", (8, 8))
        for box in boxes:
            picture.paste((255, 0, 0, 255), box)
        return picture

    frames = [drawn((0, 0, 2, 2)), drawn((0, 0, 2, 2), (4, 4, 6, 6)), drawn((4, 4, 6, 6))]
    found = animation_frames(animated(frames, "GIF", disposal=2), all_of)
    for picture, frame in zip(frames, found, strict=True):
        white = Image.new("RGBA", (8, 8), "white")
        white.alpha_composite(picture)
        assert np.array_equal(np.asarray(white.convert("RGB")), pixels(frame))


@pytest.mark.parametrize("make", [gif, webp])
def test_a_still_is_no_animation(make):
    still = make(pictures(1))
    assert animation_frames(still, all_of) == []
    document = Document("0", (Segment(Modality.IMAGE, still, "gif"),))
    assert chosen_frames(document, FrameRule(4, 1, "even")) == list(document.segments)


@pytest.mark.parametrize("make", [gif, webp])
def test_a_damaged_animation_is_a_bad_sample_wherever_it_is_cut(make):
    whole = make(pictures(4))
    frames = animation_frames(whole, all_of)
    bad = 0
    for cut in range(16, len(whole) - 1, 7):
        try:
            found = animation_frames(whole[:cut], all_of)
        except BadSample as error:
            bad += error.cause == "corrupt-image"
        else:  # a GIF cut between two frames has fewer
            assert make is gif and found == frames[: len(found)]
    assert bad > 10


@pytest.mark.parametrize("make", [gif, webp])
def test_long_animations_meet_a_limit_before_they_are_decoded(make, monkeypatch):
    whole = make(pictures(6))
    monkeypatch.setattr(Image.Image, "load", None)
    for name, limit in (("MOST_FRAMES", 5), ("MOST_PIXELS", 6 * 64 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(animation, name, limit)
            with pytest.raises(BadSample, match=r"8 × 8 pixels.*\[long-video\]"):
                animation_frames(whole, all_of)


# ---- layouts -----------------------------------------------------------------------------------


def read(tmp_path, fields, members):
    content = [("0.json", json.dumps(fields).encode())]
    content += [(f"0.{name}", data) for name, data in members.items()]
    (found,) = read_documents(write_tar(tmp_path / "0.tar", content))
    return found


def test_a_list_of_frames_is_one_video_at_its_place(tmp_path):
    members = {f"{n}.png": b"%d" % n for n in range(4)}
    fields = {
        "texts": [None, "moves", None, "stops", None],
        "frames": [["0.png", "1.png"], None, ["2.png"], None, None],
        "images": [None, None, None, None, "3.png"],
    }
    document = read(tmp_path, fields, members)
    found = [(s.payload, s.continues) for s in document.segments]
    frames = [(b"0", False), (b"1", True)]
    assert found == [*frames, ("moves", False), (b"2", False), ("stops", False), (b"3", False)]
    assert document.unused == ()
    del fields["images"], fields["texts"][4], fields["frames"][4]
    assert [s.payload for s in read(tmp_path, fields, members).segments][-1] == "stops"


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ("0.png", r"frames holds '0.png', not a list of the members .*\[foreign-layout\]"),
        ([], r"frames holds \[\], not a list .*\[foreign-layout\]"),
        (["0.png", None], r"not a name or null \[foreign-layout\]"),
        (["0.png", "9.png"], r"names image '9.png'.*\[missing-member\]"),
        (["0.png", "1.mp4"], r"'1.mp4' is no image that is read.*\[unsupported-media\]"),
    ],
)
def test_other_lists_of_frames_are_refused(tmp_path, frames, said):
    found = read(tmp_path, {"texts": [None, "a"], "frames": [frames, None]}, {"0.png": b"0"})
    assert isinstance(found, BadSample)
    with pytest.raises(BadSample, match=said):
        raise found


def test_frames_among_the_images_are_shown_their_place(tmp_path):
    found = read(tmp_path, {"texts": [None], "images": [["0.png"]]}, {"0.png": b"0"})
    assert "frames of a video are a list in 'frames'" in str(found)


# ---- prepare -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips():
    """Name → content: a list of five frames with words, a GIF and a WebP of three, two stills."""
    rng = np.random.default_rng(0)
    fields = {"texts": [None, "a ball rolls"], "frames": [[f"{n}.png" for n in range(5)], None]}
    members = {"0.json": json.dumps(fields).encode()}
    members |= {f"0.{number}.png": png(rng) for number in range(5)}
    for number, count in enumerate((3, 3, 1, 1), 1):
        make, kind = ((gif, "gif"), (webp, "webp"))[(number - 1) % 2]
        members[f"{number}.{kind}"] = make(pictures(count, number))
        members[f"{number}.txt"] = b"words"
    return members


@pytest.fixture(scope="module")
def shards(clips, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("raw_videos"), np.random.default_rng(0)
    write_tar(folder / "books" / "0.tar", articles(rng, 60))
    write_tar(folder / "pairs" / "0.tar", pairs(rng, 30))
    write_tar(folder / "clips" / "0.tar", clips.items())
    return folder


def video_spec(shards, out, **changes):
    train = {name: shards / name for name in ("books", "pairs", "clips")}
    fields = {"train": train, "validation": {}, "video_frames": 4, "max_bad_rate": 1.0}
    return spec_of(shards, out, **{**fields, **changes})


@pytest.fixture(scope="module")
def prepared(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("videos") / "out"
    prepare(video_spec(shards, out), quiet())
    return out


def block_at(tokens, medium):
    """Codes of the frames of the first block."""
    inside = tokens[tokens.index(medium.begin) + 1 : tokens.index(medium.end)]
    runs = itertools.groupby(inside, key=lambda token: token == medium.separator)
    return [list(codes) for is_separator, codes in runs if not is_separator]


def test_prepared_videos_are_blocks_of_frames_between_separators(clips, prepared):
    tokenizers = Tokenizers.load(prepared / "tokenizers")
    medium = tokenizers.vocabulary.medium(Modality.IMAGE)
    assert medium.separator == tokenizers.vocabulary.size - 1 == 330 + 16
    listed = [clips[f"0.{number}.png"] for number in (0, 1, 2, 4)]  # four of five
    files = [
        listed,
        animation_frames(clips["1.gif"], all_of),
        animation_frames(clips["2.webp"], all_of),
        [clips["3.gif"]],
        [clips["4.webp"]],
    ]
    for frames, (tokens, counts) in zip(
        files, documents_of(prepared / "train" / "clips"), strict=True
    ):
        items = [tokenizers.image.features(frame) for frame in frames]
        codes = [(c + medium.start).tolist() for c in tokenizers.image.encode_items(items)]
        assert block_at(tokens.tolist(), medium) == codes
        assert medium.block_of(codes) in [
            tokens.tolist()[at : at + 5 * len(codes) + 1] for at in range(len(tokens))
        ]
        assert counts[1] == 4 * len(codes) and counts[0] == len(tokens) - counts[1]
    assert medium.separator not in tokenizers.unused
    assert f"frame separator {medium.separator}" in describe(prepared)


def test_without_videos_lists_are_bad_samples_and_animations_stills(clips, shards, tmp_path):
    prepare(video_spec(shards, tmp_path / "out", video_frames=0), quiet())
    manifest = read_manifest(tmp_path / "out" / "train" / "clips")
    assert manifest["drops"] == {"no-video-frames": 1}
    assert "--video-frames" in manifest["examples"]["no-video-frames"]
    for path in (tmp_path / "out").rglob("*.json"):
        assert "separator" not in path.read_text(), "as before there were videos"
    tokenizers = Tokenizers.load(tmp_path / "out" / "tokenizers")
    medium = tokenizers.vocabulary.medium(Modality.IMAGE)
    (tokens, _), *_ = documents_of(tmp_path / "out" / "train" / "clips")
    (codes,) = tokenizers.image.encode_items([tokenizers.image.features(clips["1.gif"])])
    assert block_at(tokens.tolist(), medium) == [(codes + medium.start).tolist()]


def test_dropped_long_videos_are_counted_by_their_cause(shards, tmp_path):
    prepare(video_spec(shards, tmp_path / "out", video_frames=2, long_video="drop"), quiet())
    manifest = read_manifest(tmp_path / "out" / "train" / "clips")
    assert manifest["drops"] == {"long-video": 3} and manifest["documents"] == 2
    stop = video_spec(shards, tmp_path / "two", video_frames=2, long_video="drop", on_bad="stop")
    with pytest.raises(ValueError, match=r"5 frames, 2 are wanted .*\[long-video\]"):
        prepare(stop, quiet())


def test_another_choice_of_frames_tokenises_again(shards, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    prepare(video_spec(shards, tmp_path / "out", frame_stride=2), quiet())
    frames = [
        tokens.tolist().count(330 + 16) + 1
        for tokens, _ in documents_of(tmp_path / "out" / "train" / "clips")
    ]
    assert frames == [3, 2, 2, 1, 1]


def test_a_folder_stays_with_or_without_videos(shards, prepared, raw, tmp_path):
    with pytest.raises(ValueError, match=r"prepared for videos, but .* video_frames \(0\)"):
        prepare(video_spec(shards, prepared, video_frames=0), quiet())
    stills = tmp_path / "stills"
    prepare(spec_of(raw, stills), quiet())
    with pytest.raises(ValueError, match=r"prepared without videos, but .* video_frames \(4\)"):
        prepare(spec_of(raw, stills, video_frames=4), quiet())
    (stills / "tokenizers" / "vocabulary.json").unlink()  # as the oldest folders
    with pytest.raises(ValueError, match=r"prepared without videos, but .* video_frames \(4\)"):
        prepare(spec_of(raw, stills, video_frames=4), quiet())
    ready = {
        "text_vocab": 2048,
        "codes": 512,
        "image_size": 16,
        "tokenizers": stills / "tokenizers",
    }
    with pytest.raises(ValueError, match=r"video_frames \(4\) needs a frame separator"):
        prepare(video_spec(shards, tmp_path / "out", **ready), quiet())
    ready["tokenizers"] = prepared / "tokenizers"
    prepare(video_spec(shards, tmp_path / "out", **ready), quiet())
    clips = tmp_path / "out" / "train" / "clips" / "shard-000000.tar"
    assert clips.read_bytes() == (prepared / "train" / "clips" / clips.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"video_frames": -1}, r"video_frames \(-1\) must lie in \[0, 4096\]"),
        ({"frame_stride": 0}, r"frame_stride \(0\) must be at least 1"),
        ({"long_video": "cut"}, r"long_video \(cut\) must be one of even, first, drop"),
        ({"video_frames": 0, "frame_stride": 2}, r"frame_stride \(2\) needs video_frames"),
        ({"video_frames": 0, "long_video": "drop"}, r"long_video \(drop\) needs video_frames"),
        ({"image_tokenizer": "none"}, r"video_frames \(4\) needs an image tokenizer"),
    ],
)
def test_options_out_of_range_are_refused(shards, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        video_spec(shards, tmp_path, **options)


# ---- vocabulary --------------------------------------------------------------------------------


def test_vocabularies_of_before_are_read_and_written_as_they_were(tmp_path):
    path = tmp_path / "vocabulary.json"
    for vocabulary in (VOCABULARY, VIDEOS):
        fields = vocabulary.to_dict()
        assert ("separator" in fields["media"][0]) == (vocabulary is VIDEOS)
        path.write_text(json.dumps(fields))
        assert load_vocabulary(path) == vocabulary == Vocabulary.from_dict(fields)
    with pytest.raises(ValueError, match="2 frames needs a frame separator"):
        VOCABULARY.media[0].block_of([[50], [51]])


def test_the_separator_survives_conversion_to_a_public_vocabulary():
    tokens = JsonObject(from_vocabulary(VIDEOS), "map", "")
    config = JsonObject({"vocab_size": VIDEOS.size}, "config", "")
    assert to_vocabulary(tokens, config, BLOCK) == (VIDEOS, "")


@pytest.mark.parametrize("separator", [BEGIN, END, 50, SEPARATOR + 1])
def test_a_separator_is_an_id_of_its_own(separator):
    with pytest.raises(ValueError, match="separator of image"):
        replace(VIDEOS, media=(replace(IMAGES, separator=separator),))


# ---- rows --------------------------------------------------------------------------------------


def test_a_video_is_split_between_frames_alone(tmp_path):
    folder = tmp_path / "clips"
    write_source(folder, [[BOS, *video(3), 9, EOS]] * 2, shards=1, vocabulary=VIDEOS)
    a, b, c = (image(number)[1:-1] for number in range(3))
    # a document is 19 long; rows of 14 hold two frames and not their third's end
    rows, batch = rows_of(folder, 3, 14)
    pieces = [(piece.tokens.tolist(), piece.label_after) for row in rows for piece in row]
    tail = [SEPARATOR, *c, END, 9, EOS]
    assert pieces == [
        ([BOS, BEGIN, *a, SEPARATOR, *b], SEPARATOR),
        (tail, -100),
        ([BOS, BEGIN, *a], SEPARATOR),
        ([SEPARATOR, *b, SEPARATOR, *c, END, 9, EOS], -100),
    ]
    spans = [0] * 2 + [1] * 4 + [0] + [2] * 4 + [0] * 3
    assert batch.span_BS[0].tolist() == spans
    assert batch.labels_BS[0, 10] == SEPARATOR, "known across the cut"


@pytest.mark.parametrize("seq_len", [6, 7, 13, 23, 64])
def test_no_frame_is_split_and_no_token_lost(tmp_path, seq_len):
    rng = np.random.default_rng(0)
    documents = [[BOS, 9, *video(int(rng.integers(1, 7))), 8, 7, EOS] for _ in range(20)]
    folder = tmp_path / "clips"
    write_source(folder, documents, shards=1, vocabulary=VIDEOS)
    mixture = mixture_of([folder], [1.0])
    lane = Lane(mixture, mixture.stored(), seq_len)
    pieces = list(itertools.chain(*iter(lane.row, [])))
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == sum(documents, [])
    for piece in pieces:
        tokens = [*piece.tokens.tolist(), piece.label_after]
        runs = [[*r] for codes, r in itertools.groupby(tokens[:-1], CODES.__contains__) if codes]
        assert all(len(run) == BLOCK for run in runs)
        if tokens[-2] in CODES:
            assert tokens[-1] == SEPARATOR
    assert lane.codes == [sum(token in CODES for token in sum(documents, []))]


A = [*range(50, 54)]


@pytest.mark.parametrize(
    ("broken", "at"),
    [
        ([9, *A, SEPARATOR, *A, END], 2),
        ([END, *A, SEPARATOR, *A, END], 2),
        ([BEGIN, *A, 9, *A, END], 2),
        ([BEGIN, *A, BEGIN, *A, END], 2),
        ([BEGIN, *A, END, *A, END], 7),
    ],
)
def test_frames_between_other_tokens_are_refused(tmp_path, broken, at):
    document = [BOS, *broken, 9, EOS]
    write_source(tmp_path / "clips", [document], shards=1, vocabulary=VIDEOS)
    with pytest.raises(ValueError, match=rf"4 image codes at {at} must be 4 .* separator 66"):
        rows_of(tmp_path / "clips", 1, 8)


def test_frames_of_another_length_are_refused(tmp_path):
    broken = [BOS, BEGIN, *range(50, 54), SEPARATOR, *range(50, 53), END, EOS]
    write_source(tmp_path / "clips", [broken], shards=1, vocabulary=VIDEOS)
    with pytest.raises(ValueError, match=r"3 image codes at 7 must be 4 .* or a separator 66"):
        rows_of(tmp_path / "clips", 1, 8)


# ---- generation --------------------------------------------------------------------------------


def ids(draft):
    return allowed_ids(VIDEOS, draft.allowed()).nonzero().flatten().tolist()


def test_after_each_frame_a_model_goes_on_or_ends_the_video():
    draft = Draft(VIDEOS, [BOS, BEGIN, *range(50, 54)], "interleaved", 7)
    assert ids(draft) == [END, SEPARATOR]
    draft.write(SEPARATOR)
    for code in range(50, 54):
        assert ids(draft) == [*CODES]
        draft.write(code)
    assert ids(draft) == [END], "another frame would not fit"
    draft.write(END)
    assert not {SEPARATOR, END}.intersection(ids(draft)) and EOS in ids(draft)
    assert draft.unconditional.tokens == [BOS]


@pytest.mark.parametrize("mode", ["text", "image"])
def test_other_modes_write_no_further_frame_but_read_videos(mode):
    draft = Draft(VIDEOS, [BOS, *video(2)[:-1]], mode, 20)
    assert ids(draft) == [END]
    assert Draft(VIDEOS, [BOS, *video(3), 9], mode, 20).prompt == 18
    with pytest.raises(ValueError, match=r"token 6 of the prompt \(66\) is not allowed"):
        Draft(VOCABULARY, [BOS, *video(2)], mode, 20)


def test_a_prompt_with_frames_is_read_and_written_back(clips, prepared, tmp_path):
    tokenizers = Tokenizers.load(prepared / "tokenizers")
    medium = tokenizers.vocabulary.medium(Modality.IMAGE)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(clips[f"0.{number}.png"])
    line = [{"frames": ["0.png", "1.png"]}, {"text": "red"}, {"image": "2.png"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    (segments,) = read_prompts(tmp_path / "prompts.jsonl")
    tokens = to_prompt(segments, tokenizers).tokens
    assert len(block_at(tokens, medium)) == 2 and tokens.count(medium.begin) == 2
    written = to_segments(tokens[1:], tokenizers, tmp_path, "w")
    assert written == [{"frames": ["w-0.png", "w-1.png"]}, {"text": "red"}, {"image": "w-2.png"}]
    again = [{kind: v if kind == "text" else paths(tmp_path, v) for kind, v in s.items()}
             for s in written]  # fmt: skip
    rest = to_prompt(again, tokenizers).tokens
    assert len(rest) == len(tokens) and rest.count(medium.separator) == 1
    (tmp_path / "prompts.jsonl").write_text('[{"frames": []}]')
    with pytest.raises(ValueError, match=r'and {"frames": \[path, …\]}'):
        read_prompts(tmp_path / "prompts.jsonl")


def paths(folder, names):
    return str(folder / names) if isinstance(names, str) else [str(folder / name) for name in names]
