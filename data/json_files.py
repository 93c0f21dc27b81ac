"""Reads JSON that may be edited, truncated or hostile: within bounds, errors by file and field.

``json.loads`` alone accepts any size and nesting, and wrong types fail later as a ``KeyError`` or
``TypeError`` that names no file.
"""

import json
import math
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from earlyfuse.data.console import printable

MOST_BYTES = 256 << 20  # the largest tokenizer.json and shard indexes in use take about 50 MB
MOST_NESTED = 100
_LARGEST_WHOLE = 1 << 1000  # larger whole numbers do not fit a float

_REQUIRED: Any = object()
_KINDS = {
    str: "a string",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxdict = 4
_short.maxlevel = 3


def shown(value: Any) -> str:
    """``value`` for an error message: short, and without control characters."""
    return printable(_short.repr(value))


def load_json(content: bytes | str, where: str, remedy: str, *, unique_names: bool = False) -> Any:
    """Parse ``content``; ``ValueError`` with ``where`` and ``remedy`` if it is not JSON, or nested
    more than ``MOST_NESTED`` levels deep.

    ``unique_names``: also if an object names a field twice, of which parsers use the last.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique if unique_names else None)
        too_deep = _depth_exceeds(value, content)
    except RecursionError:
        too_deep = True
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{where} is not valid JSON ({error}); {remedy}") from error
    if too_deep:
        raise ValueError(f"{where} is nested more than {MOST_NESTED} levels deep; {remedy}")
    return value


def read_json_value(path: Path, remedy: str, most_bytes: int = MOST_BYTES) -> Any:
    """Parse the file ``path``; ``ValueError`` naming it if it cannot be read, is larger than
    ``most_bytes`` or is not JSON.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    if len(content) > most_bytes:
        raise ValueError(f"{path} is larger than {most_bytes:,} bytes; {remedy}")
    return load_json(content, str(path), remedy)


def read_json(path: Path, remedy: str, most_bytes: int = MOST_BYTES) -> "JsonObject":
    """The object in the file ``path``, with typed access; ``ValueError`` as in ``read_json_value``,
    and for another kind of value.
    """
    return JsonObject.of(read_json_value(path, remedy, most_bytes), str(path), remedy)


class JsonObject:
    """Fields of a JSON object; each access states the accepted type and range.

    ``where``: the file, and the path in it, for messages. ``remedy``: the end of a sentence, what
    to do about a wrong field ("repeat the prepare command").
    """

    def __init__(self, values: dict[str, Any], where: str, remedy: str):
        self.values, self.where, self.remedy = values, where, remedy

    @classmethod
    def of(cls, value: Any, where: str, remedy: str) -> "JsonObject":
        """``value`` as an object; ``ValueError`` for another kind of value."""
        if not isinstance(value, dict):
            raise ValueError(f"{where} must hold a JSON object, not {shown(value)}; {remedy}")
        return cls(value, where, remedy)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def field(
        self,
        name: str,
        kind: type,
        *,
        default: Any = _REQUIRED,
        least: float = -math.inf,
        most: float = math.inf,
        choices: Collection[Any] | None = None,
    ) -> Any:
        """The field ``name`` of type ``kind`` (str, int, float, bool, list, dict) within bounds.

        ``float`` accepts whole numbers and only finite numbers; ``int`` accepts no booleans. A
        missing field is ``default``. ``ValueError`` names file, field, value and rule.
        """
        if name not in self.values:
            if default is not _REQUIRED:
                return default
            raise ValueError(f"{self.where} has no field {name!r}; {self.remedy}")
        value = self.values[name]
        if not _is_a(value, kind):
            raise self.wrong(name, f"must be {_KINDS[kind]}")
        if choices is not None and value not in choices:
            raise self.wrong(name, f"must be one of {', '.join(map(str, choices))}")
        if kind in (int, float) and not least <= value <= most:
            raise self.wrong(name, _range(least, most))
        return float(value) if kind is float else value

    def object(self, name: str, *, default: dict[str, Any] = _REQUIRED) -> "JsonObject":
        """The object in field ``name``, or ``default``."""
        values = self.field(name, dict, default=default)
        return JsonObject(values, f"{self.where}: {name}", self.remedy)

    def objects(self, name: str) -> list["JsonObject"]:
        """The objects in the list ``name``."""
        return [
            JsonObject.of(value, f"{self.where}: {name}[{place}]", self.remedy)
            for place, value in enumerate(self.field(name, list))
        ]

    def items(self, name: str, kind: type) -> list[Any]:
        """The values of type ``kind`` in the list ``name``."""
        values = self.field(name, list)
        for place, value in enumerate(values):
            if not _is_a(value, kind):
                raise ValueError(
                    f"{self.where}: {name}[{place}] ({shown(value)}) must be {_KINDS[kind]}; "
                    f"{self.remedy}"
                )
        return list(values)

    def mapping(self, name: str, kind: type, *, least: float = -math.inf) -> dict[str, Any]:
        """The object in field ``name``; its values are of type ``kind`` and at least ``least``."""
        fields = self.object(name)
        return {key: fields.field(key, kind, least=least) for key in fields.values}

    def check_names(self, known: Collection[str]) -> None:
        """Raise ``ValueError`` for a field outside ``known``, which would be ignored."""
        if unknown := sorted(set(self.values) - set(known)):
            raise ValueError(
                f"{self.where} has the unknown field {shown(unknown[0])}; {self.remedy}"
            )

    def wrong(self, name: str, rule: str) -> ValueError:
        """The error for a field that breaks ``rule`` ("must be …")."""
        return ValueError(
            f"{self.where}: {name} ({shown(self.values.get(name))}) {rule}; {self.remedy}"
        )


def _is_a(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int
    if kind is float:
        whole = type(value) is int and abs(value) <= _LARGEST_WHOLE
        return whole or (type(value) is float and math.isfinite(value))
    return isinstance(value, kind)


def _range(least: float, most: float) -> str:
    if most == math.inf:
        return f"must be at least {least}"
    return f"must be at most {most}" if least == -math.inf else f"must lie in [{least}, {most}]"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these fields; ``ValueError`` where one is named twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"an object names the field {shown(twice)} twice")
    return fields


def _depth_exceeds(value: Any, content: bytes | str) -> bool:
    """True if containers are nested deeper than ``MOST_NESTED``."""
    if isinstance(content, bytes):
        opened = content.count(b"[") + content.count(b"{")
    else:
        opened = content.count("[") + content.count("{")
    if opened <= MOST_NESTED:
        return False
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MOST_NESTED):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True
