"""Tokenizers: text by sentencepiece, images by k-means or VQ-VAE, and the folder that holds both.

``Tokenizers.load(<out>/tokenizers)`` is what generation and evaluation need to read and show
documents.
"""

from dataclasses import dataclass
from pathlib import Path

from earlyfuse.data.tokenizers.image import ImageTokenizer, load_image_tokenizer
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.modality import MediaCodes, Modality, Vocabulary

TEXT_FILE, IMAGE_FILE, VOCABULARY_FILE = "text.model", "image.safetensors", "vocabulary.json"


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of one prepared folder; ``image`` is none where only text is prepared."""

    text: TextTokenizer
    image: ImageTokenizer | None

    @classmethod
    def load(cls, folder: Path) -> "Tokenizers":
        """Read ``<out>/tokenizers``."""
        image = folder / IMAGE_FILE
        return cls(
            TextTokenizer.load(folder / TEXT_FILE),
            load_image_tokenizer(image) if image.exists() else None,
        )

    @property
    def hashes(self) -> dict[str, str]:
        """Modality label → SHA-256 of the tokenizer's file."""
        hashes = {Modality.TEXT.label: self.text.sha256}
        if self.image is not None:
            hashes[Modality.IMAGE.label] = self.image.sha256
        return hashes

    @property
    def vocabulary(self) -> Vocabulary:
        """Text pieces with the sentinels among them, then image codes."""
        text, image = self.text, self.image
        if image is None:
            return Vocabulary(text.size, text.bos, text.eos, text.pad)
        codes = MediaCodes(
            Modality.IMAGE, text.size, image.codes, text.begin_image, text.end_image, image.block
        )
        return Vocabulary(text.size + image.codes, text.bos, text.eos, text.pad, (codes,))
