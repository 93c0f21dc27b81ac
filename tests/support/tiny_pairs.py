"""A tiny prepared folder of captioned images with real tokenizers and prompts, for tests."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_sources import write_source

from earlyfuse.data.tokenizers import Tokenizers
from earlyfuse.data.tokenizers.image_kmeans import KMeansTokenizer
from earlyfuse.data.tokenizers.image_vectors import PixelTokenizer
from earlyfuse.data.tokenizers.text import TextTokenizer

SHADES = ["shade coal", "shade iron", "shade ash", "shade silver", "shade white as bones"]
CODES = 7


def pixels(shade: int) -> np.ndarray:
    """A square that is darker at its left, (8, 8, 3) uint8; seven patches make up all of them."""
    picture = np.full((8, 8, 3), shade * 50, np.uint8)
    picture[:, :4] //= 2
    return picture


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(shade)).save(stream, "PNG")
    return stream.getvalue()


def make_pairs(folder: Path, image_tokenizer: bool = True, pixels_as_vectors: bool = False) -> Path:
    """``folder`` as ``prepare`` leaves it: tokenizers, train/pairs, validation/pairs, prompts."""
    text = TextTokenizer.train(
        [f"{s}, {i} of {len(SHADES)}" for i, s in enumerate(SHADES * 9)], 330
    )
    (folder / "tokenizers").mkdir(parents=True)
    text.save(folder / "tokenizers" / "text.model")
    if image_tokenizer:
        images = np.stack([pixels(shade) for shade in range(len(SHADES))])
        fitted = KMeansTokenizer.train(images, patch=4, codes=CODES)
        if pixels_as_vectors:
            fitted = PixelTokenizer({"image_size": 8, "patch": 4})
        fitted.save(folder / "tokenizers" / "image.safetensors")
    tokenizers = Tokenizers.load(folder / "tokenizers")
    vocabulary = tokenizers.vocabulary
    (folder / "tokenizers" / "vocabulary.json").write_text(json.dumps(vocabulary.to_dict()))
    documents, own = [], []
    for shade, caption in enumerate(SHADES):
        words, image, vectors = text.encode(caption), [], None
        if tokenizers.image is not None:
            image, vectors = tokenizers.block_of("image", pixels(shade))
        own += [vectors, vectors]
        documents += [[text.bos, *words, *image, text.eos], [text.bos, *image, *words, text.eos]]
    for split in ("train", "validation"):
        write_source(
            folder / split / "pairs",
            documents * 4,
            shards=1,
            hashes=tokenizers.hashes,
            vocabulary=vocabulary,
            vectors=tokenizers.vectors,
            own=own * 4,
        )
    if image_tokenizer:
        prompts = [
            {"caption": caption, "image": base64.b64encode(png(shade)).decode()}
            for shade, caption in enumerate(SHADES)
        ]
        (folder / "validation" / "prompts.json").write_text(json.dumps({"prompts": prompts}))
    return folder
