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

from collections.abc import Iterable, Mapping
from typing import Any

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.data.vocabulary import read_vocabulary
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import decoder_config
from earlyfuse.models.vocabulary import Modality, Vocabulary

FORMAT, VERSION = "earlyfuse", 1
CONFIG, TOKENIZERS, VQ_FILE, HUGGINGFACE = (
    "config.json",
    "tokenizers",
    "vqmodel.safetensors",
    "huggingface",
)
REMEDY = "correct it, or copy it again"  # what to do about a field that is wrong
# more is damage, and would be built before it is refused
_MOST_LAYERS, _LARGEST, _SMALLEST = 10_000, 10**9, 1e-9


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
    raw: JsonObject,
) -> tuple[Decoder.Config, Vocabulary, dict[str, Any]]:
    """Inverse of ``describe``; ``ValueError`` if it was written by another version."""
    if raw.values.get("version") != VERSION:
        raise ValueError(
            f"{raw.where}: version ({shown(raw.values.get('version'))}) must be {VERSION}; read it "
            "with the earlyfuse that wrote it"
        )
    vocabulary = read_vocabulary(raw.object("vocabulary"))
    config = read_decoder(raw.object("model"))
    if vocabulary.size != config.vocab_size:
        raise ValueError(
            f"{raw.where}: vocab_size of the model ({config.vocab_size}) must equal the size of "
            f"its vocabulary ({vocabulary.size}); {raw.remedy}"
        )
    return config, vocabulary, dict(raw.object("source").values)


def read_decoder(fields: JsonObject) -> Decoder.Config:
    """The model in ``fields``; ``ValueError`` names the file and the field."""
    where = fields.where.removesuffix(": model")  # the error names places in the model
    fields.field("rope_theta", float, default=1.0, least=_SMALLEST)
    known = {int(modality) for modality in Modality}
    if not set(fields.items("modalities", int) if "modalities" in fields else ()) <= known:
        raise fields.wrong("modalities", f"must be some of {sorted(known)}")
    try:
        return decoder_config.from_dict(fields.values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}; {fields.remedy}") from error


def refuse_others(given: JsonObject, wanted: Mapping[str, tuple[Any, Any]], reason: str) -> None:
    """``ValueError`` for the first of ``wanted`` (name → value there, the only one we compute) that
    differs.
    """
    for name, (value, ours) in wanted.items():
        if value != ours:
            raise ValueError(
                f"{given.where}: {name} ({shown(value)}) must be {ours!r}: {reason}; such a model "
                "cannot be converted"
            )


def without_nulls(raw: JsonObject, defaults: Mapping[str, Any]) -> JsonObject:
    """``raw`` over ``defaults``; a field that is null has its default."""
    given = {name: value for name, value in raw.values.items() if value is not None}
    return JsonObject({**defaults, **given}, raw.where, raw.remedy)


def check_numbers(given: JsonObject, names: Iterable[str]) -> None:
    """``ValueError`` unless all ``names`` are positive numbers of a possible size, whole but for
    ``expand`` and ``rope_theta``.
    """
    for name in names:
        if name in ("expand", "rope_theta"):
            given.field(name, float, least=_SMALLEST, most=_LARGEST)
        else:
            given.field(name, int, least=1, most=_MOST_LAYERS if "layer" in name else _LARGEST)
