"""Images of characters, drawn with the typefaces of matplotlib, and their Unicode names.

A character is used if a face has an outline of its own for it. Of characters with equal pixels
(Latin A, Greek Alpha, Cyrillic A), whose names would be a guess, the first by code point is used.
"""

import io
import random
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

REFERENCE_FACE = "DejaVuSans"  # has every block below; decides which characters look alike
TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
)
HELD_OUT_FACES = ("DejaVuSans-Oblique", "STIXGeneral")  # one sans serif, one serif
BLOCKS = (
    (0x0021, 0x007E),  # Basic Latin
    (0x00A1, 0x017F),  # Latin-1 Supplement, Latin Extended-A
    (0x0370, 0x03FF),  # Greek and Coptic
    (0x0400, 0x045F),  # Cyrillic
    (0x0531, 0x0587),  # Armenian
    (0x05D0, 0x05EA),  # Hebrew
    (0x0621, 0x064A),  # Arabic
    (0x10A0, 0x10FF),  # Georgian
    (0x1401, 0x1676),  # Canadian Aboriginal Syllabics
    (0x2190, 0x22FF),  # Arrows, Mathematical Operators
    (0x2460, 0x259F),  # Enclosed Alphanumerics, Box Drawing, Block Elements
    (0x25A0, 0x26FF),  # Geometric Shapes, Miscellaneous Symbols
    (0x2701, 0x27BF),  # Dingbats
    (0x2801, 0x28FF),  # Braille Patterns
    (0x2D30, 0x2D67),  # Tifinagh
    (0x1D538, 0x1D56B),  # Mathematical Double-Struck
)

FEW_BLOCKS = ((0x0021, 0x007E), (0x0370, 0x03FF))  # Basic Latin, Greek

_DRAWN_PX = 64  # outlines are drawn large, measured, then reduced: no hinting, exact centring
_CAPITAL = 0.72  # height of a capital H as a share of the image
_MARGIN_PX = 1


def glyph_name(character: str) -> str:
    """Official Unicode name in lower case: ``greek small letter alpha``."""
    return unicodedata.name(character).lower()


def script_word(character: str) -> str:
    """First word of the name: the script, or the kind of sign (``latin``, ``rightwards``)."""
    return glyph_name(character).split()[0]


def characters(blocks: Sequence[tuple[int, int]] = BLOCKS) -> list[str]:
    """Characters of ``blocks`` with a shape of their own in the reference face, by code point."""
    candidates = [chr(point) for first, last in blocks for point in range(first, last + 1)]
    named = [c for c in candidates if unicodedata.category(c)[0] in "LNPS"]
    shapes: dict[bytes, str] = {}
    for character in covered(REFERENCE_FACE, named):
        shapes.setdefault(glyph_pixels(REFERENCE_FACE, character, 16).tobytes(), character)
    return list(shapes.values())


def covered(face: str, wanted: Iterable[str]) -> list[str]:
    """Characters of ``wanted`` that ``face`` has; outline 0 is the box for missing characters."""
    outlines = _outlines(face)
    return [character for character in wanted if outlines.get(ord(character))]


def choose(face: str, wanted: Iterable[str], per_word: int, rng: random.Random) -> list[str]:
    """A sample of at most ``per_word`` characters of each script word, so that none dominates."""
    by_word: dict[str, list[str]] = {}
    for character in covered(face, wanted):
        by_word.setdefault(script_word(character), []).append(character)
    return [c for cs in by_word.values() for c in sorted(rng.sample(cs, min(per_word, len(cs))))]


def glyph_pixels(face: str, character: str, size: int) -> np.ndarray:
    """``character``, black on white: (size, size) uint8.

    Centred between its outermost ink and its baseline, so that a low line stays low and a degree
    sign high; reduced where it would not fit, never enlarged: small letters stay small.
    """
    font, capital = _font(face)
    left, top, right, bottom = map(int, font.getbbox(character))
    width, height = right - left, bottom - top
    page = Image.new("L", (size, size), 0)
    if width > 0 and height > 0:
        large = Image.new("L", (width, height), 0)
        ImageDraw.Draw(large).text((-left, -top), character, fill=255, font=font)
        scale = min(_CAPITAL * size / capital, (size - 2 * _MARGIN_PX) / max(width, height))
        fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
        drawn = large.resize(fitted, Image.Resampling.BOX)
        page.paste(drawn, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return 255 - np.asarray(page)


@cache
def glyph_png(face: str, character: str, size: int) -> bytes:
    """``glyph_pixels`` as an RGB PNG."""
    return encode_png(glyph_pixels(face, character, size))


def encode_png(grey: np.ndarray) -> bytes:
    """Grey levels (H, W) uint8 as an RGB PNG, always with the same settings."""
    stream = io.BytesIO()
    Image.fromarray(grey, "L").convert("RGB").save(stream, "PNG", compress_level=9)
    return stream.getvalue()


def _path(face: str) -> Path:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(
            f"matplotlib has no face {face!r} ({path}); install its wheel from PyPI, as "
            "distributions may remove its fonts"
        )
    return path


@cache
def _font(face: str) -> tuple[ImageFont.FreeTypeFont, int]:
    font = ImageFont.truetype(str(_path(face)), _DRAWN_PX, layout_engine=ImageFont.Layout.BASIC)
    _, top, _, bottom = font.getbbox("H")
    return font, round(bottom - top)


@cache
def _outlines(face: str) -> Mapping[int, int]:
    return FT2Font(str(_path(face))).get_charmap()
