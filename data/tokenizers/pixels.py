"""Encoded images → square RGB pixels."""

import io

import numpy as np
from PIL import Image, ImageOps

from earlyfuse.data.documents import BadSample

# a fixed list: Pillow would otherwise also try formats that run external programs (EPS)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LARGEST_IMAGE = 1 << 26  # pixels; beyond it a small file can unpack to gigabytes


def image_pixels(encoded: bytes, size: int) -> np.ndarray:
    """Decode, shrink the shorter side to ``size``, crop the centre. uint8 (size, size, 3).

    Transparency is laid on white. Raises ``BadSample`` "corrupt-image", also for cut files and for
    images of more than 2^26 pixels.
    """
    try:
        image = _decoded(encoded, size)
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadSample("corrupt-image", f"{type(error).__name__}: {error}") from error
    return np.asarray(_square(_rgb(ImageOps.exif_transpose(image)), size), dtype=np.uint8)


def _decoded(encoded: bytes, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = image.size
    if width * height > LARGEST_IMAGE:
        raise BadSample("corrupt-image", f"image of {width} × {height} pixels is too large")
    if image.format == "JPEG":
        image.draft("RGB", (size, size))  # decodes at a fraction of the resolution
    image.load()
    return image


def _rgb(image: Image.Image) -> Image.Image:
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
