"""Speech tokenizer: log-mel features of frames of equal length, k-means units, Griffin-Lim back.

An utterance becomes one code for each ``frame_ms`` (40: 25 Hz). A frame is the log-mel spectrum at
each of its 10 ms hops side by side, as whole levels of half a decibel relative to the loudness of
the utterance, so that recording level does not matter. k-means over them is exact (``kmeans.py``),
hence the same units in any process and batch; the features come from numpy in float64, where
machines may differ by a rounding that levels hide nearly always.

``decode`` puts the codewords' spectra end to end, finds the non-negative spectrum that has them,
and a phase that fits it (fast Griffin-Lim: Perraudin, Balazs, Søndergaard, WASPAA 2013). What a
codeword does not hold is lost: pitch mostly, and the voice.

N samples, J hops, U frames (units), F frequencies, M mel bands, D values of a frame (hops · M), K
codes.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.documents import BadSample
from earlyfuse.data.tokenizers import kmeans
from earlyfuse.data.tokenizers.audio import wav_file, waveform
from earlyfuse.data.tokenizers.image_tokenizer import LARGEST_CODEBOOK
from earlyfuse.data.tokenizers.tokenizer_file import TokenizerFile, load_tokenizer, pack

FORMAT = "earlyfuse-speech-tokenizer/1"
RATE = 16_000  # Hz
HOP = RATE // 100
MELS = 40
LONGEST_FRAME_MS = 200
STEP_DB = 0.5  # of a level
_WINDOW, _FFT = 400, 512
_FLOOR_DB = -50.0  # level 0, relative to the loudness of the utterance
_LEVELS = 180
_SILENCE_DB = -70.0  # of full scale: an utterance whose loudest hop is below holds nothing
_LOUD_DB = 15.0  # hops within this of the loudest one say how loud an utterance is
_DECODED_RMS = 0.1
_GRIFFIN_LIM_STEPS, _MOMENTUM = 40, 0.99
_UNMIX_STEPS = 40
_MOST_WAITING = 1024  # utterances: encoding them together gains nothing


class SpeechTokenizer:
    """Nearest codeword for each frame. ``codebook_KD``: distinct rows, uint8.

    A ``MediaTokenizer`` (``data/media.py``).
    """

    kind = "kmeans"
    vectors = None
    decodes = True
    block = 0
    batch = _MOST_WAITING

    def __init__(self, codebook_KD: np.ndarray, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.codes, self.frame_ms = settings["codes"], settings["frame_ms"]
        check_speech_geometry(self.frame_ms, self.codes)
        self.hops = self.frame_ms // 10
        kmeans.check_codebook(codebook_KD, self.codes, self.hops * MELS)
        self.codebook_KD = codebook_KD
        self.sha256 = hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def train(
        cls,
        utterances: Sequence[np.ndarray],
        *,
        frame_ms: int,
        codes: int,
        seed: int = 0,
        frames: int = 1 << 15,
        iterations: int = 20,
    ) -> "SpeechTokenizer":
        """Fit to ``features`` of utterances, uint8 (U, D) each, or to ``frames`` of them by
        ``seed``.

        Raises ``ValueError`` when they hold fewer distinct frames than ``codes``.
        """
        check_speech_geometry(frame_ms, codes)
        codebook_KD = kmeans.learn(
            np.concatenate([np.zeros((0, frame_ms // 10 * MELS), np.uint8), *utterances]),
            codes,
            seed=seed,
            most=frames,
            iterations=iterations,
            option="speech_codes",
            rows=f"frames of {frame_ms} ms of the training speech",
        )
        return cls(codebook_KD, {"frame_ms": frame_ms, "codes": codes, "seed": seed})

    @classmethod
    def load(cls, path: Path) -> "SpeechTokenizer":
        """The tokenizer of a file written by ``save``. ``ValueError`` when it is none."""
        return load_tokenizer("speech", FORMAT, path, {cls.kind: cls.from_file})

    @classmethod
    def from_file(cls, file: TokenizerFile) -> "SpeechTokenizer":
        """Inverse of ``to_bytes``."""
        settings = file.settings
        frame_ms = settings.field("frame_ms", int, least=10, most=LONGEST_FRAME_MS)
        codes = settings.field("codes", int, least=2, most=LARGEST_CODEBOOK)
        settings.field("seed", int)
        codebook = torch.empty(codes, frame_ms // 10 * MELS, dtype=torch.uint8, device="meta")
        tensors = file.tensors({"codebook": codebook})
        return cls(tensors["codebook"].numpy(), settings.values)

    def save(self, path: Path) -> None:
        """Write the tokenizer's file, whole or not at all."""
        atomic_write_bytes(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file: safetensors with ``FORMAT``, kind and settings in its metadata."""
        tensors = {"codebook": torch.from_numpy(self.codebook_KD)}
        return pack(FORMAT, self.kind, self.settings, tensors)

    def features(self, payload: bytes, longest: float = float("inf")) -> np.ndarray:
        """An audio file → uint8 (U, D). ``BadSample`` as ``waveform`` and ``levels``."""
        return levels(waveform(payload, RATE, longest), self.hops)

    def encode(self, features_UD: np.ndarray) -> np.ndarray:
        """uint8 (U, D) → int64 (U,), each in [0, codes)."""
        return kmeans.nearest(features_UD, self.codebook_KD)[0]

    def encode_items(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See ``MediaTokenizer``."""
        return [self.encode(features_UD) for features_UD in items]

    def error(
        self, items: Sequence[np.ndarray], codes: Sequence[np.ndarray], measured: int
    ) -> tuple[int, int]:
        """Over all levels of all utterances."""
        errors = [self.squared_error(*pair) for pair in zip(items, codes, strict=True)]
        return sum(errors), sum(features_UD.size for features_UD in items)

    def to_file(self, codes: np.ndarray) -> bytes:
        """A WAV file."""
        return wav_file(self.decode(codes), RATE)

    def squared_error(self, features_UD: np.ndarray, codes_U: np.ndarray) -> int:
        """Sum of squared differences, in levels, between frames and their codewords."""
        difference = features_UD.astype(np.int64) - self.codebook_KD[codes_U]
        return int((difference**2).sum())

    def decode(self, codes_U: np.ndarray) -> np.ndarray:
        """int64 (U,) → float64 (U · frame_ms · 16,) at ``RATE``, full scale ±1."""
        levels_JM = self.codebook_KD[codes_U].reshape(-1, MELS)
        magnitude_JF = np.sqrt(_unmix(_power(levels_JM)))
        wave = _griffin_lim(magnitude_JF)
        wave *= _DECODED_RMS / max(float(np.sqrt(np.mean(wave**2))), 1e-9)
        return wave / max(1.0, float(np.abs(wave).max(initial=0.0)))


def log_mel_error(squared_error: float, values: int) -> float:
    """Root mean square in dB of a sum of squared differences in levels."""
    return STEP_DB * float(np.sqrt(squared_error / values))


def check_speech_geometry(frame_ms: int, codes: int) -> None:
    """Raises ``ValueError`` unless frames are whole hops and the codebook has a sensible size."""
    if not 10 <= frame_ms <= LONGEST_FRAME_MS or frame_ms % 10:
        raise ValueError(
            f"speech_frame_ms ({frame_ms}) must be a multiple of 10 in [10, {LONGEST_FRAME_MS}]; "
            "40 is usual"
        )
    if not 2 <= codes <= LARGEST_CODEBOOK:
        raise ValueError(
            f"speech_codes ({codes}) must lie in [2, {LARGEST_CODEBOOK}]; choose another number"
        )


def levels(wave: np.ndarray, hops: int) -> np.ndarray:
    """(N,) at ``RATE`` → uint8 (U, hops · M), U = N / (hops · HOP) rounded up.

    Raises ``BadSample``: "short-audio" below one frame, "silent-audio" where nothing is loud
    enough to be speech.
    """
    frame = hops * HOP
    if len(wave) < frame:
        raise BadSample("short-audio", f"audio of {len(wave) / RATE:.3f} s is shorter than a frame")
    wave = np.pad(wave - wave.mean(), (0, -len(wave) % frame))
    power_JF = np.abs(_spectrum(wave)) ** 2
    energy_J = _decibel(power_JF.mean(1))
    loudest = energy_J.max()
    if loudest < _SILENCE_DB:
        raise BadSample("silent-audio", f"audio never rises above {loudest:.0f} dB of full scale")
    loudness = energy_J[energy_J > loudest - _LOUD_DB].mean()
    mel_JM = _decibel(power_JF @ _mel_filters().T) - loudness - _FLOOR_DB
    levels_JM = np.rint(mel_JM / STEP_DB).clip(0, _LEVELS).astype(np.uint8)
    return levels_JM.reshape(-1, hops * MELS)


def _power(levels_JM: np.ndarray) -> np.ndarray:
    """Mel power of levels; level 0 stands for anything below."""
    return 10 ** ((levels_JM * STEP_DB + _FLOOR_DB) / 10) * (levels_JM > 0)


def _decibel(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, 1e-20))


