"""Raw shards of text, pairs and interleaved documents, and prepared data made of them."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.prepare import PrepareSpec, prepare
from earlyfuse.data.prepare.progress import Progress
from earlyfuse.data.shards.manifest import read_manifest

OTHER_TEXTS = ["so many other words that none could guess what they mean to us today"] * 9
WORDS = "red green blue round square small large disc on a field of grey 0 1 2 3".split()


def png(rng):
    y, x = np.mgrid[:8, :8] / 8
    disc = (np.hypot(y - rng.random(), x - rng.random()) < 0.4)[..., None]
    pixels = (255 * (0.5 * disc * rng.random(3) + 0.5 * rng.random() * x[..., None])).astype(
        np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sentence(rng):
    return " ".join(rng.choice(WORDS, 12)) + ".\n"


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """``members``: (name, content), which is bytes or the header of a link or folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(rng, count, corrupt=()):
    for number in range(count):
        image = png(rng)
        yield f"{number:04d}.png", image[:40] if number in corrupt else image
        yield f"{number:04d}.txt", sentence(rng).encode()


def articles(rng, count):
    for number in range(count):
        yield f"{number:04d}.txt", "".join(sentence(rng) for _ in range(5)).encode()


def interleaved(rng, count):
    for number in range(count):
        fields = {"texts": [sentence(rng), None, sentence(rng)], "images": [None, "0.png", None]}
        yield f"{number:04d}.json", json.dumps(fields).encode()
        yield f"{number:04d}.0.png", png(rng)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Three sources to train on and one to validate on; seven shards."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for number in range(2):
        write_tar(folder / "books" / f"{number}.tar", articles(rng, 40))
        write_tar(folder / "pairs" / f"{number}.tar", pairs(rng, 30))
        write_tar(folder / "mixed" / f"{number}.tar", interleaved(rng, 20))
    write_tar(folder / "held" / "0.tar", pairs(rng, 10))
    return folder


def spec_of(raw, out, **changes):
    names = {"books": [raw / "books"], "pairs": [str(raw / "pairs/*.tar")], "mixed": raw / "mixed"}
    fields = {
        "train": names, "validation": {"pairs": raw / "held"}, "text_vocab": 330,
        "image_size": 8, "patch": 4, "codes": 16, "workers": 1, "max_bad_rate": 0.0,
    }  # fmt: skip
    return PrepareSpec(out=out, **{**fields, **changes})


def quiet():
    return Progress(io.StringIO())


def contents(folder):
    """Relative path → SHA-256 of every file below ``folder``."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def files(folder) -> int:
    """Number of shards, finished or not, while others may be renaming them."""
    return sum(len(names) for _, _, names in os.walk(folder))


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    prepare(spec_of(raw, out), quiet())
    return out


def documents_of(folder):
    """Token lists through the sidecar index, by plain reading of bytes."""
    manifest = read_manifest(folder)
    for shard in manifest["shards"]:
        content = (folder / shard["name"]).read_bytes()
        index = np.load(folder / shard["name"].replace(".tar", ".index.npy"))
        for offset, length, *counts in index:
            yield np.frombuffer(content, "<u2", length, offset).astype(int), counts
