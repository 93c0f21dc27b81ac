"""Handwritten digits with their labels: the 8x8 scans of scikit-learn, enlarged."""

import random
from dataclasses import dataclass

import numpy as np

from earlyfuse.data.embedded.glyphs import encode_png

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen"
).split()
HELD_OUT_PER_DIGIT = 30
_SCAN = 8  # scans are 8x8 with levels 0 … 16


@dataclass(frozen=True)
class Digit:
    """One scan as PNG, black on white, and its label."""

    png: bytes
    value: int

    @property
    def word(self) -> str:
        return NUMBER_WORDS[self.value]


def load(size: int, seed: int, scale: float = 1.0) -> tuple[list[Digit], list[Digit]]:
    """Training and held-out digits, ``HELD_OUT_PER_DIGIT`` of each, chosen by ``seed``.

    ``size`` must be a multiple of 8: each pixel of a scan becomes a square of pixels. ``scale`` is
    the share of both to use, at least one of each digit. Duplicate scans are dropped, so nothing
    held out is also trained on.
    """
    from sklearn.datasets import load_digits  # takes seconds; a finished corpus does without

    data = load_digits()
    by_value: dict[int, dict[bytes, np.ndarray]] = {value: {} for value in range(10)}
    for scan, value in zip(data.images, data.target, strict=True):
        by_value[int(value)].setdefault(scan.tobytes(), scan)
    train: list[Digit] = []
    held_out: list[Digit] = []
    for value, distinct in by_value.items():
        scans = list(distinct.values())
        random.Random(f"{seed}/digits/{value}").shuffle(scans)
        out, kept = scans[:HELD_OUT_PER_DIGIT], scans[HELD_OUT_PER_DIGIT:]
        for digits, chosen in ((held_out, out), (train, kept)):
            digits += [
                _digit(scan, value, size) for scan in chosen[: max(1, round(len(chosen) * scale))]
            ]
    return train, held_out


def _digit(scan: np.ndarray, value: int, size: int) -> Digit:
    grey = 255 - np.round(scan * (255 / 16)).astype(np.uint8)
    return Digit(
        encode_png(grey.repeat(size // _SCAN, axis=0).repeat(size // _SCAN, axis=1)), value
    )