def _spectrum(wave: np.ndarray) -> np.ndarray:
    """(J · HOP,) → complex (J, F); a windowed sine of full scale has power 1 at its peak / 4."""
    windows_JN = np.lib.stride_tricks.sliding_window_view(np.pad(wave, _EDGE), _WINDOW)[::HOP]
    return np.fft.rfft(windows_JN * _HANN, _FFT) * (2 / _HANN.sum())


def _wave(spectrum_JF: np.ndarray) -> np.ndarray:
    """The signal whose ``_spectrum`` is nearest: windowed overlap-add, over the squared windows."""
    hops = len(spectrum_JF)
    windows_JN = np.fft.irfft(spectrum_JF / (2 / _HANN.sum()), _FFT)[:, :_WINDOW] * _HANN
    summed, weight = np.zeros((2, hops * HOP + 2 * _EDGE))
    for hop, window in enumerate(windows_JN):
        summed[hop * HOP : hop * HOP + _WINDOW] += window
        weight[hop * HOP : hop * HOP + _WINDOW] += _HANN**2
    return (summed / np.maximum(weight, 1e-3))[_EDGE:-_EDGE]


_HANN = np.hanning(_WINDOW + 1)[:-1]
_EDGE = (_WINDOW - HOP) // 2  # windows stand in the middle of their hop


