"""Decodes images to square RGB pixels.

Pillow refuses PNGs whose text, colour profile or other metadata are large or malformed, although no
pixel depends on them: such a file is read without its metadata. Unreadable EXIF is ignored.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from earlyfuse.data.documents import BadSample, decoding

# a fixed list: Pillow would otherwise also try formats that run external programs (EPS)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LARGEST_IMAGE = 1 << 26  # pixels; beyond it a small file can unpack to gigabytes
_PNG = b"\x89PNG\r\n\x1a\n"
_UPRIGHT: dict[int | None, Image.Transpose] = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_pixels(encoded: bytes, size: int) -> np.ndarray:
    """Decode, shrink the shorter side to ``size``, crop the centre. uint8 (size, size, 3).

    Transparency is laid on white. Raises ``BadSample`` "corrupt-image", also for cut files and for
    images of more than 2^26 pixels.
    """
    with decoding("corrupt-image", "image"):
        return np.asarray(_square(_upright_rgb(encoded, draft=size), size), dtype=np.uint8)


def image_pixels_whole(encoded: bytes, size: int, long_side: str) -> np.ndarray:
    """Prepares pixels exactly as Chameleon does, which is slower than ``image_pixels``.

    JPEGs are decoded at full resolution, the whole image is resized, then cropped at whole pixels.
    ``long_side``: how the longer side becomes an integer, "round" (Meta) or "floor" (Hugging Face).
    Raises ``BadSample`` also for images that exceed 2^26 pixels once resized.
    """
    with decoding("corrupt-image", "image"):
        return _resized_whole(_upright_rgb(encoded, draft=None), size, long_side)


def _resized_whole(image: Image.Image, size: int, long_side: str) -> np.ndarray:
    width, height = image.size
    short = min(width, height)
    if long_side == "round":  # scale first, as Meta does: it decides halves
        scale = size / short
        wide, high = round(scale * width), round(scale * height)
    else:
        wide, high = (math.floor(size * side / short) for side in (width, height))
    if wide * high > LARGEST_IMAGE:
        raise BadSample(
            "corrupt-image", f"image of {width} × {height} pixels is too long to resize"
        )
    left, top = (wide - size) // 2, (high - size) // 2
    resized = image.resize((wide, high), Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.uint8)


def _upright_rgb(encoded: bytes, draft: int | None) -> Image.Image:
    """The image in RGB; ``draft``: a JPEG may be decoded at any lower resolution above this."""
    try:
        image = _decoded(encoded, draft)
    except BadSample:
        raise
    except Exception:
        if not encoded.startswith(_PNG):
            raise
        image = _decoded(_without_metadata(encoded), draft)
    return rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    # not ImageOps.exif_transpose: it rewrites the other EXIF fields, and fails on damaged ones
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # unreadable EXIF
        turn = None
    return image if turn is None else image.transpose(turn)


def _decoded(encoded: bytes, draft: int | None) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError as error:  # Pillow's message holds an address in memory
        raise ValueError(f"no image in one of the formats {', '.join(FORMATS)}") from error
    width, height = image.size
    if width * height > LARGEST_IMAGE:
        raise BadSample("corrupt-image", f"image of {width} × {height} pixels is too large")
    if image.format == "JPEG" and draft is not None:
        image.draft("RGB", (draft, draft))  # decodes at a fraction of the resolution
    image.load()
    return image


def _without_metadata(png: bytes) -> bytes:
    """``png`` reduced to the chunks that decide its pixels and orientation; damaged chunks stay,
    for Pillow to refuse.
    """
    kept = [_PNG]
    for kind, chunk in _png_chunks(png):
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not (whole and kind[:1].islower()) or kind in (b"tRNS", b"eXIf"):
            kept.append(chunk)
    return b"".join(kept)


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each chunk; the last is short in a truncated file."""
    at = len(_PNG)
    while at + 8 <= len(png):
        size, kind = struct.unpack_from(">I4s", png, at)
        yield kind, png[at : at + size + 12]
        at += size + 12


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency is laid on white."""
    if image.mode.startswith("I"):  # 16 bits a sample: "RGB" alone would clip to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """The largest central square, resized: the same as resizing the shorter side and cropping."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)
