"""Task checks and prompts on held-out images, for evaluation and samples during training.

``tasks.json`` is ``{"tasks": [{"name", "prefix", "candidates", "items": [{"image", "answer"}]}]}``
with images as base64 of PNG. The answer follows image and prefix; chance is one in
``len(candidates)``, or the share of the most frequent answer, whichever is more. Items of a spoken
task have ``speech``, base64 of FLAC, instead of an image, those of a task on clips ``frames``, a
list of images.

``labelled.json`` is ``{"name", "prefix", "train": [{"image", "label"}], "held_out": [...]}``: true
images of training and validation, from which generated images are judged. A label follows the
prefix in a caption.

``prompts.json`` is ``{"prompts": [{"caption", "image"}]}``. A caption is a whole text as it stands
before or after its image in a document.
"""

import base64
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, islice, zip_longest
from typing import Any

from earlyfuse.data.embedded.clips import MOTION_PREFIX
from earlyfuse.data.embedded.compose import DIGIT_PREFIX, GLYPH_PREFIX, Clip
from earlyfuse.data.embedded.digits import Digit
from earlyfuse.data.embedded.glyphs import glyph_name, script_word
from earlyfuse.data.embedded.speech import SPOKEN_PREFIX

DIGIT_TASK = "digit label"
_ITEMS = 200
_FEWEST = 15  # items of a script word that make it a candidate
_PROMPTS = 30
_GLYPHS_A_DIGIT = 2

Glyphs = Sequence[tuple[str, bytes]]  # (character, PNG)


def tasks(digits: Sequence[Digit], glyphs: Glyphs, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Both tasks from held-out ``digits`` and ``glyphs``."""
    labelled = [(digit.word, digit.png) for digit in digits]
    scripts = [(script_word(character), png) for character, png in glyphs]
    return {
        "tasks": [
            _task(DIGIT_TASK, DIGIT_PREFIX, labelled, seed),
            _task("glyph script", GLYPH_PREFIX, scripts, seed),
        ]
    }


def spoken_task(utterances: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """The task of naming the spoken word, from all ``utterances`` (word, FLAC)."""
    return {
        "name": "spoken digit",
        "prefix": SPOKEN_PREFIX,
        "candidates": sorted({word for word, _ in utterances}),
        "items": [{"speech": _base64(flac), "answer": word} for word, flac in utterances],
    }


def clip_task(moving: Sequence[tuple[str, Clip]]) -> dict[str, Any]:
    """The task of naming the motion, from all ``moving`` (motion, clip)."""
    return {
        "name": "clip motion",
        "prefix": MOTION_PREFIX,
        "candidates": sorted({motion for motion, _ in moving}),
        "items": [
            {"frames": [_base64(png) for png in clip.frames], "answer": motion}
            for motion, clip in moving
        ],
    }


def labelled(train: Sequence[Digit], held_out: Sequence[Digit]) -> dict[str, Any]:
    """All digits with their words."""
    splits = {"train": train, "held_out": held_out}
    return {"name": DIGIT_TASK, "prefix": DIGIT_PREFIX} | {
        split: [{"image": _base64(digit.png), "label": digit.word} for digit in digits]
        for split, digits in splits.items()
    }


def prompts(digits: Sequence[Digit], glyphs: Glyphs, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Held-out ``glyphs``, alternating between scripts, the largest first; each digit equally often
    between them.
    """
    rng = random.Random(f"{seed}/prompts")
    by_word: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for character, png in glyphs:
        by_word[script_word(character)].append((GLYPH_PREFIX + glyph_name(character), png))
    by_digit: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for digit in digits:
        by_digit[digit.word].append((DIGIT_PREFIX + digit.word, digit.png))
    of_glyphs = iter(_round_robin(by_word, rng))
    of_digits = iter(_round_robin(by_digit, rng))
    turn = [of_glyphs] * _GLYPHS_A_DIGIT + [of_digits]
    mixed = [pair for take in islice(cycle(turn), _PROMPTS) for pair in islice(take, 1)]
    return {"prompts": [{"caption": caption, "image": _base64(png)} for caption, png in mixed]}


def _task(name: str, prefix: str, pool: Sequence[tuple[str, bytes]], seed: int) -> dict[str, Any]:
    """About ``_ITEMS`` items, balanced over the answers as far as the pool allows."""
    by_answer: defaultdict[str, list[bytes]] = defaultdict(list)
    for answer, png in pool:
        by_answer[answer].append(png)
    fewest = min(_FEWEST, -(-max(map(len, by_answer.values())) // 2))  # half in a small corpus
    candidates = sorted(answer for answer, pngs in by_answer.items() if len(pngs) >= fewest)
    rng = random.Random(f"{seed}/task/{name}")
    share = -(-_ITEMS // len(candidates))
    items = [
        {"image": _base64(png), "answer": answer}
        for answer in candidates
        for png in rng.sample(by_answer[answer], min(share, len(by_answer[answer])))
    ]
    rng.shuffle(items)
    return {"name": name, "prefix": prefix, "candidates": candidates, "items": items}


def _round_robin(
    by_kind: dict[str, list[tuple[str, bytes]]], rng: random.Random
) -> list[tuple[str, bytes]]:
    """One of each kind, the largest kinds first, then another one of each, and so on."""
    kinds = sorted(by_kind, key=lambda kind: (-len(by_kind[kind]), kind))
    drawn = [rng.sample(by_kind[kind], len(by_kind[kind])) for kind in kinds]
    return [pair for turn in zip_longest(*drawn) for pair in turn if pair is not None]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
