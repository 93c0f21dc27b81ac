"""Frames of animated GIF and WebP files, as still images.

Other files with several pictures (APNG, multi-page TIFF) count as stills of their first one.
"""

import io
from collections.abc import Callable, Sequence

from PIL import Image

from earlyfuse.data.documents import BadSample, decoding
from earlyfuse.data.tokenizers.pixels import LARGEST_IMAGE, rgb

MOST_FRAMES = 1 << 12  # of a video
MOST_PIXELS = 1 << 27  # of an animation, over all its frames: 512 of 512 x 512
_GIF_EXTENSION, _GIF_IMAGE = 0x21, 0x2C


def animation_frames(encoded: bytes, choose: Callable[[int], Sequence[int]]) -> list[bytes]:
    """Chosen frames of an animation, each as the bytes of a PPM; [] for any other file.

    ``choose``: number of frames → increasing numbers of the frames to take. Frames are whole
    pictures, on white where they are transparent. Raises ``BadSample``: "corrupt-image" for a
    damaged file, "long-video" above ``MOST_FRAMES`` or ``MOST_PIXELS``.
    """
    is_gif = encoded[:6] in (b"GIF87a", b"GIF89a")
    if not is_gif and not (encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP"):
        return []
    with decoding("corrupt-image", "animation"):
        count = _gif_frames(encoded) if is_gif else 0
        if is_gif and count < 2:
            return []
        image = Image.open(io.BytesIO(encoded), formats=("GIF", "WEBP"))
        count = count or getattr(image, "n_frames", 1)
        width, height = image.size
        if count < 2:
            return []
        if width * height > LARGEST_IMAGE:
            raise BadSample("corrupt-image", f"frames of {width} × {height} pixels are too large")
        if count > MOST_FRAMES or count * width * height > MOST_PIXELS:
            raise BadSample(
                "long-video",
                f"an animation of {count if count <= MOST_FRAMES else 'too many'} frames of "
                f"{width} × {height} pixels; it may have {MOST_FRAMES:,} frames and "
                f"{MOST_PIXELS:,} pixels in all. Cut or shrink it",
            )
        frames = []
        for number in choose(count):
            image.seek(number)
            image.load()
            frames.append(_ppm(rgb(image)))
        return frames


def _gif_frames(content: bytes) -> int:
    """Number of frames, counted up to ``MOST_FRAMES`` + 1; Pillow would count without a bound."""
    at = 13 + _colours(content[10])
    frames = 0
    while at < len(content) and frames <= MOST_FRAMES:
        if content[at] == _GIF_IMAGE:
            frames += 1
            at += 11 + _colours(content[at + 9])
        elif content[at] == _GIF_EXTENSION:
            at += 2
        else:  # the trailer, or damage, which decoding meets
            break
        while at < len(content) and content[at]:
            at += 1 + content[at]
        at += 1
    return frames


def _colours(flags: int) -> int:
    """Bytes of the colour table that the flags of a GIF announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _ppm(image: Image.Image) -> bytes:
    width, height = image.size
    return b"P6 %d %d 255\n" % (width, height) + image.tobytes()
