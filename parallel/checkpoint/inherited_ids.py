"""Compares the token ids of a model with those of the data of a run that starts from it.

Text ids must mean the same: equal ids, equal pieces. Ids that the model does not have (sentinels
and codes of media, further pieces) are new. Ids of media are the model's where both have the same
codes by the same tokenizer.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.json_files import shown
from earlyfuse.data.media import MEDIA
from earlyfuse.data.tokenizers import VOCABULARY_FILE, imports, text_file
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.vocabulary import load_vocabulary
from earlyfuse.models.vocabulary import MediaCodes, Vocabulary
from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel
from earlyfuse.parallel.checkpoint.tokenizers import find_tokenizers


@dataclass(frozen=True)
class InheritedIds:
    """``row_V``: the model's row of each id of the data, None for a new id; None: ids are the same.
    ``remark``: a sentence about the comparison, or "".
    """

    row_V: list[int | None] | None
    remark: str = ""


def inherited_ids(opened: OpenModel, data: Path) -> InheritedIds:
    """Compares the ids of a model with those of the prepared folder ``data``.

    ``ValueError`` names the first id that stands for another text.
    """
    folder = data / "tokenizers"
    vocabulary, theirs = load_vocabulary(folder / VOCABULARY_FILE), opened.vocabulary
    hashes, text, remark = _hashes(opened), text_file(folder), ""
    same_layout = (vocabulary.size, vocabulary.media) == (theirs.size, theirs.media)
    if text.is_file() and sha256_file(text) == hashes.get("text"):
        pieces = theirs.size if same_layout else TextTokenizer.load(text).pieces
        common = min(pieces, theirs.size)
    elif text.is_file() and (their_text := _text_of(opened)) is not None:
        common = _common_pieces(opened, their_text, TextTokenizer.load(text), text)
    else:
        common = _layout_alone(opened, hashes, vocabulary, folder)
        remark = "no tokenizers to compare: the layouts of ids agree"
    row_V: list[int | None] = [None] * vocabulary.size
    row_V[:common] = range(common)
    _map_sentinels(row_V, vocabulary, theirs)
    other = [
        medium.modality.label
        for medium in vocabulary.media
        if not _map_medium(row_V, medium, opened, hashes, folder)
    ]
    if other:
        remark = f"{remark}; " if remark else ""
        remark += f"another tokenizer of {' and '.join(other)}, whose codes are new"
    elif same_layout:
        row_V = list(range(vocabulary.size))  # rows of padding too
    return InheritedIds(None if row_V == list(range(theirs.size)) else row_V, remark)


def _hashes(opened: OpenModel) -> dict[str, str]:
    """Label → SHA-256 of the tokenizers that the model was trained with, if known."""
    found, _ = find_tokenizers(opened)
    known = opened.source.get("tokenizers")
    hashes = dict(known) if isinstance(known, dict) else {}
    if found is not None:
        files = {label: found / medium.file for label, medium in MEDIA.items()}
        files["text"] = text_file(found)
        hashes |= {label: sha256_file(path) for label, path in files.items() if path.is_file()}
    return hashes


def _text_of(opened: OpenModel) -> TextTokenizer | None:
    found, _ = find_tokenizers(opened)
    if found is not None and text_file(found).is_file():
        return TextTokenizer.load(text_file(found))
    path = imports.text_path(opened.folder)
    return None if path is None else TextTokenizer.load(path)


def _common_pieces(
    opened: OpenModel, theirs: TextTokenizer, ours: TextTokenizer, path: Path
) -> int:
    """Number of ids that are the same pieces of text in both."""
    common = min(theirs.pieces, ours.pieces, opened.vocabulary.size)
    for token in range(common):
        if theirs.piece(token) != ours.piece(token):
            raise ValueError(
                f"start.model ({opened.folder}) has another text tokenizer than the data: id "
                f"{token} is {shown(theirs.piece(token))} there, {shown(ours.piece(token))} in "
                f"{path}; prepare the data with --text-tokenizer of the model"
            )
    return common


def _layout_alone(
    opened: OpenModel, hashes: dict[str, str], vocabulary: Vocabulary, folder: Path
) -> int:
    """Number of ids of text that agree by the layout of the vocabularies, without tokenizers."""
    theirs, text = opened.vocabulary, text_file(folder)
    if text.is_file() and "text" in hashes:
        raise ValueError(
            f"start.model ({opened.folder}) was trained with another text tokenizer (SHA-256 "
            f"{hashes['text'][:12]} …) than {text}; prepare the data with --text-tokenizer of the "
            "model, or put its tokenizers/ beside it"
        )
    if replace(theirs, size=vocabulary.size) != vocabulary:
        raise ValueError(
            f"start.model ({opened.folder}) has no text tokenizer to compare, and its layout of "
            f"ids ({_layout(theirs)}) is not that of the data ({_layout(vocabulary)}); put its "
            "tokenizer.json beside it, or prepare the data with --tokenizers of the model"
        )
    return min(theirs.size, vocabulary.size)


def _layout(vocabulary: Vocabulary) -> str:
    media = [f", {m.count} {m.modality.label} codes from {m.start}" for m in vocabulary.media]
    return f"{vocabulary.size} ids{''.join(media)}"


def _map_sentinels(row_V: list[int | None], ours: Vocabulary, theirs: Vocabulary) -> None:
    """Begin, end and padding that are no pieces have the model's."""
    for token, row in ((ours.eos, theirs.eos), (ours.bos, theirs.bos), (ours.pad, theirs.pad)):
        if row_V[token] is None:
            row_V[token] = row


def _map_medium(
    row_V: list[int | None],
    medium: MediaCodes,
    opened: OpenModel,
    hashes: dict[str, str],
    folder: Path,
) -> bool:
    """Map sentinels and codes of a medium; False if the model has it with other codes."""
    label = medium.modality.label
    theirs = {m.modality: m for m in opened.vocabulary.media}.get(medium.modality)
    if theirs is None:
        return True
    for token, row in zip(medium.sentinels, theirs.sentinels, strict=False):
        if row_V[token] is None:
            row_V[token] = row
    path, known = folder / MEDIA[label].file, hashes.get(label)
    other = known is not None and path.is_file() and sha256_file(path) != known
    same = theirs.count == medium.count and not other
    for code in range(medium.count):
        row_V[medium.start + code] = theirs.start + code if same else None
    return same
