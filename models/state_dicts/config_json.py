"""``config.json`` of an exported folder, and of every checkpoint of a run."""

from typing import Any

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.data.vocabulary import read_vocabulary
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import decoder_config
from earlyfuse.models.vocabulary import Modality, Vocabulary

FORMAT, VERSION = "earlyfuse", 1
CONFIG, TOKENIZERS = "config.json", "tokenizers"
REMEDY = "correct it, or copy it again"  # what to do about a wrong field
SMALLEST = 1e-9  # least positive number; anything smaller is damage


def describe(
    config: Decoder.Config, vocabulary: Vocabulary, source: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of ``config.json``. ``source``: plain values on the weights' origin."""
    model = own_description(config, vocabulary)
    return {"format": FORMAT, "version": VERSION, **model, "source": source}


def own_description(config: Decoder.Config, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns everything about the model; also written to a field of public configs."""
    return {"model": decoder_config.to_dict(config), "vocabulary": vocabulary.to_dict()}


def read_description(raw: JsonObject) -> tuple[Decoder.Config, Vocabulary, dict[str, Any]]:
    """Inverse of ``describe``; ``ValueError`` for another version."""
    if raw.values.get("version") != VERSION:
        raise ValueError(
            f"{raw.where}: version ({shown(raw.values.get('version'))}) must be {VERSION}; read it "
            "with the earlyfuse that wrote it"
        )
    return *read_own_description(raw), dict(raw.object("source").values)


def read_own_description(raw: JsonObject) -> tuple[Decoder.Config, Vocabulary]:
    """Inverse of ``own_description``; ``ValueError`` names the file and the field."""
    vocabulary = read_vocabulary(raw.object("vocabulary"))
    config = _read_decoder(raw.object("model"))
    if vocabulary.size != config.vocab_size:
        raise ValueError(
            f"{raw.where}: vocab_size of the model ({config.vocab_size}) must equal the size of "
            f"its vocabulary ({vocabulary.size}); {raw.remedy}"
        )
    return config, vocabulary


def _read_decoder(fields: JsonObject) -> Decoder.Config:
    fields.field("rope_theta", float, default=1.0, least=SMALLEST)
    known = {int(modality) for modality in Modality}
    if not set(fields.items("modalities", int) if "modalities" in fields else ()) <= known:
        raise fields.wrong("modalities", f"must be some of {sorted(known)}")
    try:
        return decoder_config.from_dict(fields.values)
    except (ValueError, TypeError, ArithmeticError) as error:
        where = fields.where.removesuffix(": model")  # the error names the place in the model
        raise ValueError(f"{where}: {error}; {fields.remedy}") from error
