"""Checks of fusion on held-out images: which word follows an image and the words before it.

``tasks.json`` is ``{"tasks": [{"name", "prefix", "candidates", "items": [{"image", "answer"}]}]}``
with images as base64 of PNG. The answer comes right after image and prefix; chance is one in
``len(candidates)``, or the share of the most frequent answer, whichever is more. Of a spoken task,
items have ``speech``, base64 of FLAC, instead of an image.
"""

import base64
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from earlyfuse.data.embedded.compose import DIGIT_PREFIX, GLYPH_PREFIX
from earlyfuse.data.embedded.digits import Digit
from earlyfuse.data.embedded.glyphs import script_word
from earlyfuse.data.embedded.speech import SPOKEN_PREFIX

_ITEMS = 200
_FEWEST = 15  # items of a script word that make it a candidate


def tasks(
    digits: Sequence[Digit], glyphs: Sequence[tuple[str, bytes]], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Both tasks from held-out ``digits`` and ``glyphs`` (character, PNG)."""
    labelled = [(digit.word, digit.png) for digit in digits]
    scripts = [(script_word(character), png) for character, png in glyphs]
    return {
        "tasks": [
            _task("digit label", DIGIT_PREFIX, labelled, seed),
            _task("glyph script", GLYPH_PREFIX, scripts, seed),
        ]
    }


def spoken_task(said: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """Which word was said, of all ``said`` (word, FLAC)."""
    return {
        "name": "spoken digit",
        "prefix": SPOKEN_PREFIX,
        "candidates": sorted({word for word, _ in said}),
        "items": [
            {"speech": base64.b64encode(flac).decode(), "answer": word} for word, flac in said
        ],
    }


def _task(name: str, prefix: str, pool: Sequence[tuple[str, bytes]], seed: int) -> dict[str, Any]:
    """As even over the answers as the pool allows, about ``_ITEMS`` in all."""
    by_answer: defaultdict[str, list[bytes]] = defaultdict(list)
    for answer, png in pool:
        by_answer[answer].append(png)
    fewest = min(_FEWEST, -(-max(map(len, by_answer.values())) // 2))  # of a small corpus, half
    candidates = sorted(answer for answer, pngs in by_answer.items() if len(pngs) >= fewest)
    rng = random.Random(f"{seed}/task/{name}")
    share = -(-_ITEMS // len(candidates))
    items = [
        {"image": base64.b64encode(png).decode(), "answer": answer}
        for answer in candidates
        for png in rng.sample(by_answer[answer], min(share, len(by_answer[answer])))
    ]
    rng.shuffle(items)
    return {"name": name, "prefix": prefix, "candidates": candidates, "items": items}
