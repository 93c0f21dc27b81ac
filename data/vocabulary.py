"""Layouts of ids in JSON files: ``vocabulary.json``, and ``vocabulary`` of a manifest."""

from pathlib import Path

from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.models.modality import MediaCodes, Modality, Vocabulary

MOST_IDS = 1 << 24  # tables of this length are made; the largest vocabularies in use have 2**18
_MEDIA = {modality.label: modality for modality in Modality if modality != Modality.TEXT}
_SIZES = ("size", "bos", "eos", "pad")
_CODES = ("start", "count", "begin", "end", "block")


def load_vocabulary(path: Path, remedy: str) -> Vocabulary:
    """The layout in the file ``path``; ``ValueError`` as in ``read_vocabulary``."""
    return read_vocabulary(read_json(path, remedy))


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


def _medium(fields: JsonObject) -> MediaCodes:
    fields.check_names(("modality", *_CODES))
    modality = _MEDIA[fields.field("modality", str, choices=tuple(_MEDIA))]
    return MediaCodes(
        modality, **{name: fields.field(name, int, least=0, most=MOST_IDS) for name in _CODES}
    )
