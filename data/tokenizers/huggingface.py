"""Writes a text tokenizer as Hugging Face's ``tokenizer.json`` and ``tokenizer_config.json``.

A ``text.json`` is a ``tokenizer.json`` with one more key. A sentencepiece BPE becomes byte-pair
merges in the order of its scores. Its spaces are spaces there, not U+2581, which stays a character
of its own, spelled in bytes; normalisation and byte fallback are kept. Ids of sample texts are
compared before anything is written.
"""

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from earlyfuse.data.json_files import shown
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.data.tokenizers.text_json import KEY
from earlyfuse.models.vocabulary import Vocabulary

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of pieces
_BPE = 2
_SPACE = "\u2581"
_SAMPLES = (
    "The quick brown fox, 12345 times; don't stop!",
    "  two spaces,\ttab\nline\n\n  indented: x = [1, 2]\r\n",
    "Größe naïve façade — “quotes” … ½ ﬁ ™",
    "日本語と한국어, العربية, עברית, हिन्दी, ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 \u200d\ufeff\u00a0\u3000\u2581▁x",
    "<0x41> e\u0301 \U0001f9ec \x00\x7f",
    "",
)


def tokenizer_files(
    text: TextTokenizer, vocabulary: Vocabulary, names: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """File name → content. ``names``: further tokens, special ones: sentinels and codes of media.

    ``ValueError`` says why the tokenizer cannot be written.
    """
    if text.kind == "sentencepiece":
        fields = _from_sentencepiece(text.model)
    else:
        fields = {k: v for k, v in json.loads(text.model).items() if k != KEY}
    _add_tokens(fields, names)
    spelled = {token: name for name, token in _tokens(fields).items()}
    bos = spelled.get(vocabulary.bos)
    if text.kind == "sentencepiece" and bos is not None:
        fields["post_processor"] = _begins_with(bos, vocabulary.bos)
    _compare(fields, text)
    special = {"bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": spelled[token] for name, token in special.items() if token in spelled},
    }
    return {FILE: fields, CONFIG_FILE: config}


def _tokens(fields: Mapping[str, Any]) -> dict[str, int]:
    """Name → id of all tokens; those of the model's pieces only where it is a table."""
    vocab = fields["model"]["vocab"]
    pieces = enumerate(piece for piece, _ in vocab) if isinstance(vocab, list) else ()
    found = dict(vocab) if isinstance(vocab, dict) else {piece: n for n, piece in pieces}
    return found | {token["content"]: token["id"] for token in fields["added_tokens"]}


def _add_tokens(fields: dict[str, Any], names: Mapping[str, int]) -> None:
    """Give ids without a token the special tokens ``names``, and tokens of these ids the names."""
    known = _tokens(fields)
    taken = {token: name for name, token in known.items()}
    vocab = fields["model"]["vocab"]
    for name, token in sorted(names.items(), key=lambda item: item[1]):
        if known.get(name) == token or token in taken:
            continue
        if name in known:
            raise ValueError(f"token {name!r} has the id {known[name]} there, and {token} here")
        if isinstance(vocab, dict):
            vocab[name] = token
        fields["added_tokens"].append(_added(name, token, special=True))
    fields["added_tokens"].sort(key=lambda token: token["id"])


def _added(name: str, token: int, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": name, **flags, "special": special}


def _begins_with(name: str, token: int) -> dict[str, Any]:
    """A post-processor that begins a text with the token, as documents do in training."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    a, b = ({"Sequence": {"id": letter, "type_id": n}} for n, letter in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, b],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _compare(fields: dict[str, Any], text: TextTokenizer) -> None:
    """``ValueError`` unless sample texts have the same ids."""
    written = Tokenizer.from_str(json.dumps(fields))
    for sample in _SAMPLES:
        found, expected = written.encode(sample, add_special_tokens=False).ids, text.encode(sample)
        if found != expected:
            raise ValueError(
                f"its ids of {shown(sample)} would be {shown(found)} there, not {shown(expected)}"
            )


# ---------------------------------------------------------------- sentencepiece


def _from_sentencepiece(model: bytes) -> dict[str, Any]:
    """The fields of a ``tokenizer.json``; ``ValueError`` unless the model is a BPE."""
    parts = list(_fields(model))
    trainer = dict(_fields(_last(parts, 2)))
    normalizer = dict(_fields(_last(parts, 3)))
    if trainer.get(3, 1) != _BPE:
        raise ValueError("its sentencepiece model is no BPE")
    if trainer.get(24):
        raise ValueError("its sentencepiece model puts spaces behind words")
    escaped = bool(normalizer.get(5, 1))
    pieces = [_piece(content, escaped) for number, content in parts if number == 1]
    kinds = {kind for _, _, kind in pieces}
    unknown = next((name for name, _, kind in pieces if kind == _UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(name, token, special=kind != _USER_DEFINED)
            for token, (name, _, kind) in enumerate(pieces)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": _normalizer(normalizer),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(normalizer),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": _BYTE in kinds,
            "ignore_merges": False,
            "vocab": {name: token for token, (name, _, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _piece(content: Any, escaped: bool) -> tuple[str, float, int]:
    """Spelling, score and type of a piece."""
    fields = dict(_fields(content))
    name, kind = fields[1].decode(), fields.get(3, _NORMAL)
    if escaped and kind in (_NORMAL, _USER_DEFINED):
        name = name.replace(_SPACE, " ")
    return name, struct.unpack("<f", fields.get(2, bytes(4)))[0], kind


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Pairs that make a piece, the best score first."""
    normal = {name for name, _, kind in pieces if kind == _NORMAL}
    ranked = sorted((-score, token) for token, (_, score, kind) in enumerate(pieces) if kind == 1)
    found: list[list[str]] = []
    for _, token in ranked:
        name = pieces[token][0]
        cuts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        found += [[left, right] for left, right in cuts if left in normal and right in normal]
    return found


def _normalizer(fields: Mapping[int, Any]) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if charsmap := fields.get(2):
        text = base64.b64encode(charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if fields.get(4, 1):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if fields.get(3, 1):
        steps.append({"type": "Prepend", "prepend": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _decoder(fields: Mapping[int, Any]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if fields.get(3, 1):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _last(parts: list[tuple[int, Any]], wanted: int) -> bytes:
    return next((content for number, content in reversed(parts) if number == wanted), b"")


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: an int, or bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("its sentencepiece model is damaged")
        yield number, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(content) and shift < 64:
        value |= (content[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 128:
            return value, at
    raise ValueError("its sentencepiece model is damaged")
