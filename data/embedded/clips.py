"""Clips of digits and glyphs in motion, described in words.

A clip is 4 to 8 frames, of half the image's side. Most documents hold a whole clip and, after or
before it, its description. In the others the picture stands still at first, and the motion is
named as soon as ``CLEAR`` steps of it are seen; more frames may follow. A model that reads these
has to decide after each frame whether to go on or to speak.
"""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from earlyfuse.data.embedded.compose import DIGIT_PREFIX, Clip, Parts
from earlyfuse.data.embedded.digits import Digit
from earlyfuse.data.embedded.glyphs import encode_png, glyph_name

STILL = "stands still"
_SHIFTS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
_GROWTH = {"grows": 0.5, "shrinks": -0.5}  # of the side, over the whole clip
_TURNS = {"turns left": 30, "turns right": -30}  # degrees a step
MOTIONS = (*_SHIFTS, *_GROWTH, *_TURNS, STILL)
CLEAR = 2
MOTION_PREFIX = "motion: "
CLIP_PREFIX = "clip: "
_FRAMES = (4, 8)
_STREAMED = 0.4  # share of documents that name the motion while it goes on


@dataclass(frozen=True)
class Subject:
    """The moving picture of a clip: its image as PNG, and its name."""

    png: bytes
    name: str


def subjects(digits: Sequence[Digit], glyphs: Sequence[tuple[str, bytes]]) -> list[list[Subject]]:
    """Digits, and glyphs (character, PNG)."""
    return [
        [Subject(digit.png, DIGIT_PREFIX + digit.word) for digit in digits],
        [Subject(png, glyph_name(character)) for character, png in glyphs],
    ]


def clip_documents(
    count: int, kinds: Sequence[Sequence[Subject]], rng: random.Random, image_first: float
) -> list[Parts]:
    """``count`` documents, of each kind of subject about equally many."""
    documents = []
    for _ in range(count):
        subject, motion = rng.choice(rng.choice(kinds)), rng.choice(MOTIONS)
        streamed = rng.random() < _STREAMED
        documents.append(
            _streamed(subject, motion, rng)
            if streamed
            else _described(subject, motion, rng, image_first)
        )
    return documents


def moving(
    each: int, kinds: Sequence[Sequence[Subject]], rng: random.Random
) -> list[tuple[str, Clip]]:
    """(motion, clip) of every motion, ``each`` times."""
    return [
        (motion, Clip(_drawn(rng.choice(rng.choice(kinds)), motion, 0, _length(rng), rng)))
        for motion in MOTIONS
        for _ in range(each)
    ]


def _described(subject: Subject, motion: str, rng: random.Random, image_first: float) -> Parts:
    """``[frames] motion: moves left, handwritten digit seven``, or the text first."""
    clip = Clip(_drawn(subject, motion, 0, _length(rng), rng))
    if rng.random() < 0.5:
        text = f"{MOTION_PREFIX}{motion}, {subject.name}"
    else:
        text = f"{CLIP_PREFIX}{subject.name} {motion}"
    return [clip, text] if rng.random() < image_first else [text, clip]


def _streamed(subject: Subject, motion: str, rng: random.Random) -> Parts:
    """``[frames] motion: moves left [frames]``: the text as early as it can be known."""
    longest = _FRAMES[1]
    if motion == STILL:  # known at the end alone
        return [Clip(_drawn(subject, motion, 0, longest, rng)), MOTION_PREFIX + motion]
    still = rng.randint(0, longest - 1 - CLEAR)
    known = 1 + still + CLEAR
    length = rng.randint(known, longest) if rng.random() < 0.5 else known
    frames = _drawn(subject, motion, still, length, rng)
    rest: Parts = [Clip(frames[known:])] if length > known else []
    return [Clip(frames[:known]), MOTION_PREFIX + motion, *rest]


def _length(rng: random.Random) -> int:
    return rng.randint(*_FRAMES)


def _drawn(
    subject: Subject, motion: str, still: int, length: int, rng: random.Random
) -> tuple[bytes, ...]:
    """``length`` frames as PNG; the motion begins after the first ``1 + still`` of them."""
    picture = Image.open(io.BytesIO(subject.png)).convert("L")
    size, steps = picture.width, length - 1 - still
    side, unit = size // 2, size // 16 or 1
    shift_x, shift_y = (axis * unit for axis in _SHIFTS.get(motion, (0, 0)))
    growth, turn = _GROWTH.get(motion, 0.0), _TURNS.get(motion, 0)
    room = size - side
    spare = round(side * max(growth, 0) / 2)
    left = _start(shift_x * steps, room, spare, rng)
    top = _start(shift_y * steps, room, spare, rng)
    frames = []
    for number in range(length):
        step = max(0, number - still)
        now = round(side * (1 + growth * step / max(steps, 1)))
        turned = picture.rotate(turn * step, Image.Resampling.BILINEAR, fillcolor=255)
        page = Image.new("L", (size, size), 255)
        inset = (side - now) // 2
        place = (left + shift_x * step + inset, top + shift_y * step + inset)
        page.paste(turned.resize((now, now), Image.Resampling.BOX), place)
        frames.append(encode_png(np.asarray(page)))
    return tuple(frames)


def _start(shift: int, room: int, spare: int, rng: random.Random) -> int:
    """A first place from which ``shift`` stays within ``room``, with ``spare`` on both sides."""
    return rng.randint(max(spare, -shift), min(room - spare, room - shift))
