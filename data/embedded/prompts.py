"""Held-out captions and their images, for a run to write while it trains.

``prompts.json`` is ``{"prompts": [{"caption", "image"}]}`` with images as base64 of PNG. A caption
is a whole text as it stands before or after its image in a document.
"""

import base64
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, islice, zip_longest
from typing import Any

from earlyfuse.data.embedded.compose import DIGIT_PREFIX, GLYPH_PREFIX
from earlyfuse.data.embedded.digits import Digit
from earlyfuse.data.embedded.glyphs import glyph_name, script_word

_PROMPTS = 30
_GLYPHS_A_DIGIT = 2


def prompts(
    digits: Sequence[Digit], glyphs: Sequence[tuple[str, bytes]], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Held-out ``glyphs`` (character, PNG), of the scripts in turns, the largest first; ``digits``
    between them, each as often.
    """
    rng = random.Random(f"{seed}/prompts")
    by_word: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for character, png in glyphs:
        by_word[script_word(character)].append((GLYPH_PREFIX + glyph_name(character), png))
    by_digit: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for digit in digits:
        by_digit[digit.word].append((DIGIT_PREFIX + digit.word, digit.png))
    of_glyphs = iter(_in_turns(by_word, rng))
    of_digits = iter(_in_turns(by_digit, rng))
    turn = [of_glyphs] * _GLYPHS_A_DIGIT + [of_digits]
    mixed = [pair for take in islice(cycle(turn), _PROMPTS) for pair in islice(take, 1)]
    return {
        "prompts": [
            {"caption": caption, "image": base64.b64encode(png).decode()} for caption, png in mixed
        ]
    }


def _in_turns(
    by_kind: dict[str, list[tuple[str, bytes]]], rng: random.Random
) -> list[tuple[str, bytes]]:
    """One of each kind, those of most members first, then another one of each, and so on."""
    kinds = sorted(by_kind, key=lambda kind: (-len(by_kind[kind]), kind))
    drawn = [rng.sample(by_kind[kind], len(by_kind[kind])) for kind in kinds]
    return [pair for turn in zip_longest(*drawn) for pair in turn if pair is not None]
