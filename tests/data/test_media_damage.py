"""Media as people have them: read where the pixels or samples are right, else one bad sample."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sounds import RATE, encoded, sound

from earlyfuse.data.documents import BadSample, decoding
from earlyfuse.data.tokenizers import audio, pixels
from earlyfuse.data.tokenizers.audio import waveform
from earlyfuse.data.tokenizers.log_mel import levels
from earlyfuse.data.tokenizers.pixels import image_pixels, image_pixels_whole

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
WAVE = sound(np.random.default_rng(0), 0.3)
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def picture(kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def noted(kind, data, after=False):
    """The picture with one more chunk, before or behind its pixels."""
    png = picture()
    at = len(png) - 12 if after else 33
    return png[:at] + chunk(kind, data) + png[at:]


def cause_of(function, *arguments):
    with pytest.raises(BadSample) as caught:
        function(*arguments)
    return caught.value.cause


# ---------------------------------------------------------------- images


LONG = zlib.compress(b"a" * (2 << 20))
NOTES = {
    "long text": (b"zTXt", b"k\0\0" + LONG),
    "long international text": (b"iTXt", b"k\0\1\0\0\0" + LONG),
    "text of more than Pillow keeps": (b"tEXt", b"k\0" + bytes(2 << 20)),
    "long profile": (b"iCCP", b"k\0\0" + LONG),
    "profile of an unknown method": (b"iCCP", b"k\0\5aaaa"),
    "text of an unknown method": (b"zTXt", b"k\0\5abc"),
    "short resolution": (b"pHYs", b"k"),
    "short animation": (b"acTL", b""),
    "EXIF in text that is none": (b"tEXt", b"Raw profile type exif\0\nexif\n  zz\nxyz"),
    "EXIF that is none": (b"eXIf", b"rubbish"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", NOTES)
def test_a_png_is_read_whatever_its_notes_say(what, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1 << 20)
    kind, data = NOTES[what]
    for after in (False, True):
        assert np.array_equal(image_pixels(noted(kind, data, after), 16), PICTURE)


def test_a_png_read_without_its_notes_keeps_transparency_and_orientation():
    clear = picture(transparency=tuple(map(int, PICTURE[0, 0])), exif=b"MM\0*" + bytes(4))
    exif = Image.Exif()
    exif[274] = 6
    turned = picture(exif=exif.tobytes())
    text = chunk(b"zTXt", b"k\0\0" + LONG)
    assert (image_pixels(clear[:33] + text + clear[33:], 16)[0, 0] == 255).all()
    found = image_pixels(turned[:33] + text + turned[33:], 16)
    assert np.array_equal(found, np.rot90(PICTURE, -1))


def test_a_damaged_png_is_not_mended_by_leaving_chunks_out():
    whole = bytearray(picture(transparency=(1, 2, 3)))
    whole[whole.index(b"tRNS")] ^= 0x02  # another kind, which its checksum denies
    assert cause_of(image_pixels, bytes(whole), 16) == "corrupt-image"
    noisy = bytearray(noted(b"tEXt", b"k\0text"))
    noisy[noisy.index(b"text")] ^= 1
    assert cause_of(image_pixels, bytes(noisy), 16) == "corrupt-image"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_exif_that_cannot_be_read_is_ignored(kind):
    for exif in (
        b"rubbish",
        b"MM\0*\0\0\0\x08",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\xff\xff\6\0\0\0",  # orientation: too many values
        b"II*\0\x08\0\0\0\1\0\x12\1\5\0\1\0\0\0\6\0\0\0",  # orientation: a fraction
    ):
        read = image_pixels(picture(kind, exif=b"Exif\0\0" + exif), 16)
        assert np.array_equal(read, image_pixels(picture(kind), 16))


def test_what_is_no_image_is_said_the_same_each_time():
    messages = set()
    for _ in range(2):
        with pytest.raises(BadSample, match="no image in one of the formats PNG, JPEG") as caught:
            image_pixels(bytes(bytearray(b"neither")), 16)
        messages.add(caught.value.message)
    assert len(messages) == 1


def damages(whole, count, near):
    """``count`` copies with flipped bits, half in the first ``near`` bytes; some are cut."""
    rng = random.Random(0)
    for number in range(count):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(min(len(whole), (near, len(whole))[number % 2]))] ^= (
                1 << rng.randrange(8)
            )
        yield bytes(content[: rng.randrange(len(content))] if number % 5 == 0 else content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_is_read_or_a_bad_sample(kind, capfd):
    for content in damages(picture(kind), 300, near=60):
        for read in (image_pixels, lambda data, size: image_pixels_whole(data, size, "round")):
            try:
                assert read(content, 16).shape == (16, 16, 3)
            except BadSample as bad:
                assert bad.cause == "corrupt-image" and "0x" not in bad.message
    capfd.readouterr()  # libtiff prints warnings


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), struct.error("short")])
def test_whatever_a_decoder_raises_is_a_bad_sample(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pixels.Image.Image, "resize", fail)
    large = io.BytesIO()
    Image.new("RGB", (40, 30)).save(large, "JPEG")
    assert cause_of(image_pixels, large.getvalue(), 16) == "corrupt-image"
    assert cause_of(image_pixels_whole, large.getvalue(), 16, "floor") == "corrupt-image"
    spoken = encoded(WAVE)
    monkeypatch.setattr(audio.soundfile, "SoundFile", fail)
    assert cause_of(waveform, spoken, RATE) == "corrupt-audio"


def test_decoding_leaves_bad_samples_and_interrupts_alone():
    with pytest.raises(BadSample) as caught, decoding("corrupt-image", "image"):
        raise BadSample("long-audio", "as it was")
    assert caught.value.cause == "long-audio"
    with pytest.raises(KeyboardInterrupt), decoding("corrupt-image", "image"):
        raise KeyboardInterrupt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with decoding("corrupt-image", "image"):
            warnings.warn("of a decoder", stacklevel=1)


# ---------------------------------------------------------------- audio


def wav(stated, riff, behind=b""):
    """The sound with these sizes in its header."""
    whole = encoded(WAVE)
    at = whole.index(b"data") + 4
    head = whole[:4] + struct.pack("<I", riff) + whole[8:at] + struct.pack("<I", stated)
    return head + whole[at + 4 :] + behind


@pytest.mark.parametrize("riff", [0, 36, 0xFFFF_FFFF])
def test_wav_that_states_no_samples_and_has_some_is_read_to_its_end(riff):
    np.testing.assert_allclose(waveform(wav(0, riff), RATE), WAVE, atol=2**-14)


def test_wav_without_samples_stays_empty():
    for behind in (b"", b"LIST" + struct.pack("<I", 4) + b"INFO"):
        assert len(waveform(encoded(WAVE[:0]) + behind, RATE)) == 0


@pytest.mark.parametrize("codec", ["GSM610", "G721_32"])
def test_audio_that_cannot_be_counted_is_named(codec):
    with pytest.raises(BadSample, match=r"WAV in .*G.*convert it to PCM") as caught:
        waveform(encoded(WAVE, 8000, subtype=codec), RATE)
    assert caught.value.cause == "corrupt-audio"


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "FLAC", "ULAW", "IMA_ADPCM", "GSM610", "zero"])
def test_damaged_audio_is_read_or_a_bad_sample(kind):
    if kind == "zero":
        whole = wav(0, 0)
    else:
        container = kind in ("WAV", "WAVEX", "FLAC")
        whole = encoded(WAVE, kind=kind) if container else encoded(WAVE, subtype=kind)
    for content in damages(whole, 150, near=80):
        try:
            assert levels(waveform(content, RATE, 30), 4).dtype == np.uint8
        except BadSample as bad:
            assert bad.cause.endswith("-audio") and "0x" not in bad.message
