"""Text pieces by a Hugging Face ``tokenizer.json``, as most public checkpoints ship one.

``text.json`` is that file with one more key, ``earlyfuse``: the names of the tokens that are our
sentinels. The original says them in ``tokenizer_config.json`` beside it, if at all.

Special tokens, sentinels and image codes are never produced from text: a document that happens to
contain ``<s>`` or ``IMGIMGBCZ`` is spelled out, as with sentencepiece's control pieces.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from earlyfuse.data.tokenizers.vocabulary_map import image_code_ids

KEY = "earlyfuse"
# names that tell sentinels where no tokenizer_config.json does; those of images only as a pair
_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>"),
    "pad": ("<pad>",),
}
_IMAGE_NAMES = (("<racm3:break>", "<eoss>"), ("<image>", "</image>"))
_CONFIG_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "pad": "pad_token",
    "begin_image": "boi_token",
    "end_image": "eoi_token",
}


class JsonPieces:
    """``size`` ids; ``sentinels``: name → id of those that the file has; ``image_codes``: ids that
    stand for image codes; ``reserved``: all ids that text never gives.
    """

    kind = "tokenizer.json"
    file_name = "text.json"

    def __init__(self, content: bytes) -> None:
        fields = _parse(content)
        marked = fields.pop(KEY, None)
        try:
            tokens = token_ids(fields)
            self.image_codes = frozenset(image_code_ids(tokens).values())
            names = marked or sentinel_names(tokens, {})
            self.sentinels = {key: tokens[name] for key, name in names.items() if name in tokens}
            out_of_text = self.image_codes | set(self.sentinels.values())
            for added in fields.get("added_tokens") or []:
                added["special"] = added.get("special", False) or added["id"] in out_of_text
            special = {a["id"] for a in fields.get("added_tokens") or [] if a["special"]}
            fields["truncation"] = fields["padding"] = None  # of whoever saved it, not of ours
            self._tokenizer = Tokenizer.from_str(json.dumps(fields))
        except Exception as error:  # bare Exception is what the package raises
            raise ValueError(f"it is no Hugging Face tokenizer.json: {error!r}") from error
        self._tokenizer.encode_special_tokens = True  # that is: as the text that they are
        self.size = max(tokens.values()) + 1
        self._silent = frozenset(self.sentinels.values())
        self.reserved = frozenset(special) | self.image_codes | self._silent
        self.reserved -= {_unknown(fields["model"])}

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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens give nothing."""
        return self._tokenizer.decode([token for token in ids if token not in self._silent])


def is_json(content: bytes) -> bool:
    """Whether it can only be a JSON file: a sentencepiece model never begins with a brace."""
    return content.lstrip()[:1] == b"{"


def with_sentinels(content: bytes, folder: Path) -> bytes:
    """``tokenizer.json`` → ``text.json``: adds the sentinels' names, which ``folder`` may tell.

    Content that has them is returned as it is. ``ValueError`` on what is no such file.
    """
    fields = _parse(content)
    if KEY in fields:
        return content
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= _parse((folder / name).read_bytes())
    fields[KEY] = sentinel_names(token_ids(fields), config)
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def sentinel_names(tokens: dict[str, int], config: dict[str, Any]) -> dict[str, str]:
    """Sentinel → name of its token, for those that ``tokens`` hold.

    ``config``: tokenizer_config.json; what it leaves open goes by the names in common use.
    """
    names: dict[str, str] = {}
    for key, field in _CONFIG_NAMES.items():
        told = config.get(field)
        name = told.get("content") if isinstance(told, dict) else told
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


def token_ids(fields: dict[str, Any]) -> dict[str, int]:
    """Name → id of all tokens of a parsed ``tokenizer.json``, added ones included.

    Raises ``ValueError`` where it lists none.
    """
    try:
        vocabulary = fields["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: (piece, score) by id
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = {added["content"]: added["id"] for added in fields.get("added_tokens") or []}
        return {**vocabulary, **added}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it must list its tokens in model.vocab: {error!r}") from error


def _unknown(model: dict[str, Any]) -> int | None:
    """The id for characters that the model does not know; text may hold those."""
    if "unk_id" in model:
        return model["unk_id"]
    return model["vocab"].get(model.get("unk_token")) if isinstance(model["vocab"], dict) else None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise TypeError(type(fields).__name__)
        return fields
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"it must hold one JSON object; it is damaged or cut: {error}") from error
