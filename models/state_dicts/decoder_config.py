"""A ``Decoder.Config`` as plain JSON values, and back.

A nested config becomes an object of its fields and ``kind``, the name of its class. Reading is
strict: unknown fields are refused, since this version cannot compute what they ask for. Branches
and routers are found by name among the defined subclasses of ``Branch`` and ``Router``; nothing
that a file names is imported. Missing fields have their defaults, so older files can be read.
"""

import dataclasses
import types
import typing
from typing import Any

from torchtitan.config import Configurable

from earlyfuse.data.json_files import shown
from earlyfuse.models.blocks.block import EXTRA
from earlyfuse.models.blocks.branch import Branch
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.routing import token_choice  # noqa: F401  a kind that files may name
from earlyfuse.models.routing.router import Router

KIND = "kind"
_LARGEST = (1 << 63) - 1  # whole number
# torchtitan's own fields of every module's config: callables and meshes, None in all our models
_NOT_WRITTEN = ("param_init", "sharding_config")


def to_dict(config: Configurable.Config) -> dict[str, Any]:
    """Returns plain JSON values; ``from_dict`` is the inverse."""
    fields: dict[str, Any] = {KIND: _kind(type(config))}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in (EXTRA, "depth", "vectors") and not value:
            continue  # absent in files from before the field existed
        if field.name not in _NOT_WRITTEN:
            fields[field.name] = _plain(value, field.name)
        elif value is not None:
            raise ValueError(
                f"{field.name} of {fields[KIND]} is set and cannot be written; leave it None"
            )
    return fields


def from_dict(fields: dict[str, Any]) -> Decoder.Config:
    """Inverse of ``to_dict``; ``ValueError`` names the field that is unknown, missing or wrong."""
    return _config((Decoder.Config,), fields, "model")


def differences(left: Any, right: Any, place: str = "model") -> list[str]:
    """Lists a line for each field in which two results of ``to_dict`` differ."""
    if isinstance(left, dict) and isinstance(right, dict) and left.get(KIND) == right.get(KIND):
        return [
            line
            for name in left | right
            for line in differences(left.get(name), right.get(name), f"{place}.{name}")
        ]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{place}[{i}]")]
    if left == right:
        return []
    shown = [value.get(KIND) if isinstance(value, dict) else value for value in (left, right)]
    return [f"{place} is {shown[0]!r} instead of {shown[1]!r}"]


def _kind(config: type) -> str:
    """Returns ``FeedForward`` for the class ``FeedForward.Config``."""
    return config.__qualname__.removesuffix(".Config")


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Configurable.Config):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # also of an IntEnum
    if value is None or isinstance(value, str | float | bool):
        return value
    raise ValueError(f"{name} ({value!r}) cannot be written: it is not a plain value")


def _config(classes: tuple[type, ...], fields: Any, place: str) -> Any:
    if not isinstance(fields, dict) or KIND not in fields:
        raise ValueError(f"{place} must be an object with a {KIND!r}, not {shown(fields)}")
    by_kind = {_kind(cls): cls for cls in classes}
    if fields[KIND] not in by_kind:
        raise ValueError(
            f"{place}.{KIND} ({shown(fields[KIND])}) must be one of {sorted(by_kind)}; if it "
            "is a branch or router of your own, import its file first (generate and convert: "
            "--code FILE.py), else read it with the version of earlyfuse that wrote it"
        )
    cls = by_kind[fields[KIND]]
    hints = typing.get_type_hints(cls)
    known = [f for f in dataclasses.fields(cls) if f.name not in _NOT_WRITTEN]
    names = {field.name for field in known}
    unknown = sorted(set(fields) - names - {KIND})
    required = {
        f.name
        for f in known
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(fields))
    if unknown or missing:
        raise ValueError(
            f"{place} ({fields[KIND]}) has unknown fields {shown(unknown)} and lacks {missing}; "
            "read it with the version of earlyfuse that wrote it"
        )
    return cls(
        **{
            name: _typed(hints[name], value, f"{place}.{name}")
            for name, value in fields.items()
            if name != KIND
        }
    )


def _typed(hint: Any, value: Any, place: str) -> Any:
    """Returns ``value`` as type ``hint``, one of the types in model configs."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = tuple(option for option in arguments if option is not type(None))
        if all(_is_config(option) for option in options):
            return _config(options, value, place)
        return _typed(options[0], value, place)
    if hint in (Branch.Config, Router.Config):
        return _config(tuple(_configs(hint._owner)), value, place)
    if _is_config(hint):
        return _config((hint,), value, place)
    if origin is list and isinstance(value, list):
        return [_typed(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_typed(kind, item, f"{place}[{i}]") for i, (kind, item) in pairs)
    elif origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    elif origin is typing.Literal and value in arguments:
        return value
    elif type(value) is int and abs(value) > _LARGEST:
        raise ValueError(f"{place} ({shown(value)}) must be a number of at most {_LARGEST}")
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = getattr(hint, "__name__", hint)
    raise ValueError(f"{place} ({shown(value)}) must be {wanted}")


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Configurable.Config)


def _configs(contract: Any) -> list[type]:
    """Lists the configs of all subclasses of ``contract``, ``Branch`` or ``Router``."""
    found: list[type] = []
    for cls in contract.__subclasses__():
        found += [vars(cls)["Config"]] if "Config" in vars(cls) else []
        found += _configs(cls)
    return found
