"""Audio and the speech tokenizer: what is heard survives, however it was recorded and stored."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from places import SUPPORT
from scipy.signal import resample_poly
from sounds import RATE, encoded, sound

from earlyfuse.data.documents import BadSample
from earlyfuse.data.tokenizers import audio as audio_files
from earlyfuse.data.tokenizers import log_mel, speech
from earlyfuse.data.tokenizers.audio import wav_file, waveform
from earlyfuse.data.tokenizers.log_mel import MELS, levels
from earlyfuse.data.tokenizers.speech import LONGEST_FRAME_MS, SpeechTokenizer


def cause_of(audio, longest=float("inf")):
    with pytest.raises(BadSample) as caught:
        levels(waveform(audio, RATE, longest), 4)
    return caught.value.cause


@pytest.fixture(scope="module")
def waves():
    rng = np.random.default_rng(0)
    return [sound(rng) for _ in range(60)]


@pytest.fixture(scope="module")
def tokenizer(waves):
    return SpeechTokenizer.train([levels(wave, 4) for wave in waves], frame_ms=40, codes=48)


# ---------------------------------------------------------------- audio files


@pytest.mark.parametrize("kind, subtype, error", [
    ("WAV", "PCM_U8", 2**-7), ("WAV", "PCM_16", 2**-14), ("WAV", "PCM_24", 2**-22),
    ("WAV", "PCM_32", 2**-30), ("WAV", "FLOAT", 2**-23), ("WAV", "DOUBLE", 0),
    ("WAV", "ULAW", 2**-5), ("WAVEX", "PCM_24", 2**-22), ("FLAC", "PCM_16", 2**-14),
    ("FLAC", "PCM_24", 2**-22),
])  # fmt: skip
def test_every_encoding_gives_its_samples_back_with_channels_averaged(waves, kind, subtype, error):
    found = waveform(encoded(waves[0], kind=kind, subtype=subtype), RATE)
    np.testing.assert_allclose(found, waves[0], rtol=0, atol=error)
    both = encoded(np.stack(waves[:2], 1), kind=kind, subtype=subtype)
    np.testing.assert_allclose(waveform(both, RATE), np.mean(waves[:2], 0), atol=error + 1e-12)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 16_001])
def test_another_sample_rate_gives_the_same_sound(rate):
    time = np.arange(rate // 2) / rate
    found = waveform(encoded(0.4 * np.sin(2 * np.pi * 440 * time), rate, subtype="FLOAT"), RATE)
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)
    assert abs(len(found) - len(expected)) <= 1
    inner = slice(800, len(expected) - 800)  # filters ring at the edges
    np.testing.assert_allclose(found[inner], expected[inner], atol=4e-3)


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "FLAC"])
def test_a_file_cut_anywhere_never_gives_part_of_its_sound(waves, kind):
    audio = encoded(waves[0][:3000], kind=kind)
    for cut in [*range(0, len(audio), 61), len(audio) - 1]:
        if kind != "FLAC" and cut == len(audio) - 1:
            cut -= 1  # the last byte may be a chunk's padding
        assert cause_of(audio[:cut]) == "corrupt-audio", cut


def test_damage_of_flac_is_noticed(waves):
    whole = encoded(waves[0], kind="FLAC")
    first = whole.index(b"\xff\xf8")  # of the frames
    for at in range(first, len(whole), 997):
        damaged = bytearray(whole)
        damaged[at] ^= 8
        assert cause_of(bytes(damaged)) == "corrupt-audio", at
    unknown = bytearray(whole)
    unknown[21] &= 0xF0  # 36 bits of STREAMINFO count the samples
    unknown[22:26] = bytes(4)
    with pytest.raises(BadSample, match="does not state its length"):
        waveform(bytes(unknown), RATE)


@pytest.mark.parametrize("size", [0x7FFF_F000, 0xFFFF_FFFF])
def test_wav_of_unknown_length_is_read_to_its_end(waves, size):
    """As programs write it into a pipe, espeak-ng among them."""
    audio = encoded(waves[0])
    at = audio.index(b"data") + 4
    piped = audio[:4] + struct.pack("<I", 0x7FFF_F024) + audio[8:at] + struct.pack("<I", size)
    np.testing.assert_allclose(waveform(piped + audio[at + 4 :], RATE), waves[0], atol=2**-14)


def test_what_cannot_be_speech_has_its_cause(waves):
    assert cause_of(b"") == cause_of(b"\x89PNG" + bytes(99)) == "corrupt-audio"
    assert cause_of(encoded(waves[0], kind="AIFF")) == "corrupt-audio"
    assert cause_of(encoded(waves[0], 500)) == "corrupt-audio"
    broken = np.where(np.arange(8000) == 5000, np.nan, 0.1)
    assert cause_of(encoded(broken, subtype="FLOAT")) == "corrupt-audio"
    assert cause_of(encoded(np.zeros(8000))) == "silent-audio"
    assert cause_of(encoded(np.full(8000, 0.3))) == "silent-audio"  # a constant is no sound
    assert cause_of(encoded(waves[0][:600])) == cause_of(encoded(waves[0][:0])) == "short-audio"
    assert cause_of(encoded(waves[0]), longest=0.59) == "long-audio"
    assert len(waveform(encoded(waves[0]), RATE, longest=0.6)) == len(waves[0])


def test_a_header_that_promises_too_much_asks_for_no_memory(waves, monkeypatch):
    monkeypatch.setattr(audio_files, "LARGEST_AUDIO", 5000)
    assert cause_of(encoded(waves[0])) == "long-audio"
    assert cause_of(encoded(np.stack([waves[0][:4000]] * 2, 1))) == "long-audio"
    assert len(waveform(encoded(waves[0][:5000]), RATE)) == 5000


# ---------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("frame_ms", [10, 40, LONGEST_FRAME_MS])
def test_one_code_stands_for_a_frame_and_nothing_is_left_out(waves, frame_ms):
    features = [levels(wave, frame_ms // 10) for wave in waves]
    tokenizer = SpeechTokenizer.train(features, frame_ms=frame_ms, codes=48)
    wave, frame = np.concatenate(waves[:2])[800:], 16 * frame_ms
    for samples in (frame, frame + 1, 2 * frame, 9999):
        features = levels(wave[:samples], frame_ms // 10)
        assert features.dtype == np.uint8
        assert features.shape == (-(-samples // frame), frame_ms // 10 * MELS)
        codes = tokenizer.encode(features)
        assert codes.shape == (len(features),) and codes.min() >= 0 and codes.max() < 48
        assert len(tokenizer.decode(codes)) == len(codes) * frame


def test_a_tone_is_heard_in_its_band():
    time = np.arange(RATE) / RATE
    loudest = []
    for hertz in (200, 440, 1000, 2500, 6000):
        tone = levels(0.3 * np.sin(2 * np.pi * hertz * time), 4).reshape(-1, MELS)
        loudest.append(int(tone[10].argmax()))
        centre = 700 * (10 ** ((loudest[-1] + 1) * np.log10(1 + 8000 / 700) / (MELS + 1)) - 1)
        assert abs(centre - hertz) < 0.12 * hertz + 40
    assert loudest == sorted(set(loudest))


def test_units_do_not_depend_on_level_channels_or_container(tokenizer, waves):
    for wave in waves[:8]:
        expected = tokenizer.encode(tokenizer.features(encoded(wave, subtype="FLOAT")))
        for audio in (
            encoded(wave / 8, subtype="FLOAT"),
            encoded(np.stack([wave, wave], 1), subtype="FLOAT"),
            encoded(wave, kind="FLAC", subtype="PCM_24"),
            encoded(wave + 0.05, subtype="FLOAT"),
        ):
            assert (tokenizer.encode(tokenizer.features(audio)) == expected).mean() > 0.99


def test_units_hardly_depend_on_the_sample_rate(tokenizer, waves):
    same = []
    for wave in waves[:10]:
        other = encoded(resample_poly(wave, 3, 1), 3 * RATE, subtype="FLOAT")
        units = tokenizer.encode(tokenizer.features(other))
        same += (units == tokenizer.encode(levels(wave, 4))).tolist()
    assert np.mean(same) > 0.9


def test_decoded_units_are_heard_as_mostly_the_same_units(tokenizer, waves):
    same, error, plain = [], 0, 0
    for wave in waves[:12]:
        features = levels(wave, 4)
        codes = tokenizer.encode(features)
        again = tokenizer.features(wav_file(tokenizer.decode(codes), RATE))
        same += (tokenizer.encode(again) == codes).tolist()
        error += ((again.astype(float) - features) ** 2).sum() / features.size / 12
        plain += ((features.astype(float) - features.mean(0)) ** 2).sum() / features.size / 12
    assert np.mean(same) > 0.8
    assert error < 0.5 * plain  # the spectrum is that of the utterance, not of any


def test_a_phase_is_found_that_fits_the_spectrum(waves):
    padded = waves[0][: 9600 // 640 * 640]
    wanted = np.abs(log_mel._spectrum(padded))
    found = np.abs(log_mel._spectrum(log_mel._griffin_lim(wanted)))
    assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)


def test_decoding_is_quiet_enough_and_the_same_each_time(tokenizer, waves):
    codes = tokenizer.encode(levels(waves[0], 4))
    wave = tokenizer.decode(codes)
    assert np.abs(wave).max() <= 1 and 0.02 < np.sqrt(np.mean(wave**2)) <= 0.11
    assert np.array_equal(wave, tokenizer.decode(codes))
    with soundfile.SoundFile(io.BytesIO(wav_file(wave, RATE))) as file:
        assert (file.samplerate, file.channels, file.subtype) == (RATE, 1, "PCM_16")
    for code in range(tokenizer.codes):  # whatever a model writes is heard
        assert np.isfinite(tokenizer.decode(np.array([code]))).all()


def test_more_codes_hear_more_exactly(waves):
    features = [levels(wave, 4) for wave in waves]
    errors = []
    for codes in (2, 12, 100):
        fitted = SpeechTokenizer.train(features, frame_ms=40, codes=codes)
        found = fitted.encode_items(features)
        assert len(np.unique(np.concatenate(found))) == codes
        error, values = fitted.error(features, found, 0)
        errors.append(speech.quality(error / values))
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.3 * errors[2]


def test_training_twice_in_other_processes_gives_the_same_file(tokenizer, waves):
    program = (
        "import sys, numpy as np\nfrom sounds import sound\n"
        "from earlyfuse.data.tokenizers.speech import SpeechTokenizer, levels\n"
        "rng = np.random.default_rng(0)\n"
        "features = [levels(sound(rng), 4) for _ in range(60)]\n"
        "print(SpeechTokenizer.train(features, frame_ms=40, codes=48).sha256)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           cwd=SUPPORT, check=True)  # fmt: skip
    assert shown.stdout.strip() == tokenizer.sha256


def test_settings_that_cannot_be_are_refused(waves):
    features = [levels(waves[0], 4)]
    for items, frame_ms, codes, message in (
        (features, 35, 4, r"speech_frame_ms \(35\) must be a multiple of 10"),
        (features, 210, 4, r"speech_frame_ms \(210\)"),
        (features, 40, 1, r"speech_codes \(1\) must lie in"),
        (features, 40, 16, r"speech_codes \(16\) must not exceed .* \(15\)"),
        ([], 40, 4, r"speech_codes \(4\) must not exceed .* \(0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeechTokenizer.train(items, frame_ms=frame_ms, codes=codes)
