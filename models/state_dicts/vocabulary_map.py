"""Converts between Hugging Face's ``vocabulary_map`` (token → id) and our ``Vocabulary``.

The token of an image code is ``IMGIMG``, its decimal digits as letters A to J, and ``Z``: code 12
is ``IMGIMGBCZ``. The map, not the order of the ids, defines the id of a code.
"""

from collections.abc import Mapping

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

BOS, PAD, EOS = "<s>", "<pad>", "</s>"
BEGIN_IMAGE, END_IMAGE = "<racm3:break>", "<eoss>"
PLACEHOLDER = "<image>"  # replaced by an image in transformers' processor
SEPARATOR = "<earlyfuse:frame>"  # between the frames of a video; unknown to other tools
_PREFIX, _SUFFIX = "IMGIMG", "Z"

# ids of the released 7B and 30B models (arXiv 2405.09818), for checkpoints that come without a map
RELEASED_SIZE = 65536
RELEASED = {BOS: 0, PAD: 1, EOS: 2, END_IMAGE: 8196, BEGIN_IMAGE: 8197, PLACEHOLDER: 8711}
TEXT_ONLY = {token: RELEASED[token] for token in (BOS, PAD, EOS)}
RELEASED_CODES, RELEASED_START, RELEASED_BLOCK = 8192, 4, 1024


def token_of_code(code: int) -> str:
    """Returns the token of an image code."""
    return _PREFIX + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + _SUFFIX


def ids_of_codes(vocabulary_map: Mapping[str, int]) -> list[int]:
    """Lists the token id of each image code, by code; empty without image tokens.

    ``ValueError`` if the codes are not 0 … n - 1, or two of them share an id.
    """
    by_code: dict[int, int] = {}
    for token, number in vocabulary_map.items():
        if token.startswith(_PREFIX):
            letters = token.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            digits = "".join(str(ord(letter) - ord("A")) for letter in letters)
            if not digits.isdecimal() or token != token_of_code(int(digits)):
                raise ValueError(f"vocabulary_map: {shown(token)} names no image code; correct it")
            by_code[int(digits)] = number
    if sorted(by_code) != list(range(len(by_code))) or len(set(by_code.values())) != len(by_code):
        raise ValueError(
            f"vocabulary_map names {len(by_code)} image codes; they must be 0 … {len(by_code) - 1} "
            "with distinct ids; correct it"
        )
    return [by_code[code] for code in range(len(by_code))]


def to_vocabulary(tokens: JsonObject, config: JsonObject, block: int) -> tuple[Vocabulary, str]:
    """Returns the vocabulary, and a remark if image codes were left out of it, or "".

    ``tokens``: the map. ``config``: has ``vocab_size`` and, for sentinels absent from the map,
    ``bos_token_id`` …. ``block``: codes of one image. Images are left out where the map lacks their
    begin or end token, or the ids of the codes are not contiguous.
    """
    size = config.field("vocab_size", int, least=1)
    named = {name: tokens.field(name, int, least=0, most=size - 1) for name in tokens.values}
    eos = named.get(EOS, _first(config, "eos_token_id", 0, size))
    bos = named.get(BOS, _first(config, "bos_token_id", eos, size))
    pad = named.get(PAD, _first(config, "pad_token_id", eos, size))
    text_only = Vocabulary(size, bos, eos, pad)
    ids = ids_of_codes(named)
    if not ids:
        return text_only, ""
    unnamed = [token for token in (BEGIN_IMAGE, END_IMAGE) if token not in named]
    if unnamed:
        return text_only, f"images are left out: the vocabulary_map has no {' and '.join(unnamed)}"
    if max(ids) - min(ids) + 1 != len(ids):
        return text_only, f"images are left out: the ids of the {len(ids)} codes are not contiguous"
    begin, end = named[BEGIN_IMAGE], named[END_IMAGE]
    first, count, separator = min(ids), len(ids), named.get(SEPARATOR)
    codes = MediaCodes(Modality.IMAGE, first, count, begin, end, block, separator)
    try:
        return Vocabulary(size, bos, eos, pad, (codes,)), ""
    except ValueError as error:
        return text_only, f"images are left out: {error}"


def released() -> Vocabulary:
    """Returns the vocabulary of Meta's released models."""
    begin, end = RELEASED[BEGIN_IMAGE], RELEASED[END_IMAGE]
    codes = MediaCodes(Modality.IMAGE, RELEASED_START, RELEASED_CODES, begin, end, RELEASED_BLOCK)
    return Vocabulary(RELEASED_SIZE, RELEASED[BOS], RELEASED[EOS], RELEASED[PAD], (codes,))


def from_vocabulary(vocabulary: Vocabulary) -> dict[str, int]:
    """Returns the map of our vocabulary: its sentinels and image codes, not its text pieces.

    transformers requires an id for its image placeholder: padding, which never occurs in text.
    """
    named = {BOS: vocabulary.bos, PAD: vocabulary.pad, EOS: vocabulary.eos}
    named[PLACEHOLDER] = vocabulary.pad
    if Modality.IMAGE in vocabulary.modalities:
        images = vocabulary.medium(Modality.IMAGE)
        named |= {BEGIN_IMAGE: images.begin, END_IMAGE: images.end}
        if images.separator is not None:
            named[SEPARATOR] = images.separator
        named |= {token_of_code(code): images.start + code for code in range(images.count)}
    return named


def special_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Names of all ids that are no text: sentinels, codes of every medium."""
    named = {BOS: vocabulary.bos, PAD: vocabulary.pad, EOS: vocabulary.eos}
    for medium in vocabulary.media:
        label = medium.modality.label
        if medium.modality == Modality.IMAGE:
            named |= {BEGIN_IMAGE: medium.begin, END_IMAGE: medium.end}
        else:
            named |= {f"<{label}>": medium.begin, f"</{label}>": medium.end}
        if medium.separator is not None:
            named[SEPARATOR if medium.modality == Modality.IMAGE else f"<{label}:frame>"] = (
                medium.separator
            )
        name_of = token_of_code if medium.modality == Modality.IMAGE else f"<{label}:{{}}>".format
        named |= {name_of(code): medium.start + code for code in range(medium.count)}
    return named


def _first(config: JsonObject, name: str, default: int, size: int) -> int:
    """Returns the id in field ``name`` of ``config``, the first if it is a list."""
    value = config.values.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return default
    first = JsonObject({name: value}, config.where, config.remedy)
    return int(first.field(name, int, least=0, most=size - 1))
