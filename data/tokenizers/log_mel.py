"""Log-mel levels of speech, and a signal with given levels.

A hop of 10 ms becomes ``MELS`` whole levels of half a decibel relative to the loudness of the
utterance, so that recording level does not matter. Features come from numpy in float64; machines
may differ by rounding, which levels nearly always hide. Back: a non-negative spectrum with the mel
powers, and a phase that fits it (fast Griffin-Lim: Perraudin, Balazs, Søndergaard, WASPAA 2013).

N samples, J hops, U frames of several hops, F frequencies, M mel bands.
"""

from functools import cache

import numpy as np

from earlyfuse.data.documents import BadSample

RATE = 16_000  # Hz
HOP = RATE // 100
MELS = 40
STEP_DB = 0.5  # of a level
_WINDOW, _FFT = 400, 512
_HANN = np.hanning(_WINDOW + 1)[:-1]
_EDGE = (_WINDOW - HOP) // 2  # windows are centred on their hop
_FLOOR_DB = -50.0  # level 0, relative to the loudness of the utterance
_LEVELS = 180
_SILENCE_DB = -70.0  # of full scale: an utterance whose loudest hop is below is silent
_LOUD_DB = 15.0  # hops within this of the loudest one define the loudness of an utterance
_GRIFFIN_LIM_STEPS, _MOMENTUM = 40, 0.99
_UNMIX_STEPS = 40


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


def signal_of(levels_JM: np.ndarray) -> np.ndarray:
    """Levels (J, M) → a signal (J · HOP,) of arbitrary loudness; the same each time."""
    # level 0 stands for anything below
    mel_JM = 10 ** ((levels_JM * STEP_DB + _FLOOR_DB) / 10) * (levels_JM > 0)
    return _griffin_lim(np.sqrt(_unmix(mel_JM)))


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
