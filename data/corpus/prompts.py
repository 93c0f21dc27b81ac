"""Held-out captions and their images, for a run to write while it trains.

``prompts.json`` is ``{"prompts": [{"caption", "image"}]}`` with images as base64 of PNG. A caption
is a whole text as it stands before or after its image in a document.
"""

import base64
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from earlyfuse.data.corpus.compose import GLYPH_PREFIX
from earlyfuse.data.corpus.glyphs import glyph_name, script_word

_PROMPTS = 32


def prompts(glyphs: Sequence[tuple[str, bytes]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """From held-out ``glyphs`` (character, PNG): the scripts in turns, the largest first."""
    by_word: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for character, png in glyphs:
        by_word[script_word(character)].append((character, png))
    rng = random.Random(f"{seed}/prompts")
    words = sorted(by_word, key=lambda word: (-len(by_word[word]), word))
    drawn = [rng.sample(by_word[word], len(by_word[word])) for word in words]
    turns = max(map(len, drawn))
    chosen = [pairs[turn] for turn in range(turns) for pairs in drawn if turn < len(pairs)]
    return {
        "prompts": [
            {
                "caption": GLYPH_PREFIX + glyph_name(character),
                "image": base64.b64encode(png).decode(),
            }
            for character, png in chosen[:_PROMPTS]
        ]
    }
