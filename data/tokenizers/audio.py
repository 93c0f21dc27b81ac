"""Decodes audio to one channel at one sample rate, and writes WAV files.

WAV (PCM of 8 to 32 bits, float, µ-law and whatever else libsndfile reads), FLAC, MP3 and Ogg
(Vorbis, Opus), at any sample rate; channels are averaged. Codecs that are not seekable (GSM 6.10,
G.721) are refused. A truncated WAV file reads like a shorter one, so the size in its header is
compared with the file's, and the last page of an Ogg file must be marked as its end; FLAC has
checksums, which libsndfile checks. An MP3 file that is cut is known by the length that its first
frame states (Xing); without one it reads like a shorter file.
"""

import io
import struct
from collections.abc import Iterator
from math import gcd

import numpy as np
import soundfile
from scipy.signal import resample_poly

from earlyfuse.data.documents import BadSample, decoding

FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")
RATES = range(1_000, 768_001)  # Hz
LARGEST_AUDIO = 1 << 26  # samples of all channels; beyond it a small file can unpack to gigabytes
_UNKNOWN_FRAMES = 1 << 36  # libsndfile's lengths are above it where FLAC states none
_UNKNOWN_SIZE = 0x7FFF_0000  # programs that write WAV into a pipe state at least this size


def waveform(encoded: bytes, rate: int, longest: float = float("inf")) -> np.ndarray:
    """Decode, average the channels, resample to ``rate`` Hz. float64 (samples,), full scale ±1.

    Raises ``BadSample``: "corrupt-audio" also for cut files and sample rates outside ``RATES``,
    "long-audio" above ``longest`` seconds or 2^26 samples.
    """
    with decoding("corrupt-audio", "audio"):
        samples_NC, given = _read(_with_known_size(_whole_ogg(encoded)), longest)
        wave = samples_NC.mean(axis=1)
        if not np.isfinite(wave).all():
            raise BadSample("corrupt-audio", "audio holds samples that are not finite")
        if given == rate or not len(wave):
            return wave
        shared = gcd(rate, given)
        return resample_poly(wave, rate // shared, given // shared)


def wav_file(wave: np.ndarray, rate: int) -> bytes:
    """(samples,) float, full scale ±1 → a WAV file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(wave, -1, 1), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _read(encoded: bytes, longest: float) -> tuple[np.ndarray, int]:
    """float64 (samples, channels) and their rate in Hz."""
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file:
            return _samples(file, longest), file.samplerate
    except soundfile.SoundFileError as error:  # its prefix holds an address in memory
        raise BadSample("corrupt-audio", str(error).rpartition(": ")[2]) from error


def _samples(file: soundfile.SoundFile, longest: float) -> np.ndarray:
    """float64 (samples, channels), as many as the file states."""
    wrong = ""
    if file.format not in FORMATS:
        wrong = f"audio is {file.format}, none of WAV, FLAC, MP3 and Ogg"
    elif not file.seekable():
        wrong = (
            f"audio is {file.format} in {file.subtype_info}, whose samples cannot be counted; "
            "convert it to PCM or FLAC"
        )
    elif file.samplerate not in RATES:
        wrong = f"sample rate {file.samplerate} Hz must lie in [{RATES[0]}, {RATES[-1]}]"
    elif file.frames >= _UNKNOWN_FRAMES:
        wrong = "FLAC written to a pipe does not state its length; write it to a file"
    if wrong:
        raise BadSample("corrupt-audio", wrong)
    if file.frames > longest * file.samplerate or file.frames * file.channels > LARGEST_AUDIO:
        largest = f"{longest:g} s" if longest < float("inf") else f"{LARGEST_AUDIO} samples"
        raise BadSample("long-audio", f"audio is longer than {largest}; split it into utterances")
    samples_NC = file.read(dtype="float64", always_2d=True)
    if len(samples_NC) < file.frames:
        raise BadSample(
            "corrupt-audio", f"audio of {file.frames} samples ends after {len(samples_NC)}"
        )
    return samples_NC


def _with_known_size(encoded: bytes) -> bytes:
    """``encoded``; a RIFF file that states 0 bytes of samples and has some gets their number.

    Programs that write into a pipe leave the 0, and libsndfile would read nothing. Raises
    ``BadSample`` for a file that ends before the samples that its header states.
    """
    chunks = _chunks(encoded) if encoded[:4] == b"RIFF" else ()
    for size, start in ((size, start) for name, size, start in chunks if name == b"data"):
        there = len(encoded) - start
        if there < size < _UNKNOWN_SIZE:
            raise BadSample(
                "corrupt-audio",
                f"audio is truncated: its header states {size} bytes of samples, the file has "
                f"{there}",
            )
        if not size and there and not _ends_with_chunks(encoded, start):
            whole, samples = struct.pack("<I", len(encoded) - 8), struct.pack("<I", there)
            return encoded[:4] + whole + encoded[8 : start - 4] + samples + encoded[start:]
    return encoded


def _whole_ogg(encoded: bytes) -> bytes:
    """``encoded``; ``BadSample`` for an Ogg file whose last page is cut or not its end."""
    page = encoded[max(0, encoded.rfind(b"OggS")) :]
    if encoded[:4] == b"OggS":
        sizes = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not sizes or not page[5] & 4 or len(page) < 27 + len(sizes) + sum(sizes):
            raise BadSample("corrupt-audio", "audio is truncated: its last Ogg page is not its end")
    return encoded


def _ends_with_chunks(encoded: bytes, at: int) -> bool:
    """True if the file from ``at`` consists of chunks with printable names."""
    end = at
    for name, size, start in _chunks(encoded, at):
        if not all(0x20 <= letter < 0x7F for letter in name):
            return False
        end = start + size
    return end <= len(encoded) < end + 2 and end > at


def _chunks(encoded: bytes, at: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Name, stated size and start of each chunk of a RIFF file whose header is complete."""
    while at + 8 <= len(encoded):
        name, size = struct.unpack_from("<4sI", encoded, at)
        yield name, size, at + 8
        at += 8 + size + size % 2  # chunks begin at even offsets
