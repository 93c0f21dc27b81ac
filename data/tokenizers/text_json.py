"""Text pieces of a Hugging Face ``tokenizer.json``, the format of most public checkpoints.

``text.json`` is that file with one more key, ``earlyfuse``: the names of the tokens that are our
sentinels. The original names them in ``tokenizer_config.json`` beside it, if at all.

Special tokens, sentinels and image codes are never produced from text: a document that contains
``<s>`` or ``IMGIMGBCZ`` is spelled out, as with sentencepiece's control pieces.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from earlyfuse.data.json_files import JsonObject, load_json, read_json

KEY = "earlyfuse"
LARGEST_ID = 1 << 24  # of a token; a vocabulary has a row for each
_REMEDY = "it is damaged or cut; copy it again"
# names of sentinels where no tokenizer_config.json has them; those of images only as a pair. GPT-2
# and GPT-NeoX begin and end documents with one token
_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"),
    "pad": ("<pad>", "<|padding|>"),
}
_IMAGE_NAMES = (("<racm3:break>", "<eoss>"), ("<image>", "</image>"))
_CONFIG_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "pad": "pad_token",
    "begin_image": "boi_token",
    "end_image": "eoi_token",
}
_IMAGE_CODE = re.compile("IMGIMG([A-J]+)Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


class JsonPieces:
    """``size`` ids; ``sentinels``: name → id of those that the file has; ``image_codes``: ids that
    stand for image codes; ``reserved``: all ids that text never gives.
    """

    kind = "tokenizer.json"
    file_name = "text.json"

    def __init__(self, content: bytes) -> None:
        fields = _parse(content)
        tokens = token_ids(fields)
        names = fields.mapping(KEY, str) if KEY in fields else _sentinel_names(tokens, {})
        self.image_codes = frozenset(image_code_ids(tokens).values())
        self.sentinels = {key: tokens[name] for key, name in names.items() if name in tokens}
        self._silent = frozenset(self.sentinels.values())
        out_of_text = self.image_codes | self._silent
        added = [token.values for token in _added(fields)]
        for token in added:
            token["special"] = token.get("special", False) or token["id"] in out_of_text
        special = {token["id"] for token in added if token["special"]}
        theirs = {name: value for name, value in fields.values.items() if name != KEY}
        # truncation and padding are settings of whoever saved the file
        self._tokenizer = _built({**theirs, "truncation": None, "padding": None})
        self._tokenizer.encode_special_tokens = True  # spells special tokens out as text
        self.size = max(tokens.values()) + 1
        self.reserved = (special | self.image_codes) - {_unknown(fields)} | self._silent

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``. ``ValueError`` where it holds a reserved token as a whole word."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self.reserved.isdisjoint(ids):
            token = next(token for token in ids if token in self.reserved)
            raise ValueError(
                f"text holds the token {self._tokenizer.id_to_token(token)!r} ({token}), which is "
                "reserved; take it out of the text"
            )
        return ids

    def piece(self, token: int) -> str | None:
        """Spelling of a token; None if no token has this id."""
        return self._tokenizer.id_to_token(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are dropped."""
        return self._tokenizer.decode([token for token in ids if token not in self._silent])


def is_json(content: bytes) -> bool:
    """True for a JSON file: a sentencepiece model never begins with a brace."""
    return content.lstrip()[:1] == b"{"


def with_sentinels(content: bytes, folder: Path) -> bytes:
    """``tokenizer.json`` → ``text.json``: adds the sentinels' names, from files in ``folder``.

    Content that has them is returned as it is. ``ValueError`` unless it is such a file.
    """
    fields = _parse(content)
    if KEY in fields:
        return content
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= read_json(folder / name, _REMEDY).values
    named = {KEY: _sentinel_names(token_ids(fields), config)}
    return json.dumps({**fields.values, **named}, ensure_ascii=False).encode() + b"\n"


def _sentinel_names(tokens: dict[str, int], config: dict[str, Any]) -> dict[str, str]:
    """Sentinel → name of its token among ``tokens``, by ``config`` (tokenizer_config.json), else by
    the names in common use.
    """
    names: dict[str, str] = {}
    for key, field in _CONFIG_NAMES.items():
        given = config.get(field)
        name = given.get("content") if isinstance(given, dict) else given
        if isinstance(name, str) and name in tokens:
            names[key] = name
    for key, usual in _NAMES.items():
        known = [name for name in usual if name in tokens]
        if known:
            names.setdefault(key, known[0])
    if not names.keys() & {"begin_image", "end_image"}:
        pairs = [pair for pair in _IMAGE_NAMES if set(pair) <= tokens.keys()]
        names |= dict(zip(("begin_image", "end_image"), pairs[0], strict=True)) if pairs else {}
    return names


def token_table(content: bytes) -> dict[str, int]:
    """Name → id of all tokens of a file."""
    return token_ids(_parse(content))


def token_ids(fields: JsonObject) -> dict[str, int]:
    """Name → id of all tokens of a ``tokenizer.json``, added ones included.

    Raises ``ValueError`` where it lists none, or one with an impossible id.
    """
    model = fields.object("model")
    if isinstance(model.values.get("vocab"), list):  # Unigram: (piece, score) by id
        pieces = model.items("vocab", list)
        if not all(piece and isinstance(piece[0], str) for piece in pieces):
            raise model.wrong("vocab", "must list pairs of a piece and its score")
        tokens = {piece[0]: number for number, piece in enumerate(pieces)}
    else:
        tokens = id_table(model, "vocab")
    for added in _added(fields):
        tokens[added.field("content", str)] = added.field("id", int, least=0, most=LARGEST_ID)
    if not tokens:
        raise model.wrong("vocab", "must list tokens, and is empty")
    return tokens


def id_table(fields: JsonObject, name: str) -> dict[str, int]:
    """Token → id in the field ``name``. ``ValueError`` for an impossible id."""
    listed = fields.object(name)
    return {token: listed.field(token, int, least=0, most=LARGEST_ID) for token in listed.values}


def image_code_ids(tokens: Mapping[str, int]) -> dict[int, int]:
    """Code → id of every token (name → id) that is named after an image code.

    In Chameleon a code is a token of the text vocabulary: ``IMGIMG``, the code's decimal digits
    written A … J for 0 … 9, ``Z``; code 12 is ``IMGIMGBCZ``. Ids may be in any order.
    """
    named = ((_IMAGE_CODE.fullmatch(name), token) for name, token in tokens.items())
    return {int(match[1].translate(_DIGITS)): token for match, token in named if match}


def _added(fields: JsonObject) -> list[JsonObject]:
    return fields.objects("added_tokens") if fields.values.get("added_tokens") else []


def _built(fields: dict[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(fields))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises Exception, its Rust panics BaseException
        raise ValueError(f"it is no Hugging Face tokenizer.json: {error}; {_REMEDY}") from error


def _unknown(fields: JsonObject) -> int | None:
    """The id for unknown characters, which text may hold."""
    model = fields.values["model"]
    if "unk_id" in model:
        return model["unk_id"]
    return model["vocab"].get(model.get("unk_token")) if isinstance(model["vocab"], dict) else None


def _parse(content: bytes) -> JsonObject:
    return JsonObject.of(load_json(content, "its JSON", _REMEDY), "its JSON", _REMEDY)
