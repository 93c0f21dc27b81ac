"""Tokenizers of text and media, and the folder that holds them.

::

    text.model or text.json   sentencepiece, or Hugging Face's tokenizer.json with our sentinels
    LABEL.safetensors         of a medium of ``data/media.py`` (image, speech); absent if not used
    vocabulary.json           the ranges of text, sentinels and codes among the ids

``Tokenizers.load(<out>/tokenizers)`` is what generation and evaluation need to read and show
documents.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from earlyfuse.data.media import MEDIA, MediaTokenizer, Vectors
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.vocabulary import REMEDY, load_vocabulary
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

if TYPE_CHECKING:
    from earlyfuse.data.tokenizers.image_tokenizer import ImageTokenizer
    from earlyfuse.data.tokenizers.speech import SpeechTokenizer

TEXT_FILES = ("text.model", "text.json")
VOCABULARY_FILE = "vocabulary.json"
_FROM_ONE = "they must come from one checkpoint"


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of one folder and the layout of ids.

    ``media``: label → tokenizer of each medium that is used, in the order of ``MEDIA``. Raises
    ``ValueError`` when the layout is not that of these tokenizers.
    """

    text: TextTokenizer
    media: dict[str, MediaTokenizer]
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        _check_text(self.text, self.vocabulary)
        _check_media(self.media, self.vocabulary)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizers":
        """Read ``<out>/tokenizers``. Without vocabulary.json, the layout is ``derived``.

        Raises ``FileNotFoundError`` where there is no text tokenizer, ``ValueError`` for files that
        are damaged or do not belong together.
        """
        media = load_media(folder)
        text, stored = TextTokenizer.load(text_file(folder), media), folder / VOCABULARY_FILE
        if not stored.exists():
            return cls(text, media, derived(text, media))
        vocabulary = load_vocabulary(stored)
        try:
            return cls(text, media, vocabulary)
        except ValueError as error:
            raise ValueError(f"{stored}: {error}; {REMEDY}") from error

    @property
    def image(self) -> "ImageTokenizer | None":
        """The image tokenizer, for code that handles images alone."""
        return cast("ImageTokenizer | None", self.media.get(Modality.IMAGE.label))

    @property
    def speech(self) -> "SpeechTokenizer | None":
        """The speech tokenizer, for code that handles speech alone."""
        return cast("SpeechTokenizer | None", self.media.get(Modality.SPEECH.label))

    def block_of(self, label: str, *items: np.ndarray) -> tuple[list[int], np.ndarray | None]:
        """The features of an item of medium ``label``, or of a video's frames, as prepared
        documents have them: token ids with sentinels, and of a continuous medium the float32
        vectors (n, P) of its placeholders in turn.
        """
        tokenizer = self.media[label]
        medium = self.vocabulary.medium(MEDIA[label].modality)
        encoded = tokenizer.encode_items(items)
        if tokenizer.vectors is None:
            return medium.block_of([(codes + medium.start).tolist() for codes in encoded]), None
        stored = np.concatenate(encoded).astype(tokenizer.vectors.dtype)
        tokens = medium.block_of([[medium.start] * len(vectors) for vectors in encoded])
        return tokens, stored.astype(np.float32)

    @property
    def hashes(self) -> dict[str, str]:
        """Modality label → SHA-256 of the tokenizer's file."""
        media = {label: tokenizer.sha256 for label, tokenizer in self.media.items()}
        return {Modality.TEXT.label: self.text.sha256, **media}

    @property
    def vectors(self) -> Vectors | None:
        """The vectors of continuous media, if there are any.

        ``ValueError`` where their types differ: a batch has one array of vectors.
        """
        types = {label: t.vectors for label, t in self.media.items() if t.vectors is not None}
        if len(set(types.values())) > 1:
            raise ValueError(
                f"media must have vectors of one type, not {types}; choose another patch for one"
            )
        for width, dtype, channels in types.values():
            return Vectors(width, dtype, channels or width, tuple(types))
        return None

    @property
    def unused(self) -> list[int]:
        """Text ids that occur in no document: padding rows of a model's embedding, and image codes
        of the text tokenizer where the vocabulary has no images.
        """
        ids = torch.arange(self.vocabulary.size)
        sentinels = {self.vocabulary.bos, self.vocabulary.eos, self.vocabulary.pad}
        sentinels |= {s for medium in self.vocabulary.media for s in medium.sentinels}
        return [
            token
            for token in ids[self.vocabulary.modality_of(ids) == Modality.TEXT].tolist()
            if (token >= self.text.pieces or token in self.text.image_codes)
            and token not in sentinels
        ]