@cache
def _mel_filters() -> np.ndarray:
    """(M, F): triangles of height 1 between 0 and RATE / 2, evenly spaced in HTK's mels."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corner = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    frequency_F = np.fft.rfftfreq(_FFT, 1 / RATE)
    rising = (frequency_F - corner[:-2, None]) / (corner[1:-1] - corner[:-2])[:, None]
    falling = (corner[2:, None] - frequency_F) / (corner[2:] - corner[1:-1])[:, None]
    return np.maximum(np.minimum(rising, falling), 0)


def _unmix(mel_JM: np.ndarray) -> np.ndarray:
    """Non-negative power (J, F) with these mel powers: multiplicative updates from an even one."""
    filters_MF = _mel_filters()
    power_JF = mel_JM @ (filters_MF / filters_MF.sum(1, keepdims=True))
    for _ in range(_UNMIX_STEPS):
        mixed_JF = power_JF @ filters_MF.T @ filters_MF
        power_JF *= (mel_JM @ filters_MF) / np.maximum(mixed_JF, 1e-20)
    return power_JF


def _griffin_lim(magnitude_JF: np.ndarray) -> np.ndarray:
    """A signal (J · HOP,) whose spectrum has about these magnitudes; the same each time."""
    angle_JF = np.random.default_rng(0).uniform(0, 2 * np.pi, magnitude_JF.shape)
    phase_JF = np.exp(1j * angle_JF)
    before_JF = np.zeros_like(phase_JF)
    for _ in range(_GRIFFIN_LIM_STEPS):
        now_JF = _spectrum(_wave(magnitude_JF * phase_JF))
        ahead_JF = now_JF + _MOMENTUM * (now_JF - before_JF)
        phase_JF = ahead_JF / np.maximum(np.abs(ahead_JF), 1e-12)
        before_JF = now_JF
    return _wave(magnitude_JF * phase_JF)
