"""Text tokenizer: sentencepiece BPE with byte fallback that gives every string back unchanged.

Sentinels are control pieces, which sentencepiece never produces from text: a document that happens
to contain ``<image>`` cannot open an image.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from earlyfuse.data.atomic import atomic_write_bytes

BEGIN_IMAGE, END_IMAGE = "<image>", "</image>"
# unknown, bos, eos, pad, two image sentinels, newline, 256 bytes, and room for letters and merges
SMALLEST_VOCABULARY = 320
LARGEST_VOCABULARY = 1 << 20
_SPACE_SYMBOL = "\u2581"  # how sentencepiece spells a space inside pieces; decode turns it into one


class TextTokenizer:
    """A sentencepiece model and its sentinels.

    ``size`` counts the model's pieces and, behind them, any of pad / begin image / end image that a
    model made elsewhere lacks. ``sha256`` is that of the model file.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._pieces.get_piece_size()
        self.bos = self._sentinel(self._pieces.bos_id())
        self.eos = self._sentinel(self._pieces.eos_id())
        self.pad = self._sentinel(self._pieces.pad_id())
        self.begin_image = self._sentinel(self._pieces.piece_to_id(BEGIN_IMAGE))
        self.end_image = self._sentinel(self._pieces.piece_to_id(END_IMAGE))
        space = [self._pieces.piece_to_id(f"<0x{value:02X}>") for value in _SPACE_SYMBOL.encode()]
        self._space_symbol_ids = space if all(map(self._pieces.is_byte, space)) else []

    def encode(self, text: str) -> list[int]:
        """Piece ids of ``text``, without sentinels. ``UnicodeEncodeError`` on lone surrogates."""
        text.encode()
        if not self._space_symbol_ids or _SPACE_SYMBOL not in text:
            return self._pieces.encode(text)
        # spelled in bytes, U+2581 survives decode
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE_SYMBOL)):
            ids += self._space_symbol_ids if number else []
            ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; sentinels give nothing, broken byte sequences U+FFFD.

        Raises ``ValueError`` for ids that are no text (image codes lie behind ``size``).
        """
        foreign = [token for token in ids if not 0 <= token < self.size]
        if foreign:
            raise ValueError(
                f"token ({foreign[0]}) must lie in [0, {self.size}) to be text; decode images apart"
            )
        pieces = self._pieces.get_piece_size()
        return self._pieces.decode([int(token) for token in ids if token < pieces])

    def save(self, path: Path) -> None:
        """Write the model file, whole or not at all."""
        atomic_write_bytes(path, self.model)

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read a sentencepiece ``.model``. Raises ``ValueError`` naming a file that is none."""
        model = Path(path).read_bytes()
        try:
            return cls(model)
        except RuntimeError as error:
            raise ValueError(
                f"text tokenizer ({path}) must be a sentencepiece .model file, which says: {error}"
            ) from error

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> "TextTokenizer":
        """Learn ``vocabulary_size`` pieces. Equal texts in equal order give equal bytes.

        Raises ``ValueError`` when the size is out of range or the texts are too few for it.
        """
        check_vocabulary_size(vocabulary_size)
        model = io.BytesIO()
        lines = _lines(texts)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=model,
                model_type="bpe",
                vocab_size=vocabulary_size,
                byte_fallback=True,
                # identity and no space handling: decode(encode(s)) == s
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                # indentation of code as one piece; numbers digit by digit, as in Chameleon's
                # descendants
                allow_whitespace_only_pieces=True,
                split_digits=True,
                user_defined_symbols=["\n"],
                control_symbols=[BEGIN_IMAGE, END_IMAGE],
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                max_sentence_length=1 << 24,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"text vocabulary ({vocabulary_size}) does not fit the training texts; "
                f"give more text or another size; sentencepiece says: {error}"
            ) from error
        return cls(model.getvalue())

    def _sentinel(self, piece: int) -> int:
        """``piece`` where text cannot produce it, else a new id behind the model's pieces."""
        if piece >= 0 and self._pieces.is_control(piece):
            return piece
        self.size += 1
        return self.size - 1


def check_vocabulary_size(size: int) -> None:
    """Raises ``ValueError`` unless ``size`` leaves room for bytes, sentinels and some letters."""
    if not SMALLEST_VOCABULARY <= size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"text vocabulary ({size}) must lie in [{SMALLEST_VOCABULARY}, {LARGEST_VOCABULARY}]: "
            "256 pieces are bytes; choose another size"
        )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Non-empty lines: newline is a piece of its own, so nothing is learnt across it."""
    for text in texts:
        yield from (line for line in text.split("\n") if line)
