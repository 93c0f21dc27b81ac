"""Reads a ``Vocabulary`` from JSON: ``vocabulary.json``, and ``vocabulary`` of a manifest."""

from pathlib import Path

from earlyfuse.data.json_files import JsonObject, read_json, shown
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

MOST_IDS = 1 << 24  # length of tables; the largest vocabularies in use have 2**18
REMEDY = "copy it again, or remove it and repeat the prepare command"
_SIZES = ("size", "bos", "eos", "pad")
_CODES = ("start", "count", "begin", "end", "block")


def load_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in the file ``path``; ``ValueError`` as in ``read_vocabulary``."""
    return read_vocabulary(read_json(path, REMEDY))


def read_vocabulary(fields: JsonObject) -> Vocabulary:
    """The inverse of ``Vocabulary.to_dict``; ``ValueError`` names file, field, value and rule."""
    fields.check_names((*_SIZES, "media"))
    sizes = {name: fields.field(name, int, least=0, most=MOST_IDS) for name in _SIZES}
    media = tuple(_medium(medium) for medium in fields.objects("media"))
    if len({medium.modality for medium in media}) < len(media):
        raise fields.wrong("media", "must name each modality once")
    try:
        return Vocabulary(**sizes, media=media)
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}; {fields.remedy}") from error


def check_same(path: Path, here: Vocabulary, data: Vocabulary, manifest: Path) -> None:
    """Raise ``ValueError`` if ``here``, of the file ``path``, is not the vocabulary of ``data``."""
    expected = data.to_dict()
    for name, value in here.to_dict().items():
        if value != expected[name]:
            raise ValueError(
                f"{path}: {name} ({shown(value)}) must be that of the data "
                f"({shown(expected[name])}, by {manifest}); {REMEDY}"
            )


def _medium(fields: JsonObject) -> MediaCodes:
    fields.check_names(("modality", *_CODES, "separator"))
    labels = [modality.label for modality in Modality if modality != Modality.TEXT]
    modality: Modality = Modality[fields.field("modality", str, choices=labels)]
    codes = {name: fields.field(name, int, least=0, most=MOST_IDS) for name in _CODES}
    separator = fields.field("separator", int, default=None, least=0, most=MOST_IDS)
    return MediaCodes(modality, **codes, separator=separator)
