"""Text for a terminal: what comes from outside cannot move the cursor or hide what stands there."""

import unicodedata

# direction marks reorder what surrounds them; line separators break one line into two
_REORDERING = frozenset("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e") | frozenset(
    "\u2066\u2067\u2068\u2069"
)


def printable(text: str, keep: str = "") -> str:
    """``text`` with control characters, surrogates and direction marks as Python escapes.

    ``keep``: control characters left as they are, such as ``"\\n\\t"`` for a text of several lines.
    File names, sample keys, generated text and values of files all pass here before ``print``.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(letter) if letter not in keep else letter for letter in text)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) in ("Cc", "Cs") or letter in _REORDERING:
        return letter.encode("unicode_escape").decode()
    return letter
