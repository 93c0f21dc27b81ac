"""Shared by all public formats: results of import and export, and checks of their configs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from earlyfuse.data.json_files import JsonObject, shown
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts.config_json import SMALLEST, read_own_description
from earlyfuse.models.state_dicts.plain_decoder import agreed
from earlyfuse.models.state_dicts.tensor_map import TensorMaps, Tensors
from earlyfuse.models.vocabulary import Vocabulary

OURS = "earlyfuse"  # field with our description in a config that we write; other readers ignore it
# larger values are damage, and would be built before they are refused
_MOST_LAYERS, _LARGEST = 10_000, 10**9


@dataclass(frozen=True)
class Imported:
    """A public model as ours, from its config and the names of its tensors.

    ``maps``: our tensors from theirs. ``image_tokenizer``: its tensors, copied unchanged.
    ``unused``: further names that may be present. ``carried``: the config to write back when the
    model is exported again; empty if earlyfuse wrote it. ``remark``: a note on the vocabulary.
    """

    config: Decoder.Config
    vocabulary: Vocabulary
    maps: TensorMaps
    image_tokenizer: TensorMaps = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    carried: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Exported:
    """A model of ours in a public format: its tensors, and its JSON files by name.

    ``aliases``: second name → name of a tensor that is stored once. ``shards``: Meta's files.
    """

    tensors: Tensors
    files: dict[str, dict[str, Any]]
    aliases: dict[str, str] = field(default_factory=dict)
    shards: int = 1


def read_ours(raw: JsonObject, theirs: Decoder.Config) -> tuple[Decoder.Config, Vocabulary]:
    """Reads our description in ``raw``; ``ValueError`` if it contradicts the public fields."""
    config, vocabulary = read_own_description(raw.object(OURS))
    return agreed(config, theirs, raw.where), vocabulary


def with_dtype(carried: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Returns ``carried`` with the tensors' ``dtype`` in its dtype field, if it has one."""
    name = "torch_dtype" if "torch_dtype" in carried else "dtype"
    return {**carried, name: dtype} if dtype is not None and name in carried else dict(carried)


def refuse_others(given: JsonObject, wanted: Mapping[str, tuple[Any, Any]], reason: str) -> None:
    """``ValueError`` for the first of ``wanted`` (name → value there, supported value) that
    differs.
    """
    for name, (value, ours) in wanted.items():
        if value != ours:
            raise ValueError(
                f"{given.where}: {name} ({shown(value)}) must be {ours!r}: {reason}; such a model "
                "cannot be converted"
            )


def without_nulls(raw: JsonObject, defaults: Mapping[str, Any]) -> JsonObject:
    """Returns ``raw`` over ``defaults``; a null field has its default."""
    given = {name: value for name, value in raw.values.items() if value is not None}
    return JsonObject({**defaults, **given}, raw.where, raw.remedy)


def sizes(given: JsonObject, *names: str) -> list[int]:
    """Reads the fields ``names``: positive whole numbers of a plausible size."""
    return [
        given.field(name, int, least=1, most=_MOST_LAYERS if "layer" in name else _LARGEST)
        for name in names
    ]


def positive(given: JsonObject, name: str) -> float:
    """Reads the field ``name``: a positive number of a plausible size."""
    return float(given.field(name, float, least=SMALLEST, most=_LARGEST))
