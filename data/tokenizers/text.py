"""Text tokenizer: sentencepiece BPE with byte fallback, which decodes every string unchanged.

``train`` makes such a tokenizer; ``load`` also reads other sentencepiece models and Hugging Face's
``tokenizer.json`` (text_json.py), with the properties that they have. Sentinels are control pieces,
which sentencepiece never produces from text: a document that contains ``<image>`` opens no image.
"""

import hashlib
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

from earlyfuse.data.atomic import atomic_write_bytes
from earlyfuse.data.media import MEDIA
from earlyfuse.data.tokenizers.text_json import JsonPieces, is_json, with_sentinels

# unknown, bos, eos, pad, sentinels, newline, 256 bytes, and room for letters and merges
SMALLEST_VOCABULARY = 320
LARGEST_VOCABULARY = 1 << 20
_SPACE_SYMBOL = "\u2581"  # how sentencepiece spells a space inside pieces; decode turns it into one


class TextTokenizer:
    """A file of text pieces, sentencepiece's or Hugging Face's, and its sentinels.

    ====================  ======================================================================
    ``pieces``, ``size``  ids of the file; and with a new id for each sentinel that it lacks
    ``begin``, ``end``    label of a medium → its sentinels. Images always have some, other
                          ``media`` only where they are used, so that a new medium moves no ids
    ``image_codes``       ids among the pieces that stand for image codes (Chameleon's)
    ``reserved``          these, the sentinels, and all other ids that text never gives
    ``model, sha256``     content of the file, and its hash
    ====================  ======================================================================
    """

    def __init__(self, model: bytes, media: Collection[str] = ()) -> None:
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._pieces = JsonPieces(model) if is_json(model) else SentencePieces(model)
        self.kind, self.file_name = self._pieces.kind, self._pieces.file_name
        self.pieces = self.size = self._pieces.size
        self.image_codes = self._pieces.image_codes
        self.bos = self._sentinel("bos")
        self.eos = self._sentinel("eos")
        self.pad = self._sentinel("pad")
        self.begin: dict[str, int] = {}
        self.end: dict[str, int] = {}
        for label in _with_sentinels(media):
            self.begin[label] = self._sentinel(f"begin_{label}")
            self.end[label] = self._sentinel(f"end_{label}")
        self.reserved = self._pieces.reserved | set(range(self.pieces, self.size))

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without sentinels.

        Raises ``UnicodeEncodeError`` on lone surrogates, ``ValueError`` where a Hugging Face
        vocabulary of whole words would turn text into a reserved token.
        """
        text.encode()
        return self._pieces.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; sentinels are dropped, broken byte sequences become U+FFFD.

        Raises ``ValueError`` for image codes and ids outside [0, ``size``).
        """
        for token in ids:
            if not 0 <= token < self.size:
                raise ValueError(
                    f"token ({token}) must lie in [0, {self.size}) to be text; decode images apart"
                )
            if token in self.image_codes:
                raise ValueError(f"token ({token}) is an image code, no text; decode images apart")
        return self._pieces.decode([int(token) for token in ids if token < self.pieces])

    def piece(self, token: int) -> str | None:
        """Spelling of the piece ``token`` of the file; None if no piece has this id."""
        return self._pieces.piece(token) if token < self.pieces else None

    def save(self, path: Path) -> None:
        """Write the model file, whole or not at all."""
        atomic_write_bytes(path, self.model)

    @classmethod
    def load(cls, path: Path, media: Collection[str] = ()) -> "TextTokenizer":
        """Read a sentencepiece ``.model``, a Hugging Face ``tokenizer.json`` or our ``text.json``.

        ``tokenizer_config.json`` beside a ``tokenizer.json`` names the sentinels. Raises
        ``ValueError`` naming a file that is none of them.
        """
        path = Path(path)
        model = path.read_bytes()
        try:
            as_json = is_json(model) or path.suffix == ".json"
            return cls(with_sentinels(model, path.parent) if as_json else model, media)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"text tokenizer ({path}) must be a sentencepiece .model file or a Hugging Face "
                f"tokenizer.json, and cannot be read as one: {error}"
            ) from error

    @classmethod
    def train(
        cls, texts: Iterable[str], vocabulary_size: int, media: Collection[str] = ()
    ) -> "TextTokenizer":
        """Learn ``vocabulary_size`` pieces. Equal texts in equal order give equal bytes.

        Raises ``ValueError`` when the size is out of range or the texts are too few for it, and
        whatever ``texts`` raises.
        """
        check_vocabulary_size(vocabulary_size)
        lines = _Lines(texts)
        first = next(lines, None)
        if first is None:
            raise ValueError(
                f"text vocabulary ({vocabulary_size}) is learnt from text, and there is none; "
                "give texts that are not empty"
            )
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=chain([first], lines),
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
                control_symbols=[
                    piece for label in _with_sentinels(media) for piece in MEDIA[label].sentinels
                ],
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                max_sentence_length=1 << 24,
                num_threads=1,
                minloglevel=2,
            )
        except Exception as error:
            if lines.error is not None or not isinstance(error, RuntimeError):
                raise lines.error or error from None
            raise ValueError(
                f"text vocabulary ({vocabulary_size}) does not fit the training texts; give more "
                f"text or another --text-vocab; sentencepiece: {str(error).rpartition('] ')[2]}"
            ) from error
        return cls(model.getvalue(), media)

    def _sentinel(self, name: str) -> int:
        """The file's own, or a new id behind its pieces."""
        piece = self._pieces.sentinels.get(name)
        if piece is not None:
            return piece
        self.size += 1
        return self.size - 1