def text_file(folder: Path) -> Path:
    """The text tokenizer of ``folder``, or where one would be. ``ValueError`` where two are."""
    found = [folder / name for name in TEXT_FILES if (folder / name).exists()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {TEXT_FILES[0]} and {TEXT_FILES[1]}; remove one of them")
    return found[0] if found else folder / TEXT_FILES[0]


def load_media(folder: Path) -> dict[str, MediaTokenizer]:
    """Label → tokenizer of each medium that has one in ``folder``."""
    return {
        label: medium.module().load(folder / medium.file)
        for label, medium in MEDIA.items()
        if (folder / medium.file).exists()
    }


def derived(text: TextTokenizer, media: dict[str, MediaTokenizer]) -> Vocabulary:
    """Text pieces with the sentinels among them, then the codes of each medium in turn, except
    image codes that the text tokenizer names itself.

    Raises ``ValueError`` when it names other codes than one range as long as the codebook.
    """
    size, codes = text.size, []
    for label, tokenizer in media.items():
        modality, start = MEDIA[label].modality, size
        if modality == Modality.IMAGE and text.image_codes:
            start = min(text.image_codes)
            if text.image_codes != set(range(start, start + tokenizer.codes)):
                raise ValueError(
                    f"the text tokenizer names {len(text.image_codes)} image codes at ids {start} "
                    f"… {max(text.image_codes)}, the image tokenizer has {tokenizer.codes}; "
                    f"{_FROM_ONE}"
                )
        size = max(size, start + tokenizer.codes)
        begin, end = text.begin[label], text.end[label]
        codes.append(MediaCodes(modality, start, tokenizer.codes, begin, end, tokenizer.block))
    return Vocabulary(size, text.bos, text.eos, text.pad, tuple(codes))


def with_separator(vocabulary: Vocabulary) -> Vocabulary:
    """``vocabulary`` with one id more, which stands between the frames of a video.

    It lies behind all others, so that text pieces and codes are those of data without videos.
    """
    media = tuple(
        replace(medium, separator=vocabulary.size)
        if MEDIA[medium.modality.label].video_list
        else medium
        for medium in vocabulary.media
    )
    return replace(vocabulary, size=vocabulary.size + 1, media=media)


def _check_text(text: TextTokenizer, vocabulary: Vocabulary) -> None:
    """``ValueError`` unless no text can be mistaken for a sentinel or a code."""
    if text.pieces > vocabulary.size:
        raise ValueError(
            f"the text tokenizer has {text.pieces} ids, the vocabulary {vocabulary.size}; "
            f"{_FROM_ONE}"
        )

    def is_text(token: int) -> bool:
        return token < text.pieces and token not in text.reserved

    for name, token in (("bos", vocabulary.bos), ("eos", vocabulary.eos)):
        if is_text(token):
            raise ValueError(
                f"{name} ({token}) of the vocabulary is a piece of text for the text tokenizer, so "
                "that any text could begin or end a document; name another in vocabulary.json, or "
                f"{name}_token in the tokenizer_config.json that the tokenizer came with"
            )
    for medium in vocabulary.media:
        never_text = text.image_codes if medium.modality == Modality.IMAGE else frozenset()
        codes = range(medium.start, min(medium.start + medium.count, text.pieces))
        spelled = [token for token in codes if token not in never_text]
        spelled += filter(is_text, medium.sentinels)
        if spelled:
            raise ValueError(
                f"the vocabulary gives id {spelled[0]} to {medium.modality.label}, but the text "
                f"tokenizer uses it for text; {_FROM_ONE}"
            )


def _check_media(media: dict[str, MediaTokenizer], vocabulary: Vocabulary) -> None:
    """``ValueError`` unless the vocabulary has the codes and blocks of each tokenizer."""
    codes = {medium.modality.label: medium for medium in vocabulary.media}
    for label, tokenizer in media.items():
        medium = codes.get(label)
        found = (0, 0) if medium is None else (medium.count, medium.block or tokenizer.block)
        if found != (tokenizer.codes, tokenizer.block):
            raise ValueError(
                f"the vocabulary has {found[0]} {label} codes in blocks of "
                f"{found[1] or 'any length'}, the {label} tokenizer {tokenizer.codes} in blocks of "
                f"{tokenizer.block or 'any length'}; {_FROM_ONE}"
            )
