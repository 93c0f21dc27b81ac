"""Encoded audio → one channel at one sample rate, and back to a file.

WAV (PCM of 8 to 32 bits, float, µ-law and whatever else libsndfile reads) and FLAC, at any sample
rate, with any number of channels, which are averaged. Codecs that cannot be sought in (GSM 6.10,
G.721) are refused.

A WAV file that was cut reads like a shorter one, so the sizes that it states are compared with what
is there; FLAC has checksums, which libsndfile checks.
"""

import io
import struct
from collections.abc import Iterator
from math import gcd

import numpy as np
import soundfile
from scipy.signal import resample_poly

from earlyfuse.data.documents import BadSample, decoding

FORMATS = ("WAV", "WAVEX", "FLAC")
RATES = range(1_000, 768_001)  # Hz
LARGEST_AUDIO = 1 << 26  # samples of all channels; beyond it a small file can unpack to gigabytes
_UNKNOWN_FRAMES = 1 << 36  # FLAC cannot state so many; libsndfile then gives far more
# what is written for the size of WAV by programs that do not know it yet: no number of bytes
_UNKNOWN_SIZE = 0x7FFF_0000


def waveform(encoded: bytes, rate: int, longest: float = float("inf")) -> np.ndarray:
    """Decode, average the channels, resample to ``rate`` Hz. float64 (samples,), full scale ±1.

    Raises ``BadSample``: "corrupt-audio" also for cut files and sample rates outside ``RATES``,
    "long-audio" above ``longest`` seconds or 2^26 samples.
    """
    with decoding("corrupt-audio", "audio"):
        _check_whole(encoded)
        samples_NC, given = _read(_with_known_size(encoded), longest)
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
    """float64 (samples, channels): all that the file states."""
    if file.format not in FORMATS:
        raise BadSample("corrupt-audio", f"audio is {file.format}, neither WAV nor FLAC")
    if not file.seekable():
        raise BadSample(
            "corrupt-audio",
            f"audio is {file.format} in {file.subtype_info}, whose samples cannot be counted; "
            "convert it to PCM or FLAC",
        )
    if file.samplerate not in RATES:
        raise BadSample(
            "corrupt-audio",
            f"a sample rate of {file.samplerate} Hz; known are {RATES[0]} to {RATES[-1]}",
        )
    if file.frames >= _UNKNOWN_FRAMES:
        raise BadSample(
            "corrupt-audio",
            "FLAC does not state its length, as when it was written to a pipe, so that a cut could "
            "not be noticed; write it to a file",
        )
    if file.frames > longest * file.samplerate or file.frames * file.channels > LARGEST_AUDIO:
        largest = f"{longest:g} s" if longest < float("inf") else f"{LARGEST_AUDIO} samples"
        raise BadSample("long-audio", f"audio is longer than {largest}; cut it into utterances")
    samples_NC = file.read(dtype="float64", always_2d=True)
    if len(samples_NC) < file.frames:
        raise BadSample(
            "corrupt-audio", f"audio of {file.frames} samples ends after {len(samples_NC)}"
        )
    return samples_NC


def _check_whole(encoded: bytes) -> None:
    """Raises ``BadSample`` for a RIFF file that ends before the samples that it states."""
    if encoded[:4] != b"RIFF":
        return
    for name, size, start in _chunks(encoded):
        if name == b"data" and size < _UNKNOWN_SIZE and start + size > len(encoded):
            raise BadSample(
                "corrupt-audio",
                f"audio is cut: its header states {size} bytes of samples, "
                f"{len(encoded) - start} are there",
            )


def _with_known_size(encoded: bytes) -> bytes:
    """A RIFF file that states 0 bytes of samples and has some, with their number in its header.

    So do programs that write into a pipe and never come back to the header. libsndfile takes the 0
    at its word.
    """
    if encoded[:4] != b"RIFF":
        return encoded
    for name, size, start in _chunks(encoded):
        if name == b"data":
            there = len(encoded) - start
            if size or not there or _ends_with_chunks(encoded, start):
                return encoded
            sizes = struct.pack("<I", len(encoded) - 8), struct.pack("<I", there)
            return encoded[:4] + sizes[0] + encoded[8 : start - 4] + sizes[1] + encoded[start:]
    return encoded


def _ends_with_chunks(encoded: bytes, at: int) -> bool:
    """Whether chunks with printable names, and nothing else, lie between ``at`` and the end."""
    end = at
    for name, size, start in _chunks(encoded, at):
        if not all(0x20 <= letter < 0x7F for letter in name):
            return False
        end = start + size
    return end <= len(encoded) < end + 2 and end > at


def _chunks(encoded: bytes, at: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Name, stated size and start of each chunk of a RIFF file, as far as their headers are."""
    while at + 8 <= len(encoded):
        name, size = struct.unpack_from("<4sI", encoded, at)
        yield name, size, at + 8
        at += 8 + size + size % 2  # chunks begin at even places
