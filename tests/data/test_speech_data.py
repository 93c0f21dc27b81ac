"""Speech from raw shards to batches and back to files: whole utterances or none."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from raw_shards import contents, documents_of, prepare, quiet, sentence, spec_of, write_tar
from sounds import encoded, prepared_speech, sound, speech_spec, spoken_pairs, three_media

from earlyfuse.data.media import MEDIA
from earlyfuse.data.prepare.report import describe
from earlyfuse.data.shards.manifest import read_manifest
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import validation_batches
from earlyfuse.data.stream.loader import LaneLoader
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.generate.constrained import Draft
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.tools import prepare as command
from earlyfuse.tools.documents import read_prompts, to_prompt, to_segments


@pytest.fixture(scope="module")
def raw_speech(tmp_path_factory):
    return three_media(tmp_path_factory.mktemp("raw_speech"))


@pytest.fixture(scope="module")
def data(raw_speech, tmp_path_factory):
    return prepared_speech(raw_speech, tmp_path_factory.mktemp("spoken") / "out")


@pytest.fixture(scope="module")
def tokenizers(data):
    return Tokenizers.load(data / "tokenizers")


# ---------------------------------------------------------------- prepare


def test_utterances_stand_in_reading_order_between_their_sentinels(raw_speech, data, tokenizers):
    vocabulary, speech = tokenizers.vocabulary, tokenizers.speech
    medium = vocabulary.medium(Modality.SPEECH)
    text = tokenizers.text
    assert (medium.begin, medium.end) == (text.begin["speech"], text.end["speech"])
    assert medium.start == vocabulary.medium(Modality.IMAGE).start + 16
    assert vocabulary.size == 330 + 16 + 24 and medium.block == 0
    with tarfile.open(raw_speech / "mixed" / "0.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    for n, (ids, counts) in enumerate(documents_of(data / "train" / "mixed")):
        codes = speech.encode(speech.features(members[f"{n}.0.wav"])) + medium.start
        begin = [vocabulary.bos, medium.begin, *codes, medium.end]
        assert ids[: len(begin)].tolist() == begin
        kinds = vocabulary.modality_of(torch.from_numpy(ids)).tolist()
        assert counts == [kinds.count(kind) for kind in range(3)] and counts[1:] == [4, len(codes)]
        texts = json.loads(members[f"{n}.json"])["texts"]
        assert text.decode([i for i in ids if i < 330]) == texts[1] + texts[3]


def test_manifest_counts_speech_and_names_its_longest_utterance(data, tokenizers):
    manifest = read_manifest(data / "train" / "said")
    lengths = [counts[2] for _, counts in documents_of(data / "train" / "said")]
    assert manifest["tokens"]["speech"] == sum(lengths) and manifest["tokens"]["image"] == 0
    assert manifest["longest"] == {"speech": max(lengths)} and manifest["drops"] == {}
    assert manifest["tokenizers"] == tokenizers.hashes
    assert 0 < manifest["speech_squared_error"] < 3600  # in half decibels
    assert "longest" not in read_manifest(data / "train" / "books")
    page = describe(data)
    assert tokenizers.speech.sha256 in page and "log-mel dB" in page and "/ 24" in page


def test_damaged_audio_is_counted_by_cause_and_costs_only_itself(tmp_path):
    rng = np.random.default_rng(2)
    members = [*spoken_pairs(rng, 14, damaged=(2, 5, 7))]
    more = {
        "quiet": encoded(np.zeros(9000)),
        "short": encoded(sound(rng, 0.02)),
        "long": encoded(sound(rng, 1.2)),
    }
    for key, audio in more.items():
        members += [(f"{key}.wav", audio), (f"{key}.txt", b"words")]
    write_tar(tmp_path / "raw" / "0.tar", members)
    options = {
        "train": {"said": tmp_path / "raw"}, "validation": {}, "image_tokenizer": "none",
        "speech_seconds": 1.0,
    }  # fmt: skip
    spec = speech_spec(tmp_path, tmp_path / "out", **options, max_bad_rate=0.5)
    (manifest,) = prepare(spec, quiet()).values()
    assert manifest["drops"] == {
        "corrupt-audio": 3, "silent-audio": 1, "short-audio": 1, "long-audio": 1,
    }  # fmt: skip
    assert manifest["documents"] == 11 and manifest["longest"]["speech"] <= 25
    medium = Vocabulary.from_dict(manifest["vocabulary"]).medium(Modality.SPEECH)
    for ids, counts in documents_of(tmp_path / "out" / "train" / "said"):
        begin, end = ids.tolist().index(medium.begin), ids.tolist().index(medium.end)
        assert end - begin - 1 == counts[1] and counts[1] >= 5
    with pytest.raises(ValueError, match=r"0\.tar: .*on_bad is 'stop'"):
        stop = speech_spec(tmp_path, tmp_path / "stop", **options, on_bad="stop")
        prepare(stop, quiet())
    with pytest.raises(ValueError, match=r"speech_seconds \(0\) must be above 0"):
        speech_spec(tmp_path, tmp_path, speech_seconds=0)


def test_workers_do_not_change_a_byte(raw_speech, data, tmp_path):
    prepare(speech_spec(raw_speech, tmp_path / "two", workers=2), quiet())
    assert contents(tmp_path / "two") == contents(data)


def test_without_speech_nothing_is_other_than_before(raw, prepared, tmp_path):
    """Old folders stay: no sentinel, no id, no column, no field of a record, no name in a file."""
    for path in prepared.rglob("*.json"):
        assert "speech" not in path.read_text(), path
    text = TextTokenizer.load(prepared / "tokenizers" / "text.model")
    assert text.size == text.pieces == 330 and "speech" not in text.begin
    assert b"<speech>" not in text.model
    assert not (prepared / "tokenizers" / MEDIA["speech"].file).exists()
    for options in ({"text_tokenizer": prepared / "tokenizers" / "text.model"}, {}):
        with pytest.raises(ValueError, match=r"prepared with (text|speech) tokenizer .*(none|332)"):
            prepare(spec_of(raw, prepared, speech_tokenizer="kmeans", **options), quiet())
    for options in ({"speech_codes": 9}, {"speech_seconds": 1.0}):  # of no tokenizer that is there
        shutil.copytree(prepared, tmp_path / "copy")
        times = {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("shard-*")}
        prepare(spec_of(raw, tmp_path / "copy", **options), quiet())
        assert contents(tmp_path / "copy") == contents(prepared)
        assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("shard-*")}
        shutil.rmtree(tmp_path / "copy")


def test_a_ready_text_tokenizer_keeps_every_id_and_a_learnt_one_its_size(tmp_path):
    texts = [sentence(np.random.default_rng(n)) for n in range(40)]
    plain = TextTokenizer.train(texts, 330)
    plain.save(tmp_path / "plain.model")
    spoken = TextTokenizer.load(tmp_path / "plain.model", ["speech"])
    assert (spoken.begin["speech"], spoken.end["speech"], spoken.size) == (330, 331, 332)
    assert spoken.encode("text here") == plain.encode("text here")
    assert (spoken.bos, spoken.eos, spoken.pad) == (plain.bos, plain.eos, plain.pad)
    assert spoken.begin["image"] == plain.begin["image"]
    assert spoken.end["image"] == plain.end["image"]
    assert spoken.decode([330, *plain.encode("text"), 331]) == "text"
    learnt = TextTokenizer.train(texts, 330, ["speech"])
    sentinels = {learnt.begin["speech"], learnt.end["speech"]}
    assert learnt.size == learnt.pieces == 330 and sentinels <= learnt.reserved
    assert not sentinels & set(learnt.encode("<speech></speech>"))


def test_other_speech_tokenizers_are_refused_and_ready_ones_are_taken(raw_speech, data, tmp_path):
    before = contents(data)
    for changes in (
        {"speech_codes": 23}, {"speech_frame_ms": 20}, {"speech_tokenizer": "none"}, {"seed": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"was prepared with (speech|text|image) tokenizer"):
            prepare(speech_spec(raw_speech, data, **changes), quiet())
    assert contents(data) == before
    ready = str(data / "tokenizers" / MEDIA["speech"].file)
    prepare(speech_spec(raw_speech, data, speech_tokenizer=ready), quiet())
    assert contents(data) == before
    spec = spec_of(raw_speech, tmp_path / "all", tokenizers=data / "tokenizers",
                   train={"said": raw_speech / "said"}, validation={})  # fmt: skip
    prepare(spec, quiet())
    said = contents(data / "train" / "said")
    assert contents(tmp_path / "all" / "train" / "said") == said
    with pytest.raises(ValueError, match="names all tokenizers"):
        speech_spec(raw_speech, tmp_path, tokenizers=data / "tokenizers")
    with pytest.raises(ValueError, match="speech_tokenizer 'none'"):
        books = {"train": {"books": raw_speech / "books"}, "image_tokenizer": "none"}
        prepare(speech_spec(raw_speech, tmp_path / "books", **books, validation={}), quiet())


def test_speech_that_has_no_tokenizer_is_named(raw_speech, tmp_path, capsys):
    arguments = ["build", "--out", str(tmp_path), "--train", f"said={raw_speech / 'said'}"]
    arguments += ["--image-tokenizer", "none", "--text-vocab", "330", "--workers", "1"]
    assert command.main(arguments) == 2
    assert "no-speech-tokenizer 12" in capsys.readouterr().err
    (tmp_path / "train").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "tokenizers")
    arguments += ["--speech-tokenizer", "kmeans", "--speech-codes", "8"]
    assert command.main(arguments) == 0
    assert "speech kmeans, codes 8, frame_ms 40" in capsys.readouterr().out


# ---------------------------------------------------------------- batches


def test_batches_hold_whole_utterances_with_running_spans(data):
    names = ("books", "said", "mixed")
    sources = tuple(TokenSource(data / "train" / name) for name in names)
    mixture = Mixture(sources, (0.3, 0.4, 0.3))
    media = [mixture.vocabulary.medium(kind) for kind in (Modality.SPEECH, Modality.IMAGE)]
    for batch in validation_batches(mixture, 64, 2):
        for tokens, modality, span in zip(
            batch.tokens_BS, batch.modality_BS, batch.span_BS, strict=True
        ):
            blocks = 0
            for medium in media:
                inside = (tokens >= medium.start) & (tokens < medium.start + medium.count)
                assert torch.equal(inside, modality == medium.modality)
                begins, ends = (tokens == medium.begin).nonzero(), (tokens == medium.end).nonzero()
                for begin, end in zip(begins.flatten(), ends.flatten(), strict=True):
                    assert end > begin + 1 and inside[begin + 1 : end].all()
                    assert len(set(span[begin + 1 : end].tolist())) == 1
                    blocks += 1
            assert torch.equal(span > 0, modality > 0)
            assert sorted(set(span.tolist()) - {0}) == list(range(1, blocks + 1))


def test_a_lane_keeps_its_share_of_all_media_together(data):
    folders = {str(data / "train" / name): 1 / 3 for name in ("books", "said", "mixed")}
    config = LaneLoader.Config(sources=folders, global_batch_size=2, media_share=0.3, prefetch=0)
    loader = LaneLoader(config, dp_world_size=1, dp_rank=0, seq_len=64, local_batch_size=2)
    for step, (fields, _) in enumerate(loader):
        assert set(fields["batch"].modality_BS.unique().tolist()) <= {0, 1, 2}
        if step == 150:
            break
    progress = loader.progress()["tokens"]
    media = progress["image"] + progress["speech"]
    assert min(progress.values()) > 0
    assert abs(media / (media + progress["text"]) - 0.3) < 0.02


def test_a_row_shorter_than_an_utterance_is_refused_before_the_first_batch(data):
    longest = read_manifest(data / "train" / "said")["longest"]["speech"]
    config = LaneLoader.Config(sources={str(data / "train" / "said"): 1.0}, global_batch_size=1)
    fits = {"dp_world_size": 1, "dp_rank": 0, "local_batch_size": 1}
    LaneLoader(config, seq_len=longest + 2, **fits)
    with pytest.raises(ValueError, match=rf"must be at least {longest + 2}: .*speech_seconds"):
        LaneLoader(config, seq_len=longest + 1, **fits)


# ---------------------------------------------------------------- prompts and results


def test_documents_go_to_tokens_and_back_to_files(data, tokenizers, tmp_path):
    wave = sound(np.random.default_rng(8), 0.5)
    (tmp_path / "a.flac").write_bytes(encoded(wave, kind="FLAC"))
    lines = [{"text": "x"}, {"speech": "a.flac"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(lines))
    (segments,) = read_prompts(tmp_path / "prompts.jsonl")
    assert segments == [{"text": "x"}, {"speech": str(tmp_path / "a.flac")}]
    tokens = to_prompt(segments, tokenizers).tokens
    medium = tokenizers.vocabulary.medium(Modality.SPEECH)
    assert tokens[-15] == medium.begin and tokens[-1] == medium.end
    written = to_segments(tokens[1:], tokenizers, tmp_path, "said")
    assert written == [{"text": "x"}, {"speech": "said-0.wav"}]
    again = to_prompt([{"speech": str(tmp_path / "said-0.wav")}], tokenizers).tokens
    assert len(again) == 1 + 15
    for name, content in (("none.wav", None), ("cut.wav", encoded(wave)[:900])):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"speech .*{name} cannot be read"):
            to_prompt([{"speech": str(tmp_path / name)}], tokenizers)


def test_a_draft_of_speech_is_one_utterance(tokenizers):
    vocabulary = tokenizers.vocabulary
    medium = vocabulary.medium(Modality.SPEECH)
    draft = Draft(vocabulary, [vocabulary.bos], "speech", 9)
    assert draft.written == [medium.begin] and draft.allowed().end is None
    for _ in range(3):
        draft.write(medium.start)
    assert draft.allowed().end == medium and not draft.done
    draft.write(medium.end)
    assert draft.done
    full = Draft(vocabulary, [vocabulary.bos], "speech", 4)
    full.write(medium.start)
    full.write(medium.start)
    assert full.allowed().codes is None and full.allowed().end == medium
    with pytest.raises(ValueError, match="must be at least 3"):
        Draft(vocabulary, [vocabulary.bos], "speech", 2)
    with pytest.raises(ValueError, match="needs a vocabulary with speech codes"):
        Draft(Vocabulary(9, 0, 1, 2), [0], "speech", 9)