class SentencePieces:
    """Pieces of a sentencepiece model; the attributes are those of ``JsonPieces``."""

    kind = "sentencepiece"
    file_name = "text.model"
    image_codes: frozenset[int] = frozenset()

    def __init__(self, content: bytes) -> None:
        self._processor = pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.size = pieces.get_piece_size()
        found = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}
        for label, medium in MEDIA.items():
            for place, piece in zip(("begin", "end"), medium.sentinels, strict=True):
                found[f"{place}_{label}"] = pieces.piece_to_id(piece)
        # only a control piece is out of reach of text
        self.sentinels = {
            name: piece for name, piece in found.items() if piece >= 0 and pieces.is_control(piece)
        }
        self.reserved = frozenset(filter(pieces.is_control, range(self.size)))
        space = [pieces.piece_to_id(f"<0x{value:02X}>") for value in _SPACE_SYMBOL.encode()]
        self._space_symbol_ids = space if all(map(pieces.is_byte, space)) else []

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        if not self._space_symbol_ids or _SPACE_SYMBOL not in text:
            return self._processor.encode(text)
        # spelled in bytes, U+2581 survives decode
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE_SYMBOL)):
            ids += self._space_symbol_ids if number else []
            ids += self._processor.encode(part)
        return ids

    def piece(self, token: int) -> str | None:
        """Spelling of a piece."""
        return str(self._processor.id_to_piece(token))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; control pieces are dropped."""
        return self._processor.decode(list(ids))


def _with_sentinels(media: Collection[str]) -> list[str]:
    """Labels of the media whose sentinels a text tokenizer for ``media`` has, in table order."""
    return [label for label, medium in MEDIA.items() if medium.always or label in media]


def check_vocabulary_size(size: int) -> None:
    """``ValueError`` unless ``size`` leaves room for bytes, sentinels and some letters."""
    if not SMALLEST_VOCABULARY <= size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"text vocabulary ({size}) must lie in [{SMALLEST_VOCABULARY}, {LARGEST_VOCABULARY}]: "
            "256 pieces are bytes; choose another size"
        )


class _Lines(Iterator[str]):
    """Non-empty lines of ``texts``: newline is a piece of its own, so no piece spans two lines.

    ``error``: raised by ``texts``; sentencepiece would report it as its own.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._lines = (line for text in texts for line in text.split("\n") if line)
        self.error: Exception | None = None

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise
