"""The folder that we export, and the ``config.json`` in it and in our checkpoints.

================================  =================================================================
file                              what it is
================================  =================================================================
``config.json``                   ``describe``: format, version, model, vocabulary, where it is from
``model-0000k-of-0000N…``         safetensors, with ``model.safetensors.index.json``
``tokenizers/``                   the tokenizers of the data, where they are known
``vqmodel.safetensors``           image tokenizer of a Hugging Face folder, as it came
``huggingface/``                  other files of a Hugging Face folder, as they came
================================  =================================================================
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from earlyfuse.data import json_files
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.modality import Vocabulary
from earlyfuse.models.state_dicts import decoder_config

FORMAT, VERSION = "earlyfuse", 1
CONFIG, TOKENIZERS, VQ_FILE, HUGGINGFACE = (
    "config.json",
    "tokenizers",
    "vqmodel.safetensors",
    "huggingface",
)
_MOST_LAYERS, _LARGEST = 10_000, 10**9  # more is damage, and would be built before it is refused


def describe(
    config: Decoder.Config, vocabulary: Vocabulary, source: dict[str, Any]
) -> dict[str, Any]:
    """What ``config.json`` says. ``source``: plain values on where the parameters are from."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": decoder_config.to_dict(config),
        "vocabulary": vocabulary.to_dict(),
        "source": source,
    }


def read_description(
    raw: dict[str, Any], where: Path
) -> tuple[Decoder.Config, Vocabulary, dict[str, Any]]:
    """Inverse of ``describe``; ``ValueError`` if it was written by another version."""
    if raw.get("version") != VERSION:
        raise ValueError(
            f"{where}: version ({raw.get('version')!r}) must be {VERSION}; read it with the "
            "earlyfuse that wrote it"
        )
    try:
        vocabulary = Vocabulary.from_dict(raw["vocabulary"])
        config = decoder_config.from_dict(raw["model"])
        source = dict(raw["source"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no description of a model ({error!r})") from error
    if vocabulary.size != config.vocab_size:
        raise ValueError(
            f"{where}: vocab_size of the model ({config.vocab_size}) must equal the size of its "
            f"vocabulary ({vocabulary.size})"
        )
    return config, vocabulary, source


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; ``ValueError`` naming it if there is none."""
    return json_files.read_json(path, "correct it, or copy it again").values


def check_numbers(
    given: Mapping[str, Any], names: Iterable[str], where: str = "config.json"
) -> None:
    """``ValueError`` unless all ``names`` are positive numbers of a possible size, whole but for
    ``expand`` and ``rope_theta``.
    """
    for name in names:
        value: Any = given.get(name)
        broken = name in ("expand", "rope_theta")
        most = math.inf if broken else _MOST_LAYERS if "layer" in name else _LARGEST
        number = type(value) is int or (broken and type(value) is float and math.isfinite(value))
        if not number or not 0 < value <= most:
            also = "" if broken else f", whole and at most {most:,}"
            raise ValueError(
                f"{where}: {name} ({value!r}) must be a positive number{also}; correct it"
            )
