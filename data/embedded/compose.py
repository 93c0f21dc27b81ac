"""Composes documents of digit and glyph images and words, in true relations.

A document is a list of parts: text as ``str``, an image as its PNG ``bytes``, an ``Utterance``, a
``Clip``.
The words to predict follow the media as early as the sentence allows, after a constant prefix.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from earlyfuse.data.embedded.digits import NUMBER_WORDS, Digit
from earlyfuse.data.embedded.glyphs import covered, glyph_name, glyph_png


@dataclass(frozen=True)
class Utterance:
    """Speech as the bytes of a FLAC file."""

    flac: bytes


@dataclass(frozen=True)
class Clip:
    """A video as the PNGs of its frames."""

    frames: tuple[bytes, ...]


Parts = list[str | bytes | Utterance | Clip]

IMAGE_FIRST = 0.7  # share of captioned documents in which the images come first, unless given
DIGIT_PREFIX = "handwritten digit "
GLYPH_PREFIX = "glyph: "


def glyph_document(png: bytes, character: str, rng: random.Random, image_first: float) -> Parts:
    """``[image] glyph: greek small letter alpha``, or the words first."""
    return _ordered([png], GLYPH_PREFIX + glyph_name(character), rng, image_first)


def digit_documents(
    digits: Sequence[Digit], passes: int, rng: random.Random, image_first: float
) -> list[Parts]:
    """Each digit once alone, then ``passes - 1`` times beside another one."""

    def labelled(digit: Digit) -> Parts:
        return _ordered([digit.png], DIGIT_PREFIX + digit.word, rng, image_first)

    documents = [labelled(digit) for digit in digits]
    for _ in range(passes - 1):
        shuffled = rng.sample(digits, len(digits))
        pairs = zip(shuffled[::2], shuffled[1::2], strict=False)
        documents += [labelled(first) + labelled(second) for first, second in pairs]
    return documents


def interleaved_documents(
    count: int,
    digits: Sequence[Digit],
    faces: Sequence[str],
    words: Sequence[str],
    size: int,
    rng: random.Random,
    image_first: float,
) -> list[Parts]:
    """``count`` sums, readings, comparisons and spellings in fixed proportions."""
    makers: list[Callable[[], Parts]] = [
        lambda: _sum(digits, rng),
        lambda: _reading(digits, rng, image_first),
        lambda: _comparison(digits, rng),
        lambda: _spelling(faces, words, size, rng, image_first),
    ]
    return [maker() for maker in rng.choices(makers, weights=(35, 25, 15, 25), k=count)]


def _sum(digits: Sequence[Digit], rng: random.Random) -> Parts:
    """``[3] plus [4] makes seven``; half of the sums below ten end with an image of the answer."""
    first, second = rng.choice(digits), rng.choice(digits)
    total = first.value + second.value
    parts: Parts = [first.png, "plus", second.png, f"makes {NUMBER_WORDS[total]}"]
    if total < 10 and rng.random() < 0.5:
        parts.append(rng.choice([digit for digit in digits if digit.value == total]).png)
    return parts


def _reading(digits: Sequence[Digit], rng: random.Random, image_first: float) -> Parts:
    """``[7] [2] [9] reads seven two nine``."""
    chosen = [rng.choice(digits) for _ in range(rng.randint(2, 4))]
    text = "reads " + " ".join(digit.word for digit in chosen)
    return _ordered([digit.png for digit in chosen], text, rng, image_first)


def _comparison(digits: Sequence[Digit], rng: random.Random) -> Parts:
    """``[7] is greater than [2]``."""
    first, second = rng.choice(digits), rng.choice(digits)
    relation = "is equal to"
    if first.value != second.value:
        relation = "is greater than" if first.value > second.value else "is less than"
    return [first.png, relation, second.png]


def _spelling(
    faces: Sequence[str], words: Sequence[str], size: int, rng: random.Random, image_first: float
) -> Parts:
    """``[t] [u] [p] [l] [e] spells tuple``, all letters from one face."""
    face, word = rng.choice(faces), rng.choice(words)
    assert len(covered(face, word)) == len(word), f"{face} cannot spell {word!r}"
    images = [glyph_png(face, letter, size) for letter in word]
    return _ordered(images, f"spells {word}", rng, image_first)


def _ordered(images: Sequence[bytes], text: str, rng: random.Random, image_first: float) -> Parts:
    return [*images, text] if rng.random() < image_first else [text, *images]
