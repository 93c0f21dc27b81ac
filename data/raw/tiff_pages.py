"""Pages of a TIFF beside interleaved JSON, as MINT-1T's PDF and ArXiv parts are published.

A sample is ``KEY.json`` with ``texts`` and ``images``, whose names (``page_0_image_85``) are no
members, and ``KEY.tiff``, which holds the images in the order of the names.
"""

import io
from collections.abc import Iterator, Sequence

from PIL import Image

from earlyfuse.data.documents import decoding
from earlyfuse.data.raw.archive import Sample
from earlyfuse.data.raw.members import bad, find_member
from earlyfuse.data.tokenizers.pixels import LARGEST_IMAGE, rgb

TIFF = ("tiff", "tif")
_MOST_PIXELS = 1 << 28  # of all pages
_MOST_PAGES = 1024


def tiff_pages(sample: Sample, names: Sequence[object]) -> Iterator[bytes] | None:
    """Files of the pages, as many as ``names`` that are not null; none where names are members."""
    wanted = [name for name in names if name is not None]
    tiff = next((name for name in TIFF if name in sample.members), None)
    if tiff is None or not wanted or any(find_member(sample, name) for name in wanted):
        return None
    with decoding("corrupt-image", f"sample {sample.key!r}: {tiff}"):
        pages = Image.open(io.BytesIO(sample.members[tiff]), formats=("TIFF",))
        count, pixels = 0, 0
        while count <= _MOST_PAGES and _seek(pages, count):
            size = pages.width * pages.height
            count, pixels = count + 1, pixels + size
            if size > LARGEST_IMAGE or pixels > _MOST_PIXELS or count > _MOST_PAGES:
                what = f"{tiff} has more than {_MOST_PAGES:,} pages, {LARGEST_IMAGE:,} pixels on a"
                raise bad(sample, "too-large", f"{what} page, or {_MOST_PIXELS:,} in all")
    if count != len(wanted):
        what = f"{tiff} has {count} pages for {len(wanted)} names in images"
        raise bad(sample, "foreign-layout", what)
    return (_page(sample, pages, number) for number in range(count))


def _seek(pages: Image.Image, number: int) -> bool:
    try:
        pages.seek(number)
    except EOFError:
        return False
    return True


def _page(sample: Sample, pages: Image.Image, number: int) -> bytes:
    with decoding("corrupt-image", f"sample {sample.key!r}: page {number} of its TIFF"):
        pages.seek(number)
        file = io.BytesIO()
        rgb(pages).save(file, "PPM")
        return file.getvalue()
