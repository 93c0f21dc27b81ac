"""Samples of every raw layout, and tars of them."""

import base64
import io
import json
import tarfile

from earlyfuse.data.documents import BadSample

IMAGE = bytes(range(256)) * 2  # readers hand on bytes; nobody decodes them here


SOUND = IMAGE[::-1]


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def as_json(**fields):
    return json.dumps(fields).encode()


def plain(document):
    """A document as strings and bytes, a bad sample as its cause."""
    if isinstance(document, BadSample):
        return document.cause
    return [segment.payload for segment in document.segments]


def image(number):
    return IMAGE + bytes([number % 256])


def pairs(number):
    key = f"{number:05d}"
    return [(f"{key}.jpg", image(number)), (f"{key}.txt", b"a caption"), (f"{key}.json", b"{}")]


def interleaved(number):
    texts, images = ["one", None, "two", None], [None, "0.png", None, "left.side.PNG"]
    fields = as_json(texts=texts, images=images, metadata="[]")
    members = {"json": fields, "0.png": image(number), "left.side.PNG": image(number + 100)}
    return [(f"{number}.{name}", data) for name, data in members.items()]


def mmc4(number):
    infos = [
        {"image_base64": str(base64.b64encode(image(number))), "matched_text_index": 1},
        {"image_name": "gone.png", "matched_text_index": 0},
        {"image_base64": base64.b64encode(image(number + 100)).decode(), "matched_text_index": 1},
    ]
    return [(f"uuid-{number}.json", as_json(text_list=["one", "two"], image_info=infos))]


def text(number):
    return [(f"{number}.txt", f"prose {number}, αβγ".encode())]
