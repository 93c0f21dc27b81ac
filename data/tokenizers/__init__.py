"""Tokenizers of text, images and speech, and the folder that holds them.

::

    text.model or text.json   sentencepiece, or Hugging Face's tokenizer.json with our sentinels
    image.safetensors         k-means, VQ-VAE or Chameleon's VQ-GAN; absent where only text is used
    speech.safetensors        k-means of log-mel frames; absent where there is no speech
    vocabulary.json           where text, sentinels and codes lie among the ids

``Tokenizers.load(<out>/tokenizers)`` is what generation and evaluation need to read and show
documents.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from earlyfuse.data.tokenizers.image import ImageTokenizer, load_image_tokenizer
from earlyfuse.data.tokenizers.speech_kmeans import SpeechTokenizer
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.vocabulary import REMEDY, load_vocabulary
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

TEXT_FILES = ("text.model", "text.json")
IMAGE_FILE, SPEECH_FILE = "image.safetensors", "speech.safetensors"
VOCABULARY_FILE = "vocabulary.json"
_COPY = "copy it again from where the tokenizers were made"


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of one folder, none for a medium that is not used, and the ids' layout.

    Raises ``ValueError`` when the layout is not one of these tokenizers.
    """

    text: TextTokenizer
    image: ImageTokenizer | None
    vocabulary: Vocabulary
    speech: SpeechTokenizer | None = None

    def __post_init__(self) -> None:
        _check_fit(self.text, self.image, self.speech, self.vocabulary)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizers":
        """Read ``<out>/tokenizers``. Without vocabulary.json, the layout is ``derived``.

        Raises ``FileNotFoundError`` where there is no text tokenizer, ``ValueError`` for files that
        are damaged or do not belong together.
        """
        path, stored = folder / IMAGE_FILE, folder / VOCABULARY_FILE
        image = load_image_tokenizer(path) if path.exists() else None
        spoken = folder / SPEECH_FILE
        speech = SpeechTokenizer.load(spoken) if spoken.exists() else None
        text = TextTokenizer.load(text_file(folder), speech is not None)
        if not stored.exists():
            return cls(text, image, derived(text, image, speech), speech)
        vocabulary = load_vocabulary(stored)
        try:
            return cls(text, image, vocabulary, speech)
        except ValueError as error:
            raise ValueError(f"{stored}: {error}; {REMEDY}") from error

    @property
    def hashes(self) -> dict[str, str]:
        """Modality label → SHA-256 of the tokenizer's file."""
        hashes = {Modality.TEXT.label: self.text.sha256}
        if self.image is not None:
            hashes[Modality.IMAGE.label] = self.image.sha256
        if self.speech is not None:
            hashes[Modality.SPEECH.label] = self.speech.sha256
        return hashes

    @property
    def unused(self) -> list[int]:
        """Text ids that no document has: padding rows of a model's embedding, image codes of the
        text tokenizer where the vocabulary has no images.
        """
        ids = torch.arange(self.vocabulary.size)
        sentinels = {self.vocabulary.bos, self.vocabulary.eos, self.vocabulary.pad}
        sentinels |= {s for medium in self.vocabulary.media for s in (medium.begin, medium.end)}
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


def derived(
    text: TextTokenizer, image: ImageTokenizer | None, speech: SpeechTokenizer | None = None
) -> Vocabulary:
    """Text pieces with the sentinels among them, then image codes, unless text names those itself,
    then speech codes.

    Raises ``ValueError`` when it names them otherwise than as one range of ids.
    """
    size = text.size
    media: list[MediaCodes] = []
    if image is not None:
        media.append(_image_codes(text, image))
        size = max(size, media[0].start + media[0].count)
    if speech is not None:
        begin, end = text.begin_speech, text.end_speech
        assert begin is not None and end is not None, "text is loaded with them beside speech"
        media.append(MediaCodes(Modality.SPEECH, size, speech.codes, begin, end))
        size += speech.codes
    return Vocabulary(size, text.bos, text.eos, text.pad, tuple(media))


def _image_codes(text: TextTokenizer, image: ImageTokenizer) -> MediaCodes:
    start = text.size
    if text.image_codes:
        start = min(text.image_codes)
        if text.image_codes != set(range(start, start + image.codes)):
            raise ValueError(
                f"the text tokenizer names {len(text.image_codes)} image codes at ids "
                f"{start} … {max(text.image_codes)}, the image tokenizer has {image.codes}; take "
                "both from one checkpoint"
            )
    begin, end = text.begin_image, text.end_image
    return MediaCodes(Modality.IMAGE, start, image.codes, begin, end, image.block)


def _check_fit(
    text: TextTokenizer,
    image: ImageTokenizer | None,
    speech: SpeechTokenizer | None,
    vocabulary: Vocabulary,
) -> None:
    """Raises ``ValueError`` unless codes fit and no text can be mistaken for anything else."""
    if text.pieces > vocabulary.size:
        raise ValueError(
            f"the text tokenizer has {text.pieces} ids, the vocabulary {vocabulary.size}; they "
            "must come from one checkpoint"
        )
    for name, token in (("bos", vocabulary.bos), ("eos", vocabulary.eos)):
        if token < text.pieces and token not in text.reserved:
            raise ValueError(
                f"{name} ({token}) of the vocabulary is a piece of text for the text tokenizer, so "
                "that any text could begin or end a document; name another in vocabulary.json, or "
                f"{name}_token in the tokenizer_config.json that the tokenizer came with"
            )
    media = {medium.modality: medium for medium in vocabulary.media}
    if image is not None:
        medium = media.get(Modality.IMAGE)
        found = (0, 0) if medium is None else (medium.count, medium.block or image.block)
        if found != (image.codes, image.block):
            raise ValueError(
                f"the vocabulary has {found[0]} image codes in blocks of {found[1]}, the image "
                f"tokenizer {image.codes} in blocks of {image.block}; they must come from one "
                "checkpoint"
            )
    if speech is not None:
        medium = media.get(Modality.SPEECH)
        if medium is None or (medium.count, medium.block) != (speech.codes, 0):
            raise ValueError(
                f"the vocabulary has {medium.count if medium else 0} speech codes, the speech "
                f"tokenizer {speech.codes}, in blocks of any length; they must be made together"
            )
    for medium in vocabulary.media:
        inside = range(medium.start, min(medium.start + medium.count, text.pieces))
        never_text = text.image_codes if medium.modality == Modality.IMAGE else frozenset()
        spelled = [token for token in inside if token not in never_text]
        spelled += [
            token
            for token in (medium.begin, medium.end)
            if token < text.pieces and token not in text.reserved
        ]
        if spelled:
            raise ValueError(
                f"the vocabulary gives id {spelled[0]} to {medium.modality.label}, but the text "
                "tokenizer uses it for text; they must come from one checkpoint"
            )
