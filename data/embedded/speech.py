"""Spoken digits and glyph names, synthesised by espeak-ng, which has to be installed.

Voices of validation do not occur in training. Utterances are reproducible for one version of
espeak-ng, which the corpus records.
"""

import io
import random
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import soundfile

from earlyfuse.data.embedded.compose import (
    DIGIT_PREFIX,
    GLYPH_PREFIX,
    Parts,
    Utterance,
)
from earlyfuse.data.embedded.digits import NUMBER_WORDS, Digit
from earlyfuse.data.embedded.glyphs import glyph_name

PROGRAM = "espeak-ng"
SPOKEN_PREFIX = "spoken: "
# "en" is British: with "en-gb", espeak-ng ignores the timbre
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029")
TIMBRES = ("m1", "m2", "m4", "m5", "m6", "m7", "f1", "f2", "f4", "f5")
HELD_OUT_TIMBRES = ("m3", "f3")
_WORDS_A_MINUTE = (140, 190)
_PITCH = (35, 65)  # of 0 … 99
_AT_ONCE = 4


@dataclass(frozen=True)
class Voice:
    """Parameters of espeak-ng."""

    name: str
    speed: int
    pitch: int


def espeak_version() -> str:
    """Output of ``espeak-ng --version``.

    Raises ``ValueError`` if it is not installed, or lacks a voice, which it would replace silently.
    """
    if shutil.which(PROGRAM) is None:
        raise ValueError(
            f"the corpus with speech needs {PROGRAM}, which is not on PATH; install it (Debian, "
            f"Ubuntu: apt-get install {PROGRAM}), or build the corpus without speech"
        )
    there = {*_output("--voices=en").split(), *_output("--voices=variant").split()}
    wanted = [*ACCENTS, *(f"!v/{timbre}" for timbre in (*TIMBRES, *HELD_OUT_TIMBRES))]
    missing = [voice for voice in wanted if voice not in there]
    if missing:
        raise ValueError(
            f"{PROGRAM} has no voices {', '.join(missing)}; install it with all its data (Debian, "
            "Ubuntu: apt-get install espeak-ng espeak-ng-data)"
        )
    return _output("--version").partition("  Data at")[0].strip()


def _output(question: str) -> str:
    return subprocess.run([PROGRAM, question], capture_output=True, text=True, check=True).stdout


def speak(text: str, voice: Voice) -> Utterance:
    """``text`` as 16-bit FLAC. ``RuntimeError`` with the message of espeak-ng if it fails."""
    command = [PROGRAM, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch)]
    spoken = subprocess.run([*command, "-z", "--stdout", "--", text], capture_output=True)
    if spoken.returncode or not spoken.stdout:
        raise RuntimeError(
            f"{' '.join(command)} failed: {spoken.stderr.decode(errors='replace').strip()}; "
            f"install all of {PROGRAM} and its data"
        )
    samples, rate = soundfile.read(io.BytesIO(spoken.stdout), dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return Utterance(file.getvalue())


def speech_documents(
    count: int,
    digits: Sequence[Digit],
    glyphs: Sequence[tuple[str, bytes]],
    timbres: Sequence[str],
    rng: random.Random,
    image_first: float,
) -> list[Parts]:
    """``count`` documents: a spoken digit or glyph name and its words, half of them with image."""
    said: list[tuple[str, Voice]] = []
    rest: list[tuple[bytes | None, str]] = []
    for _ in range(count):
        pictured = rng.random() < 0.5
        if rng.random() < 0.5:
            digit = rng.choice(digits)
            word, png, prefix = digit.word, digit.png, DIGIT_PREFIX
        else:
            character, png = rng.choice(glyphs)
            word, prefix = glyph_name(character), GLYPH_PREFIX
        said.append((word, _voice(timbres, rng)))
        rest.append((png, prefix + word) if pictured else (None, SPOKEN_PREFIX + word))
    utterances = _spoken(said)
    return [
        _arranged(utterance, png, text, rng, image_first)
        for utterance, (png, text) in zip(utterances, rest, strict=True)
    ]


def spoken_digits(each: int, timbres: Sequence[str], rng: random.Random) -> list[tuple[str, bytes]]:
    """(word, FLAC) of every digit, ``each`` times by different voices."""
    words = [word for word in NUMBER_WORDS[:10] for _ in range(each)]
    utterances = _spoken([(word, _voice(timbres, rng)) for word in words])
    return [(word, said.flac) for word, said in zip(words, utterances, strict=True)]


def _arranged(
    utterance: Utterance, png: bytes | None, text: str, rng: random.Random, image_first: float
) -> Parts:
    """Text last or first, media in either order."""
    media: Parts = [utterance] if png is None else rng.sample([utterance, png], 2)
    first = 0.5 if png is None else image_first
    return [*media, text] if rng.random() < first else [text, *media]


def _voice(timbres: Sequence[str], rng: random.Random) -> Voice:
    name = f"{rng.choice(ACCENTS)}+{rng.choice(timbres)}"
    return Voice(name, rng.randint(*_WORDS_A_MINUTE), rng.randint(*_PITCH))


def _spoken(said: Sequence[tuple[str, Voice]]) -> list[Utterance]:
    """Utterances in the order of ``said``, synthesised by several processes at once."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(lambda what: speak(*what), said))
